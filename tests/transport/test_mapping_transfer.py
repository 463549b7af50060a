"""Pulls out of mapped memory: bytes, owners in all states, disconnects, refusals, idleness."""

from __future__ import annotations

import ctypes
import os
import queue
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mapping_peer import (
    BLOCK_BYTES,
    UNTOUCHED,
    Peer,
    Worker,
    block_content,
    describe,
    fill,
    peer_process,
    wait_until,
)

from pdengine.transport.mapping_copy import Copier, mapped_pool
from pdengine.transport.mapping_transfer import MappingTransfer
from pdengine.transport.pool_handoff import HANDOFF_SECONDS, HandoffAddress
from pdengine.transport.regions import Run, block_runs, copy_ranges
from pdengine.transport.shared_memory import SharedMemory
from pdengine.transport.transfer import PeerFailed, PullCompleted, PullFailed, Transfer, TransferError

LARGE = 4096  # blocks: a copy that takes tens of milliseconds
MappingWorker = Worker[MappingTransfer]


@pytest.fixture
def worker() -> Iterator[MappingWorker]:
    worker = Worker(MappingTransfer)
    worker.blocks[:] = UNTOUCHED
    yield worker
    worker.transfer.close()


@pytest.fixture(scope="module")
def peer() -> Iterator[Peer]:
    with peer_process(num_blocks=1024) as peer:
        yield peer


def pull(worker: MappingWorker, pull_id: int, engine_id: str, runs: list[Run]) -> PullCompleted:
    worker.transfer.pull(pull_id, engine_id, runs)
    event = worker.next_event()
    assert isinstance(event, PullCompleted), event
    assert event.pull_id == pull_id
    return event


def address_of(worker_address: bytes) -> HandoffAddress:
    return msgspec.msgpack.decode(worker_address, type=HandoffAddress)


# ------------------------------------------------------------------------------------------ bytes


def test_scattered_blocks_arrive_and_nothing_else_is_touched(worker: MappingWorker, peer: Peer) -> None:
    transfer: Transfer = worker.transfer
    assert worker.connect("peer", peer) == "mapping"
    remote, local = [5, 6, 7, 300, 2, 1, 900], [0, 1, 2, 3, 10, 11, 63]
    event = pull(worker, 7, "peer", block_runs(remote, local))
    assert (event.num_bytes, event.num_gets, event.post_seconds) == (7 * BLOCK_BYTES, 5, 0.0)
    assert event.seconds > 0
    for remote_block, local_block in zip(remote, local, strict=True):
        assert np.array_equal(worker.blocks[local_block], block_content(remote_block))
    assert (worker.blocks[sorted(set(range(64)) - set(local))] == UNTOUCHED).all()
    assert transfer.version == "mapping 1"


BLOCKS_OF_PROPERTY = 24


@st.composite
def runs_of_a_pull(draw: st.DrawFn) -> list[Run]:
    """Runs anywhere in the remote pool, to disjoint places of the local one, in any order."""
    runs, local = [], 0
    while local < BLOCKS_OF_PROPERTY:
        local += draw(st.integers(0, 3))
        count = draw(st.integers(1, 6))
        if local + count > BLOCKS_OF_PROPERTY:
            break
        runs.append(Run(draw(st.integers(0, BLOCKS_OF_PROPERTY - count)), local, count))
        local += count
    return draw(st.permutations(runs))


@pytest.mark.parametrize("streaming_bytes", [0, 2**62], ids=["past the caches", "plain"])
@pytest.mark.parametrize("block_bytes", [1, 63, 1000, 4096, 12288])
def test_any_runs_are_copied_exactly(streaming_bytes: int, block_bytes: int) -> None:
    copier = Copier(streaming_bytes)
    source, destination = (SharedMemory(BLOCKS_OF_PROPERTY * block_bytes) for _ in range(2))
    remote, local = (
        np.frombuffer(memory.buffer, np.uint8).reshape(-1, block_bytes) for memory in (source, destination)
    )
    fill(remote)
    remote_pool, local_pool = (
        mapped_pool(describe(memory, BLOCKS_OF_PROPERTY, block_bytes)) for memory in (source, destination)
    )

    @given(runs_of_a_pull())
    def check(runs: list[Run]) -> None:
        local[:] = UNTOUCHED
        expected = local.copy()
        for run in runs:
            into = slice(run.local_block, run.local_block + run.count)
            expected[into] = remote[run.remote_block : run.remote_block + run.count]
        ranges = copy_ranges(remote_pool.region, local_pool.region, runs)
        started_at, ended_at = copier.copy(ranges, remote_pool, local_pool)
        assert np.array_equal(local, expected)
        assert 0 < started_at <= ended_at

    check()


