"""Pulls between real processes: bytes, lanes, a busy target, dead peers, idleness, close."""

from __future__ import annotations

import math
import os
import queue
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
from ucx_peer import BLOCK_BYTES, Peer, Worker, block_content, peer_process

from pdengine.transport import ucx_loop, ucx_transfer
from pdengine.transport.regions import Run, block_runs, describe_region
from pdengine.transport.transfer import PeerConnected, PeerFailed, PullCompleted, PullFailed, TransferError
from pdengine.transport.ucx_library import load_ucx
from pdengine.transport.ucx_loop import WARM_UP_BYTES
from pdengine.transport.ucx_settings import ucx_settings
from pdengine.transport.ucx_transfer import CudaPool, UcxTransfer
from pdengine.transport.ucx_worker import UcxWorker


@pytest.fixture
def worker() -> Iterator[Worker]:
    worker = Worker()
    yield worker
    worker.transfer.close()


@pytest.fixture(scope="module")
def peer() -> Iterator[Peer]:
    with peer_process(seed=1, num_blocks=1024) as peer:
        yield peer


def connect(worker: Worker, engine_id: str, peer: Peer | Worker) -> PeerConnected:
    address = peer.worker_address if isinstance(peer, Peer) else peer.transfer.worker_address
    worker.transfer.connect(engine_id, address, peer.region)
    event = worker.next_event()
    assert isinstance(event, PeerConnected), event
    assert event.engine_id == engine_id
    return event


def pull(worker: Worker, pull_id: int, engine_id: str, runs: list[Run]) -> PullCompleted:
    worker.transfer.pull(pull_id, engine_id, runs)
    event = worker.next_event()
    assert isinstance(event, PullCompleted), event
    assert event.pull_id == pull_id
    return event


def test_scattered_blocks_arrive_with_one_get_per_run(worker: Worker, peer: Peer) -> None:
    connect(worker, "peer", peer)
    remote, local = [5, 6, 7, 300, 2, 1, 900], [0, 1, 2, 3, 10, 11, 63]
    worker.pool.blocks[:] = 0xAA
    event = pull(worker, 7, "peer", block_runs(remote, local))
    assert (event.num_bytes, event.num_gets) == (7 * BLOCK_BYTES, 5)
    for remote_block, local_block in zip(remote, local, strict=True):
        assert np.array_equal(worker.pool.blocks[local_block], block_content(1, remote_block))
    untouched = sorted(set(range(64)) - set(local))
    assert (worker.pool.blocks[untouched] == 0xAA).all()


def test_many_pulls_at_once_all_arrive(worker: Worker, peer: Peer) -> None:
    connect(worker, "peer", peer)
    for pull_id in range(40):
        # Each block of its own, and 40 x 5 reads: more than the window.
        blocks = [(pull_id * 7 + 13 * step) % 1024 for step in range(5)]
        locals_ = [(pull_id + step * 2) % 64 for step in range(5)]
        worker.transfer.pull(pull_id, "peer", [Run(r, d, 1) for r, d in zip(blocks, locals_, strict=True)])
    ended = [worker.next_event() for _ in range(40)]
    assert {event.pull_id for event in ended if isinstance(event, PullCompleted)} == set(range(40))
    event = pull(worker, 40, "peer", [Run(block, (block * 3) % 64, 1) for block in range(500, 564)])
    assert event.num_gets == 64
    assert all(np.array_equal(worker.pool.blocks[(b * 3) % 64], block_content(1, b)) for b in range(500, 564))


def test_shared_memory_is_chosen_on_one_host(worker: Worker, peer: Peer) -> None:
    lanes = set(connect(worker, "peer", peer).lanes.split(", "))
    assert lanes
    assert lanes <= {"sysv", "posix", "cma", "xpmem", "knem"}


