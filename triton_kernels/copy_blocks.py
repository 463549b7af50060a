"""Copies of whole blocks inside a KV pool."""

from collections.abc import Sequence

import torch
from torch import Tensor


def copy_blocks(kv_pool: Tensor, sources: Sequence[int], destinations: Sequence[int]) -> None:
    """Copy block `sources[i]` of the pool, all heads and layers of it, to block `destinations[i]`.

    `kv_pool` is `[num_blocks, ...]` on any device; on a GPU the copy is in the order of the current stream.
    All sources are read before any block is written, so that a block may be source and destination. Raises
    ValueError if the lists differ in length, name a block outside of the pool, or a destination twice.
    """
    if len(sources) != len(destinations):
        raise ValueError(f"{len(sources)} sources cannot be copied to {len(destinations)} destinations")
    if len(set(destinations)) != len(destinations):
        raise ValueError("a block is the destination of two copies")
    num_blocks = len(kv_pool)
    outside = [block for block in (*sources, *destinations) if not 0 <= block < num_blocks]
    if outside:
        raise ValueError(f"block {outside[0]} is not in a pool of {num_blocks}")
    if not sources:
        return
    # From pageable memory: torch copies it before the call returns.
    blocks = torch.tensor([list(sources), list(destinations)]).to(kv_pool.device, non_blocking=True)
    kv_pool.index_copy_(0, blocks[1], kv_pool.index_select(0, blocks[0]))