def test_a_kernel_that_cannot_populate_changes_nothing() -> None:
    """As before Linux 5.14: a call that does nothing stands in for madvise."""
    copier = Copier()
    memcpy, _, clock_gettime = copier._functions
    nothing = ctypes.cast(ctypes.CDLL(None).getppid, ctypes.c_void_p).value
    copier._functions = (memcpy, nothing, clock_gettime)
    source, destination = SharedMemory(8 * BLOCK_BYTES), SharedMemory(8 * BLOCK_BYTES)
    fill(np.frombuffer(source.buffer, np.uint8).reshape(8, BLOCK_BYTES))
    pools = [mapped_pool(describe(memory, 8, BLOCK_BYTES)) for memory in (source, destination)]
    ranges = copy_ranges(pools[0].region, pools[1].region, [Run(2, 5, 3)])
    copier.copy(ranges, *pools)
    expected = bytes(5 * BLOCK_BYTES) + source.buffer[2 * BLOCK_BYTES : 5 * BLOCK_BYTES]
    assert destination.buffer[:] == expected


def test_what_the_owner_writes_later_is_seen(worker: MappingWorker) -> None:
    owner = Worker(MappingTransfer)
    worker.connect("owner", owner)
    pull(worker, 1, "owner", [Run(9, 0, 1)])
    assert (worker.blocks[0] == 0).all()
    owner.blocks[9] = 77
    pull(worker, 2, "owner", [Run(9, 0, 1)])
    assert (worker.blocks[0] == 77).all()
    owner.transfer.close()


def test_high_offsets_of_pools_beyond_4_gib() -> None:
    """Only the last blocks are touched, so it takes no memory."""
    num_blocks = 2**32 // BLOCK_BYTES + 1000
    reader, owner = (Worker(MappingTransfer, num_blocks=num_blocks) for _ in range(2))
    for block in range(num_blocks - 3, num_blocks):
        owner.blocks[block] = block_content(block)
    reader.connect("owner", owner)
    pull(reader, 1, "owner", [Run(num_blocks - 3, num_blocks - 10, 3)])
    for step in range(3):
        expected = block_content(num_blocks - 3 + step)
        assert np.array_equal(reader.blocks[num_blocks - 10 + step], expected)
    reader.transfer.close()
    owner.transfer.close()


# --------------------------------------------------------------------------- owners in all states


def test_an_owner_that_never_gives_up_the_gil(worker: MappingWorker) -> None:
    with peer_process() as owner:
        worker.connect("owner", owner)
        owner.compute()
        pull(worker, 1, "owner", [Run(20, 0, 8)])
        assert all(np.array_equal(worker.blocks[block], block_content(20 + block)) for block in range(8))


def test_an_owner_that_is_stopped(worker: MappingWorker) -> None:
    with peer_process() as owner:
        worker.connect("owner", owner)
        owner.pause()
        pull(worker, 1, "owner", [Run(30, 0, 2)])
        assert np.array_equal(worker.blocks[1], block_content(31))
        worker.transfer.connect("owner", owner.worker_address, owner.region)
        event = worker.next_event()
        assert event == PeerFailed(
            "owner", f"the peer did not hand over its pool within {HANDOFF_SECONDS:g} s"
        )


def test_an_owner_that_is_killed_in_the_middle_of_a_pull() -> None:
    reader = Worker(MappingTransfer, num_blocks=LARGE)
    with peer_process(num_blocks=LARGE) as owner:
        reader.connect("owner", owner)
        reader.transfer.pull(1, "owner", [Run(0, 0, LARGE)])
        wait_until(lambda: reader.blocks[0].any())
        owner.kill()
        event = reader.next_event()
        assert isinstance(event, PullCompleted), event
        assert event.num_bytes == LARGE * BLOCK_BYTES
        assert all(np.array_equal(reader.blocks[b], block_content(b)) for b in range(0, LARGE, 37))
        pull(reader, 2, "owner", [Run(100, 0, 1)])  # its memory outlives it
        assert np.array_equal(reader.blocks[0], block_content(100))
        reader.transfer.connect("owner", owner.worker_address, owner.region)
        failed = reader.next_event()
        assert isinstance(failed, PeerFailed)
        assert "not within reach" in failed.reason
    reader.transfer.close()


# ---------------------------------------------------------------------- disconnect, connect, close


