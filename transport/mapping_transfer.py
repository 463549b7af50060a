"""The data plane between processes of one host: map the peer's KV pool, read-only, and copy.

The owner takes no part in a pull, so it may compute, be stopped or be dead: its pool outlives it as long as
somebody has it mapped. Whether what is read still counts is decided by leases, not here.
"""

from __future__ import annotations

import atexit
import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from pdengine.transport.mapping_copy import Copier, MappedPool, mapped_pool
from pdengine.transport.pool_handoff import HandoffAddress, Outcome, PoolHandoff
from pdengine.transport.regions import RegionDescriptor, Run, check_pull_compatible, copy_ranges
from pdengine.transport.shared_memory import MappedMemory, SharedMemory
from pdengine.transport.transfer import (
    Deliver,
    PeerConnected,
    PeerFailed,
    PullCompleted,
    PullFailed,
    TransferError,
)

LANES = "mapping"
CLOSE_SECONDS = 10.0  # a copy that runs is waited for


@dataclass(eq=False)
class _Peer:
    """memory, pool: None until the peer has handed its pool over."""

    engine_id: str
    region: RegionDescriptor
    memory: MappedMemory | None = None
    pool: MappedPool | None = None


@dataclass(frozen=True)
class _Pull:
    pull_id: int
    engine_id: str
    runs: tuple[Run, ...]


