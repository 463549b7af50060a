"""Pages of the pool are there before a step writes to them, and no more of them than that and a little."""

from __future__ import annotations

import mmap
import threading
from pathlib import Path

import pytest
from engine_worker import DEADLINE_SECONDS, EngineWorker, TokenRunner

from pdengine.engine.pool_pages import PIECE_BYTES, PoolPages
from pdengine.engine.sequence import Mode, Sequence
from pdengine.engine.step import Chunk
from pdengine.transport.memory_transfer import Fabric
from pdengine.transport.messages import SamplingParams
from pdengine.transport.shared_memory import SharedMemory

BLOCK_SIZE, BLOCK_BYTES = 4, 6_000  # blocks that do not end where pages do


class Kernel:
    """Remembers what it was asked for."""

    def __init__(self, *, can_populate: bool = True) -> None:
        self.calls: list[tuple[int, int]] = []
        self._can_populate = can_populate
        self._called = threading.Condition()

    def populate(self, address: int, num_bytes: int) -> bool:
        with self._called:
            self.calls.append((address, num_bytes))
            self._called.notify_all()
        return self._can_populate

    @property
    def num_bytes(self) -> int:
        return sum(num_bytes for _, num_bytes in self.calls)

    def wait_for(self, num_bytes: int) -> None:
        with self._called:
            assert self._called.wait_for(lambda: self.num_bytes >= num_bytes, DEADLINE_SECONDS)


def make_pages(kernel: Kernel, *, num_blocks: int = 1000, ahead_blocks: int = 0) -> PoolPages:
    return PoolPages(
        0,
        num_blocks=num_blocks,
        block_bytes=BLOCK_BYTES,
        block_size=BLOCK_SIZE,
        ahead_bytes=ahead_blocks * BLOCK_BYTES,
        populate=kernel.populate,
    )


def chunk(block_ids: list[int], num_computed: int, num_tokens: int) -> Chunk:
    sequence = Sequence(
        request_id="a",
        attempt=1,
        mode=Mode.WHOLE,
        sampling=SamplingParams(max_tokens=1),
        num_prompt_tokens=100,
        token_ids=[1] * 100,
    )
    sequence.block_ids, sequence.num_computed = block_ids, num_computed
    return Chunk(sequence, num_tokens)


def test_a_step_gets_the_pages_up_to_the_last_block_that_it_writes_once() -> None:
    kernel = Kernel()
    pages = make_pages(kernel)
    pages.use([chunk([0, 1, 2, 50], 0, 9), chunk([9, 8, 99], 4, 4)])  # blocks 3 of the one and 99 wait
    assert kernel.calls == [(0, 9 * BLOCK_BYTES)]
    pages.use([chunk([0, 1, 2, 50], 9, 3)])
    assert len(kernel.calls) == 1
    pages.use([chunk([0, 1, 2, 50], 12, 1)])
    assert kernel.calls[1:] == [(9 * BLOCK_BYTES, 42 * BLOCK_BYTES)]


def test_pages_are_taken_ahead_in_pieces_up_to_a_limit_beyond_what_is_used() -> None:
    kernel = Kernel()
    pages = make_pages(kernel, ahead_blocks=100)
    while pages.populate_ahead():
        pass
    assert [size for _, size in kernel.calls] == [PIECE_BYTES, PIECE_BYTES, 600_000 - 2 * PIECE_BYTES]
    assert not pages.populate_ahead()
    pages.use([chunk([49], 0, 1)])
    assert len(kernel.calls) == 3
    assert pages.populate_ahead()
    while pages.populate_ahead():
        pass
    assert sum(kernel.calls[-1]) == 150 * BLOCK_BYTES


def test_nothing_beyond_the_end_of_the_pool_is_taken() -> None:
    kernel = Kernel()
    pages = make_pages(kernel, num_blocks=10, ahead_blocks=100)
    assert not pages.populate_ahead()
    assert not pages.populate_ahead()
    pages.use([chunk([9], 0, 4)])
    assert kernel.calls == [(0, 10 * BLOCK_BYTES)]


def test_a_kernel_that_cannot_is_asked_once() -> None:
    kernel = Kernel(can_populate=False)
    pages = make_pages(kernel, ahead_blocks=100)
    assert not pages.populate_ahead()
    pages.use([chunk([9], 0, 4)])
    assert len(kernel.calls) == 1


def test_an_engine_takes_pages_before_it_computes_and_while_it_waits() -> None:
    kernel, runner = Kernel(), TokenRunner(256, BLOCK_SIZE)
    worker = EngineWorker(
        Fabric(),
        "worker",
        runner=runner,
        region=runner.describe(),
        block_size=BLOCK_SIZE,
        max_batch_tokens=32,
        pages=make_pages(kernel, num_blocks=256, ahead_blocks=2),
    )
    kernel.wait_for(2 * BLOCK_BYTES)
    runner.hold()
    worker.whole("request", list(range(1, 18)), max_tokens=2)
    runner.wait_until_held()
    assert kernel.num_bytes == 5 * BLOCK_BYTES
    runner.release()
    assert len(worker.collect(1)["request"]) == 2
    kernel.wait_for(7 * BLOCK_BYTES)
    worker.stop()
    assert kernel.num_bytes == 7 * BLOCK_BYTES


def _resident_bytes(address: int) -> int:
    """Of the mapping that begins at `address`."""
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    for line in lines:
        if line.startswith(f"{address:x}-"):
            return next(int(rest.split()[1]) * 1024 for rest in lines if rest.startswith("Rss:"))
    raise AssertionError("there is no such mapping")


@pytest.mark.parametrize("num_blocks", [1, 5, 64])
def test_the_real_kernel_keeps_what_is_written(num_blocks: int) -> None:
    memory = SharedMemory(64 * BLOCK_BYTES)
    memory.buffer[:5] = b"first"
    pages = PoolPages(
        memory.address, num_blocks=64, block_bytes=BLOCK_BYTES, block_size=BLOCK_SIZE, ahead_bytes=0
    )
    for block in range(num_blocks):
        pages.use([chunk([block], 0, BLOCK_SIZE)])
    resident = _resident_bytes(memory.address)
    assert num_blocks * BLOCK_BYTES <= resident < num_blocks * BLOCK_BYTES + mmap.PAGESIZE
    assert memory.buffer[:6] == b"first\0"