def test_disconnect_fails_what_waits_and_lets_a_running_copy_end() -> None:
    reader = Worker(MappingTransfer, num_blocks=LARGE)
    owner, other = Worker(MappingTransfer, num_blocks=LARGE), Worker(MappingTransfer)
    owner.blocks[:] = 1
    reader.connect("owner", owner)
    reader.connect("other", other)
    reader.transfer.pull(1, "owner", [Run(0, 0, LARGE)])
    reader.transfer.pull(2, "owner", [Run(0, 0, 1)])
    reader.transfer.pull(3, "other", [Run(0, 0, 1)])
    wait_until(lambda: reader.blocks[0].any())
    reader.transfer.disconnect("owner")
    reader.transfer.disconnect("owner")
    reader.transfer.pull(4, "owner", [Run(0, 0, 1)])
    events = [reader.next_event() for _ in range(4)]
    assert isinstance(events[0], PullCompleted)
    assert events[0].pull_id == 1
    assert events[1] == PullFailed(2, "the peer was disconnected")
    assert isinstance(events[2], PullCompleted)
    assert events[2].pull_id == 3
    assert events[3] == PullFailed(4, "engine owner is not connected")
    assert reader.events.empty()
    for closed in (reader, owner, other):
        closed.transfer.close()


def test_a_disconnected_peer_is_no_longer_mapped(worker: MappingWorker, peer: Peer) -> None:
    def num_mapped() -> int:
        return Path("/proc/self/maps").read_text().count("pdengine-pool")

    before = num_mapped(), len(os.listdir("/proc/self/fd"))
    for turn in range(20):
        worker.connect("peer", peer)
        assert num_mapped() == before[0] + 1
        pull(worker, turn, "peer", [Run(turn, 0, 1)])
    worker.transfer.disconnect("peer")
    worker.transfer.pull(99, "peer", [])
    assert worker.next_event() == PullFailed(99, "engine peer is not connected")
    assert (num_mapped(), len(os.listdir("/proc/self/fd"))) == before


def test_disconnect_while_connecting_ends_in_one_failure(worker: MappingWorker) -> None:
    with peer_process() as stopped:
        stopped.pause()
        worker.transfer.connect("stopped", stopped.worker_address, stopped.region)
        worker.transfer.disconnect("stopped")
        assert worker.next_event() == PeerFailed("stopped", "the peer was disconnected")
        worker.transfer.connect("stopped", stopped.worker_address, stopped.region)
        worker.transfer.connect("stopped", stopped.worker_address, stopped.region)
        assert worker.next_event() == PeerFailed("stopped", "the peer was connected again")
        worker.transfer.close()
        assert worker.next_event() == PeerFailed("stopped", "the transfer is closed")
        assert worker.events.empty()


def test_close_fails_what_waits_and_what_comes_later(peer: Peer) -> None:
    reader, owner = (Worker(MappingTransfer, num_blocks=LARGE) for _ in range(2))
    owner.blocks[:] = 1
    reader.connect("owner", owner)
    reader.transfer.pull(1, "owner", [Run(0, 0, LARGE)])
    reader.transfer.pull(2, "owner", [Run(0, 0, 1)])
    reader.transfer.pull(3, "nobody", [Run(0, 0, 1)])
    wait_until(lambda: reader.blocks[0].any())
    reader.transfer.close()
    reader.transfer.close()
    reader.transfer.pull(4, "owner", [])
    reader.transfer.connect("peer", peer.worker_address, peer.region)
    reader.transfer.disconnect("owner")
    first = reader.next_event()
    assert isinstance(first, PullCompleted)
    assert reader.blocks[LARGE - 1].all()
    closed = "the transfer is closed"
    later = [reader.next_event() for _ in range(4)]
    assert later == [PullFailed(n, closed) for n in (2, 3, 4)] + [PeerFailed("peer", closed)]
    assert reader.events.empty()
    with pytest.raises(TransferError, match="closed"):
        reader.transfer.register(reader.region, reader.memory)
    owner.transfer.close()


# ---------------------------------------------------------------------------------------- refusals


def test_pulls_that_cannot_begin(worker: MappingWorker, peer: Peer) -> None:
    worker.transfer.pull(1, "nobody", [Run(0, 0, 1)])
    assert worker.next_event() == PullFailed(1, "engine nobody is not connected")
    worker.connect("peer", peer)
    event = pull(worker, 2, "peer", [])
    assert (event.num_bytes, event.num_gets) == (0, 0)
    for pull_id, run, reason in (
        (3, Run(1023, 0, 2), "remote blocks 1023 to 1024 are outside a pool of 1024 blocks"),
        (4, Run(0, 64, 1), "local blocks 64 to 64 are outside a pool of 64 blocks"),
        (5, Run(-1, 0, 1), "remote blocks -1 to -1 are outside a pool of 1024 blocks"),
        (6, Run(0, 0, 0), "remote blocks 0 to -1 are outside a pool of 1024 blocks"),
    ):
        worker.transfer.pull(pull_id, "peer", [Run(0, 0, 1), run])
        assert worker.next_event() == PullFailed(pull_id, reason)
    assert (worker.blocks == UNTOUCHED).all()


