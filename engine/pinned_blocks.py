"""Which blocks of the KV cache are bound until another worker has pulled them."""

from collections import Counter
from collections.abc import Iterable


class PinnedBlocks:
    """Blocks of prompts that are computed for other workers, running or leased; a shared one counts once."""

    def __init__(self) -> None:
        self._holders: Counter[int] = Counter()

    def __len__(self) -> int:
        return len(self._holders)

    def pin(self, block_ids: Iterable[int]) -> None:
        self._holders.update(block_ids)

    def unpin(self, block_ids: Iterable[int]) -> None:
        for block_id in block_ids:
            if self._holders[block_id] == 1:
                del self._holders[block_id]
            else:
                assert self._holders[block_id] > 1, "unpinned what is not pinned"
                self._holders[block_id] -= 1

    def num_unpinned(self, block_ids: Iterable[int]) -> int:
        """How many of `block_ids` are not pinned."""
        return sum(block_id not in self._holders for block_id in block_ids)
