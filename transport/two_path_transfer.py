"""The `Transfer` of a worker: the peer's memory mapped where both are on one host, else UCX."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from pdengine.transport.mapping_transfer import MappingTransfer
from pdengine.transport.regions import RegionDescriptor, Run
from pdengine.transport.shared_memory import SharedMemory
from pdengine.transport.transfer import (
    Deliver,
    PeerConnected,
    PeerFailed,
    PullFailed,
    PushFailed,
    SameHost,
    Transfer,
    TransferEvent,
)
from pdengine.transport.ucx_transfer import CudaPool, UcxTransfer

logger = logging.getLogger(__name__)


class WorkerAddress(msgspec.Struct, frozen=True, array_like=True):
    """The addresses of one worker for each path. mapping: empty if it does not offer its memory."""

    ucx: bytes
    mapping: bytes


@dataclass(eq=False)
class _Peer:
    """key: the name of this connection on its path; an engine that connects again gets another, so that late
    events of the old one are known as such, and ignored.

    path: None while the mapping is tried; pulls wait for the outcome.
    """

    engine_id: str
    key: str
    ucx_address: bytes
    region: RegionDescriptor
    path: Transfer | None = None
    is_connected: bool = False  # PeerConnected was delivered
    waiting: list[tuple[int, Sequence[Run]]] = field(default_factory=list)


class TwoPathTransfer:
    """A `PushTransfer` that maps a peer's memory if the peer lets it, and otherwise reads through UCX.

    Whether a peer is on this host is tried, not guessed: only one that shares the network namespace and the
    user can hand over its pool. `PeerConnected.lanes` is "mapping", or the lanes of UCX, which is connected
    only where the mapping cannot be used. With `same_host="ucx"` this worker neither maps nor offers; a pool
    in GPU memory, which `cuda` describes, needs that.

    `deliver` is called on threads of both paths; `on_fatal` if one of them dies. Raises what `UcxTransfer`
    and `MappingTransfer` raise.
    """

    def __init__(
        self,
        *,
        deliver: Deliver,
        on_fatal: Callable[[BaseException], None],
        advertise_host: str = "127.0.0.1",
        same_host: SameHost = "mapping",
        library_path: Path | None = None,
        cuda: CudaPool | None = None,
    ) -> None:
        self._deliver = deliver
        self._lock = threading.RLock()  # guards the peers; events of the paths take it, too
        self._peers: dict[str, _Peer] = {}  # by engine id
        self._num_connects = 0
        self._closed = False
        self._ucx = UcxTransfer(
            deliver=self._take_ucx_event,
            on_fatal=on_fatal,
            advertise_host=advertise_host,
            library_path=library_path,
            cuda=cuda,
        )
        self._mapping: MappingTransfer | None = None
        if same_host == "mapping":
            self._mapping = MappingTransfer(deliver=self._take_mapping_event, on_fatal=on_fatal)
        mapping_address = b"" if self._mapping is None else self._mapping.worker_address
        self.worker_address = msgspec.msgpack.encode(WorkerAddress(self._ucx.worker_address, mapping_address))
        self.version = self._ucx.version

    @property
    def ucx(self) -> UcxTransfer:
        """The path between hosts, for its metrics."""
        return self._ucx

    def register(self, region: RegionDescriptor, memory: SharedMemory | None = None) -> RegionDescriptor:
        """As `Transfer.register`. Peers on this host can map the pool if it lies in `memory`."""
        if self._mapping is not None:
            self._mapping.register(region, memory)
        return self._ucx.register(region)

    def connect(self, engine_id: str, worker_address: bytes, region: RegionDescriptor) -> None:
        self._connect(engine_id, worker_address, region, self._mapping)

    def connect_to_push(self, engine_id: str, worker_address: bytes, region: RegionDescriptor) -> None:
        """Through UCX, because pools are mapped read-only."""
        self._connect(engine_id, worker_address, region, mapping=None)

    def _connect(
        self,
        engine_id: str,
        worker_address: bytes,
        region: RegionDescriptor,
        mapping: MappingTransfer | None,
    ) -> None:
        with self._lock:
            self.disconnect(engine_id)
            if self._closed:
                self._deliver(PeerFailed(engine_id, "the transfer is closed"))
                return
            try:
                address = msgspec.msgpack.decode(worker_address, type=WorkerAddress)
            except msgspec.DecodeError as error:
                self._deliver(PeerFailed(engine_id, f"the peer's worker address is not valid: {error}"))
                return
            self._num_connects += 1
            key = f"{engine_id}/{self._num_connects}"
            peer = _Peer(engine_id, key, address.ucx, region)
            self._peers[engine_id] = peer
            if mapping is None or not address.mapping:
                self._connect_ucx(peer)
            else:
                mapping.connect(key, address.mapping, region)

    def pull(self, pull_id: int, engine_id: str, runs: Sequence[Run]) -> None:
        with self._lock:
            peer = self._peers.get(engine_id)
            if peer is None:
                closed = "the transfer is closed"
                self._deliver(
                    PullFailed(pull_id, closed if self._closed else f"engine {engine_id} is not connected")
                )
            elif peer.path is None:
                peer.waiting.append((pull_id, tuple(runs)))
            else:
                peer.path.pull(pull_id, peer.key, runs)

    def push(self, push_id: int, engine_id: str, runs: Sequence[Run], layer: int) -> None:
        with self._lock:
            peer = self._peers.get(engine_id)
            if peer is None or peer.path is not self._ucx:
                self._deliver(PushFailed(push_id, f"engine {engine_id} is not connected to push"))
            else:
                self._ucx.push(push_id, peer.key, runs, layer)

    def disconnect(self, engine_id: str) -> None:
        with self._lock:
            peer = self._peers.pop(engine_id, None)
            if peer is not None:
                self._drop(peer, "the peer was disconnected")

    def close(self) -> None:
        with self._lock:
            self._closed = True
            peers, self._peers = self._peers, {}
            for peer in peers.values():
                self._report_end(peer, "the transfer is closed")
        # Without the lock: both wait for threads that deliver events, which take it.
        if self._mapping is not None:
            self._mapping.close()
        self._ucx.close()

    def _connect_ucx(self, peer: _Peer) -> None:
        peer.path = self._ucx
        self._ucx.connect(peer.key, peer.ucx_address, peer.region)
        self._start_waiting(peer, self._ucx)

    def _drop(self, peer: _Peer, reason: str) -> None:
        """Disconnect a peer that is no longer in the table."""
        self._report_end(peer, reason)
        path = self._mapping if peer.path is None else peer.path
        if path is not None:
            path.disconnect(peer.key)

    def _start_waiting(self, peer: _Peer, path: Transfer) -> None:
        waiting, peer.waiting = peer.waiting, []
        for pull_id, runs in waiting:
            path.pull(pull_id, peer.key, runs)

    def _report_end(self, peer: _Peer, reason: str) -> None:
        """What has no outcome yet gets one here: from now on events of this connection are ignored."""
        waiting, peer.waiting = peer.waiting, []
        for pull_id, _ in waiting:
            self._deliver(PullFailed(pull_id, reason))
        if not peer.is_connected:
            self._deliver(PeerFailed(peer.engine_id, reason))

    # Events of the paths, on their threads

    def _take_mapping_event(self, event: TransferEvent) -> None:
        with self._lock:
            match event:
                case PeerConnected(key, lanes):
                    peer = self._current(key)
                    if peer is not None:
                        assert self._mapping is not None
                        peer.path = self._mapping
                        self._start_waiting(peer, self._mapping)
                        self._announce(peer, lanes)
                case PeerFailed(key, reason):
                    peer = self._current(key)
                    if peer is not None:
                        logger.info("the memory of %s is not mapped: %s", peer.engine_id, reason)
                        self._connect_ucx(peer)
                case _:
                    self._deliver(event)

    def _take_ucx_event(self, event: TransferEvent) -> None:
        with self._lock:
            match event:
                case PeerConnected(key, lanes):
                    peer = self._current(key)
                    if peer is not None:
                        self._announce(peer, lanes)
                case PeerFailed(key, reason):
                    peer = self._current(key)
                    if peer is not None:
                        del self._peers[peer.engine_id]
                        self._deliver(PeerFailed(peer.engine_id, reason))
                case _:
                    self._deliver(event)

    def _announce(self, peer: _Peer, lanes: str) -> None:
        peer.is_connected = True
        self._deliver(PeerConnected(peer.engine_id, lanes))

    def _current(self, key: str) -> _Peer | None:
        """The peer of this connection, unless it was disconnected or connected again since."""
        peer = self._peers.get(_engine_of(key))
        return peer if peer is not None and peer.key == key else None


def _engine_of(key: str) -> str:
    return key.rpartition("/")[0]