def test_peers_that_do_not_fit_are_refused_by_name(worker: MappingWorker, peer: Peer) -> None:
    def refusal(worker_address: bytes, **changes: object) -> str:
        region = msgspec.structs.replace(peer.region, **changes)
        worker.transfer.connect("peer", worker_address, region)
        event = worker.next_event()
        assert isinstance(event, PeerFailed), event
        return event.reason

    good = peer.worker_address
    address = address_of(good)
    assert "dtype" in refusal(good, dtype="float16")
    assert refusal(good, sizes=(1023, BLOCK_BYTES)) == (
        f"the peer's pool has {1024 * BLOCK_BYTES} bytes, its region {1023 * BLOCK_BYTES}"
    )
    assert "worker address is not valid" in refusal(b"")
    assert "worker address is not valid" in refusal(os.urandom(40))
    wrong_nonce = msgspec.msgpack.encode(HandoffAddress(address.name, b"guessed"))
    assert refusal(wrong_nonce) == ("the peer did not hand over its pool: the peer does not know the nonce")
    for name in ("pdengine-nobody", "x" * 200, "\0", "", "\udcff".encode("utf-8", "replace").decode()):
        unreachable = msgspec.msgpack.encode(HandoffAddress(name, address.nonce))
        assert "not within reach" in refusal(unreachable), name
    empty_nonce = msgspec.msgpack.encode(HandoffAddress(address.name, b""))
    assert "did not hand over" in refusal(empty_nonce)
    assert worker.connect("peer", peer) == "mapping"


def test_registering(worker: MappingWorker, peer: Peer) -> None:
    with pytest.raises(TransferError, match="already"):
        worker.transfer.register(worker.region, worker.memory)
    events: queue.SimpleQueue[object] = queue.SimpleQueue()
    bare = MappingTransfer(deliver=events.put, on_fatal=events.put)
    bare.connect("peer", peer.worker_address, peer.region)
    assert events.get(timeout=10) == PeerFailed("peer", "no local region is registered")
    worker.transfer.connect("bare", bare.worker_address, worker.region)
    failed = worker.next_event()
    assert isinstance(failed, PeerFailed)
    assert "no pool in shared memory is registered" in failed.reason
    with pytest.raises(TransferError, match="not what lies in the shared memory"):
        bare.register(worker.region, SharedMemory(worker.memory.nbytes))
    bare.close()


# ------------------------------------------------------------------------------------- the process


def test_an_idle_connected_pair_takes_no_cpu(worker: MappingWorker) -> None:
    with peer_process() as other:
        worker.connect("peer", other)
        pull(worker, 1, "peer", [Run(0, 0, 8)])
        before = _cpu_ticks(other.process.pid), _cpu_ticks(os.getpid())
        with pytest.raises(queue.Empty):
            worker.events.get(timeout=1.5)  # the measured window
        after = _cpu_ticks(other.process.pid), _cpu_ticks(os.getpid())
        assert [end - start <= 2 for start, end in zip(before, after, strict=True)] == [True, True]


def _cpu_ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def test_an_exception_on_the_thread_is_reported() -> None:
    fatal: queue.SimpleQueue[BaseException] = queue.SimpleQueue()
    broken = RuntimeError("the receiver is broken")

    def deliver(event: object) -> None:
        raise broken

    transfer = MappingTransfer(deliver=deliver, on_fatal=fatal.put)
    transfer.pull(1, "nobody", [Run(0, 0, 1)])
    assert fatal.get(timeout=30) is broken
    transfer.close()


def test_a_process_that_forgets_to_close_exits_in_silence() -> None:
    script = f"""
from mapping_peer import MappingTransfer, Worker
from pdengine.transport.regions import Run
a, b = (Worker(MappingTransfer, num_blocks={LARGE}) for _ in range(2))
assert a.connect("b", b) == "mapping"
a.transfer.pull(1, "b", [Run(0, 0, {LARGE})])
"""
    environ = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    result = subprocess.run(
        [sys.executable, "-c", script], env=environ, capture_output=True, text=True, timeout=60
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
