"""What the UCX thread does between its native phases: peers, pulls and the tables they occupy.

Everything here runs on the one thread that owns UCX; commands arrive as callables from `UcxTransfer`.
"""

from __future__ import annotations

import contextlib
import os
import queue
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt

from pdengine.transport import ucx_progress as native
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
from pdengine.transport.ucx_library import UcxLibrary
from pdengine.transport.ucx_worker import UcxWorker

MAX_PEERS = 1024
CONNECT_SECONDS = 10.0
CLOSE_SECONDS = 5.0
WARM_UP_BYTES = 8
_FAR_FUTURE = 2**62  # ns
_POLLIN = 1

Table: TypeAlias = npt.NDArray[np.int64]


@dataclass
class _Peer:
    engine_id: str
    row: int  # of the endpoint table
    region: RegionDescriptor
    connect_deadline: int | None  # ns, while connecting
    close_reason: str = ""  # once it is being closed: why its pulls fail
    announce: bool = False  # tell the reason as PeerFailed, too, when it is closed


@dataclass(frozen=True)
class _Pull:
    """A pull or push with a row in the pull table; the warm-up read of a connecting peer has no id."""

    pull_id: int | None
    peer: _Peer
    ranges: Table  # the native loop refers to it by address
    is_push: bool = False


class UcxLoop:
    """The state of the UCX thread: one worker, its endpoints, and the pulls in flight.

    cuda_scratch: the pool is in GPU memory, and so are WARM_UP_BYTES at this address.
    """

    def __init__(
        self,
        library: UcxLibrary,
        settings: dict[str, str],
        *,
        deliver: Deliver,
        commands: queue.SimpleQueue[Command],
        command_descriptor: int,
        control: Table,
        gaps: Table,
        cuda_scratch: int | None = None,
    ) -> None:
        self._library = library
        self._deliver = deliver
        self._commands = commands
        self._command_descriptor = command_descriptor
        self._control = control
        self._gaps = gaps
        self._loop = native.compile_loop()
        self._functions = tuple(native.native_functions(library))
        self._get, self._put = library.address_of("ucp_get_nbx"), library.address_of("ucp_put_nbx")
        self._flush = library.address_of("ucp_ep_flush_nbx")
        self._worker = UcxWorker(library, settings, cuda=cuda_scratch is not None)
        self.worker_address = self._worker.address()
        self._scratch = np.zeros(WARM_UP_BYTES, np.uint8)
        # Of the pool's kind of memory, so that the warm-up takes the transports that pulls will take.
        self._scratch_address = self._scratch.ctypes.data if cuda_scratch is None else cuda_scratch
        self._scratch_parameters = self._worker.get_parameters(None)
        self._pool_parameters = 0
        self._region: RegionDescriptor | None = None
        self._peers: dict[str, _Peer] = {}
        self._closing_peers: list[_Peer] = []
        self._pulls: list[_Pull] = []  # by row of the pull table
        self._close_deadline: int | None = None  # ns, once `close` was asked for
        # The error handler writes into this table for as long as an endpoint lives, so it never moves.
        self._endpoint_table: Table = np.zeros((MAX_PEERS, native.ENDPOINT_COLUMNS), np.int64)
        self._pull_table: Table = np.zeros((0, native.PULL_COLUMNS), np.int64)
        self._request_table: Table = np.zeros((0, native.WINDOW), np.int64)
        self._clock: Table = np.zeros(2, np.int64)
        self._descriptors = library.ffi.new("struct pollfd[2]")
        self._descriptors[0].fd = self._worker.event_descriptor()
        self._descriptors[1].fd = command_descriptor
        self._descriptors[0].events = self._descriptors[1].events = _POLLIN

    def run(self) -> None:
        """Alternate between commands and the native loop until closed. UcxError if UCX cannot go on."""
        descriptors = int(self._library.ffi.cast("intptr_t", self._descriptors))
        while True:
            self._take_commands()
            self._settle()
            if self._close_deadline is not None and self._finish_close(self._close_deadline):
                return
            self._control[native.CONTROL_DEADLINE] = self._next_deadline()
            status = self._loop.run(
                self._functions,
                self._worker.handle,
                descriptors,
                self._clock,
                self._control,
                self._gaps,
                self._endpoint_table[: self._num_rows()],
                self._pull_table,
                self._request_table,
            )
            self._library.check(status, "ucp_worker_arm")

    # Commands

    def register(self, region: RegionDescriptor, reply: Future[RegionDescriptor]) -> None:
        if self._region is not None:
            reply.set_exception(TransferError("a region is registered already"))
            return
        try:
            memory = self._worker.map_memory(region.base_address, region.nbytes)
        except TransferError as error:
            reply.set_exception(error)
            return
        self._pool_parameters = self._worker.get_parameters(memory.handle)
        self._region = msgspec.structs.replace(region, remote_key=memory.remote_key)
        reply.set_result(self._region)

    def connect(self, engine_id: str, worker_address: bytes, region: RegionDescriptor) -> None:
        self.disconnect(engine_id)
        try:
            peer = self._open_peer(engine_id, worker_address, region)
        except (TransferError, ValueError) as error:
            self._deliver(PeerFailed(engine_id, str(error)))
            return
        self._peers[engine_id] = peer
        # A first small read makes UCX connect its transports, here and not in the first pull.
        read = (self._scratch_address, region.base_address, min(WARM_UP_BYTES, region.nbytes))
        self._start(_Pull(None, peer, np.array([read], np.int64)), self._scratch_parameters)

    def pull(self, pull_id: int, engine_id: str, runs: Sequence[Run]) -> None:
        peer = self._peers.get(engine_id)
        if peer is None or self._region is None:
            self._deliver(PullFailed(pull_id, f"engine {engine_id} is not connected"))
            return
        try:
            ranges = copy_ranges(peer.region, self._region, runs)
        except ValueError as error:
            self._deliver(PullFailed(pull_id, str(error)))
            return
        if len(ranges) == 0:
            self._deliver(PullCompleted(pull_id, 0, 0, 0.0, time.monotonic()))
            return
        self._start(_Pull(pull_id, peer, ranges), self._pool_parameters)

    def push(self, push_id: int, engine_id: str, runs: Sequence[Run], layer: int) -> None:
        peer = self._peers.get(engine_id)
        if peer is None or self._region is None:
            self._deliver(PushFailed(push_id, f"engine {engine_id} is not connected"))
            return
        try:
            ranges = layer_ranges(peer.region, self._region, runs, layer)
        except ValueError as error:
            self._deliver(PushFailed(push_id, str(error)))
            return
        self._start(_Pull(push_id, peer, ranges, is_push=True), self._pool_parameters)

    def disconnect(self, engine_id: str) -> None:
        self._disconnect(engine_id, "the peer was disconnected")

    def close(self) -> None:
        self._close_deadline = time.monotonic_ns() + int(CLOSE_SECONDS * 1e9)
        for engine_id in list(self._peers):
            self._disconnect(engine_id, "the transfer is closed")

    # Peers

    def _open_peer(self, engine_id: str, worker_address: bytes, region: RegionDescriptor) -> _Peer:
        if self._region is None:
            raise TransferError("no local region is registered")
        check_pull_compatible(self._region, region)
        free_rows = np.flatnonzero(self._endpoint_table[:, native.ENDPOINT_STATE] == native.FREE)
        if len(free_rows) == 0:
            raise TransferError(f"there are {MAX_PEERS} peers already, which is the limit")
        row = int(free_rows[0])
        entry = self._endpoint_table[row]
        entry[:] = 0
        endpoint = self._worker.create_endpoint(
            worker_address,
            self._loop.error_handler.address,
            entry[native.ENDPOINT_STATUS :].ctypes.data,
        )
        try:
            remote_key = self._worker.unpack_remote_key(endpoint, region.remote_key)
        except TransferError:
            entry[native.ENDPOINT_CLOSE_REQUEST] = self._worker.close_endpoint(endpoint)
            entry[native.ENDPOINT_STATE] = native.CLOSING
            self._closing_peers.append(_Peer(engine_id, row, region, None))
            raise
        entry[native.ENDPOINT_HANDLE] = endpoint
        entry[native.ENDPOINT_REMOTE_KEY] = remote_key
        entry[native.ENDPOINT_STATE] = native.OPEN
        return _Peer(engine_id, row, region, time.monotonic_ns() + int(CONNECT_SECONDS * 1e9))

    def _disconnect(self, engine_id: str, reason: str) -> None:
        peer = self._peers.get(engine_id)
        if peer is not None:
            self._close_peer(peer, reason, announce=peer.connect_deadline is not None)

    def _close_peer(self, peer: _Peer, reason: str, *, announce: bool) -> None:
        """Close by force, which cancels the reads in flight; the rest happens when they have ended."""
        del self._peers[peer.engine_id]
        peer.close_reason = reason
        peer.announce = announce
        self._closing_peers.append(peer)
        entry = self._endpoint_table[peer.row]
        entry[native.ENDPOINT_STATE] = native.CLOSING
        if entry[native.ENDPOINT_IN_FLIGHT] == 0:
            self._destroy_remote_key(entry)
        entry[native.ENDPOINT_CLOSE_REQUEST] = self._worker.close_endpoint(int(entry[native.ENDPOINT_HANDLE]))

    def _destroy_remote_key(self, entry: Table) -> None:
        """Before the endpoint if it can be; but reads in flight use the key, and only the close ends them."""
        remote_key = int(entry[native.ENDPOINT_REMOTE_KEY])
        entry[native.ENDPOINT_REMOTE_KEY] = 0
        if remote_key:
            self._worker.destroy_remote_key(remote_key)

    def _free_peer(self, peer: _Peer) -> None:
        entry = self._endpoint_table[peer.row]
        self._destroy_remote_key(entry)
        entry[:] = 0
        if peer.announce:
            self._deliver(PeerFailed(peer.engine_id, peer.close_reason))

    # Between two native phases

    def _take_commands(self) -> None:
        # The flag first, then the descriptor, then the queue: a command that comes later sets them again.
        self._control[native.CONTROL_WAKE] = 0
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._command_descriptor)
        while True:
            try:
                command = self._commands.get_nowait()
            except queue.Empty:
                return
            command(self)

    def _settle(self) -> None:
        """Act on what the native loop left in the tables."""
        now = time.monotonic_ns()
        for peer in list(self._peers.values()):
            status = int(self._endpoint_table[peer.row, native.ENDPOINT_STATUS])
            if status != 0:
                self._close_peer(peer, self._library.describe_status(status), announce=True)
            elif peer.connect_deadline is not None and now >= peer.connect_deadline:
                self._close_peer(peer, f"no answer within {CONNECT_SECONDS:g} s", announce=True)
        self._end_pulls()
        for peer in list(self._closing_peers):
            if native.endpoint_is_closed(self._endpoint_table[peer.row]):
                self._closing_peers.remove(peer)
                self._free_peer(peer)

    def _start(self, pull: _Pull, parameters: int) -> None:
        row = np.zeros((1, native.PULL_COLUMNS), np.int64)
        row[0, native.PULL_ENDPOINT] = pull.peer.row
        row[0, native.PULL_RANGES] = pull.ranges.ctypes.data
        row[0, native.PULL_NUM_GETS] = len(pull.ranges)
        row[0, native.PULL_PARAMETERS] = parameters
        row[0, native.PULL_FUNCTION] = self._put if pull.is_push else self._get
        if pull.is_push:
            row[0, native.PULL_FLUSH] = self._flush
            row[0, native.PULL_NUM_GETS] += 1
        self._pulls.append(pull)
        self._pull_table = np.concatenate([self._pull_table, row])
        self._request_table = np.concatenate([self._request_table, np.zeros((1, native.WINDOW), np.int64)])

    def _end_pulls(self) -> None:
        keep = []
        for row, pull in enumerate(self._pulls):
            entry = self._pull_table[row]
            in_flight = entry[native.PULL_POSTED] != entry[native.PULL_COMPLETED]
            closing = self._endpoint_table[pull.peer.row, native.ENDPOINT_STATE] == native.CLOSING
            if native.pull_has_ended(entry) or (closing and not in_flight):
                self._end_pull(pull, entry)
            else:
                keep.append(row)
        if len(keep) < len(self._pulls):
            self._pulls = [self._pulls[row] for row in keep]
            self._pull_table = self._pull_table[keep]
            self._request_table = self._request_table[keep]

    def _end_pull(self, pull: _Pull, entry: Table) -> None:
        status = int(entry[native.PULL_STATUS])
        complete = status == 0 and entry[native.PULL_COMPLETED] == entry[native.PULL_NUM_GETS]
        if pull.pull_id is None:
            self._end_warm_up(pull.peer, status, complete)
        elif complete and pull.is_push:
            num_bytes, completed_at = int(pull.ranges[:, 2].sum()), int(entry[native.PULL_ENDED_AT]) / 1e9
            self._deliver(PushCompleted(pull.pull_id, num_bytes, len(pull.ranges), completed_at))
        elif complete:
            seconds = int(entry[native.PULL_ENDED_AT] - entry[native.PULL_POSTED_AT]) / 1e9
            self._deliver(
                PullCompleted(
                    pull.pull_id,
                    num_bytes=int(pull.ranges[:, 2].sum()),
                    num_gets=len(pull.ranges),
                    seconds=seconds,
                    completed_at=int(entry[native.PULL_ENDED_AT]) / 1e9,
                    post_seconds=int(entry[native.PULL_POST_TIME]) / 1e9,
                )
            )
        else:
            reason = pull.peer.close_reason or self._library.describe_status(status)
            self._deliver(_failed(pull, pull.pull_id, reason))

    def _end_warm_up(self, peer: _Peer, status: int, complete: bool) -> None:
        if self._peers.get(peer.engine_id) is not peer:
            return  # it is being closed, which reports it
        if complete:
            peer.connect_deadline = None
            endpoint = int(self._endpoint_table[peer.row, native.ENDPOINT_HANDLE])
            self._deliver(PeerConnected(peer.engine_id, self._worker.lanes(endpoint)))
        else:
            reason = f"its pool cannot be read: {self._library.describe_status(status)}"
            self._close_peer(peer, reason, announce=True)

    def _num_rows(self) -> int:
        """How many rows of the endpoint table the native loop must look at."""
        return 1 + max((peer.row for peer in [*self._peers.values(), *self._closing_peers]), default=-1)

    def _next_deadline(self) -> int:
        deadlines = [peer.connect_deadline for peer in self._peers.values()] + [self._close_deadline]
        return min((deadline for deadline in deadlines if deadline is not None), default=_FAR_FUTURE)

    def _finish_close(self, deadline: int) -> bool:
        """True if there is nothing more to do: everything released, or given up at the deadline."""
        if not self._closing_peers:
            self._worker.close()
            return True
        if time.monotonic_ns() < deadline:
            return False
        # UCX still owns reads in flight, so nothing may be released under it.
        for pull in self._pulls:
            if pull.pull_id is not None:
                self._deliver(_failed(pull, pull.pull_id, "the transfer is closed"))
        return True


def _failed(pull: _Pull, pull_id: int, reason: str) -> PullFailed | PushFailed:
    return PushFailed(pull_id, reason) if pull.is_push else PullFailed(pull_id, reason)


Command: TypeAlias = Callable[[UcxLoop], None]
