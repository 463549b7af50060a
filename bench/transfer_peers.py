"""The two processes of `pdengine bench transfer`: the target offers a pool, the reader pulls from it.

`python -m pdengine.bench.transfer_peers target|reader POOL_BYTES ADVERTISED_HOST mapping|ucx|nixl` takes and
gives the messages of `transfer_messages` as lines of JSON. Both use the pool and the transfer of a worker, or
NIXL in its place.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
from collections.abc import Callable
from time import perf_counter
from typing import TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt

from pdengine.bench.memory_copy import compile_copy
from pdengine.bench.nixl_transfer import NixlTransfer
from pdengine.bench.scatter import UNIT_BYTES, Scatter
from pdengine.bench.transfer_messages import Connected, Measure, Measured, Offer, ProgressGaps, Work
from pdengine.transport.regions import RegionDescriptor, Run, copy_ranges, describe_region
from pdengine.transport.shared_memory import SharedMemory
from pdengine.transport.transfer import PeerConnected, PullCompleted, TransferEvent
from pdengine.transport.two_path_transfer import TwoPathTransfer

EVENT_SECONDS = 60.0

Answer: TypeAlias = Callable[[msgspec.Struct], None]


class WrongBytes(RuntimeError):
    """A pull completed, but what has arrived is not what the target holds."""


class Peer:
    """A worker's transfer with its pool, whose units begin and end with their number plus one."""

    def __init__(self, pool_bytes: int, advertise_host: str, method: str) -> None:
        self.memory = SharedMemory(pool_bytes)
        self.words = _words(self.memory)
        self.events: queue.SimpleQueue[TransferEvent | BaseException] = queue.SimpleQueue()
        self.transfer: TwoPathTransfer | NixlTransfer
        if method == "nixl":
            self.transfer = NixlTransfer(deliver=self.events.put)
            self.progress_gaps = self.transfer.progress_gaps
        else:
            self.transfer = TwoPathTransfer(
                deliver=self.events.put,
                on_fatal=self.events.put,
                advertise_host=advertise_host,
                same_host="mapping" if method == "mapping" else "ucx",
            )
            self.progress_gaps = self.transfer.ucx.progress_gaps
        self.region = self.transfer.register(_describe(self.memory), self.memory)

    def next_event(self) -> TransferEvent | BaseException:
        return self.events.get(timeout=EVENT_SECONDS)


def run_target(peer: Peer, answer: Answer) -> None:
    """Offer the pool, and do on the main thread what the messages ask for, until stdin ends."""
    peer.words[:] = _numbers(peer.words)
    answer(Offer(peer.transfer.worker_address, peer.region, peer.transfer.version))
    messages: queue.SimpleQueue[Work | None] = queue.SimpleQueue()

    def read_messages() -> None:
        for line in sys.stdin.buffer:
            messages.put(msgspec.json.decode(line, type=Work))
        messages.put(None)

    threading.Thread(target=read_messages, daemon=True).start()
    before = _gap_counts(peer)
    work: Callable[[], None] | None = None
    while True:
        try:
            message = messages.get(block=work is None)
        except queue.Empty:
            assert work is not None
            work()
            continue
        if message is None:
            return
        after = _gap_counts(peer)
        answer(_progress_gaps(peer, after - before))
        before = after
        work = _work(message.kind)


