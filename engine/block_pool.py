"""Who holds which block of the KV cache, and what can be found in it.

A block is free, held by one or more sequences, or *idle*: nobody holds it, but it still has the keys and
values of a prefix that is known by name, and is given back to whoever asks for that prefix first. Idle blocks
count as free: when nothing else is left, the one that was not used for the longest time is forgotten and
handed out (LRU, as in vLLM's automatic prefix caching).
"""

from collections import OrderedDict
from collections.abc import Sequence

from pdengine.engine.free_blocks import FreeBlocks


class BlockPool:
    """Blocks 0 .. num_blocks - 1, counted by references. Not thread-safe: it belongs to the engine thread.

    added, removed: names of blocks that can, or can no longer be found, since somebody last cleared them.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.added: list[bytes] = []
        self.removed: list[bytes] = []
        self._free = FreeBlocks(num_blocks)
        self._references = [0] * num_blocks
        self._name_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # the least recently used first

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated, idle ones included."""
        return self._free.num_free + len(self._idle)

    @property
    def num_idle(self) -> int:
        return len(self._idle)

    def allocate(self, count: int) -> list[int] | None:
        """`count` blocks, each held once, in as few runs as the best fit gives; None if fewer are free."""
        if count > self.num_free:
            return None
        forgotten = [self._forget_oldest() for _ in range(count - self._free.num_free)]
        block_ids = self._free.allocate(count - len(forgotten))
        assert block_ids is not None
        if forgotten:
            block_ids = sorted(block_ids + forgotten)  # all that were free are among them
        for block_id in block_ids:
            self._references[block_id] = 1
        return block_ids

    def free(self, block_ids: Sequence[int]) -> None:
        """Let go of blocks. Of those that nobody holds now, the named ones are idle, the last one of them the
        first to be forgotten: a prefix is of more use than what follows it."""
        unnamed = []
        for block_id in reversed(block_ids):
            assert self._references[block_id] > 0, "freed what was not allocated"
            self._references[block_id] -= 1
            if self._references[block_id] == 0:
                if block_id in self._name_of:
                    self._idle[block_id] = None
                else:
                    unnamed.append(block_id)
        if unnamed:
            self._free.free(unnamed)

    def share(self, block_ids: Sequence[int]) -> None:
        """Hold blocks once more, that are held or idle."""
        for block_id in block_ids:
            if self._references[block_id] == 0:
                del self._idle[block_id]
            self._references[block_id] += 1

    def num_holders(self, block_id: int) -> int:
        return self._references[block_id]

    def is_writable(self, block_id: int) -> bool:
        """Whether it has one holder and no name: what others may read is never written again."""
        return self._references[block_id] == 1 and block_id not in self._name_of

    # --------------------------------------------------------------------------------- prefixes

    def find(self, names: Sequence[bytes]) -> list[int]:
        """The blocks of the longest known prefix: those of the leading `names`. `share` them to hold them."""
        block_ids = []
        for name in names:
            block_id = self._block_of.get(name)
            if block_id is None:
                break
            block_ids.append(block_id)
        return block_ids

    def num_free_without(self, block_ids: Sequence[int]) -> int:
        """Blocks that could be allocated once all of `block_ids` are held."""
        return self.num_free - sum(block_id in self._idle for block_id in block_ids)

    def name(self, block_id: int, name: bytes) -> None:
        """Let a held block, which is full and will not be written again, be found under `name`, unless
        another one with the same contents is."""
        assert self._references[block_id] > 0
        if name not in self._block_of and block_id not in self._name_of:
            self._block_of[name] = block_id
            self._name_of[block_id] = name
            self.added.append(name)

    def names(self) -> list[bytes]:
        """All names under which a block can be found now."""
        return list(self._block_of)

    def _forget_oldest(self) -> int:
        """The idle block that was not used for the longest time: it cannot be found any more."""
        block_id, _ = self._idle.popitem(last=False)
        name = self._name_of.pop(block_id)
        del self._block_of[name]
        self.removed.append(name)
        return block_id

    def check(self) -> None:
        """Assert that every block is free, idle or held, and that names lead to the blocks that have them."""
        self._free.check()
        held = {block_id for block_id, count in enumerate(self._references) if count > 0}
        idle = set(self._idle)
        assert min(self._references) >= 0
        assert not held & idle
        assert len(held) + len(idle) + self._free.num_free == self.num_blocks
        assert all(not self._free.is_free(block_id) for block_id in held | idle)
        assert set(self._name_of) >= idle
        assert set(self._name_of) <= held | idle
        assert {name: block_id for block_id, name in self._name_of.items()} == self._block_of
