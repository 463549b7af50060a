"""The operations of `Kernels` in plain torch: the reference for our kernels, and what a CPU runs for shapes
and dtypes that those do not take."""

import torch
from torch import Tensor
from torch.nn import functional as F

from pdengine.triton_kernels import torch_attention, torch_sampling
from pdengine.triton_kernels.attention import AttentionBatch
from pdengine.triton_kernels.kernels import Kernels, SamplingBatch


class TorchKernels(Kernels):
    """See `Kernels` for what each method does."""

    def add_rms_norm(
        self, residual: Tensor, update: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        if update is not None:
            residual += update
        return residual, F.rms_norm(residual, weight.shape, weight, eps).to(dtype)

    def rotate_and_store(
        self,
        qkv: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        query_norm: Tensor | None,
        key_norm: Tensor | None,
        eps: float,
        kv_pool: Tensor,
        layer: int,
        batch: AttentionBatch,
    ) -> Tensor:
        num_kv_heads = kv_pool.shape[1]
        num_heads = qkv.shape[1] - 2 * num_kv_heads
        query, key, value = torch.split(qkv, [num_heads, num_kv_heads, num_kv_heads], dim=1)
        if query_norm is not None and key_norm is not None:
            query = F.rms_norm(query.to(torch.float32), query_norm.shape, query_norm, eps)
            key = F.rms_norm(key.to(torch.float32), key_norm.shape, key_norm, eps)
        if cos is not None and sin is not None:
            query, key = apply_rope(query, cos, sin), apply_rope(key, cos, sin)
        torch_attention.store_kv(
            kv_pool, layer, key.to(qkv.dtype), value, batch.block_ids, batch.block_offsets
        )
        return query.to(qkv.dtype)

    def paged_attention(
        self, query: Tensor, kv_pool: Tensor, layer: int, batch: AttentionBatch, scale: float
    ) -> Tensor:
        return torch_attention.attend(query, kv_pool, layer, batch, scale)

    def silu_multiply(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        product: Tensor = F.silu(gate.to(torch.float32)) * up
        return product.to(gate_up.dtype)

    def sample(self, logits: Tensor, batch: SamplingBatch) -> Tensor:
        return torch_sampling.sample(logits, batch)


def apply_rope(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first rotary_dim dimensions of `heads` `[tokens, heads, head_dim]` and return float32.

    `cos` and `sin` are `[tokens, 1, rotary_dim / 2]`. Dimension i is paired with i + rotary_dim / 2 ("rotate
    half"), the convention of Hugging Face checkpoints.
    """
    pairs = cos.shape[-1]
    first, second, kept = heads.to(torch.float32).tensor_split((pairs, 2 * pairs), dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, kept), dim=-1)
