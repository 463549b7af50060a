"""The asyncio client: any number of requests at once, at one router or several."""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from math import inf
from types import TracebackType
from typing import Unpack

import zmq.asyncio

from pdengine.client.arguments import GenerateOptions, to_request
from pdengine.client.async_stream import AsyncStream
from pdengine.client.connection import Connection, Listener, Reply, RouterStalled
from pdengine.client.results import Cancelled, Completion, GenerateError, PromptLike, RouterUnavailable
from pdengine.transport.addresses import check_address
from pdengine.transport.keys import KeysLike, client_keys
from pdengine.transport.messages import Cancel, ClientToRouter, GetStatus, Status

DEFAULT_ADDRESS = "tcp://127.0.0.1:5555"  # of a router on this machine
CONNECT_SECONDS = 10.0
STATUS_SECONDS = 10.0
RETRIES = 3


def _never() -> bool:
    return False


class AsyncClient:
    """A client of the router at `address`, or of several. Use it as `async with`, or call `close`.

    Make it on the event loop that uses it. It connects in the background, and again when a connection is
    lost. Each request goes to the connected router that has the fewest of this client's requests.

    connect_timeout: seconds that a request waits for a router.
    retries: how often a request is sent again if its router is lost, or can serve nobody, before the first
        token has come. Then another router gets it, or the same one when it is back.

    keys: a file that `pdengine keygen` made for a client, for routers that ask for keys; docs/security.md.

    Raises AddressError, KeysError, or ValueError where there is no address or `retries` is negative.
    """

    def __init__(
        self,
        address: str | Sequence[str] = DEFAULT_ADDRESS,
        *,
        connect_timeout: float = CONNECT_SECONDS,
        retries: int = RETRIES,
        keys: KeysLike = None,
    ) -> None:
        self.addresses = [address] if isinstance(address, str) else list(dict.fromkeys(address))
        if not self.addresses:
            raise ValueError("a client needs the address of a router")
        if retries < 0:
            raise ValueError(f"retries is {retries}, it must be at least 0")
        for each in self.addresses:
            check_address(each)
        peer_keys = client_keys(keys)
        self._connect_timeout = connect_timeout
        self._retries = retries
        self._loop = asyncio.get_running_loop()
        self._closed = False
        self._last_tag = 0
        self._changed = asyncio.Event()  # set for a moment, to wake whoever waits
        self._context = zmq.asyncio.Context()
        # The one that was asked last comes last: of routers with as many requests, each has its turn.
        self._connections = [
            Connection(self._context, each, self.wake, self._move, keys=peer_keys) for each in self.addresses
        ]
        self._connection_of: dict[int, Connection] = {}  # by tag

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Cancel what is in flight and disconnect; idempotent."""
        if self._closed:
            return
        self._closed = True
        for tag in self._connection_of:
            self.cancel(tag)
        for connection in self._connections:
            connection.tell_all(Cancelled, "the client was closed")
        self._connection_of.clear()  # streams that are closed later have nothing to say
        self.wake()
        for connection in self._connections:
            await connection.close()
        self._context.destroy(linger=None)

    async def generate(self, prompt: PromptLike, **options: Unpack[GenerateOptions]) -> Completion:
        """The whole answer to `prompt`, or all `n` of them. GenerateOptions says what the arguments are.

        Raises Rejected, Failed, TimedOut, Cancelled or RouterUnavailable; TypeError or ValueError for
        arguments that no router could understand.
        """
        async with self.stream(prompt, **options) as stream:
            async for _ in stream:
                pass
        return stream.completion

    def stream(self, prompt: PromptLike, **options: Unpack[GenerateOptions]) -> AsyncStream:
        """Like `generate`, but the answer comes as an asynchronous iterator of Delta; several answers come
        interleaved.

        The request is sent at the first step; closing the stream cancels it.
        """
        return AsyncStream(self, to_request(prompt, options), self._retries)

    async def status(self, address: str | None = None) -> Status:
        """The workers that have joined the router at `address`, and their load; by default, of any router
        that is connected.

        Raises RouterUnavailable, or ValueError for an address that is not this client's.
        """
        if address is not None and address not in self.addresses:
            raise ValueError(f"{address} is not a router of this client, {', '.join(self.addresses)} are")
        candidates = [each for each in self._connections if address in (None, each.address)]
        await self._wait(lambda: any(each.connected for each in candidates), candidates)
        connection = max(candidates, key=lambda each: (each.usable, each.connected))
        replies: asyncio.Queue[Reply] = asyncio.Queue()
        tag = self._open_at(connection, replies.put_nowait)
        try:
            connection.send(GetStatus(tag))
            async with asyncio.timeout(STATUS_SECONDS):
                reply = await replies.get()
        except TimeoutError:
            raise RouterUnavailable(f"no answer from the router at {connection.address}") from None
        finally:
            self.forget(tag)
        if isinstance(reply, GenerateError):
            raise reply
        assert isinstance(reply, Status)
        return reply

    # --------------------------------------------------- for those who send requests of their own

    async def wait_connected(self, *, unless: Callable[[], bool] = _never, at_most: float = inf) -> None:
        """Wait until a router takes requests, or `unless` holds; `wake` has it looked at.

        Raises RouterUnavailable after `connect_timeout` seconds, or `at_most`; RuntimeError if the client is
        closed, Cancelled if it is closed meanwhile.
        """
        await self._wait(lambda: unless() or self.has_usable_router, self._connections, at_most)

    @property
    def has_usable_router(self) -> bool:
        """Whether a router takes requests now."""
        return any(each.usable for each in self._connections)

    @property
    def usable_addresses(self) -> list[str]:
        """Of the routers that take requests now."""
        return [each.address for each in self._connections if each.usable]

    def wake(self) -> None:
        self._changed.set()
        self._changed.clear()

    def open(self, listener: Listener) -> int:
        """A new tag, of the router that is best for it now. listener: is called with what that says, on the
        loop, and may not raise."""
        best = min(
            self._connections, key=lambda each: (not each.connected, not each.usable, len(each.listeners))
        )
        self._connections.remove(best)
        self._connections.append(best)
        return self._open_at(best, listener)

    def send(self, message: ClientToRouter) -> None:
        """To the router of the tag.

        Raises RouterUnavailable, Cancelled if the client is closed, or ValueError for what cannot be encoded.
        """
        if self._closed:
            raise Cancelled("the client was closed")
        self._connection_of[message.tag].send(message)

    def cancel(self, tag: int) -> None:
        connection = self._connection_of.get(tag)
        if connection is not None:
            with suppress(RouterUnavailable):  # a router aborts the requests of a client that is gone
                connection.send(Cancel(tag))

    def forget(self, tag: int) -> None:
        connection = self._connection_of.pop(tag, None)
        if connection is not None:
            connection.listeners.pop(tag)

    def abandon(self, tag: int) -> None:
        """Cancel and forget, soon. Unlike all else here, it may be called on any thread."""
        with suppress(RuntimeError):  # the loop is closed already
            self._loop.call_soon_threadsafe(self._drop, tag)

    def _drop(self, tag: int) -> None:
        if tag in self._connection_of and not self._closed:
            self.cancel(tag)
        self.forget(tag)

    def _move(self, stalled: Connection) -> None:
        """Let another router have the requests of this one, if there is one."""
        if self.has_usable_router:
            stalled.tell_all(RouterStalled, f"the router at {stalled.address} stands still")

    def _open_at(self, connection: Connection, listener: Listener) -> int:
        self._last_tag += 1
        connection.listeners[self._last_tag] = listener
        self._connection_of[self._last_tag] = connection
        return self._last_tag

    async def _wait(
        self, ready: Callable[[], bool], connections: Sequence[Connection], at_most: float = inf
    ) -> None:
        if self._closed:
            raise RuntimeError("the client is closed")
        try:
            async with asyncio.timeout(min(self._connect_timeout, at_most)):
                while not ready():
                    await self._changed.wait()
                    if self._closed:
                        raise Cancelled("the client was closed")
        except TimeoutError:
            addresses = ", ".join(sorted(each.address for each in connections))
            reason = f"no router answers at {addresses}"
            if any(each.shakes_hands_in_vain for each in connections):
                reason += "; one is there, but its keys and this client's do not go together"
            raise RouterUnavailable(reason) from None
