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
    Event,
    FreeLease,
    LeaseUnneeded,
    Stop,
)
from pdengine.engine.engine import Engine
from pdengine.engine.lease_keeper import LeaseKeeper
from pdengine.engine.leases import GrantedLeases
from pdengine.engine.metrics import WorkerMetrics
from pdengine.engine.open_answers import OpenAnswers
from pdengine.engine.peers import Peers
from pdengine.engine.pushes import LoseWriter, UnwantedPush
from pdengine.engine.work_intake import WorkIntake
from pdengine.engine.worker_config import StartupError
from pdengine.engine.worker_keys import WorkerKeys
from pdengine.transport.bounded_log import BoundedLog
from pdengine.transport.handshakes import IN_VAIN, REFUSED, watch_handshakes
from pdengine.transport.messages import (
    Abort,
    Compatibility,
    Decode,
    EndPush,
    Heartbeat,
    HeartbeatReply,
    Hello,
    LeasesRenewed,
    Leaving,
    Left,
    Load,
    Malformed,
    Message,
    PeerDescriptor,
    PeerJoined,
    PeerLeft,
    PeerReply,
    PeerRequest,
    Prefill,
    PrefillAndDecode,
    Prefilled,
    PullEarly,
    PushEnded,
    Refused,
    ReleaseLeases,
    RenewLeases,
    Reserve,
    RouterToWorker,
    Welcome,
)
from pdengine.transport.sockets import KEY_REVOKED, PeerSocket, SendFailed, ServerSocket
from pdengine.transport.transfer import PeerConnected, PeerFailed, PushTransfer

logger = logging.getLogger(__name__)

TICK_SECONDS = 0.25  # leases are swept and renewed this often
HELLO_SECONDS = 1.0
LET_GO_SECONDS = 2.0  # for the router's answer to Leaving, then an idle worker goes without it
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


