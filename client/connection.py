"""One router, as a client has it: a DEALER socket, and the requests that are in flight there."""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import TypeAlias

import zmq.asyncio

from pdengine.client.results import GenerateError, RouterUnavailable
from pdengine.transport import messages
from pdengine.transport.keys import PeerKeys
from pdengine.transport.messages import ClientToRouter, RouterToClient
from pdengine.transport.sockets import KEY_REVOKED, LINGER_MS, MAX_REQUEST_BYTES, PeerSocket, SendFailed

INQUIRE_SECONDS = 15.0  # of silence, until a request asks whether the router still has it
PROBE_SECONDS = 1.0  # of silence, until a router that has requests is asked whether it is there
MAX_PROBES = 2  # without an answer, until it is taken to stand still
NO_TAG = 0  # of no request: the router answers that it does not have it
AVOID_SECONDS = 1.0  # a router that can serve nobody, for instance without workers, is left out for so long

Reply: TypeAlias = RouterToClient | messages.Delta | GenerateError
Listener: TypeAlias = Callable[[Reply], object]


class ConnectionLost(RouterUnavailable):
    """The router that had the request is gone: another one, or this one when it is back, may do it."""


class RouterStalled(ConnectionLost):
    """The router that has the request is silent, and another one is there: that may do it, if no token has
    come. Otherwise nothing has happened yet: the silent one may go on, or its connection be lost."""


class Connection:
    """The connection to the router at `address`. It comes up in the background, and again when it was lost.

    Make it on the event loop that uses it. on_change: called when the connection comes up or goes down, and
    when the router takes requests again. on_stall: called when the router does not answer any more, though
    nobody has closed the connection: its host is gone, or its process is stopped. Until ZeroMQ's heartbeats
    end the connection, after 20 s, it may go on. connected: whether the connection is up. listeners: for each
    request in flight, by its tag, what is called with all that the router says about it; it may not raise.
    Raises AddressError.
    """

    def __init__(
        self,
        context: zmq.asyncio.Context,
        address: str,
        on_change: Callable[[], None],
        on_stall: Callable[["Connection"], None],
        *,
        keys: PeerKeys | None = None,
    ) -> None:
        self.address = address
        self.connected = False
        self.listeners: dict[int, Listener] = {}
        self._on_change = on_change
        self._on_stall = on_stall
        self._heard = True  # since the last look
        self._stalled = False
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
        loops = (self._receive(), self._watch(), self._probe())
        self._tasks = [asyncio.create_task(loop) for loop in loops]

    @property
    def shakes_hands_in_vain(self) -> bool:
        """Whether somebody is there, and this side's keys do not go with his."""
        return not self.connected and self._socket.num_failed_handshakes > 0

    @property
    def usable(self) -> bool:
        """Whether the router is there and takes requests."""
        return self.connected and self._avoided is None and not self._stalled

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
        for listener in list(self.listeners.values()):
            listener(kind(reason))

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

    async def _probe(self) -> None:
        """Find out whether the router stands still.

        Turns of this loop are counted, not the time: if it is this process that stood still, the router's
        words are there at its next turn.
        """
        num_probes = 0
        while True:
            await asyncio.sleep(PROBE_SECONDS)
            if self._heard or not self.connected:
                self._heard, num_probes = False, 0
                if self._stalled:
                    self._stalled = False
                    self._on_change()
            elif self.listeners or self._stalled:
                if num_probes >= MAX_PROBES:
                    self._stalled = True
                    self._on_stall(self)  # at each turn: another router may be there only later
                num_probes += 1
                with suppress(ConnectionLost):
                    self.send(messages.Inquire(NO_TAG))

    def _hear(self, message: RouterToClient) -> None:
        self._heard = True
        match message:
            case messages.Deltas(deltas):
                for delta in deltas:
                    self._pass_on(delta.tag, delta)
            case messages.Malformed(reason) if reason == KEY_REVOKED:
                self._avoid()  # another router may still admit it
                self.tell_all(ConnectionLost, f"the router at {self.address} refused it: {reason}")
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
        listener = self.listeners.get(tag)
        if listener is not None:
            listener(reply)

    def _avoid(self) -> None:
        if self._avoided is None:
            self._avoided = asyncio.get_running_loop().call_later(AVOID_SECONDS, self._end_avoidance)

    def _end_avoidance(self) -> None:
        if self._avoided is not None:
            self._avoided.cancel()
        self._avoided = None
        self._on_change()
