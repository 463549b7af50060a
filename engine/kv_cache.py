"""The KV cache of one worker: a single buffer, allocated once and kept until the process ends."""

from math import prod

import torch
from torch import Tensor

from pdengine.engine.device_memory import CudaContext, DeviceMemory
from pdengine.models.config import ModelConfig
from pdengine.transport.regions import RegionDescriptor, describe_region
from pdengine.transport.shared_memory import SharedMemory

DIMENSIONS = ("block", "kv_head", "layer", "kv", "token", "dim")
CPU = torch.device("cpu")
LAYOUT = "/".join(DIMENSIONS)  # compared between workers: a change of layout is a change of this name


class KVCache:
    """A pool `[num_blocks, num_kv_heads, num_layers, 2, block_size, head_dim]`, 2 = K, V.

    A block is contiguous over all layers, so that one read moves it; heads come first inside a block, so that
    a peer with another tensor-parallel degree can read its slice of heads as one piece.

    Host memory lies in `memory`, which peers on this host can map; pages that were never touched cost
    nothing. GPU memory is taken at once, and its contents are undefined; then `memory` is None. Raises
    TransferError or CudaError if there is too little of it.
    """

    def __init__(
        self,
        model: ModelConfig,
        *,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device = CPU,
    ) -> None:
        sizes = (num_blocks, model.num_kv_heads, model.num_layers, 2, block_size, model.head_dim)
        num_bytes = prod(sizes) * dtype.itemsize
        self.memory: SharedMemory | None = None
        if device.type == "cuda":
            index = torch.cuda.current_device() if device.index is None else device.index
            flat = DeviceMemory(CudaContext(index), num_bytes).tensor(torch.device("cuda", index))
        else:
            self.memory = SharedMemory(num_bytes)
            flat = torch.frombuffer(self.memory.buffer, dtype=torch.uint8)
        self.pool: Tensor = flat.view(dtype).view(sizes)
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
