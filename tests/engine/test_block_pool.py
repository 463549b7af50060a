"""The block pool: references, idle prefixes, and what can be found."""

from __future__ import annotations

from collections import Counter, OrderedDict

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from lines_executed import lines_executed

from pdengine.engine import block_pool, free_blocks
from pdengine.engine.block_pool import BlockPool

NAMES = [bytes([letter]) for letter in range(12)]


class PoolAgainstModel(RuleBasedStateMachine):
    """The pool beside counters of holders, and an order of idle blocks."""

    @initialize(num_blocks=st.integers(1, 12))
    def build(self, num_blocks: int) -> None:
        self.pool = BlockPool(num_blocks)
        self.num_blocks = num_blocks
        self.held: list[list[int]] = []
        self.name_of: dict[int, bytes] = {}
        self.idle: OrderedDict[int, None] = OrderedDict()
        self.told: set[bytes] = set()

    @property
    def holders(self) -> Counter[int]:
        return Counter(block_id for block_ids in self.held for block_id in block_ids)

    @rule(count=st.integers(0, 13))
    def allocate(self, count: int) -> None:
        holders = self.holders
        empty = {b for b in range(self.num_blocks) if not holders[b] and b not in self.idle}
        block_ids = self.pool.allocate(count)
        if count > len(empty) + len(self.idle):
            assert block_ids is None
            return
        assert block_ids is not None
        assert len(block_ids) == len(set(block_ids)) == count
        # Idle ones only when nothing else is left, and then those that were not used for the longest time.
        forgotten = list(self.idle)[: max(0, count - len(empty))]
        assert set(block_ids) - empty == set(forgotten)
        for block_id in forgotten:
            del self.idle[block_id], self.name_of[block_id]
        self.held.append(block_ids)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        block_ids = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.pool.free(block_ids)
        holders = self.holders
        for block_id in reversed(block_ids):
            if not holders[block_id] and block_id in self.name_of:
                self.idle[block_id] = None

    @rule(names=st.lists(st.sampled_from(NAMES), max_size=4, unique=True))
    def share_what_is_found(self, names: list[bytes]) -> None:
        block_of = {name: block_id for block_id, name in self.name_of.items()}
        found = self.pool.find(names)
        known = [name in block_of for name in names]
        num_known = known.index(False) if False in known else len(known)
        assert found == [block_of[name] for name in names[:num_known]]
        num_free = self.pool.num_free_without(found)
        self.pool.share(found)
        assert self.pool.num_free == num_free
        for block_id in found:
            self.idle.pop(block_id, None)
        self.held.append(found)

    @precondition(lambda self: any(self.held))
    @rule(data=st.data(), name=st.sampled_from(NAMES))
    def give_a_name(self, data: st.DataObject, name: bytes) -> None:
        block_id = data.draw(st.sampled_from(sorted(self.holders)))
        self.pool.name(block_id, name)
        if block_id not in self.name_of and name not in self.name_of.values():
            self.name_of[block_id] = name

    @rule()
    def tell(self) -> None:
        """Whoever clears the lists knows what can be found: removed first, then added, but for what is gone
        again."""
        pool = self.pool
        self.told -= set(pool.removed)
        self.told |= {name for name in pool.added if pool.find([name])}
        assert self.told == set(self.name_of.values())
        pool.added.clear()
        pool.removed.clear()

    @invariant()
    def agrees_with_the_model(self) -> None:
        pool, holders = self.pool, self.holders
        pool.check()
        assert [pool.num_holders(b) for b in range(self.num_blocks)] == [
            holders[b] for b in range(self.num_blocks)
        ]
        assert pool.num_free == self.num_blocks - len(holders)
        assert pool.num_idle == len(self.idle)
        assert set(pool.names()) == set(self.name_of.values())
        for block_id in range(self.num_blocks):
            only_one = holders[block_id] == 1 and block_id not in self.name_of
            assert pool.is_writable(block_id) == only_one


TestPoolAgainstModel = PoolAgainstModel.TestCase
TestPoolAgainstModel.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def pool_of_idle_blocks(num_blocks: int) -> BlockPool:
    """Block i can be found under the name i; 0 was used last."""
    pool = BlockPool(num_blocks)
    block_ids = pool.allocate(num_blocks)
    assert block_ids == list(range(num_blocks))
    for block_id in block_ids:
        pool.name(block_id, str(block_id).encode())
    pool.free(block_ids)
    return pool


def test_the_end_of_a_prefix_is_forgotten_before_its_beginning() -> None:
    pool = pool_of_idle_blocks(4)
    assert pool.allocate(2) == [2, 3]
    assert pool.find([b"0", b"1", b"2"]) == [0, 1]
    assert pool.removed == [b"3", b"2"]


def test_what_is_used_again_is_kept_longer() -> None:
    pool = pool_of_idle_blocks(4)
    pool.share([3])
    pool.free([3])
    assert pool.allocate(3) == [0, 1, 2]
    assert pool.find([b"3"]) == [3]


def test_forgotten_blocks_and_free_ones_are_handed_out_as_one_run() -> None:
    pool = BlockPool(6)
    first, second = pool.allocate(3), pool.allocate(3)
    assert (first, second) == ([0, 1, 2], [3, 4, 5])
    pool.name(1, b"name")
    pool.free([0, 1, 2])
    assert pool.allocate(3) == [0, 1, 2]


def test_the_same_contents_are_found_once() -> None:
    pool = BlockPool(2)
    pool.allocate(2)
    pool.name(0, b"name")
    pool.name(1, b"name")
    pool.name(0, b"other")
    assert pool.find([b"name"]) == [0]
    assert pool.find([b"other"]) == []
    pool.free([1])
    assert pool.num_idle == 0
    assert pool.added == [b"name"]


def test_freeing_more_often_than_it_is_held_is_a_defect() -> None:
    pool = BlockPool(2)
    pool.allocate(1)
    pool.share([0])
    pool.free([0])
    pool.free([0])
    with pytest.raises(AssertionError, match="not allocated"):
        pool.free([0])


def test_only_held_blocks_get_names() -> None:
    with pytest.raises(AssertionError):
        BlockPool(2).name(0, b"name")


def test_too_much_changes_nothing() -> None:
    pool = pool_of_idle_blocks(4)
    assert pool.allocate(5) is None
    assert pool.num_idle == pool.num_free == 4
    assert pool.removed == []


@pytest.mark.parametrize("count", [1, 8, 50])
def test_work_does_not_grow_with_the_pool(count: int) -> None:
    def use(pool: BlockPool) -> None:
        block_ids = pool.allocate(count)
        assert block_ids is not None
        pool.share(block_ids)
        pool.name(block_ids[0], b"new")
        assert pool.find([b"new"])
        pool.free(block_ids)
        pool.free(block_ids)

    small, large = pool_of_idle_blocks(320), pool_of_idle_blocks(100_000)
    work = lines_executed(lambda: use(small), block_pool, free_blocks)
    assert work > 0
    assert lines_executed(lambda: use(large), block_pool, free_blocks) == work
    large.check()
