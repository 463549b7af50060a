"""The operations of `Kernels` by our Triton kernels, for GPUs.

Under Triton's interpreter (`TRITON_INTERPRET=1`) they also take tensors of a CPU, which is how they are
tested where there is no GPU; without it they refuse those.
"""

import torch
from torch import Tensor

from pdengine.triton_kernels import rms_norm, rotary_store, sampling, silu_multiply, triton_attention
from pdengine.triton_kernels.attention import AttentionBatch
from pdengine.triton_kernels.kernels import Kernels, SamplingBatch


class TritonKernels(Kernels):
    """See `Kernels` for what each method does. None of them waits for the device."""

    def add_rms_norm(
        self, residual: Tensor, update: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        return rms_norm.add_rms_norm(residual, update, weight, eps, dtype)

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
        return rotary_store.rotate_and_store(qkv, cos, sin, query_norm, key_norm, eps, kv_pool, layer, batch)

    def paged_attention(
        self, query: Tensor, kv_pool: Tensor, layer: int, batch: AttentionBatch, scale: float
    ) -> Tensor:
        return triton_attention.paged_attention(query, kv_pool, layer, batch, scale)

    def silu_multiply(self, gate_up: Tensor) -> Tensor:
        return silu_multiply.silu_multiply(gate_up)

    def sample(self, logits: Tensor, batch: SamplingBatch) -> Tensor:
        return sampling.sample(logits, batch)