def test_tcp_where_the_user_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UCX_TLS", "tcp")
    worker = Worker()
    with peer_process(seed=3) as peer:
        assert connect(worker, "peer", peer).lanes == "tcp/lo"
        pull(worker, 1, "peer", [Run(0, 8, 32)])
        assert all(np.array_equal(worker.pool.blocks[8 + b], block_content(3, b)) for b in range(32))
        worker.transfer.close()


def test_a_broken_tcp_connection_fails_the_pull_and_the_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UCX_TLS", "tcp")
    worker = Worker()
    with peer_process(seed=3) as peer:
        connect(worker, "peer", peer)
        peer.pause()
        worker.transfer.pull(1, "peer", [Run(0, 0, 64)])
        peer.kill()
        events = [worker.next_event(), worker.next_event()]
        assert isinstance(events[0], PullFailed), events
        assert isinstance(events[1], PeerFailed), events
        worker.transfer.pull(2, "peer", [Run(0, 0, 1)])
        assert worker.next_event() == PullFailed(2, "engine peer is not connected")
    worker.transfer.close()


def test_the_time_of_posting_is_part_of_a_pull(worker: Worker, peer: Peer) -> None:
    connect(worker, "peer", peer)
    event = pull(worker, 1, "peer", [Run(block, block, 1) for block in range(0, 64, 2)])
    assert 0 < event.post_seconds <= event.seconds


def test_gaps_between_progress_calls_are_counted(worker: Worker, peer: Peer) -> None:
    connect(worker, "peer", peer)
    before = worker.transfer.progress_gaps()
    bounds = [bound for bound, _ in before]
    assert bounds == sorted(set(bounds))
    assert (bounds[0], bounds[-1]) == (1e-6, math.inf)
    pull(worker, 1, "peer", [Run(0, 0, 64)])
    after = worker.transfer.progress_gaps()
    added = [now - then for (_, now), (_, then) in zip(after, before, strict=True)]
    assert min(added) >= 0
    assert sum(added) > 0
    # Sleeping is no gap: while nothing happens, none of seconds appears.
    with pytest.raises(queue.Empty):
        worker.events.get(timeout=1.5)
    pull(worker, 2, "peer", [Run(0, 0, 1)])
    gaps = worker.transfer.progress_gaps()
    assert sum(count for bound, count in gaps if bound > 1.5) == 0


def test_a_target_that_never_gives_up_the_gil_is_still_read(worker: Worker) -> None:
    with peer_process(seed=4) as peer:
        connect(worker, "peer", peer)
        peer.compute()
        pull(worker, 1, "peer", block_runs([9, 3, 4, 5], [0, 1, 2, 3]))
        assert peer.stop_computing.value == 0
        for remote, local in zip([9, 3, 4, 5], [0, 1, 2, 3], strict=True):
            assert np.array_equal(worker.pool.blocks[local], block_content(4, remote))


def test_a_dead_peer_fails_alone(worker: Worker, peer: Peer) -> None:
    connect(worker, "healthy", peer)
    with peer_process(seed=5) as victim:
        connect(worker, "victim", victim)
        victim.pause()  # it cannot answer, so the pulls are in flight for sure
        for pull_id in range(3):
            worker.transfer.pull(pull_id, "victim", [Run(block, block, 1) for block in range(0, 60, 2)])
        victim.kill()
        pull(worker, 10, "healthy", [Run(77, 1, 1)])
        worker.transfer.disconnect("victim")
        worker.transfer.disconnect("victim")
        failed = [worker.next_event() for _ in range(3)]
        assert {event.pull_id for event in failed if isinstance(event, PullFailed)} == {0, 1, 2}
    worker.transfer.pull(11, "victim", [Run(0, 0, 1)])
    assert worker.next_event() == PullFailed(11, "engine victim is not connected")
    pull(worker, 12, "healthy", [Run(78, 2, 1)])
    assert np.array_equal(worker.pool.blocks[2], block_content(1, 78))
    with peer_process(seed=6) as successor:
        connect(worker, "successor", successor)
        pull(worker, 13, "successor", [Run(7, 3, 1)])
        assert np.array_equal(worker.pool.blocks[3], block_content(6, 7))


