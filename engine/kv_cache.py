"""The KV cache of one worker: a single buffer, allocated once and kept until the process ends."""

import mmap
from math import prod

import torch
from torch import Tensor

from pdengine.models.config import ModelConfig
from pdengine.transport.regions import RegionDescriptor, describe_region

DIMENSIONS = ("block", "kv_head", "layer", "kv", "token", "dim")
MAP_NORESERVE = 0x4000  # <linux/mman.h>; the mmap module has no name for it before Python 3.13
LAYOUT = "/".join(DIMENSIONS)  # compared between workers: a change of layout is a change of this name


class KVCache:
    """A pool `[num_blocks, num_kv_heads, num_layers, 2, block_size, head_dim]`, 2 = K, V.

    A block is contiguous over all layers, so that one read moves it; heads come first inside a block, so that
    a peer with another tensor-parallel degree can read its slice of heads as one piece. The memory is mapped
    lazily: pages that no sequence ever used cost nothing.
    """

    def __init__(self, model: ModelConfig, *, num_blocks: int, block_size: int, dtype: torch.dtype) -> None:
        sizes = (num_blocks, model.num_kv_heads, model.num_layers, 2, block_size, model.head_dim)
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
        memory = mmap.mmap(-1, prod(sizes) * dtype.itemsize, flags=flags)
        self.pool: Tensor = torch.frombuffer(memory, dtype=dtype).view(sizes)
        self.block_size = block_size

    def describe(self) -> RegionDescriptor:
        """The region for peers, without a remote key."""
        return describe_region(
            DIMENSIONS,
            tuple(self.pool.shape),
            item_size=self.pool.element_size(),
            dtype=dtype_name(self.pool.dtype),
            base_address=self.pool.data_ptr(),
        )


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.bfloat16` -> `"bfloat16"`."""
    return str(dtype).removeprefix("torch.")
