"""What attention over the paged KV cache needs to know of a step, on every device.

The cache is a single tensor `[num_blocks, num_kv_heads, num_layers, 2, block_size, head_dim]` (2 = K, V): all
layers of a block are contiguous, so that a block travels between workers in one read, and the tile that a
kernel reads (`[block_size, head_dim]`) is contiguous too. Paging follows PagedAttention (arXiv 2309.06180).
"""

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class AttentionBatch:
    """Where the tokens of one step live in the paged KV cache.

    The tokens of a sequence are consecutive in the batch and are the last ones of its context. Every sequence
    has at least one new token.
    """

    block_ids: Tensor  # [tokens] int64: block each new token's K and V are stored in
    block_offsets: Tensor  # [tokens] int64: place inside that block
    block_tables: Tensor  # [sequences, max_blocks] int64, padded with 0
    query_starts: Tensor  # [sequences + 1] int64, exclusive prefix sums of the new tokens per sequence
    context_lengths: Tensor  # [sequences] int64: tokens in the cache after this step's store (cached + new)

    # The same on the host, from which launches are planned: to read a tensor of a GPU is to wait for it.
    query_starts_on_host: list[int]
    context_lengths_on_host: list[int]
    num_decodes: int  # sequences [0, num_decodes) have one new token each; later ones may have one, too

    # What an implementation has planned for this step, by the shape of the heads; the layers share it.
    plans: dict[Hashable, Any] = field(default_factory=dict, repr=False, compare=False)
