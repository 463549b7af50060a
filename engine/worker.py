"""The control thread of one worker: it talks to the router and to peers, and keeps leases alive.

It is an asyncio loop and the only thread that touches ZeroMQ sockets. The engine thread computes; the
transfer's thread moves bytes. If either dies the worker stops: nothing that it promised could be kept.
"""

import asyncio
import contextlib
import logging
import threading
from collections.abc import Coroutine
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass
from time import monotonic
from typing import Any

import msgspec
import zmq.asyncio

from pdengine.engine.commands import (
    AbortAll,
    AbortRequest,
    AddRequest,
    CoverLease,
    Event,
    FreeLease,
    LeaseUnneeded,
    LoseLease,
    Stop,
)
from pdengine.engine.engine import Engine
from pdengine.engine.leases import BorrowedLease, BorrowedLeases, GrantedLeases
from pdengine.engine.metrics import WorkerMetrics
from pdengine.engine.open_answers import OpenAnswers
from pdengine.engine.pushes import LoseWriter, StartPushed, UnwantedPush
from pdengine.engine.request_log import RequestRecord
from pdengine.engine.sequence import Mode, Push, Sequence, blocks_for, sequences_of
from pdengine.engine.worker_config import StartupError
from pdengine.engine.worker_keys import WorkerKeys
from pdengine.transport.keys import KeysError
from pdengine.transport.messages import (
    Abort,
    Compatibility,
    Decode,
    DecodeAccepted,
    EndPush,
    Heartbeat,
    HeartbeatReply,
    Hello,
    KVLease,
    LeasesRenewed,
    Leaving,
    Left,
    Load,
    Malformed,
    Message,
    PeerDescriptor,
    PeerJoined,
    PeerLeft,
    PeerLink,
    PeerReply,
    PeerRequest,
    Prefill,
    PrefillAndDecode,
    Prefilled,
    PullEarly,
    PushEnded,
    PushTarget,
    Refused,
    ReleaseLeases,
    RenewLeases,
    Reserve,
    RouterToWorker,
    Welcome,
    Work,
    WorkFailed,
)
from pdengine.transport.sockets import (
    IN_VAIN,
    REFUSED,
    PeerSocket,
    SendFailed,
    ServerSocket,
    watch_handshakes,
)
from pdengine.transport.transfer import PeerConnected, PeerFailed, PushTransfer

logger = logging.getLogger(__name__)

TICK_SECONDS = 0.25  # leases are swept and renewed this often
HELLO_SECONDS = 1.0
RECONNECT_SECONDS = 5.0
MAX_STEP_SECONDS = 30.0  # a worker whose engine loop takes longer for one turn is not ready


class WorkerDied(RuntimeError):
    """A thread of this worker ended by an exception."""


@dataclass(frozen=True)
class WorkerParts:
    """What `Worker` puts together; made by `start_worker.run_worker`."""

    descriptor: PeerDescriptor
    compatibility: Compatibility
    max_context: int
    block_size: int
    max_requests: int
    lease_seconds: float
    drain_seconds: float
    router_address: str
    context: zmq.asyncio.Context
    peer_server: ServerSocket[PeerRequest]
    transfer: PushTransfer
    engine: Engine
    metrics: WorkerMetrics
    died: "Future[None]"  # gets the exception of a thread that dies
    keys: WorkerKeys | None = None


@dataclass(eq=False)
class Peer:
    """A prefill worker that this worker pulls from, or a worker of the other role in a cluster that pushes.

    lanes: of the connection, empty while there is none. reconnect_at: set once the connection is broken.
    """

    descriptor: PeerDescriptor
    socket: PeerSocket[PeerReply]
    receiver: asyncio.Task[None]
    lanes: str = ""
    reconnect_at: float | None = None


