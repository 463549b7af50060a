"""The data plane within one process: a fake for tests of the engine, with copies that can be held back."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from pdengine.transport.regions import (
    RegionDescriptor,
    Run,
    check_pull_compatible,
    copy_ranges,
    layer_ranges,
)
from pdengine.transport.transfer import (
    Deliver,
    PeerConnected,
    PeerFailed,
    PullCompleted,
    PullFailed,
    PushCompleted,
    PushFailed,
    TransferError,
)


class Fabric:
    """What the transfers of one test share: it finds a transfer by its worker address."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.transfers: dict[bytes, MemoryTransfer] = {}
        self._num_addresses = 0

    def new_address(self) -> bytes:
        with self.lock:
            self._num_addresses += 1
            return b"memory:%d" % self._num_addresses


@dataclass(frozen=True)
class _Peer:
    worker_address: bytes
    region: RegionDescriptor


@dataclass(frozen=True)
class _Copy:
    """pushed_layer: None for a pull."""

    copy_id: int
    engine_id: str
    runs: tuple[Run, ...]
    started_at: float
    pushed_layer: int | None


class MemoryTransfer:
    """A `PushTransfer` between pools of one process. It copies at once, on the caller's thread.

    After `hold()` copies wait in flight, for tests that delay, lose or fail them: `release` performs them,
    `fail` fails one, and one that is never released ends by `disconnect` or `close`, as with a dead peer.
    """

    version = "memory"

    def __init__(self, fabric: Fabric, *, deliver: Deliver) -> None:
        self.worker_address = fabric.new_address()
        self._fabric = fabric
        self._deliver = deliver
        self._region: RegionDescriptor | None = None
        self._peers: dict[str, _Peer] = {}
        self._holding = False
        self._held: dict[int, _Copy] = {}
        self._closed = False
        with fabric.lock:
            fabric.transfers[self.worker_address] = self

    def register(self, region: RegionDescriptor) -> RegionDescriptor:
        with self._fabric.lock:
            if self._closed:
                raise TransferError("the transfer is closed")
            if self._region is not None:
                raise TransferError("a region is registered already")
            self._region = msgspec.structs.replace(region, remote_key=self.worker_address)
            return self._region

    def connect(self, engine_id: str, worker_address: bytes, region: RegionDescriptor) -> None:
        with self._fabric.lock:
            self.disconnect(engine_id)
            reason = self._refusal(worker_address, region)
            if reason is not None:
                self._deliver(PeerFailed(engine_id, reason))
                return
            self._peers[engine_id] = _Peer(worker_address, region)
            self._deliver(PeerConnected(engine_id, "memory"))

    def connect_to_push(self, engine_id: str, worker_address: bytes, region: RegionDescriptor) -> None:
        self.connect(engine_id, worker_address, region)

    def pull(self, pull_id: int, engine_id: str, runs: Sequence[Run]) -> None:
        self._start(_Copy(pull_id, engine_id, tuple(runs), time.monotonic(), pushed_layer=None))

    def push(self, push_id: int, engine_id: str, runs: Sequence[Run], layer: int) -> None:
        self._start(_Copy(push_id, engine_id, tuple(runs), time.monotonic(), pushed_layer=layer))

    def disconnect(self, engine_id: str) -> None:
        with self._fabric.lock:
            self._peers.pop(engine_id, None)
            for copy in [copy for copy in self._held.values() if copy.engine_id == engine_id]:
                self.fail(copy.copy_id, f"engine {engine_id} was disconnected")

    def close(self) -> None:
        """Besides closing this side, breaks the connections of its readers: they see PeerFailed."""
        with self._fabric.lock:
            if self._closed:
                return
            self._closed = True
            for engine_id in list(self._peers):
                self.disconnect(engine_id)
            del self._fabric.transfers[self.worker_address]
            for reader in self._fabric.transfers.values():
                reader._lose_peer(self.worker_address)

    def hold(self) -> None:
        """From now on copies stay in flight."""
        with self._fabric.lock:
            self._holding = True

    @property
    def held(self) -> tuple[int, ...]:
        """The ids of the pulls and pushes that are held, oldest first."""
        with self._fabric.lock:
            return tuple(self._held)

    def release(self, copy_id: int | None = None) -> None:
        """Perform one held copy, or with None all of them, and hold no more. KeyError if it is not held."""
        with self._fabric.lock:
            if copy_id is not None:
                self._perform(self._held.pop(copy_id))
                return
            self._holding = False
            held, self._held = self._held, {}
            for copy in held.values():
                self._perform(copy)

    def fail(self, copy_id: int, reason: str) -> None:
        """Fail one held copy. KeyError if it is not held."""
        with self._fabric.lock:
            self._fail(self._held.pop(copy_id), reason)

    def _refusal(self, worker_address: bytes, region: RegionDescriptor) -> str | None:
        if self._closed:
            return "the transfer is closed"
        if self._region is None:
            return "no local region is registered"
        if worker_address not in self._fabric.transfers or region.remote_key != worker_address:
            return "no such worker address"
        try:
            check_pull_compatible(self._region, region)
        except ValueError as error:
            return str(error)
        return None

    def _start(self, copy: _Copy) -> None:
        with self._fabric.lock:
            if self._holding and copy.engine_id in self._peers:
                self._held[copy.copy_id] = copy
            else:
                self._perform(copy)

    def _perform(self, copy: _Copy) -> None:
        peer, layer = self._peers.get(copy.engine_id), copy.pushed_layer
        if self._closed:
            self._fail(copy, "the transfer is closed")
            return
        if peer is None or self._region is None:
            self._fail(copy, f"engine {copy.engine_id} is not connected")
            return
        try:
            if layer is None:
                ranges = copy_ranges(peer.region, self._region, copy.runs)
            else:
                ranges = layer_ranges(peer.region, self._region, copy.runs, layer)
        except ValueError as error:
            self._fail(copy, str(error))
            return
        for local_address, remote_address, length in ranges.tolist():
            if layer is None:
                ctypes.memmove(local_address, remote_address, length)
            else:
                ctypes.memmove(remote_address, local_address, length)
        num_bytes, now = int(ranges[:, 2].sum()), time.monotonic()
        if layer is None:
            seconds = now - copy.started_at
            self._deliver(PullCompleted(copy.copy_id, num_bytes, len(ranges), seconds, now))
        else:
            self._deliver(PushCompleted(copy.copy_id, num_bytes, len(ranges), now))

    def _fail(self, copy: _Copy, reason: str) -> None:
        failed = PullFailed if copy.pushed_layer is None else PushFailed
        self._deliver(failed(copy.copy_id, reason))

    def _lose_peer(self, worker_address: bytes) -> None:
        lost = [engine_id for engine_id, peer in self._peers.items() if peer.worker_address == worker_address]
        for engine_id in lost:
            self.disconnect(engine_id)
            self._deliver(PeerFailed(engine_id, "the peer closed its transfer"))