def test_a_peer_killed_before_the_pull(worker: Worker) -> None:
    with peer_process(seed=5) as victim:
        connect(worker, "victim", victim)
        victim.kill()
        worker.transfer.pull(1, "victim", [Run(0, 0, 64)])
        worker.transfer.disconnect("victim")
        event = worker.next_event()
        assert isinstance(event, PullFailed), event


def test_connecting_to_a_dead_peer_fails_when_disconnected(worker: Worker) -> None:
    with peer_process() as victim:
        victim.kill()
        worker.transfer.connect("victim", victim.worker_address, victim.region)
        worker.transfer.pull(1, "victim", [Run(0, 0, 1)])
        worker.transfer.disconnect("victim")
        events = {type(event): event for event in (worker.next_event(), worker.next_event())}
        assert set(events) == {PullFailed, PeerFailed}


def test_an_idle_connected_pair_takes_no_cpu(worker: Worker) -> None:
    with peer_process() as other:
        connect(worker, "peer", other)
        pull(worker, 1, "peer", [Run(0, 0, 8)])
        before = _cpu_seconds(other.process.pid)
        with pytest.raises(queue.Empty):
            worker.events.get(timeout=2.0)  # the measured window
        # 1 % of the window, and the resolution of the clock
        assert _cpu_seconds(other.process.pid) - before <= 0.02 + 1 / os.sysconf("SC_CLK_TCK")


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_high_offsets_of_pools_beyond_4_gib() -> None:
    num_blocks = 2**32 // BLOCK_BYTES + 1000
    last = range(num_blocks - 3, num_blocks)
    worker = Worker(num_blocks)
    with peer_process(seed=8, num_blocks=num_blocks, blocks=last) as peer:
        connect(worker, "peer", peer)
        local = num_blocks - 10
        pull(worker, 1, "peer", [Run(last.start, local, 3)])
        for step in range(3):
            assert np.array_equal(worker.pool.blocks[local + step], block_content(8, last[step]))
        worker.transfer.close()


def test_two_transfers_in_one_process_read_each_other(worker: Worker) -> None:
    other = Worker()
    worker.pool.blocks[:] = np.arange(64, dtype=np.uint8)[:, None]
    other.pool.blocks[:] = np.arange(100, 164, dtype=np.uint8)[:, None]
    connect(worker, "other", other)
    connect(other, "worker", worker)
    pull(worker, 1, "other", [Run(3, 40, 2)])
    pull(other, 2, "worker", [Run(7, 50, 1)])
    assert worker.pool.blocks[39:43, 0].tolist() == [39, 103, 104, 42]
    assert other.pool.blocks[49:52, -1].tolist() == [149, 7, 151]
    other.transfer.close()


def test_peers_can_be_connected_again_and_again(worker: Worker, peer: Peer) -> None:
    for turn in range(20):
        connect(worker, "peer", peer)
        event = pull(worker, turn, "peer", [Run(turn, 0, 1)])
        assert event.num_gets == 1
        assert np.array_equal(worker.pool.blocks[0], block_content(1, turn))
        if turn % 2:
            worker.transfer.disconnect("peer")


