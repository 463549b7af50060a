"""The operations of `Kernels` for CPUs, compiled by numba; for shapes and dtypes that these kernels do not
take, plain torch does the same.

A call costs about 3 us besides its work, which counts in a small model's decode step: addresses instead of
arrays, one launch each, and what the layers of a step share is prepared once per step.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pdengine.triton_kernels import torch_sampling
from pdengine.triton_kernels.attention import AttentionBatch
from pdengine.triton_kernels.cpu_attention import CpuAttention
from pdengine.triton_kernels.cpu_launch import float_bits
from pdengine.triton_kernels.cpu_native import native_kernels
from pdengine.triton_kernels.kernels import Kernels, SamplingBatch
from pdengine.triton_kernels.torch_kernels import TorchKernels

# Elements from which on a kernel is worth all threads: waking them takes as long as some thousand elements.
PARALLEL_ELEMENTS = 16384
DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class RotationPlan:
    """What the layers of a step share."""

    sizes: npt.NDArray[np.int64]  # as the kernel reads them, at `address`
    address: int
    num_heads: int
    layer_bytes: int  # of one KV head in a block of the pool


class CpuKernels(Kernels):
    """See `Kernels` for what each method does."""

    def __init__(self) -> None:
        native = native_kernels()
        self._native = native
        self._run = native.launcher.run
        self._add_rms_norm = native.add_rms_norm.address
        self._silu_multiply = native.silu_multiply.address
        self._rotate_and_store = native.rotate_and_store.address
        self._attention = CpuAttention(native)
        self._torch = TorchKernels()

    def add_rms_norm(
        self, residual: Tensor, update: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        num_tokens, hidden = residual.shape
        taken = hidden % 16 == 0 and dtype in DTYPES and residual.is_contiguous()
        if update is not None:
            taken = taken and update.dtype in DTYPES and update.is_contiguous()
        if not taken:
            return self._torch.add_rms_norm(residual, update, weight, eps, dtype)
        normed = torch.empty(num_tokens, hidden, dtype=dtype)
        self._run(
            self._add_rms_norm,
            num_tokens * hidden >= PARALLEL_ELEMENTS,
            residual.data_ptr(),
            0 if update is None else update.data_ptr(),
            weight.data_ptr(),
            normed.data_ptr(),
            num_tokens,
            hidden,
            float_bits(eps),
            update is not None and update.dtype == torch.bfloat16,
            dtype == torch.bfloat16,
            0,
            0,
            0,
        )
        return residual, normed

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
        num_tokens, num_qkv_heads, head_dim = qkv.shape
        pairs = 0 if cos is None else cos.shape[-1]
        taken = head_dim % 16 == 0 and pairs % 16 == 0 and qkv.dtype in DTYPES and qkv.is_contiguous()
        if not taken or kv_pool.dtype != qkv.dtype:
            return self._torch.rotate_and_store(
                qkv, cos, sin, query_norm, key_norm, eps, kv_pool, layer, batch
            )
        shape = ("rotate_and_store", num_qkv_heads, pairs)
        plan: RotationPlan | None = batch.plans.get(shape)
        if plan is None:
            plan = batch.plans[shape] = plan_rotation(kv_pool, num_qkv_heads, pairs)
        query = torch.empty(num_tokens, plan.num_heads, head_dim, dtype=qkv.dtype)
        self._run(
            self._rotate_and_store,
            num_tokens * num_qkv_heads * head_dim >= PARALLEL_ELEMENTS,
            qkv.data_ptr(),
            query.data_ptr(),
            0 if cos is None else cos.data_ptr(),
            0 if sin is None else sin.data_ptr(),
            0 if query_norm is None else query_norm.data_ptr(),
            0 if key_norm is None else key_norm.data_ptr(),
            float_bits(eps),
            kv_pool.data_ptr() + layer * plan.layer_bytes,
            batch.block_ids.data_ptr(),
            batch.block_offsets.data_ptr(),
            num_tokens,
            plan.address,
        )
        return query

    def paged_attention(
        self, query: Tensor, kv_pool: Tensor, layer: int, batch: AttentionBatch, scale: float
    ) -> Tensor:
        return self._attention.attend(query, kv_pool, layer, batch, scale)

    def silu_multiply(self, gate_up: Tensor) -> Tensor:
        num_tokens, double_size = gate_up.shape
        size = double_size // 2
        if size % 16 != 0 or gate_up.dtype not in DTYPES or not gate_up.is_contiguous():
            return self._torch.silu_multiply(gate_up)
        product = torch.empty(num_tokens, size, dtype=gate_up.dtype)
        self._run(
            self._silu_multiply,
            num_tokens * size >= PARALLEL_ELEMENTS,
            gate_up.data_ptr(),
            product.data_ptr(),
            num_tokens,
            size,
            gate_up.dtype == torch.bfloat16,
            0,
            0,
            0,
            0,
            0,
            0,
            0,
        )
        return product

    def sample(self, logits: Tensor, batch: SamplingBatch) -> Tensor:
        return torch_sampling.sample(logits, batch)


def plan_rotation(kv_pool: Tensor, num_qkv_heads: int, pairs: int) -> RotationPlan:
    """What `rotate_and_store` is told of the shapes of all layers."""
    _, num_kv_heads, _, _, block_size, head_dim = kv_pool.shape
    block_elements, head_elements, layer_elements = kv_pool.stride()[:3]
    num_heads = num_qkv_heads - 2 * num_kv_heads
    is_bfloat16 = kv_pool.dtype == torch.bfloat16
    sizes = np.array(
        (num_heads, num_kv_heads, head_dim, pairs, is_bfloat16, block_size, block_elements, head_elements),
        np.int64,
    )
    return RotationPlan(sizes, sizes.ctypes.data, num_heads, layer_elements * kv_pool.element_size())
