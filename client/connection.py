"""One router, as a client has it: a DEALER socket, and the requests that are in flight there."""

import asyncio
from collections.abc import Callable
from typing import TypeAlias

import zmq.asyncio

from pdengine.client.results import GenerateError, RouterUnavailable
from pdengine.transport import messages
from pdengine.transport.keys import PeerKeys
from pdengine.transport.messages import ClientToRouter, RouterToClient
from pdengine.transport.sockets import LINGER_MS, MAX_REQUEST_BYTES, PeerSocket, SendFailed

INQUIRE_SECONDS = 15.0  # of silence, until a request asks whether the router still has it
AVOID_SECONDS = 1.0  # a router that can serve nobody, for instance without workers, is left out for so long

Reply: TypeAlias = RouterToClient | messages.Delta | GenerateError


class ConnectionLost(RouterUnavailable):
    """The router that had the request is gone: another one, or this one when it is back, may do it."""


class Connection:
    """The connection to the router at `address`. It comes up in the background, and again when it was lost.

    Make it on the event loop that uses it. on_change: called when the connection comes up or goes down, and
    when the router takes requests again. connected: whether the connection is up. replies: for each request
    in flight, by its tag, the queue of what the router says about it. Raises AddressError.
    """

    def __init__(
        self,
        context: zmq.asyncio.Context,
        address: str,
        on_change: Callable[[], None],
        *,
        keys: PeerKeys | None = None,
    ) -> None:
        self.address = address
        self.connected = False
        self.replies: dict[int, asyncio.Queue[Reply]] = {}
        self._on_change = on_change
        self._avoided: asyncio.TimerHandle | None = None
        # Not `only_when_connected`: then the last words before a connection goes down are lost at times. So
        # what did not leave before reaches the next router there, and a Cancel of each lost request after it.
        self._socket = PeerSocket[RouterToClient](
            context,
            address,
            RouterToClient,
            keys=keys,
            watched=True,
            max_message_bytes=MAX_REQUEST_BYTES,
        )
        self._tasks = [asyncio.create_task(self._receive()), asyncio.create_task(self._watch())]

    @property
    def shakes_hands_in_vain(self) -> bool:
        """Whether somebody is there, and this side's keys do not go with his."""
        return not self.connected and self._socket.num_failed_handshakes > 0

    @property
    def usable(self) -> bool:
        """Whether the router is there and takes requests."""
        return self.connected and self._avoided is None

    def send(self, message: ClientToRouter) -> None:
        """Raises ConnectionLost, or ValueError for a message that cannot be encoded or is too long."""
        try:
            self._socket.send(message)
        except SendFailed as error:
            self._avoid()  # it went a moment ago, or it stands still
            raise ConnectionLost(f"the router at {self.address} cannot be reached: {error}") from error
        except OverflowError as error:
            raise ValueError(f"a number does not fit in 64 bits: {error}") from error

    def tell_all(self, kind: type[GenerateError], reason: str) -> None:
        """End all that is in flight, each request with an error of its own, because each raises it."""
        for replies in self.replies.values():
            replies.put_nowait(kind(reason))

    async def close(self) -> None:
        if self._avoided is not None:
            self._avoided.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._socket.close(LINGER_MS if self.connected else 0)  # nobody is there to hear last words

    async def _receive(self) -> None:
        while True:
            self._hear(await self._socket.receive())

    async def _watch(self) -> None:
        while True:
            self.connected = await self._socket.connection_change()
            if self.connected:
                self._end_avoidance()
            else:
                # First all that the router said before it went: what `_receive` has taken, and the rest.
                await asyncio.sleep(0)
                for message in self._socket.receive_waiting():
                    self._hear(message)
                self.tell_all(ConnectionLost, f"the connection to the router at {self.address} was lost")
                self._on_change()

    def _hear(self, message: RouterToClient) -> None:
        match message:
            case messages.Deltas(deltas):
                for delta in deltas:
                    self._pass_on(delta.tag, delta)
            case messages.Malformed(reason):
                self.tell_all(RouterUnavailable, f"the router did not understand: {reason}")
            case messages.Failed(tag, _, retry):
                if retry:
                    self._avoid()
                self._pass_on(tag, message)
            case _:
                self._pass_on(message.tag, message)

    def _pass_on(self, tag: int, reply: Reply) -> None:
        """What is said of a tag that nobody has any more is dropped."""
        if tag in self.replies:
            self.replies[tag].put_nowait(reply)

    def _avoid(self) -> None:
        if self._avoided is None:
            self._avoided = asyncio.get_running_loop().call_later(AVOID_SECONDS, self._end_avoidance)

    def _end_avoidance(self) -> None:
        if self._avoided is not None:
            self._avoided.cancel()
        self._avoided = None
        self._on_change()