def test_pulls_that_cannot_begin(worker: Worker, peer: Peer) -> None:
    worker.transfer.pull(1, "nobody", [Run(0, 0, 1)])
    assert worker.next_event() == PullFailed(1, "engine nobody is not connected")
    connect(worker, "peer", peer)
    event = pull(worker, 2, "peer", [])
    assert (event.num_bytes, event.num_gets) == (0, 0)
    worker.transfer.pull(3, "peer", [Run(1023, 0, 2)])
    assert worker.next_event() == PullFailed(
        3, "remote blocks 1023 to 1024 are outside a pool of 1024 blocks"
    )
    worker.transfer.pull(4, "peer", [Run(0, 64, 1)])
    assert worker.next_event() == PullFailed(4, "local blocks 64 to 64 are outside a pool of 64 blocks")
    worker.transfer.pull(5, "peer", [Run(0, 0, 1), Run(-1, 1, 1)])
    assert worker.next_event() == PullFailed(5, "remote blocks -1 to -1 are outside a pool of 1024 blocks")
    worker.transfer.pull(6, "peer", [Run(2**62, 0, 1)])
    event = worker.next_event()
    assert isinstance(event, PullFailed), event
    assert "outside a pool of 1024 blocks" in event.reason
    pull(worker, 7, "peer", [Run(0, 0, 1)])


@pytest.mark.parametrize(
    ("field", "names", "sizes", "dtype", "item_size"),
    [
        ("names", ("block", "page"), (1024, BLOCK_BYTES), "uint8", 1),
        ("dtype", ("block", "byte"), (1024, BLOCK_BYTES), "int8", 1),
        ("sizes[byte]", ("block", "byte"), (1024, BLOCK_BYTES // 2), "uint8", 1),
        ("strides[block]", ("block", "byte"), (1024, BLOCK_BYTES), "uint8", 2),
    ],
)
def test_a_pool_of_another_layout_is_refused_by_name(
    worker: Worker,
    peer: Peer,
    field: str,
    names: tuple[str, ...],
    sizes: tuple[int, ...],
    dtype: str,
    item_size: int,
) -> None:
    other = describe_region(
        names,
        sizes,
        item_size=item_size,
        dtype=dtype,
        base_address=peer.region.base_address,
        remote_key=peer.region.remote_key,
    )
    worker.transfer.connect("peer", peer.worker_address, other)
    event = worker.next_event()
    assert isinstance(event, PeerFailed), event
    assert f"KV regions differ in {field}: " in event.reason
    worker.transfer.pull(1, "peer", [Run(0, 0, 1)])
    assert worker.next_event() == PullFailed(1, "engine peer is not connected")
    connect(worker, "peer", peer)


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda whole: b"", id="empty"),
        pytest.param(lambda whole: whole[:5], id="shorter than its checksum"),
        pytest.param(lambda whole: whole[:-1], id="truncated"),
        pytest.param(lambda whole: whole + b"x", id="longer"),
        pytest.param(lambda whole: whole[:8] + bytes([whole[8] ^ 0xF]) + whole[9:], id="another version"),
        pytest.param(lambda whole: bytes(reversed(whole)), id="garbage"),
    ],
)
def test_damaged_addresses_and_keys_are_refused(
    worker: Worker, peer: Peer, damage: Callable[[bytes], bytes]
) -> None:
    worker.transfer.connect("peer", damage(peer.worker_address), peer.region)
    event = worker.next_event()
    assert isinstance(event, PeerFailed), event
    assert re.match("the peer's worker address is (empty|damaged)", event.reason)
    region = msgspec.structs.replace(peer.region, remote_key=damage(peer.region.remote_key))
    worker.transfer.connect("peer", peer.worker_address, region)
    event = worker.next_event()
    assert isinstance(event, PeerFailed), event
    assert re.match("the peer's remote key is (empty|damaged)", event.reason)
    connect(worker, "peer", peer)
    pull(worker, 1, "peer", [Run(3, 0, 1)])


def test_close_fails_what_is_in_flight_and_what_comes_later(peer: Peer) -> None:
    worker = Worker()
    with peer_process() as paused:
        connect(worker, "paused", paused)
        paused.pause()
        worker.transfer.pull(1, "paused", [Run(0, 0, 64)])
        connect(worker, "peer", peer)  # so that the pull has been posted by now
        worker.transfer.close()
        worker.transfer.close()
        worker.transfer.pull(2, "peer", [])
        worker.transfer.connect("other", peer.worker_address, peer.region)
        worker.transfer.disconnect("peer")
        assert worker.next_event() == PullFailed(1, "the transfer is closed")
        assert worker.next_event() == PullFailed(2, "the transfer is closed")
        assert worker.next_event() == PeerFailed("other", "the transfer is closed")
        assert worker.events.empty()
        with pytest.raises(TransferError, match="closed"):
            worker.transfer.register(worker.pool.describe())