class Worker:
    """Runs until `stop` is called or something breaks."""

    def __init__(self, parts: WorkerParts) -> None:
        self._parts = parts
        self._engine = parts.engine
        self._transfer = parts.transfer
        self._engine_id = parts.descriptor.engine_id
        self._router = PeerSocket[RouterToWorker](
            parts.context,
            parts.router_address,
            RouterToWorker,
            keys=parts.keys.to_router() if parts.keys is not None else None,
            only_when_connected=True,
        )
        self._epoch: str | None = None
        self._heartbeat_interval = HELLO_SECONDS
        self._granted = GrantedLeases(parts.lease_seconds)
        self._borrowed = BorrowedLeases()
        self._uncovered: dict[BorrowedLease, float] = {}  # not confirmed yet -> when that is given up
        self._pushes = False  # as the router says
        # Told until its writer answers; one that is not met again by the deadline is taken for dead.
        self._unwanted_pushes: dict[EndPush, tuple[str, float]] = {}
        self._ends_awaited: dict[EndPush, bytes] = {}  # -> who waits for PushEnded
        self._open = OpenAnswers()
        self._peers: dict[str, Peer] = {}
        self._stopping = asyncio.Event()
        self._stop_now = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None  # while running
        parts.metrics.watch_worker(
            load=self._load, num_leases=lambda: len(self._granted), why_not_ready=self.why_not_ready
        )

    # ------------------------------------------------------------------------------------ life

    async def run(self) -> None:
        """Serve until `stop`. Raises StartupError if the router refuses this worker, WorkerDied if a
        thread dies."""
        self._loop = asyncio.get_running_loop()
        engine_thread = threading.Thread(target=self._run_engine, name="engine", daemon=True)
        engine_thread.start()
        loops: list[Coroutine[Any, Any, None]] = [
            self._receive_from_router(),
            self._serve_peers(),
            self._keep_in_touch(),
            self._tick(),
            self._drain_when_asked(),
            self._raise_when_dead(),
            watch_handshakes(lambda: {"workers": self._parts.peer_server}, REFUSED),
            watch_handshakes(self._connections, IN_VAIN),
        ]
        if self._parts.keys is not None:
            loops += [self._parts.keys.run()]
        tasks = [asyncio.create_task(loop) for loop in loops]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for finished in done:
                finished.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._engine.post(Stop())
            for engine_id in list(self._peers):
                self._forget_peer(engine_id)
            self._transfer.close()
            self._send_to_router(Left())  # from now on nothing of this worker's is on its way
            self._router.close()
            self._parts.peer_server.close()
            if self._parts.keys is not None:
                self._parts.keys.close()
            engine_thread.join(timeout=5)

    def stop(self) -> None:
        """Finish what is there and leave; called twice, leave at once. Call it on the loop's thread."""
        if self._stopping.is_set():
            self._stop_now.set()
        self._stopping.set()

    def why_not_ready(self) -> str | None:
        """What keeps this worker from taking requests, in one line. May be called on any thread."""
        if self._stopping.is_set():
            return "the worker is leaving"
        if self._epoch is None:
            return "no router has welcomed this worker"
        step_age = self._engine.step_age()
        if step_age > MAX_STEP_SECONDS:
            return f"the engine loop has not turned for {step_age:.0f} s"
        return None

    def on_fatal(self, error: BaseException) -> None:
        """A thread of this worker has died. May be called on any thread."""
        died = WorkerDied(f"{type(error).__name__}: {error}")
        died.__cause__ = error
        with contextlib.suppress(InvalidStateError):  # it is not the first, or the worker has stopped
            self._parts.died.set_exception(died)

    def on_events(self, events: list[Event]) -> None:
        """Take the engine's events. Called on the engine thread."""
        try:
            assert self._loop is not None
            self._loop.call_soon_threadsafe(self._handle_events, events)
        except RuntimeError:
            logger.debug("the loop is closed: %d events are dropped", len(events))

    async def _raise_when_dead(self) -> None:
        await asyncio.wrap_future(self._parts.died)

    def _run_engine(self) -> None:
        try:
            self._engine.run()
        except BaseException as error:
            self.on_fatal(error)

    async def _drain_when_asked(self) -> None:
        await self._stopping.wait()
        self._send_to_router(Leaving())
        deadline = monotonic() + self._parts.drain_seconds
        while not self._is_idle() and not self._stop_now.is_set() and monotonic() < deadline:
            try:
                await asyncio.wait_for(self._stop_now.wait(), TICK_SECONDS)
            except TimeoutError:
                continue

    def _is_idle(self) -> bool:
        return not (len(self._open) or len(self._granted) or len(self._borrowed))

    # ---------------------------------------------------------------------------------- router

    def _connections(self) -> dict[str, PeerSocket[Any]]:
        return {"the router": self._router, **{name: peer.socket for name, peer in self._peers.items()}}

    def _send_to_router(self, message: Message) -> None:
        try:
            self._router.send(message)
        except SendFailed as error:
            logger.debug("%s was not sent: %s", type(message).__name__, error)

    async def _keep_in_touch(self) -> None:
        """Say hello until a router answers, then send heartbeats."""
        while True:
            if self._epoch is None:
                self._send_to_router(self._hello())
            else:
                self._send_to_router(Heartbeat(self._load()))
            await asyncio.sleep(self._heartbeat_interval)

    def _hello(self) -> Hello:
        parts = self._parts
        return Hello(parts.descriptor, parts.compatibility, self._load(), parts.max_context)

    def _load(self) -> Load:
        return msgspec.structs.replace(self._engine.load, step_age=self._engine.step_age())

    async def _receive_from_router(self) -> None:
        while True:
            message = await self._router.receive()
            match message:
                case Welcome():
                    self._join(message)
                case Refused(field, ours, theirs):
                    raise StartupError(
                        f"the router refused this worker: its {field} is {theirs}, the cluster's is {ours}"
                    )
                case HeartbeatReply(epoch, known):
                    if epoch != self._epoch or not known:
                        self._epoch = None
                        self._send_to_router(self._hello())
                case PeerJoined(peer):
                    self._meet_peer(peer)
                case PeerLeft(engine_id):
                    self._forget_peer(engine_id)
                    self._lose_writer(engine_id)
                case Prefill(work, may_wait, push_to):
                    self._take_prompt(work, may_wait, push_to)
                case PrefillAndDecode(work, may_wait):
                    self._take(self._sequences(work, Mode.WHOLE, may_wait))
                case PullEarly():
                    self._pull_early(message)
                case Reserve(work, writer):
                    sequences = self._sequences(work, Mode.DECODE)
                    sequences[0].writer = writer
                    self._take(sequences)
                case Decode(work, KVLease() as lease):
                    self._take_leased(work, lease)
                case Decode(work):
                    self._decode_pushed(work)
                case Abort(request_id, choices):
                    self._abort(request_id, choices)
                case RenewLeases():
                    self._send_to_router(self._renew(message))
                case ReleaseLeases(lease_ids):
                    self._release(lease_ids)
                case Malformed(reason):
                    logger.error("the router did not understand a message: %s", reason)

    def _join(self, welcome: Welcome) -> None:
        """A router that welcomes this worker has given it nothing yet: whatever is here is of the past.

        Only granted leases stay until they expire: somebody may still read what they cover.
        """
        self._epoch = welcome.epoch
        self._heartbeat_interval = welcome.heartbeat_interval
        self._engine.post(AbortAll())
        self._open.clear()
        # Where the new router moves the KV cache the other way, every connection is the wrong one.
        current = {peer.engine_id for peer in welcome.peers if welcome.pushes == self._pushes}
        self._pushes = welcome.pushes
        for engine_id in [engine_id for engine_id in self._peers if engine_id not in current]:
            self._forget_peer(engine_id)
        for peer in welcome.peers:
            self._meet_peer(peer)
        if self._stopping.is_set():
            self._send_to_router(Leaving())
        logger.info("joined router %s", welcome.epoch)

    # ------------------------------------------------------------------------------------ work

    def _sequences(self, work: Work, mode: Mode, may_wait: bool = True) -> list[Sequence]:
        return sequences_of(work, mode, block_size=self._parts.block_size, may_wait=may_wait)

    def _take(self, sequences: list[Sequence]) -> None:
        refusal = self._refusal(sequences)
        if refusal is None:
            self._start(sequences)
        else:
            self._send_to_router(refusal)

    def _take_prompt(self, work: Work, may_wait: bool, push_to: PushTarget | None) -> None:
        [sequence] = self._sequences(work, Mode.PREFILL, may_wait)
        if push_to is not None:
            num_blocks = blocks_for(len(sequence.token_ids), self._parts.block_size)
            if push_to.engine_id not in self._peers or len(push_to.block_ids) != num_blocks:
                reason = "its KV cache cannot be pushed where it shall be"
                self._send_to_router(WorkFailed(work.request_id, work.attempt, reason, retry=True))
                return
            sequence.push = Push(work.request_id, work.attempt, push_to)
        self._take([sequence])

    def _start(self, sequences: list[Sequence]) -> None:
        choices = [answer.choice for sequence in sequences for answer in sequence.answers]
        leader = sequences[0]
        record = RequestRecord(leader.request_id, leader.attempt, leader.mode, leader.num_prompt_tokens)
        self._open.begin(record, choices)
        self._engine.post(AddRequest(sequences))

    def _take_leased(self, work: Work, lease: KVLease) -> None:
        """Pull at once and renew the lease from now on; the engine waits until it is known to hold."""
        [sequence] = self._sequences(work, Mode.DECODE)
        refusal = self._refusal([sequence], lease)
        if refusal is not None:
            self._send_to_router(refusal)
            return
        sequence.lease = self._borrowed.add(lease, work.request_id)
        if not sequence.lease.is_acknowledged:
            self._uncovered.setdefault(sequence.lease, monotonic() + lease.duration)
        self._send_to_router(DecodeAccepted(work.request_id, work.attempt))
        self._start([sequence])
        self._renew_borrowed()

    def _decode_pushed(self, work: Work) -> None:
        record = RequestRecord(work.request_id, work.attempt, Mode.DECODE, len(work.prompt_ids))
        self._open.begin(record, [choice.index for choice in work.choices])
        self._engine.post(StartPushed(work))

    def _pull_early(self, news: PullEarly) -> None:
        """Nobody depends on an early pull: what is wrong with it shows when Decode comes."""
        fits = len(news.lease.block_ids) <= self._parts.descriptor.region.num_blocks
        done = news.num_tokens // self._parts.block_size <= len(news.lease.block_ids)
        if fits and done and news.lease.engine_id in self._peers and not self._stopping.is_set():
            self._engine.post(news)

    def _refusal(self, sequences: list[Sequence], lease: KVLease | None = None) -> WorkFailed | None:
        leader = sequences[0]

        def refuse(reason: str, *, retry: bool) -> WorkFailed:
            self._parts.metrics.request_ended("failed")
            return WorkFailed(leader.request_id, leader.attempt, reason, retry)

        if self._stopping.is_set():
            return refuse("the worker is leaving", retry=True)
        needed = blocks_for(max(s.max_cached_tokens for s in sequences), self._parts.block_size)
        num_blocks, max_requests = self._parts.descriptor.region.num_blocks, self._parts.max_requests
        if needed > num_blocks:
            return refuse(f"the request needs {needed} KV blocks, the pool has {num_blocks}", retry=False)
        if leader.num_slots > max_requests:
            reason = f"n is {leader.num_slots}, this worker writes {max_requests} answers at once at most"
            return refuse(reason, retry=False)
        if lease is None:
            return None
        if lease.engine_id not in self._peers:
            return refuse("the prefill worker is not known here", retry=True)
        lengths = {len(answer.token_ids) - 1 for answer in (leader, *leader.siblings)}
        if lengths != {lease.num_tokens} or len(lease.block_ids) < blocks_for(
            lease.num_tokens, self._parts.block_size
        ):
            return refuse(f"lease {lease.lease_id} does not cover the tokens of the request", retry=True)
        return None

    def _abort(self, request_id: str, choices: list[int] | None) -> None:
        self._open.give_up(request_id, choices)
        self._engine.post(AbortRequest(request_id, None if choices is None else frozenset(choices)))

    def _handle_events(self, events: list[Event]) -> None:
        for event in events:
            match event:
                case LeaseUnneeded(borrowed):
                    self._drop_borrowed(borrowed)
                case UnwantedPush(writer, order):
                    self._unwanted_pushes[order] = (writer, monotonic() + self._parts.lease_seconds)
                    self._send_to_peer(writer, order)
                case PushEnded(request_id, attempt):
                    identity = self._ends_awaited.pop(EndPush(request_id, attempt), None)
                    if identity is not None:
                        self._answer_peer(identity, event)
                case PeerConnected(engine_id, lanes):
                    logger.info("connected to %s over %s", engine_id, lanes)
                    self._send_to_router(PeerLink(engine_id, lanes=lanes))
                    if engine_id in self._peers:
                        self._peers[engine_id].lanes = lanes
                        self._peers[engine_id].reconnect_at = None
                case PeerFailed(engine_id, reason):
                    logger.warning("no connection to %s: %s", engine_id, reason)
                    self._send_to_router(PeerLink(engine_id, error=reason))
                    if engine_id in self._peers:
                        self._peers[engine_id].lanes = ""
                        self._peers[engine_id].reconnect_at = monotonic() + RECONNECT_SECONDS
                case _:
                    if isinstance(event, Prefilled) and event.lease is not None:
                        self._granted.grant(event.lease.lease_id, monotonic())
                    self._open.note(event)
                    self._send_to_router(event)

    # ----------------------------------------------------------------- leases granted to others

    async def _serve_peers(self) -> None:
        server = self._parts.peer_server
        while True:
            identity, message = await server.receive()
            match message:
                case ReleaseLeases(lease_ids):
                    self._release(lease_ids)
                case RenewLeases():
                    self._answer_peer(identity, self._renew(message))
                case EndPush():
                    self._ends_awaited[message] = identity
                    self._engine.post(message)

    def _answer_peer(self, identity: bytes, answer: PeerReply) -> None:
        try:
            self._parts.peer_server.send(identity, answer)
        except SendFailed as error:
            logger.debug("a peer was not answered: %s", error)

    def _renew(self, request: RenewLeases) -> LeasesRenewed:
        renewed, lost = self._granted.renew(request.lease_ids, monotonic())
        return LeasesRenewed(request.sequence, renewed, lost)

    def _release(self, lease_ids: list[int]) -> None:
        for lease_id in self._granted.release(lease_ids):
            self._engine.post(FreeLease(lease_id))

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_SECONDS)
            now = monotonic()
            for lease_id in self._granted.expire(now):
                logger.warning("lease %d has expired", lease_id)
                self._parts.metrics.leases_expired(1)
                self._engine.post(FreeLease(lease_id))
            self._renew_borrowed()
            self._end_pushes(now)
            for borrowed in [b for b, deadline in self._uncovered.items() if deadline <= now]:
                self._borrowed.remove(borrowed.lease)
                self._lose_borrowed(borrowed, "the prefill worker did not confirm the lease on its KV cache")
            for peer in self._peers.values():
                if peer.reconnect_at is not None and peer.reconnect_at <= now:
                    peer.reconnect_at = None
                    self._connect_transfer(peer.descriptor)

    def _end_pushes(self, now: float) -> None:
        """Ask again: the question or its answer may have been lost with a connection."""
        for order, (writer, deadline) in list(self._unwanted_pushes.items()):
            if writer in self._peers:
                self._send_to_peer(writer, order)
            elif deadline <= now:
                self._lose_writer(writer)

    def _lose_writer(self, engine_id: str) -> None:
        """It is dead, or has left: it writes nothing more."""
        for order in [o for o, (writer, _) in self._unwanted_pushes.items() if writer == engine_id]:
            del self._unwanted_pushes[order]
        self._engine.post(LoseWriter(engine_id))

    # ---------------------------------------------------------------- leases borrowed from peers

    def _renew_borrowed(self) -> None:
        now = monotonic()
        for engine_id, lease_ids in self._borrowed.due(now).items():
            self._send_to_peer(engine_id, RenewLeases(self._borrowed.sent(now), lease_ids))

    def _take_renewal(self, engine_id: str, answer: LeasesRenewed) -> None:
        covered, lost = self._borrowed.acknowledge(engine_id, answer.sequence, answer.renewed, answer.lost)
        for borrowed in covered:
            if self._uncovered.pop(borrowed, None) is not None:
                self._engine.post(CoverLease(borrowed))
        for borrowed in lost:
            self._lose_borrowed(borrowed, "the lease on its KV cache has expired")

    def _lose_borrowed(self, borrowed: BorrowedLease, reason: str) -> None:
        self._uncovered.pop(borrowed, None)
        self._engine.post(LoseLease(borrowed, reason))

    def _drop_borrowed(self, borrowed: BorrowedLease) -> None:
        """The lease is not needed any more: tell its owner, once."""
        self._uncovered.pop(borrowed, None)
        if self._borrowed.remove(borrowed.lease):
            self._send_to_peer(borrowed.lease.engine_id, ReleaseLeases([borrowed.lease.lease_id]))

    # ----------------------------------------------------------------------------------- peers

    def _meet_peer(self, descriptor: PeerDescriptor) -> None:
        roles = (self._parts.descriptor.role, descriptor.role)
        if roles != ("decode", "prefill") and not (self._pushes and roles == ("prefill", "decode")):
            return
        known = self._peers.get(descriptor.engine_id)
        if known is not None:
            if known.lanes:  # a new router does not know that this worker is connected already
                self._send_to_router(PeerLink(descriptor.engine_id, lanes=known.lanes))
            return
        try:
            keys = self._parts.keys.to_peer(descriptor) if self._parts.keys is not None else None
        except KeysError as error:
            self._send_to_router(PeerLink(descriptor.engine_id, error=str(error)))
            return
        socket = PeerSocket[PeerReply](self._parts.context, descriptor.control_address, PeerReply, keys=keys)
        receiver = asyncio.create_task(self._receive_from_peer(descriptor.engine_id, socket))
        self._peers[descriptor.engine_id] = Peer(descriptor, socket, receiver)
        self._connect_transfer(descriptor)

    def _connect_transfer(self, peer: PeerDescriptor) -> None:
        """A decode worker connects to read, or, in a cluster that pushes, a prefill worker to write."""
        if peer.role == "decode":
            self._transfer.connect_to_push(peer.engine_id, peer.transfer_address, peer.region)
        elif not self._pushes:
            self._transfer.connect(peer.engine_id, peer.transfer_address, peer.region)

    def _forget_peer(self, engine_id: str) -> None:
        """The peer is gone: its pulls fail at once, its leases are lost."""
        peer = self._peers.pop(engine_id, None)
        if peer is None:
            return
        self._transfer.disconnect(engine_id)
        for borrowed in self._borrowed.drop_owner(engine_id):
            self._lose_borrowed(borrowed, "the prefill worker is gone")
        peer.receiver.cancel()
        peer.socket.close()

    async def _receive_from_peer(self, engine_id: str, socket: PeerSocket[PeerReply]) -> None:
        while True:
            message = await socket.receive()
            if isinstance(message, LeasesRenewed):
                self._take_renewal(engine_id, message)
            elif isinstance(message, PushEnded):
                self._unwanted_pushes.pop(EndPush(message.request_id, message.attempt), None)
                self._engine.post(message)
            else:
                logger.error("%s did not understand a message: %s", engine_id, message.reason)

    def _send_to_peer(self, engine_id: str, message: Message) -> None:
        peer = self._peers.get(engine_id)
        if peer is None:
            return
        try:
            peer.socket.send(message)
        except SendFailed as error:
            logger.debug("%s was not sent to %s: %s", type(message).__name__, engine_id, error)
