"""The asyncio client: one DEALER socket, any number of requests at once."""

import asyncio
import math
from collections.abc import Iterable
from time import monotonic
from types import TracebackType
from typing import TypeAlias

import msgspec
import zmq.asyncio

from pdengine.client.arguments import to_request
from pdengine.client.results import (
    Cancelled,
    Completion,
    Delta,
    Failed,
    GenerateError,
    PromptLike,
    Rejected,
    RouterUnavailable,
    TimedOut,
    choices_of,
)
from pdengine.transport import messages
from pdengine.transport.messages import (
    Accepted,
    Cancel,
    Finished,
    Generate,
    GetStatus,
    Inquire,
    Message,
    RouterToClient,
    Status,
)
from pdengine.transport.sockets import PeerSocket, SendFailed

DEFAULT_ADDRESS = "tcp://127.0.0.1:5555"  # of a router on this machine
CONNECT_SECONDS = 10.0
STATUS_SECONDS = 10.0
INQUIRE_SECONDS = 15.0  # of silence, until a request asks whether the router still has it
GRACE_SECONDS = 5.0  # beyond a request's own timeout, for the router's answer to arrive

Reply: TypeAlias = RouterToClient | GenerateError


class AsyncClient:
    """A client of the router at `address`. Use it as `async with`, or call `close`.

    Make it on the event loop that uses it. It connects in the background, and again when the connection is
    lost; a request waits up to `connect_timeout` seconds for it.
    """

    def __init__(self, address: str = DEFAULT_ADDRESS, *, connect_timeout: float = CONNECT_SECONDS) -> None:
        self.address = address
        self._connect_timeout = connect_timeout
        self._context = zmq.asyncio.Context()
        self._socket = PeerSocket[RouterToClient](self._context, address, RouterToClient, watched=True)
        self._connected = asyncio.Event()
        self._closed = False
        self._replies: dict[int, asyncio.Queue[Reply]] = {}
        self._last_tag = 0
        self._tasks = [asyncio.create_task(self._receive()), asyncio.create_task(self._watch_connection())]

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
        for tag in self._replies:
            self.cancel(tag)
        self._tell_all(Cancelled("the client was closed"))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._socket.close()
        self._context.destroy(linger=None)

    async def generate(
        self,
        prompt: PromptLike,
        *,
        max_tokens: int = 16,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        seed: int | None = None,
        stop_token_ids: Iterable[int] = (),
        ignore_eos: bool = False,
        n: int = 1,
        priority: int = 0,
        cache_salt: str = "",
        timeout: float | None = None,
    ) -> Completion:
        """The whole answer to `prompt`, or all `n` of them. The arguments are those of SamplingParams and
        Generate; timeout is in seconds.

        Raises Rejected, Failed, TimedOut, Cancelled or RouterUnavailable; TypeError or ValueError for
        arguments that no router could understand.
        """
        stream = self.stream(
            prompt,
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            seed=seed,
            stop_token_ids=stop_token_ids,
            ignore_eos=ignore_eos,
            n=n,
            priority=priority,
            cache_salt=cache_salt,
            timeout=timeout,
        )
        async with stream:
            async for _ in stream:
                pass
        return stream.completion

    def stream(
        self,
        prompt: PromptLike,
        *,
        max_tokens: int = 16,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        seed: int | None = None,
        stop_token_ids: Iterable[int] = (),
        ignore_eos: bool = False,
        n: int = 1,
        priority: int = 0,
        cache_salt: str = "",
        timeout: float | None = None,
    ) -> "AsyncStream":
        """Like `generate`, but the answer comes as an asynchronous iterator of Delta; several answers come
        interleaved.

        The request is sent at the first step; closing the stream cancels it.
        """
        request = to_request(
            prompt,
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            seed=seed,
            stop_token_ids=stop_token_ids,
            ignore_eos=ignore_eos,
            n=n,
            priority=priority,
            cache_salt=cache_salt,
            timeout=timeout,
        )
        return AsyncStream(self, request)

    async def status(self) -> Status:
        """The workers that have joined the router, and their load. Raises RouterUnavailable."""
        await self.wait_connected()
        tag, replies = self.open()
        try:
            self.send(GetStatus(tag))
            async with asyncio.timeout(STATUS_SECONDS):
                reply = await replies.get()
        except TimeoutError:
            raise RouterUnavailable(f"no answer from the router at {self.address}") from None
        finally:
            self.forget(tag)
        if isinstance(reply, GenerateError):
            raise reply
        assert isinstance(reply, Status)
        return reply

    # ------------------------------------------------------------------- used by AsyncStream

    def open(self) -> tuple[int, "asyncio.Queue[Reply]"]:
        """A new tag, and the queue that gets what the router says about it."""
        self._last_tag += 1
        self._replies[self._last_tag] = asyncio.Queue()
        return self._last_tag, self._replies[self._last_tag]

    def forget(self, tag: int) -> None:
        self._replies.pop(tag, None)

    def cancel(self, tag: int) -> None:
        try:
            self._socket.send(Cancel(tag))
        except SendFailed:
            return  # the router aborts the requests of a client that is gone

    def send(self, message: Message) -> None:
        try:
            self._socket.send(message)
        except SendFailed as error:
            raise RouterUnavailable(f"the router at {self.address} does not read: {error}") from error
        except OverflowError as error:
            raise ValueError(f"a number does not fit in 64 bits: {error}") from error

    async def wait_connected(self) -> None:
        """Raises RouterUnavailable after `connect_timeout` seconds, RuntimeError if the client is closed."""
        if self._closed:
            raise RuntimeError("the client is closed")
        try:
            async with asyncio.timeout(self._connect_timeout):
                await self._connected.wait()
        except TimeoutError:
            raise RouterUnavailable(f"no router answers at {self.address}") from None

    async def _receive(self) -> None:
        while True:
            message = await self._socket.receive()
            if isinstance(message, messages.Malformed):
                self._tell_all(RouterUnavailable(f"the router did not understand: {message.reason}"))
            elif message.tag in self._replies:
                self._replies[message.tag].put_nowait(message)

    async def _watch_connection(self) -> None:
        while True:
            if await self._socket.connection_change():
                self._connected.set()
            else:
                self._connected.clear()
                await asyncio.sleep(0)  # what the router said before it went is there: let `_receive` take it
                self._tell_all(RouterUnavailable(f"the connection to the router at {self.address} was lost"))

    def _tell_all(self, error: GenerateError) -> None:
        for replies in self._replies.values():
            replies.put_nowait(error)


