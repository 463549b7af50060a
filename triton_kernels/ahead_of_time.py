"""How a kernel file names what `compile_report` compiles: for GPUs that need not be there.

Every module of kernels defines

    def ahead_of_time(capability: int) -> Iterator[CompileCase]

which yields each kernel with each tile size that it would be launched with on that compute capability (80, 90
or 100). The first case of a kernel is a common one: the tests compile that, the report compiles all.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from triton.runtime.jit import JITFunction

TRITON_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}  # those we compute in
HEAD_DIMS = (128, 64, 80, 96, 256)


@dataclass(frozen=True)
class CompileCase:
    """One specialisation of a kernel.

    `arguments` gives, by name and in the kernel's order, the Triton type of each run-time argument, such as
    `"*bf16"`, `"*i64"`, `"i32"` or `"fp32"`; pointers are taken to be aligned to 16 bytes, as Triton finds
    at launch. `constants` gives the `tl.constexpr` arguments. The defaults are those of a launch.
    """

    kernel: JITFunction[Any]
    label: str  # what distinguishes this specialisation: "bf16 head_dim=128 block=16"
    arguments: Mapping[str, str]
    constants: Mapping[str, object]
    num_warps: int = 4
    num_stages: int = 3
    divisible_by_16: tuple[str, ...] = ()  # integers, at every launch; such as strides
