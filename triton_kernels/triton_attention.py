"""Paged attention by our Triton kernels, for CUDA tensors, or CPU tensors under Triton's interpreter.

Decoding sequences, which stand first in a batch, go to the flash-decoding kernel, chunks of prompts to the
prefill kernel.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from pdengine.triton_kernels.attention import AttentionBatch
from pdengine.triton_kernels.attention_plan import AttentionPlan, plan_decodes, plan_prefills
from pdengine.triton_kernels.attention_tiles import (
    MAX_HEAD_DIM,
    decode_tile,
    prefill_tile,
    resident_decode_programs,
)
from pdengine.triton_kernels.decode_attention import decode_attention
from pdengine.triton_kernels.device_limits import device_limits
from pdengine.triton_kernels.prefill_attention import prefill_attention


@dataclass(frozen=True)
class AttentionShape:
    """What a plan depends on besides the batch: the same for all layers of a model, but for the window."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: torch.dtype
    device: torch.device
    window: int | None

    def __post_init__(self) -> None:
        """Raises ValueError for what the kernels cannot do."""
        if self.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise ValueError(f"dtype is {self.dtype}, attention takes bfloat16, float16 or float32")
        if self.head_dim > MAX_HEAD_DIM:
            raise ValueError(f"head_dim is {self.head_dim}, attention takes {MAX_HEAD_DIM} at most")
        if self.block_size & (self.block_size - 1):
            raise ValueError(f"block_size is {self.block_size}, attention needs a power of two")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window is {self.window}, it must be at least 1")


def paged_attention(
    query: Tensor, kv_pool: Tensor, layer: int, batch: AttentionBatch, scale: float, window: int | None = None
) -> Tensor:
    """Causal grouped-query attention of the new tokens to their whole context, after it was stored.

    `query` is `[tokens, num_heads, head_dim]` with any strides but the last, which is 1, of the dtype of
    `kv_pool`: bfloat16, float16 or float32. The result has the same shape and dtype, contiguous. Query head h
    reads KV head `h // (num_heads / num_kv_heads)` (arXiv 2305.13245). `window`: tokens visible to a query,
    itself included (arXiv 2310.06825); None: all. Scores and softmax are float32, weights are rounded to the
    dtype before they multiply V (as FlashAttention does). Slots past a context are never read. Does not wait
    for the device. Raises ValueError for other dtypes, block sizes that are no powers of two, head dimensions
    above 256.
    """
    _, num_kv_heads, _, _, block_size, head_dim = kv_pool.shape
    shape = AttentionShape(
        query.shape[1], num_kv_heads, head_dim, block_size, kv_pool.dtype, kv_pool.device, window
    )
    plan = batch.plans.get(shape)
    if plan is None:
        plan = batch.plans[shape] = make_plan(batch, shape)
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if plan.decode is not None:
        decode_attention(query, kv_pool, layer, batch.block_tables, plan.decode, scale, output)
    if plan.prefill is not None:
        prefill_attention(query, kv_pool, layer, batch.block_tables, plan.prefill, scale, output, window)
    return output


def make_plan(batch: AttentionBatch, shape: AttentionShape) -> AttentionPlan:
    """Computed once per step, by the first layer that has this shape."""
    limits = device_limits(shape.device)
    group_size = shape.num_heads // shape.num_kv_heads
    decode = prefill = None
    if batch.num_decodes > 0:
        tile = decode_tile(shape.dtype, shape.head_dim)
        decode = plan_decodes(
            batch.context_lengths_on_host[: batch.num_decodes],
            window=shape.window,
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            tile=tile,
            num_resident=resident_decode_programs(tile, shape.dtype, shape.head_dim, limits),
            device=shape.device,
        )
    if batch.num_decodes < len(batch.context_lengths_on_host):
        starts = batch.query_starts_on_host[batch.num_decodes :]
        most_tokens = max(end - start for start, end in pairwise(starts))
        prefill = plan_prefills(
            batch.query_starts_on_host,
            batch.context_lengths_on_host,
            batch.num_decodes,
            group_size=group_size,
            tile=prefill_tile(shape.dtype, shape.head_dim, limits.capability, most_tokens * group_size),
            window=shape.window,
            device=shape.device,
        )
    return AttentionPlan(decode, prefill)
