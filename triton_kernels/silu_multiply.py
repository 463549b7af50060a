"""Triton: SiLU(gate) * up, the gate of SwiGLU (arXiv 2002.05202), in float32 registers."""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from pdengine.triton_kernels.ahead_of_time import CompileCase

COLUMNS = 1024  # per program; 8 elements per thread are one 128-bit load of 16-bit numbers
NUM_WARPS = 4


def silu_multiply(gate_up: Tensor) -> Tensor:
    """See `Kernels.silu_multiply`; `gate_up` is contiguous."""
    assert gate_up.is_contiguous()
    tokens, size = gate_up.shape[0], gate_up.shape[1] // 2
    output = torch.empty(tokens, size, dtype=gate_up.dtype, device=gate_up.device)
    grid = (tokens, triton.cdiv(size, COLUMNS))
    _silu_multiply_kernel[grid](gate_up, output, size, COLUMNS=COLUMNS, num_warps=NUM_WARPS)
    return output


@triton.jit
def _silu_multiply_kernel(
    gate_up_ptr: tl.tensor,  # [tokens, 2 * size]
    output_ptr: tl.tensor,  # [tokens, size]
    size: tl.tensor,
    COLUMNS: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < size
    gate = tl.load(gate_up_ptr + token * 2 * size + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + token * 2 * size + size + column, mask=inside, other=0.0).to(tl.float32)
    product = gate * tl.sigmoid(gate) * up
    tl.store(output_ptr + token * size + column, product.to(output_ptr.dtype.element_ty), mask=inside)


def ahead_of_time(capability: int) -> Iterator[CompileCase]:
    for dtype in ("bf16", "fp16", "fp32"):
        yield CompileCase(
            _silu_multiply_kernel,
            dtype,
            {"gate_up_ptr": f"*{dtype}", "output_ptr": f"*{dtype}", "size": "i32"},
            {"COLUMNS": COLUMNS},
            num_warps=NUM_WARPS,
            divisible_by_16=("size",),
        )
