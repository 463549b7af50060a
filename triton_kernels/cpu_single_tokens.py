"""What a step of single tokens is about, in memory that stays where it is.

Between two steps of a large model all that Python had in the caches is gone: what is computed anew costs ten
times as much as in a loop of its own. So hardly anything is allocated or called.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pdengine.triton_kernels.cpu_attention import KernelPlan, part_size, pool_strides

NUM_PLAN_WORDS = 16
MIN_TABLE_BLOCKS = 64


class SingleTokens:
    """`plan` describes the tokens written last to the kernels of decode attention."""

    def __init__(self, max_tokens: int, num_heads: int, kv_pool: Tensor) -> None:
        _, self._num_kv_heads, _, _, self._block_size, self._head_dim = kv_pool.shape
        self._max_tokens, self._num_heads = max_tokens, num_heads
        inputs = torch.zeros(5, max_tokens, dtype=torch.int64)
        self.token_ids, self.positions, self.block_ids, self.block_offsets, context_lengths = (
            row.data_ptr() for row in inputs
        )
        self._inputs = inputs.numpy()  # the same memory
        self._words = np.zeros(NUM_PLAN_WORDS, np.int64)
        self._first_parts = np.zeros(max_tokens + 1, np.int64)
        block_bytes, head_bytes = pool_strides(kv_pool)
        self._words[3] = self._first_parts.ctypes.data
        self._words[8:] = (
            context_lengths,
            num_heads,
            self._num_kv_heads,
            self._head_dim,
            kv_pool.dtype == torch.bfloat16,
            self._block_size,
            block_bytes,
            head_bytes,
        )
        self._allocate_parts(max_tokens)
        self._allocate_tables(MIN_TABLE_BLOCKS)
        self.plan = KernelPlan(self._words, self._words.ctypes.data, (self,), in_parallel=True)

    def write(
        self,
        token_ids: Sequence[int],
        context_lengths: Sequence[int],
        block_tables: Sequence[Sequence[int]],
    ) -> bool:
        """The next tokens of some sequences; `context_lengths` count them. Returns whether a context is split
        into parts."""
        block_size = self._block_size
        positions = [length - 1 for length in context_lengths]
        places = [divmod(position, block_size) for position in positions]
        block_ids = [table[index] for table, (index, _) in zip(block_tables, places, strict=True)]
        offsets = [offset for _, offset in places]
        num_tokens = len(token_ids)
        self._inputs[:, :num_tokens] = (token_ids, positions, block_ids, offsets, context_lengths)
        width = max(places)[0] + 1
        if width > self._tables.shape[1]:
            self._allocate_tables(2 * width)
        for row, (table, (last, _)) in enumerate(zip(block_tables, places, strict=True)):
            self._tables[row, : last + 1] = table[: last + 1]
        return self._split(context_lengths)

    def _split(self, context_lengths: Sequence[int]) -> bool:
        """See `plan_decodes`."""
        part_tokens = part_size(sum(context_lengths), self._num_kv_heads, torch.get_num_threads())
        parts, first_parts = [], [0]
        for row, length in enumerate(context_lengths):
            parts += [(row, first, row) for first in range(0, length, part_tokens)]
            first_parts.append(len(parts))
        if len(parts) > len(self._parts):
            self._allocate_parts(2 * len(parts))
        self._parts[: len(parts)] = parts
        self._first_parts[: len(first_parts)] = first_parts
        self._words[0], self._words[2] = len(parts) * self._num_kv_heads, part_tokens
        return len(parts) > len(context_lengths)

    def _allocate_parts(self, count: int) -> None:
        self._parts = np.zeros((count, 3), np.int64)
        self._sums = torch.zeros(count * self._num_heads, self._head_dim)
        self._scales = torch.zeros(count * self._num_heads, 2)
        self._words[1] = self._parts.ctypes.data
        self._words[4:6] = self._sums.data_ptr(), self._scales.data_ptr()

    def _allocate_tables(self, width: int) -> None:
        self._tables = np.zeros((self._max_tokens, width), np.int64)
        self._words[6:8] = self._tables.ctypes.data, width
