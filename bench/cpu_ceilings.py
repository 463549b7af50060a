"""What the cores and the memory of this machine give at the moment: cloud machines change by the minute."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

REPETITIONS = 5
READ_BYTES = 256 * 2**20  # well above any cache
ROWS, COLUMNS_IN, COLUMNS_OUT = 512, 1024, 4096  # of a bfloat16 matmul, as in the prefill of a small model


@dataclass(frozen=True)
class CpuCeilings:
    """With torch's threads, the best of a few repetitions: bfloat16 matmul and reading of float32."""

    matmul_gflop_per_second: float
    read_gb_per_second: float


def measure_cpu_ceilings() -> CpuCeilings:
    """Takes under a second on two cores."""
    import torch

    inputs = torch.randn(ROWS, COLUMNS_IN).bfloat16()
    weight = torch.randn(COLUMNS_OUT, COLUMNS_IN).bfloat16()
    memory = torch.ones(READ_BYTES // 4)
    flop = 2 * ROWS * COLUMNS_IN * COLUMNS_OUT
    matmul_seconds, read_seconds = [], []
    for _ in range(REPETITIONS):
        begin = monotonic()
        torch.nn.functional.linear(inputs, weight)
        matmul_seconds.append(monotonic() - begin)
        begin = monotonic()
        memory.sum()
        read_seconds.append(monotonic() - begin)
    return CpuCeilings(flop / min(matmul_seconds) / 1e9, READ_BYTES / min(read_seconds) / 1e9)


def stolen_seconds() -> float:
    """CPU seconds that the hypervisor has given to others since boot (steal in proc(5)); 0 without one."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()
    return int(fields[8]) / os.sysconf("SC_CLK_TCK")