def run_reader(peer: Peer, answer: Answer) -> None:
    """Connect to the target of the first message, then measure what the others ask for, until stdin ends."""
    source = SharedMemory(peer.memory.nbytes)
    _words(source)[:] = -_numbers(_words(source))
    peer.words[:] = 0
    copy = compile_copy()
    offer = msgspec.json.decode(sys.stdin.buffer.readline(), type=Offer)
    peer.transfer.connect("target", offer.worker_address, offer.region)
    connected = peer.next_event()
    if not isinstance(connected, PeerConnected):
        raise SystemExit(f"the target cannot be reached: {connected}")
    # Once without looking at the clock: pages, caches and the speed of a TCP connection settle.
    whole_pool = Scatter(peer.memory.nbytes, UNIT_BYTES, peer.memory.nbytes // UNIT_BYTES, longest_run=0)
    _measure(peer, _describe(source), copy, Measure(whole_pool, repetitions=2))
    answer(Connected(connected.lanes))
    for line in sys.stdin.buffer:
        answer(_measure(peer, _describe(source), copy, msgspec.json.decode(line, type=Measure)))


def _measure(
    peer: Peer,
    source: RegionDescriptor,
    copy: Callable[[npt.NDArray[np.int64]], None],
    task: Measure,
) -> Measured:
    """Pull and copy in turns, so that what else the machine does hits both."""
    measured = Measured([], [], [], [])
    for repetition in range(task.repetitions):
        runs = task.scatter.runs(seed=repetition)
        started_at = perf_counter()
        peer.transfer.pull(repetition, "target", runs)
        event = peer.next_event()
        measured.seconds.append(perf_counter() - started_at)
        if not isinstance(event, PullCompleted):
            raise SystemExit(f"a pull failed: {event}")
        _check(peer, runs)
        measured.post_seconds.append(event.post_seconds)
        measured.num_gets.append(event.num_gets)
        ranges = copy_ranges(source, peer.region, runs)
        started_at = perf_counter()
        copy(ranges)
        measured.copy_seconds.append(perf_counter() - started_at)
    return measured


def _check(peer: Peer, runs: list[Run]) -> None:
    """Raise WrongBytes unless every unit of the runs has arrived; the copies in between undo it."""
    for run in runs:
        arrived = peer.words[run.local_block : run.local_block + run.count]
        expected = np.arange(run.remote_block, run.remote_block + run.count)[:, None] + 1
        if not (arrived[:, [0, -1]] == expected).all():
            raise WrongBytes(f"{run} has not brought the target's bytes")


def _work(kind: str) -> Callable[[], None] | None:
    """About a millisecond of work."""
    if kind == "torch":
        import torch

        torch.set_num_threads(1)
        matrix = torch.ones(128, 128)

        def multiply() -> None:
            for _ in range(10):
                torch.mm(matrix, matrix)

        return multiply
    return {"idle": None, "python": _count}[kind]


def _count() -> None:
    turns = 0
    while turns < 20_000:
        turns += 1


def _gap_counts(peer: Peer) -> npt.NDArray[np.int64]:
    return np.array([count for _, count in peer.progress_gaps()], np.int64)


def _progress_gaps(peer: Peer, counts: npt.NDArray[np.int64]) -> ProgressGaps:
    bounds = [bound for bound, _ in peer.progress_gaps()]
    total = int(counts.sum())
    bucket = int(np.searchsorted(np.cumsum(counts), 0.99 * total))
    is_known = total > 0 and bucket < len(bounds) - 1
    return ProgressGaps(total, bounds[bucket] if is_known else None)


def _describe(memory: SharedMemory) -> RegionDescriptor:
    sizes = (memory.nbytes // UNIT_BYTES, UNIT_BYTES)
    return describe_region(("block", "byte"), sizes, item_size=1, dtype="uint8", base_address=memory.address)


def _words(memory: SharedMemory) -> npt.NDArray[np.int64]:
    """[units, words per unit]"""
    return np.frombuffer(memory.buffer, np.int64).reshape(-1, UNIT_BYTES // 8)


def _numbers(words: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """[units, 1]: the number of each unit, plus one"""
    return np.arange(1, len(words) + 1)[:, None]


def main() -> None:
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what libraries print must not come between the answers
    sys.stdout = sys.stderr

    def answer(message: msgspec.Struct) -> None:
        answers.write(msgspec.json.encode(message) + b"\n")

    side, pool_bytes, advertise_host, method = sys.argv[1:]
    peer = Peer(int(pool_bytes), advertise_host, method)
    try:
        run_target(peer, answer) if side == "target" else run_reader(peer, answer)
    finally:
        peer.transfer.close()


if __name__ == "__main__":
    main()