class AsyncStream:
    """One request in flight: an asynchronous iterator of Delta. Use it as `async with`, or call `aclose`."""

    def __init__(self, client: AsyncClient, request: Generate) -> None:
        self._client = client
        self._request = request
        self._timeout = request.timeout
        self._give_up_at: float | None = None
        self._tag: int | None = None
        self._replies: asyncio.Queue[Reply] = asyncio.Queue()
        self._deltas: list[Delta] = []
        self._finished: Finished | None = None
        self._closed = False

    @property
    def completion(self) -> Completion:
        """The whole answer, once the iteration has ended."""
        if self._finished is None:
            raise RuntimeError("the stream has not ended")
        return Completion(
            choices=choices_of(self._deltas, self._finished.finish_reasons),
            usage=self._finished.usage,
            prefill_worker=self._finished.prefill_worker,
            decode_worker=self._finished.decode_worker,
            attempts=self._finished.attempts,
            transfer=self._finished.transfer,
        )

    def __aiter__(self) -> "AsyncStream":
        return self

    async def __anext__(self) -> Delta:
        if self._closed:
            raise StopAsyncIteration
        try:
            if self._tag is None:
                await self._start()
            delta = await self._next_delta()
        except BaseException:
            await self.aclose()
            raise
        if delta is None:
            await self.aclose()
            raise StopAsyncIteration
        self._deltas.append(delta)
        return delta

    async def aclose(self) -> None:
        """End the request if it has not ended; idempotent."""
        self._closed = True
        if self._tag is None:
            return
        if self._finished is None:
            self._client.cancel(self._tag)
        self._client.forget(self._tag)
        self._tag = None
        self._replies.put_nowait(Cancelled("the stream was closed"))  # somebody may be waiting for more

    async def __aenter__(self) -> "AsyncStream":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def _start(self) -> None:
        await self._client.wait_connected()
        if self._closed:
            raise Cancelled("the stream was closed")
        self._tag, self._replies = self._client.open()
        if self._timeout is not None and math.isfinite(self._timeout) and self._timeout > 0:
            self._give_up_at = monotonic() + self._timeout + GRACE_SECONDS
        self._client.send(msgspec.structs.replace(self._request, tag=self._tag))

    async def _next_delta(self) -> Delta | None:
        """The next piece of the answer, or None after the last. Raises what the request ended with."""
        while self._finished is None:
            reply = await self._next_reply()
            match reply:
                case messages.Delta(_, text, token_ids, index, finish_reason):
                    return Delta(text, token_ids, index, finish_reason)
                case Finished():
                    self._finished = reply
                case messages.Rejected(_, reason, field):
                    raise Rejected(reason, field)
                case messages.Failed(_, reason):
                    raise Failed(reason)
                case messages.Aborted(_, "timeout"):
                    raise TimedOut(f"the request did not finish within {self._timeout:g} s")
                case messages.Aborted():
                    raise Cancelled("the request was cancelled")
                case GenerateError():
                    raise reply
                case Accepted():
                    continue
        return None

    async def _next_reply(self) -> Reply:
        """Wait for the router's next word; after a silence ask it whether it still has the request.

        It drops the requests of a client that did not read for long, for instance while it was stopped.
        """
        while True:
            seconds = INQUIRE_SECONDS
            if self._give_up_at is not None:
                seconds = min(seconds, self._give_up_at - monotonic())
            try:
                # Not wait_for: in Python 3.11 it swallows a cancellation that meets a reply.
                async with asyncio.timeout(seconds):
                    return await self._replies.get()
            except TimeoutError:
                if self._give_up_at is not None and self._give_up_at <= monotonic():
                    raise TimedOut(f"no answer within {self._timeout:g} s") from None
            assert self._tag is not None
            self._client.send(Inquire(self._tag))
