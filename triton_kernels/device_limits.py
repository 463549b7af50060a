"""What the launches of kernels are planned from: the limits of a GPU that its compute capability implies.

Source: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
"""

from dataclasses import dataclass
from functools import lru_cache

import torch

REGISTERS_PER_MULTIPROCESSOR = 65_536
SHARED_MEMORY_PER_MULTIPROCESSOR = {
    80: 164 << 10,
    87: 164 << 10,
    90: 228 << 10,
    100: 228 << 10,
    103: 228 << 10,
}
SMALLEST_SHARED_MEMORY = 100 << 10  # of 8.6, 8.9 and 12.0
RESERVED_SHARED_MEMORY = 1 << 10  # per program, taken by the system
MAX_PROGRAMS_PER_MULTIPROCESSOR = 32  # 24 or 16 on some; our programs are limited by memory long before


@dataclass(frozen=True)
class DeviceLimits:
    capability: int  # 10 * major + minor
    num_multiprocessors: int

    @property
    def shared_memory(self) -> int:
        """Bytes per multiprocessor, shared by the programs resident on it."""
        return SHARED_MEMORY_PER_MULTIPROCESSOR.get(self.capability, SMALLEST_SHARED_MEMORY)

    @property
    def shared_memory_per_program(self) -> int:
        return self.shared_memory - RESERVED_SHARED_MEMORY

    def resident_programs(self, shared_memory: int, registers: int, num_warps: int) -> int:
        """Programs that run on one multiprocessor at once: each takes `shared_memory` bytes and `registers`
        per thread. At least 1."""
        by_memory = self.shared_memory // (shared_memory + RESERVED_SHARED_MEMORY)
        by_registers = REGISTERS_PER_MULTIPROCESSOR // (32 * num_warps * registers)
        return max(1, min(by_memory, by_registers, MAX_PROGRAMS_PER_MULTIPROCESSOR))


# What CPU tensors under Triton's interpreter are planned for.
INTERPRETER_LIMITS = DeviceLimits(capability=80, num_multiprocessors=16)


@lru_cache
def device_limits(device: torch.device) -> DeviceLimits:
    """Of a CUDA device, or those that the interpreter pretends to have."""
    if device.type != "cuda":
        return INTERPRETER_LIMITS
    properties = torch.cuda.get_device_properties(device)
    return DeviceLimits(10 * properties.major + properties.minor, properties.multi_processor_count)
