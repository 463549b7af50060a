"""The compiled CPU kernels of a process."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from pdengine.triton_kernels import (
    cpu_decode_attention,
    cpu_elementwise,
    cpu_linear,
    cpu_prefill_attention,
    cpu_program,
    cpu_step_edges,
)
from pdengine.triton_kernels.cpu_launch import Launcher, compile_kernel, make_launcher
from pdengine.triton_kernels.vector_code import has_bf16_dot_product


@dataclass(frozen=True)
class NativeKernels:
    """numba's C functions, and what runs them."""

    launcher: Launcher
    add_rms_norm: Any
    silu_multiply: Any
    rotate_and_store: Any
    decode_attention: Any
    reduce_parts: Any
    prefill_attention: Any
    run_program: Any
    start_tokens: Any
    choose_largest: Any
    linear_float32: Any
    linear_bfloat16: Any  # None where the CPU has no dot products of bfloat16


@cache
def native_kernels() -> NativeKernels:
    """Compile, or load from numba's cache, once per process."""
    return NativeKernels(
        launcher=make_launcher(),
        add_rms_norm=compile_kernel(cpu_elementwise.add_rms_norm),
        silu_multiply=compile_kernel(cpu_elementwise.silu_multiply),
        rotate_and_store=compile_kernel(cpu_elementwise.rotate_and_store),
        decode_attention=compile_kernel(cpu_decode_attention.decode_attention),
        reduce_parts=compile_kernel(cpu_decode_attention.reduce_parts),
        prefill_attention=compile_kernel(cpu_prefill_attention.prefill_attention),
        run_program=compile_kernel(cpu_program.run_program),
        start_tokens=compile_kernel(cpu_step_edges.start_tokens),
        choose_largest=compile_kernel(cpu_step_edges.choose_largest),
        linear_float32=compile_kernel(cpu_linear.linear_float32),
        linear_bfloat16=compile_kernel(cpu_linear.linear_bfloat16) if has_bf16_dot_product() else None,
    )