def test_a_region_is_registered_once(worker: Worker) -> None:
    assert worker.region.remote_key
    with pytest.raises(TransferError, match="already"):
        worker.transfer.register(worker.pool.describe())


def test_an_advertised_host_of_another_machine_is_refused() -> None:
    with pytest.raises(TransferError, match=r"203\.0\.113\.7"):
        Worker(advertise_host="203.0.113.7")


def test_an_exception_on_the_ucx_thread_is_reported() -> None:
    fatal: queue.SimpleQueue[BaseException] = queue.SimpleQueue()
    broken = RuntimeError("the receiver is broken")

    def deliver(event: object) -> None:
        raise broken

    transfer = UcxTransfer(deliver=deliver, on_fatal=fatal.put)
    transfer.pull(1, "nobody", [Run(0, 0, 1)])
    assert fatal.get(timeout=30) is broken
    transfer.close()


def test_ucx_starts_on_a_thread_that_has_the_context_of_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[object, ...]] = []

    class Loop:
        worker_address = b"address"

        def __init__(self, *_: object, cuda_scratch: int, **__: object) -> None:
            calls.append(("start UCX", threading.current_thread().name, cuda_scratch))

        def run(self) -> None: ...

    def attach_thread() -> None:
        calls.append(("attach", threading.current_thread().name))

    monkeypatch.setattr(ucx_transfer, "load_ucx", lambda path, *, cuda: load_ucx(path))
    monkeypatch.setattr(ucx_transfer, "UcxLoop", Loop)
    cuda = CudaPool(attach_thread, 4096)
    UcxTransfer(deliver=calls.append, on_fatal=calls.append, cuda=cuda).close()
    assert calls == [("attach", "ucx"), ("start UCX", "ucx", 4096)]


def test_a_context_that_cannot_be_attached_is_an_error_of_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def attach_thread() -> None:
        raise TransferError("no such GPU")

    monkeypatch.setattr(ucx_transfer, "load_ucx", lambda path, *, cuda: load_ucx(path))
    with pytest.raises(TransferError, match="no such GPU"):
        UcxTransfer(deliver=print, on_fatal=print, cuda=CudaPool(attach_thread, 4096))


def test_the_first_read_goes_where_it_was_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU that is memory of the GPU; here UCX is let believe that it is none."""
    monkeypatch.setattr(ucx_transfer, "load_ucx", lambda path, *, cuda: load_ucx(path))
    monkeypatch.setattr(ucx_transfer, "ucx_settings", lambda *args, cuda: ucx_settings(*args))
    monkeypatch.setattr(ucx_loop, "UcxWorker", lambda *args, cuda: UcxWorker(*args))
    scratch = np.zeros(2 * WARM_UP_BYTES, np.uint8)
    reader, source = Worker(cuda=CudaPool(lambda: None, scratch.ctypes.data)), Worker()
    source.pool.blocks[:] = 7
    connect(reader, "source", source)
    assert scratch.tolist() == [7] * WARM_UP_BYTES + [0] * WARM_UP_BYTES
    reader.transfer.close()
    source.transfer.close()


def test_a_process_that_forgets_to_close_exits_in_silence() -> None:
    script = """
from ucx_peer import Worker
a, b = Worker(), Worker()
a.transfer.connect("b", b.transfer.worker_address, b.region)
assert type(a.next_event()).__name__ == "PeerConnected"
"""
    environ = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    result = subprocess.run(
        [sys.executable, "-c", script], env=environ, capture_output=True, text=True, timeout=60
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