class Worker:
    """Runs until `stop` is called or something breaks."""

    def __init__(self, parts: WorkerParts) -> None:
        self._parts = parts
        self._engine = parts.engine
        self._router = PeerSocket[RouterToWorker](
            parts.context,
            parts.router_address,
            RouterToWorker,
            keys=parts.keys.to_router() if parts.keys is not None else None,
            only_when_connected=True,
        )
        self._log = BoundedLog(logger)
        self._epoch: str | None = None
        self._heartbeat_interval = HELLO_SECONDS
        self._granted = GrantedLeases(parts.lease_seconds)
        # Told until its writer answers; one that is not met again by the deadline is taken for dead.
        self._unwanted_pushes: dict[EndPush, tuple[str, float]] = {}
        self._ends_awaited: dict[EndPush, bytes] = {}  # -> who waits for PushEnded
        self._open = OpenAnswers()
        self._stopping = asyncio.Event()
        self._stop_now = asyncio.Event()
        self._let_go = False  # no router has work for this worker on its way
        self._loop: asyncio.AbstractEventLoop | None = None  # while running
        self._peers = Peers(
            role=parts.descriptor.role,
            context=parts.context,
            keys=parts.keys,
            transfer=parts.transfer,
            tell_router=self._send_to_router,
            on_answer=self._take_answer,
        )
        self._borrowed = LeaseKeeper(send=self._peers.send, post=parts.engine.post)
        self._intake = WorkIntake(
            block_size=parts.block_size,
            num_blocks=parts.descriptor.region.num_blocks,
            max_requests=parts.max_requests,
            metrics=parts.metrics,
            open_answers=self._open,
            peers=self._peers,
            leases=self._borrowed,
            post=parts.engine.post,
            tell_router=self._send_to_router,
            is_leaving=self._stopping.is_set,
        )
        parts.metrics.watch_sockets({"workers": parts.peer_server})
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
            loops += [self._parts.keys.run(self._shut_out)]
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
            for engine_id in self._peers:
                self._forget_peer(engine_id)
            self._parts.transfer.close()
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
        self._say_leaving()
        begin = monotonic()
        deadline, let_go_at = begin + self._parts.drain_seconds, begin + LET_GO_SECONDS
        while not self._stop_now.is_set() and monotonic() < deadline:
            if self._is_idle() and (self._let_go or monotonic() > let_go_at):
                return
            try:
                await asyncio.wait_for(self._stop_now.wait(), TICK_SECONDS)
            except TimeoutError:
                continue

    def _say_leaving(self) -> None:
        """The router answers the heartbeat after it: then all that was sent before it knew is here."""
        try:
            self._router.send(Leaving())
            self._router.send(Heartbeat(self._load()))
        except SendFailed:
            self._let_go = True  # there is no router

    def _is_idle(self) -> bool:
        return not (len(self._open) or len(self._granted) or len(self._borrowed))

    # ---------------------------------------------------------------------------------- router

    def _connections(self) -> dict[str, PeerSocket[Any]]:
        return {"the router": self._router, **self._peers.sockets()}

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
                if self._stopping.is_set():
                    self._send_to_router(Leaving())  # what was said first may be lost with its connection
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
                case HeartbeatReply(epoch, known, leaving):
                    self._let_go = leaving or not known
                    if epoch != self._epoch or not known:
                        self._epoch = None
                        self._send_to_router(self._hello())
                case PeerJoined(peer):
                    self._peers.meet(peer)
                case PeerLeft(engine_id):
                    self._forget_peer(engine_id)
                    self._lose_writer(engine_id)
                case Prefill() | PrefillAndDecode() | PullEarly() | Reserve() | Decode() | Abort():
                    self._intake.take(message)
                case RenewLeases():
                    self._send_to_router(self._renew(message))
                case ReleaseLeases(lease_ids):
                    self._release(lease_ids)
                case Malformed(reason):
                    self._log.warning("the router refused a message: %s", reason)
                    if reason == KEY_REVOKED and self._epoch is not None:
                        self._epoch = None  # it says Hello from now on, and joins once its key is admitted
                        self._drop_work()

    def _join(self, welcome: Welcome) -> None:
        """A router that welcomes this worker has given it nothing yet: whatever is here is of the past.

        Only granted leases stay until they expire: somebody may still read what they cover.
        """
        self._epoch = welcome.epoch
        self._heartbeat_interval = welcome.heartbeat_interval
        self._drop_work()
        # Where the new router moves the KV cache the other way, every connection is the wrong one.
        current = {peer.engine_id for peer in welcome.peers if welcome.pushes == self._peers.pushes}
        for engine_id in self._peers:
            if engine_id not in current:
                self._forget_peer(engine_id)
        self._peers.forget_shut_out()
        self._peers.pushes = welcome.pushes
        for peer in welcome.peers:
            self._peers.meet(peer)
        if self._stopping.is_set():
            self._let_go = False
            self._say_leaving()
        logger.info("joined router %s", welcome.epoch)

    def _drop_work(self) -> None:
        """Nobody waits for any of it any more."""
        self._engine.post(AbortAll())
        self._open.clear()

    # ---------------------------------------------------------------------------------- engine

    def _handle_events(self, events: list[Event]) -> None:
        for event in events:
            match event:
                case LeaseUnneeded(borrowed):
                    self._borrowed.give_back(borrowed)
                case UnwantedPush(writer, order):
                    self._unwanted_pushes[order] = (writer, monotonic() + self._parts.lease_seconds)
                    self._peers.send(writer, order)
                case PushEnded(request_id, attempt):
                    identity = self._ends_awaited.pop(EndPush(request_id, attempt), None)
                    if identity is not None:
                        self._answer_peer(identity, event)
                case PeerConnected() | PeerFailed():
                    self._peers.note(event)
                case _:
                    if isinstance(event, Prefilled) and event.lease is not None:
                        self._granted.grant(event.lease.lease_id, monotonic())
                    self._open.note(event)
                    self._send_to_router(event)

    # ----------------------------------------------------------------------------------- peers

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
            self._borrowed.renew()
            self._borrowed.give_up_unconfirmed(now)
            self._end_pushes(now)
            self._peers.reconnect(now)

    def _end_pushes(self, now: float) -> None:
        """Ask again: the question or its answer may have been lost with a connection.

        A writer that is shut out can write still: only the router can say that it is gone.
        """
        for order, (writer, deadline) in list(self._unwanted_pushes.items()):
            if writer in self._peers:
                self._peers.send(writer, order)
            elif deadline <= now and not self._peers.is_shut_out(writer):
                self._lose_writer(writer)

    def _lose_writer(self, engine_id: str) -> None:
        """It is dead, or has left: it writes nothing more."""
        for order in [o for o, (writer, _) in self._unwanted_pushes.items() if writer == engine_id]:
            del self._unwanted_pushes[order]
        self._engine.post(LoseWriter(engine_id))

    def _shut_out(self) -> None:
        """Other keys are admitted than before: nothing is read from those who are no longer, and those who
        are now are met."""
        self._parts.peer_server.forget_revoked()  # its socket does not hear them from now on
        self._peers.meet_admitted()
        for engine_id, reason in self._peers.revoked().items():
            self._shut_out_peer(engine_id, reason)

    def _shut_out_peer(self, engine_id: str, reason: str) -> None:
        if self._peers.shut_out(engine_id, reason):
            self._borrowed.lose_owner(engine_id)

    def _forget_peer(self, engine_id: str) -> None:
        if self._peers.forget(engine_id):
            self._borrowed.lose_owner(engine_id)

    def _take_answer(self, engine_id: str, answer: PeerReply) -> None:
        """Take what a peer says."""
        match answer:
            case LeasesRenewed():
                self._borrowed.take_answer(engine_id, answer)
            case PushEnded(request_id, attempt):
                self._unwanted_pushes.pop(EndPush(request_id, attempt), None)
                self._engine.post(answer)
            case Malformed(reason) if reason == KEY_REVOKED:
                self._shut_out_peer(engine_id, reason)