class MappingTransfer:
    """A `Transfer` between pools in `SharedMemory` of one host and one user.

    The thread "mapping" copies one pull after the other, each without the GIL, and sleeps when there is none.
    `disconnect` and `close` fail the pulls that wait; a copy that runs completes. A pull needs a peer that is
    connected. `deliver` is called on that thread or the caller's, `on_fatal` if a thread dies: nothing that
    is in flight will be reported any more, so the process should exit.

    Raises TransferError if the socket that hands our pool over cannot be opened.
    """

    version = "mapping 1"

    def __init__(self, *, deliver: Deliver, on_fatal: Callable[[BaseException], None]) -> None:
        self._deliver = deliver
        self._on_fatal = on_fatal
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._lock = threading.Lock()  # guards _pool and _closed
        self._pool: MappedPool | None = None
        self._closed = False
        # The rest belongs to the thread.
        self._peers: dict[str, _Peer] = {}
        self._pulls: deque[_Pull] = deque()
        self._is_running = True
        self._copier = Copier()
        self._handoff = PoolHandoff(on_fatal=on_fatal)
        self.worker_address = msgspec.msgpack.encode(self._handoff.address)
        self._thread = threading.Thread(target=self._run, name="mapping", daemon=True)
        self._thread.start()
        atexit.register(self.close)  # nothing may be unmapped under a copy while the interpreter goes away

    def register(self, region: RegionDescriptor, memory: SharedMemory | None = None) -> RegionDescriptor:
        """As `Transfer.register`. Peers can map the pool if it lies in `memory`; without, this worker can
        pull, and nobody from it."""
        if memory is not None and (memory.address, memory.nbytes) != (region.base_address, region.nbytes):
            raise TransferError("the region is not what lies in the shared memory")
        with self._lock:
            if self._closed:
                raise TransferError("the transfer is closed")
            if self._pool is not None:
                raise TransferError("a region is registered already")
            self._pool = mapped_pool(region)
        if memory is not None:
            self._handoff.offer(memory)
        return region

    def connect(self, engine_id: str, worker_address: bytes, region: RegionDescriptor) -> None:
        if not self._submit(lambda: self._connect(engine_id, worker_address, region)):
            self._deliver(PeerFailed(engine_id, "the transfer is closed"))

    def pull(self, pull_id: int, engine_id: str, runs: Sequence[Run]) -> None:
        pull = _Pull(pull_id, engine_id, tuple(runs))
        if not self._submit(lambda: self._pulls.append(pull)):
            self._deliver(PullFailed(pull_id, "the transfer is closed"))

    def disconnect(self, engine_id: str) -> None:
        self._submit(lambda: self._disconnect(engine_id, "the peer was disconnected"))

    def close(self) -> None:
        self._submit(self._close, last=True)
        self._thread.join(CLOSE_SECONDS)
        self._handoff.close()
        atexit.unregister(self.close)

    def _submit(self, command: Callable[[], None], *, last: bool = False) -> bool:
        """Hand a command to the thread. False if the transfer is closed."""
        with self._lock:
            if self._closed:
                return False
            self._closed = last
            self._commands.put(command)
            return True

    # On the thread

    def _run(self) -> None:
        try:
            while self._is_running:
                self._take_commands()
                if self._pulls:
                    self._perform(self._pulls.popleft())
        except BaseException as error:
            with self._lock:
                self._closed = True
            self._on_fatal(error)

    def _take_commands(self) -> None:
        """All that are there; sleeps for one if there is no pull to perform."""
        if not self._pulls:
            self._commands.get()()
        while True:
            try:
                command = self._commands.get_nowait()
            except queue.Empty:
                return
            command()

    def _connect(self, engine_id: str, worker_address: bytes, region: RegionDescriptor) -> None:
        self._disconnect(engine_id, "the peer was connected again")
        try:
            if self._pool is None:
                raise TransferError("no local region is registered")
            check_pull_compatible(self._pool.region, region)
            address = _decode(worker_address)
        except (TransferError, ValueError) as error:
            self._deliver(PeerFailed(engine_id, str(error)))
            return
        peer = self._peers[engine_id] = _Peer(engine_id, region)

        def done(outcome: Outcome) -> None:
            self._submit(lambda: self._finish_connect(peer, outcome))

        self._handoff.fetch(address, region.nbytes, done)

    def _finish_connect(self, peer: _Peer, outcome: Outcome) -> None:
        if self._peers.get(peer.engine_id) is not peer:  # disconnected meanwhile, which was reported
            if isinstance(outcome, MappedMemory):
                outcome.close()
        elif isinstance(outcome, MappedMemory):
            peer.memory = outcome
            peer.pool = mapped_pool(msgspec.structs.replace(peer.region, base_address=outcome.address))
            self._deliver(PeerConnected(peer.engine_id, LANES))
        else:
            del self._peers[peer.engine_id]
            self._deliver(PeerFailed(peer.engine_id, str(outcome)))

    def _perform(self, pull: _Pull) -> None:
        peer = self._peers.get(pull.engine_id)
        if peer is None or peer.pool is None or self._pool is None:
            self._deliver(PullFailed(pull.pull_id, f"engine {pull.engine_id} is not connected"))
            return
        try:
            ranges = copy_ranges(peer.pool.region, self._pool.region, pull.runs)
        except ValueError as error:
            self._deliver(PullFailed(pull.pull_id, str(error)))
            return
        started_at, ended_at = self._copier.copy(ranges, peer.pool, self._pool)
        num_bytes, seconds = int(ranges[:, 2].sum()), (ended_at - started_at) / 1e9
        self._deliver(PullCompleted(pull.pull_id, num_bytes, len(ranges), seconds, ended_at / 1e9))

    def _disconnect(self, engine_id: str, reason: str) -> None:
        peer = self._peers.pop(engine_id, None)
        if peer is None:
            return
        if peer.memory is None:
            self._deliver(PeerFailed(engine_id, reason))
        else:
            peer.memory.close()
        keep = deque[_Pull]()
        for pull in self._pulls:
            if pull.engine_id == engine_id:
                self._deliver(PullFailed(pull.pull_id, reason))
            else:
                keep.append(pull)
        self._pulls = keep

    def _close(self) -> None:
        self._is_running = False
        for engine_id in list(self._peers):
            self._disconnect(engine_id, "the transfer is closed")
        while self._pulls:  # of peers that are not connected
            self._deliver(PullFailed(self._pulls.popleft().pull_id, "the transfer is closed"))


def _decode(worker_address: bytes) -> HandoffAddress:
    try:
        return msgspec.msgpack.decode(worker_address, type=HandoffAddress)
    except msgspec.DecodeError as error:
        raise TransferError(f"the peer's worker address is not valid: {error}") from None
