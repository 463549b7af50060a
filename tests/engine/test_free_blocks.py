"""Free blocks: none twice, none lost, and runs as long as the free ones allow."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from lines_executed import lines_executed

from pdengine.engine import free_blocks
from pdengine.engine.free_blocks import FreeBlocks


def run_lengths(block_ids: list[int]) -> list[int]:
    """Lengths of the runs of consecutive ids, in order."""
    lengths = [1] if block_ids else []
    for previous, current in pairwise(block_ids):
        if current == previous + 1:
            lengths[-1] += 1
        else:
            lengths.append(1)
    return lengths


def fewest_runs(free_runs: list[int], count: int) -> int:
    """How many free runs, longest first, it takes to get `count` blocks."""
    runs = 0
    for length in sorted(free_runs, reverse=True):
        if count <= 0:
            break
        count -= length
        runs += 1
    return runs


class FreeBlocksAgainstModel(RuleBasedStateMachine):
    """Beside a plain set of free blocks."""

    @initialize(num_blocks=st.integers(1, 40))
    def build(self, num_blocks: int) -> None:
        self.pool = FreeBlocks(num_blocks)
        self.free = set(range(num_blocks))
        self.owned: list[int] = []

    @rule(count=st.integers(0, 42))
    def allocate(self, count: int) -> None:
        free_runs = run_lengths(sorted(self.free))
        block_ids = self.pool.allocate(count)
        if count > len(self.free):
            assert block_ids is None
            return
        assert block_ids is not None
        assert len(block_ids) == len(set(block_ids)) == count
        assert self.free.issuperset(block_ids)
        # Neighbours in the list may come from two free runs, but never from more than it takes.
        assert len(run_lengths(block_ids)) <= fewest_runs(free_runs, count)
        if count in free_runs:
            remaining = run_lengths(sorted(self.free.difference(block_ids)))
            assert len(remaining) == len(free_runs) - 1, "a run that fits exactly is taken whole"
        self.free.difference_update(block_ids)
        self.owned.extend(block_ids)

    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        """Any part of what is allocated, in any order, whoever got it."""
        count = data.draw(st.integers(0, len(self.owned)))
        order = data.draw(st.permutations(self.owned))
        returned, self.owned = order[:count], order[count:]
        self.pool.free(returned)
        self.free.update(returned)

    @invariant()
    def agrees_with_the_model(self) -> None:
        self.pool.check()
        assert self.pool.num_free == len(self.free)

    def teardown(self) -> None:
        self.pool.free(self.owned)
        self.pool.check()
        assert self.pool.allocate(self.pool.num_blocks) == list(range(self.pool.num_blocks))


TestFreeBlocksAgainstModel = FreeBlocksAgainstModel.TestCase
TestFreeBlocksAgainstModel.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_best_fit_takes_the_shortest_run_that_is_long_enough() -> None:
    pool = FreeBlocks(20)
    pool.allocate(20)
    pool.free([*range(0, 6), *range(8, 11), *range(14, 18)])
    assert pool.allocate(3) == [8, 9, 10]
    assert pool.allocate(4) == [14, 15, 16, 17]
    assert pool.allocate(2) == [0, 1]


def test_without_a_long_run_the_longest_comes_first_and_the_rest_fits_best() -> None:
    pool = FreeBlocks(20)
    pool.allocate(20)
    pool.free([*range(0, 5), *range(8, 10), *range(14, 17)])
    assert pool.allocate(7) == [0, 1, 2, 3, 4, 8, 9]


def test_too_much_changes_nothing() -> None:
    pool = FreeBlocks(4)
    pool.allocate(1)
    assert pool.allocate(4) is None
    assert pool.num_free == 3
    pool.check()


@pytest.mark.parametrize("block_ids", [[2], [0, 0], [1, 2], [8], [-1]])
def test_freeing_what_is_not_allocated_is_a_defect(block_ids: list[int]) -> None:
    pool = FreeBlocks(8)
    assert pool.allocate(2) == [0, 1]
    with pytest.raises(AssertionError, match="not allocated"):
        pool.free(block_ids)


def test_check_notices_a_lost_block() -> None:
    pool = FreeBlocks(8)
    pool.allocate(2)
    pool.num_free += 1
    with pytest.raises(AssertionError):
        pool.check()


def fragmented_pool(num_blocks: int) -> FreeBlocks:
    """Every second stretch of 8 blocks is free, so no run is longer than 8."""
    pool = FreeBlocks(num_blocks)
    pool.allocate(num_blocks)
    pool.free(block for block in range(num_blocks) if block // 8 % 2)
    return pool


@pytest.mark.parametrize("count", [1, 8, 50])
def test_work_does_not_grow_with_the_pool(count: int) -> None:
    def allocate_and_free(pool: FreeBlocks) -> None:
        block_ids = pool.allocate(count)
        assert block_ids is not None
        pool.free(block_ids)

    small, large = fragmented_pool(320), fragmented_pool(100_000)
    work = lines_executed(lambda: allocate_and_free(small), free_blocks)
    assert work > 0
    assert lines_executed(lambda: allocate_and_free(large), free_blocks) == work
    large.check()


def test_a_hundred_thousand_blocks_join_again() -> None:
    pool = fragmented_pool(100_000)
    pool.free(block for block in range(100_000) if block // 8 % 2 == 0)
    pool.check()
    assert pool.allocate(100_000) == list(range(100_000))
