"""Which blocks of the KV cache hold nothing, as runs of neighbours.

Blocks are handed out in runs that are as consecutive as possible, because a pull moves one run of
neighbouring blocks with a single read. Free runs are kept coalesced and sorted by length, so allocating costs
the same in a pool of a hundred blocks and of a hundred thousand.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable


class FreeBlocks:
    """Allocates block ids 0 .. num_blocks - 1. Not thread-safe: it belongs to the engine thread."""

    def __init__(self, num_blocks: int) -> None:
        assert num_blocks > 0
        self.num_blocks = num_blocks
        self.num_free = num_blocks
        self._allocated = bytearray(num_blocks)
        self._by_length: list[tuple[int, int]] = []  # (length, start) of every free run, sorted
        self._length_at: dict[int, int] = {}  # start of a free run -> its length
        self._start_before: dict[int, int] = {}  # end (exclusive) of a free run -> its start
        self._insert_run(0, num_blocks)

    def allocate(self, count: int) -> list[int] | None:
        """`count` blocks in as few runs as the best fit gives, or None if fewer are free."""
        if count > self.num_free:
            return None
        block_ids: list[int] = []
        while len(block_ids) < count:
            missing = count - len(block_ids)
            # The shortest run that is long enough, or else the longest one, whole.
            index = min(bisect_left(self._by_length, (missing, 0)), len(self._by_length) - 1)
            length, start = self._by_length[index]
            taken = min(length, missing)
            self._remove_run(start)
            if taken < length:
                self._insert_run(start + taken, length - taken)
            block_ids.extend(range(start, start + taken))
        for block_id in block_ids:
            self._allocated[block_id] = 1
        self.num_free -= count
        return block_ids

    def free(self, block_ids: Iterable[int]) -> None:
        """Give blocks back. Freeing a block that is not allocated is a defect of the caller."""
        for start, length in _runs(sorted(block_ids)):
            assert self._allocated[start : start + length] == b"\x01" * length, "freed what was not allocated"
            self._allocated[start : start + length] = bytes(length)
            self.num_free += length
            self._insert_coalesced(start, length)

    def is_free(self, block_id: int) -> bool:
        return not self._allocated[block_id]

    def check(self) -> None:
        """Assert that every block is either allocated or in exactly one maximal free run."""
        runs = sorted(self._length_at.items())
        assert self._by_length == sorted((length, start) for start, length in runs)
        assert self._start_before == {start + length: start for start, length in runs}
        free = [block for start, length in runs for block in range(start, start + length)]
        assert len(free) == len(set(free)) == self.num_free
        assert all(not self._allocated[block] for block in free)
        assert sum(self._allocated) + self.num_free == self.num_blocks
        assert all(start not in self._start_before for start, _ in runs), "neighbouring runs were not joined"

    def _insert_coalesced(self, start: int, length: int) -> None:
        if start in self._start_before:
            before = self._start_before[start]
            length += self._remove_run(before)
            start = before
        if start + length in self._length_at:
            length += self._remove_run(start + length)
        self._insert_run(start, length)

    def _insert_run(self, start: int, length: int) -> None:
        insort(self._by_length, (length, start))
        self._length_at[start] = length
        self._start_before[start + length] = start

    def _remove_run(self, start: int) -> int:
        length = self._length_at.pop(start)
        del self._start_before[start + length]
        del self._by_length[bisect_left(self._by_length, (length, start))]
        return length


def _runs(sorted_ids: list[int]) -> Iterable[tuple[int, int]]:
    """(start, length) of each run of consecutive ids."""
    start = 0
    for index in range(1, len(sorted_ids) + 1):
        if index == len(sorted_ids) or sorted_ids[index] != sorted_ids[index - 1] + 1:
            yield sorted_ids[start], index - start
            start = index
