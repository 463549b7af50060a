"""Triton: add to the residual stream and norm the sum, in one pass over memory.

RMSNorm (arXiv 1910.07467) reads each row once into registers, so the add before it costs no pass of its own.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from pdengine.triton_kernels.ahead_of_time import CompileCase

MAX_HIDDEN = 16384  # a row stays in the registers of one program
TILE_ELEMENTS = 1024  # a program takes several rows if they are shorter than this


def add_rms_norm(
    residual: Tensor, update: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """See `Kernels.add_rms_norm`; all tensors are contiguous.

    Raises ValueError for a hidden size above 16384.
    """
    assert residual.is_contiguous()
    assert update is None or update.is_contiguous()
    tokens, hidden = residual.shape
    if hidden > MAX_HIDDEN:
        raise ValueError(f"hidden size is {hidden}, the RMSNorm kernel takes {MAX_HIDDEN} at most")
    normed = torch.empty_like(residual, dtype=dtype)
    rows, columns, num_warps = _tile(hidden)
    _add_rms_norm_kernel[(triton.cdiv(tokens, rows),)](
        residual,
        residual if update is None else update,
        weight,
        normed,
        tokens,
        hidden,
        eps,
        HAS_UPDATE=update is not None,
        ROWS=rows,
        COLUMNS=columns,
        num_warps=num_warps,
    )
    return residual, normed


def _tile(hidden: int) -> tuple[int, int, int]:
    """Rows per program, columns, warps: 16 elements per thread for rows of usual length."""
    columns = triton.next_power_of_2(hidden)
    rows = max(1, TILE_ELEMENTS // columns)
    return rows, columns, min(max(rows * columns // 512, 2), 32)


@triton.jit(do_not_specialize=["tokens"])
def _add_rms_norm_kernel(
    residual_ptr: tl.tensor,  # [tokens, hidden] float32, changed if HAS_UPDATE
    update_ptr: tl.tensor,  # [tokens, hidden]
    weight_ptr: tl.tensor,  # [hidden] float32
    normed_ptr: tl.tensor,  # [tokens, hidden]
    tokens: tl.tensor,
    hidden: tl.tensor,
    eps: tl.tensor,
    HAS_UPDATE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    inside = (row < tokens)[:, None] & (column < hidden)[None, :]
    offsets = row[:, None] * hidden + column[None, :]
    x = tl.load(residual_ptr + offsets, mask=inside, other=0.0)
    if HAS_UPDATE:
        x += tl.load(update_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        tl.store(residual_ptr + offsets, x, mask=inside)
    weight = tl.load(weight_ptr + column, mask=column < hidden, other=0.0)
    mean_square = tl.sum(x * x, axis=1) / hidden
    normed = x * tl.rsqrt(mean_square + eps)[:, None] * weight[None, :]
    tl.store(normed_ptr + offsets, normed.to(normed_ptr.dtype.element_ty), mask=inside)


def ahead_of_time(capability: int) -> Iterator[CompileCase]:
    for hidden in (4096, 64, 1024, 2048, 8192, 16384):
        for dtype in ("bf16", "fp16", "fp32"):
            for has_update in (True, False):
                rows, columns, num_warps = _tile(hidden)
                yield CompileCase(
                    _add_rms_norm_kernel,
                    f"{dtype} hidden={hidden}" + (" with update" if has_update else ""),
                    {
                        "residual_ptr": "*fp32",
                        "update_ptr": f"*{dtype}" if has_update else "*fp32",
                        "weight_ptr": "*fp32",
                        "normed_ptr": f"*{dtype}",
                        "tokens": "i32",
                        "hidden": "i32",
                        "eps": "fp32",
                    },
                    {"HAS_UPDATE": has_update, "ROWS": rows, "COLUMNS": columns},
                    num_warps=num_warps,
                    divisible_by_16=("hidden",),
                )
