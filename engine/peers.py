"""The workers that this one moves KV caches with: each with a socket and a connection of the transfer.

A decode worker meets prefill workers. Only in a cluster that pushes, these meet decode workers as well.
"""

import asyncio
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from time import monotonic

import zmq.asyncio

from pdengine.engine.worker_keys import WorkerKeys
from pdengine.transport.bounded_log import BoundedLog
from pdengine.transport.keys import KeysError
from pdengine.transport.messages import (
    Malformed,
    Message,
    PeerDescriptor,
    PeerLink,
    PeerReply,
    Role,
)
from pdengine.transport.sockets import PeerSocket, SendFailed
from pdengine.transport.transfer import PeerConnected, PeerFailed, PushTransfer

logger = logging.getLogger(__name__)

RECONNECT_SECONDS = 5.0


@dataclass(eq=False)
class _Peer:
    """lanes: of the connection, empty while there is none. reconnect_at: set once it is broken."""

    descriptor: PeerDescriptor
    socket: PeerSocket[PeerReply]
    receiver: asyncio.Task[None]
    lanes: str = ""
    reconnect_at: float | None = None


class Peers:
    """Belongs to the control thread. Iterates over the engine ids.

    role: of this worker. pushes: whether prefill workers write KV caches, or decode workers read them; set it
    while there are no peers. tell_router: takes the state of each connection. on_answer: takes an engine id
    and what it says. A worker whose key is not admitted is shut out, and met when it is.
    """

    def __init__(
        self,
        *,
        role: Role,
        context: zmq.asyncio.Context,
        keys: WorkerKeys | None,
        transfer: PushTransfer,
        tell_router: Callable[[PeerLink], None],
        on_answer: Callable[[str, PeerReply], None],
    ) -> None:
        self.pushes = False
        self._role = role
        self._context = context
        self._keys = keys
        self._transfer = transfer
        self._tell_router = tell_router
        self._on_answer = on_answer
        self._peers: dict[str, _Peer] = {}
        self._shut_out: dict[str, PeerDescriptor] = {}
        self._log = BoundedLog(logger)

    def __contains__(self, engine_id: object) -> bool:
        return engine_id in self._peers

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._peers))

    def sockets(self) -> dict[str, PeerSocket[PeerReply]]:
        return {engine_id: peer.socket for engine_id, peer in self._peers.items()}

    def meet(self, descriptor: PeerDescriptor) -> None:
        """Connect to this worker, if KV caches move between its role and this one's."""
        roles = (self._role, descriptor.role)
        if roles != ("decode", "prefill") and not (self.pushes and roles == ("prefill", "decode")):
            return
        known = self._peers.get(descriptor.engine_id)
        if known is not None:
            if known.lanes:  # a new router does not know that this worker is connected already
                self._tell_router(PeerLink(descriptor.engine_id, lanes=known.lanes))
            return
        try:
            keys = self._keys.to_peer(descriptor) if self._keys is not None else None
        except KeysError as error:
            self._shut_out[descriptor.engine_id] = descriptor
            self._tell_router(PeerLink(descriptor.engine_id, error=str(error)))
            return
        socket = PeerSocket[PeerReply](self._context, descriptor.control_address, PeerReply, keys=keys)
        receiver = asyncio.create_task(self._receive(descriptor.engine_id, socket))
        self._peers[descriptor.engine_id] = _Peer(descriptor, socket, receiver)
        self._connect(descriptor)
        if self._shut_out.pop(descriptor.engine_id, None) is not None and self._is_written_by(descriptor):
            self._tell_router(PeerLink(descriptor.engine_id))  # who writes does not tell: it was connected

    def meet_admitted(self) -> None:
        """Other keys are admitted than before: meet those who were shut out, as far as they are now."""
        for descriptor in list(self._shut_out.values()):
            self.meet(descriptor)

    def shut_out(self, engine_id: str, reason: str) -> bool:
        """Let go of a peer until other keys are admitted. Returns whether it was known."""
        peer = self._peers.get(engine_id)
        if peer is None:
            return False
        self.forget(engine_id)
        self._shut_out[engine_id] = peer.descriptor
        self._tell_router(PeerLink(engine_id, error=reason))
        return True

    def is_shut_out(self, engine_id: str) -> bool:
        """Whether it is there, and not a peer for the sake of its key."""
        return engine_id in self._shut_out

    def forget_shut_out(self) -> None:
        """A new router says who is there."""
        self._shut_out.clear()

    def forget(self, engine_id: str) -> bool:
        """The peer is gone: its pulls fail at once. Returns whether it was known."""
        self._shut_out.pop(engine_id, None)
        peer = self._peers.pop(engine_id, None)
        if peer is None:
            return False
        self._transfer.disconnect(engine_id)
        peer.receiver.cancel()
        peer.socket.close()
        return True

    def revoked(self) -> dict[str, str]:
        """Those whose keys are not admitted any more, and the words for it."""
        reasons = {}
        for engine_id, peer in self._peers.items():
            try:
                if self._keys is not None:
                    self._keys.to_peer(peer.descriptor)
            except KeysError as error:
                reasons[engine_id] = str(error)
        return reasons

    def send(self, engine_id: str, message: Message) -> None:
        """Whoever is gone, or cannot be reached, is sent nothing."""
        peer = self._peers.get(engine_id)
        if peer is None:
            return
        try:
            peer.socket.send(message)
        except SendFailed as error:
            logger.debug("%s was not sent to %s: %s", type(message).__name__, engine_id, error)

    def note(self, event: PeerConnected | PeerFailed) -> None:
        """Take what the transfer tells of a connection."""
        peer = self._peers.get(event.engine_id)
        if peer is None:
            return  # what was on its way when it was forgotten
        match event:
            case PeerConnected(engine_id, lanes):
                logger.info("connected to %s over %s", engine_id, lanes)
                self._tell_router(PeerLink(engine_id, lanes=lanes))
                peer.lanes, peer.reconnect_at = lanes, None
            case PeerFailed(engine_id, reason):
                logger.warning("no connection to %s: %s", engine_id, reason)
                self._tell_router(PeerLink(engine_id, error=reason))
                peer.lanes, peer.reconnect_at = "", monotonic() + RECONNECT_SECONDS

    def reconnect(self, now: float) -> None:
        """Try broken connections again that have been so for RECONNECT_SECONDS."""
        for peer in self._peers.values():
            if peer.reconnect_at is not None and peer.reconnect_at <= now:
                peer.reconnect_at = None
                self._connect(peer.descriptor)

    def _connect(self, peer: PeerDescriptor) -> None:
        """A decode worker connects to read, or, in a cluster that pushes, a prefill worker to write."""
        if peer.role == "decode":
            self._transfer.connect_to_push(peer.engine_id, peer.transfer_address, peer.region)
        elif not self._is_written_by(peer):
            self._transfer.connect(peer.engine_id, peer.transfer_address, peer.region)

    def _is_written_by(self, peer: PeerDescriptor) -> bool:
        """Whether it is `peer` that connects."""
        return self.pushes and peer.role == "prefill"

    async def _receive(self, engine_id: str, socket: PeerSocket[PeerReply]) -> None:
        while engine_id in self._peers:  # its last word may be why it is let go of
            message = await socket.receive()
            if isinstance(message, Malformed):
                self._log.warning("%s refused a message: %s", engine_id, message.reason)
            self._on_answer(engine_id, message)
