"""Attention over the paged KV cache: the one place that picks an implementation for a device.

The cache is a single tensor `[num_blocks, num_kv_heads, num_layers, 2, block_size, head_dim]` (2 = K, V): all
layers of a block are contiguous, so that a block travels between workers in one read, and the tile that a
kernel reads (`[block_size, head_dim]`) is contiguous too. Paging follows PagedAttention (arXiv 2309.06180).

Every device takes the torch path today. Our Triton kernels come next and are picked here, by the device of
`kv_pool`; callers do not change.
"""

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from pdengine.triton_kernels import torch_attention


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

    @cached_property
    def query_starts_on_host(self) -> list[int]:
        """Copied once per step: every layer needs it, and each copy from a GPU waits for its kernels."""
        return [int(start) for start in self.query_starts.tolist()]

    @cached_property
    def context_lengths_on_host(self) -> list[int]:
        return [int(length) for length in self.context_lengths.tolist()]


def store_kv(kv_pool: Tensor, layer: int, key: Tensor, value: Tensor, batch: AttentionBatch) -> None:
    """Write one layer's new `key` and `value`, `[tokens, num_kv_heads, head_dim]`, into the cache."""
    torch_attention.store_kv(kv_pool, layer, key, value, batch.block_ids, batch.block_offsets)


def paged_attention(
    query: Tensor, kv_pool: Tensor, layer: int, batch: AttentionBatch, scale: float
) -> Tensor:
    """Causal grouped-query attention of the new tokens to their whole context, after `store_kv`.

    `query` is `[tokens, num_heads, head_dim]`, and so is the result; query head h reads KV head
    `h // (num_heads / num_kv_heads)` (arXiv 2305.13245). Chunks with a cached prefix and single decode tokens
    may be mixed. Scores and softmax are accumulated in float32. Cache slots past a sequence's context are
    never read, whatever they hold.
    """
    return torch_attention.paged_attention(
        query,
        kv_pool,
        layer,
        batch.block_tables,
        batch.query_starts_on_host,
        batch.context_lengths_on_host,
        scale,
    )
