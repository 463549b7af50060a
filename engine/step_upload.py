"""The small arrays of a step, moved to the device in one copy that nobody waits for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

ALIGNMENT = 16  # bytes; kernels are compiled for pointers of this alignment and would be again for others
NUM_BUFFERS = 2

Array = npt.NDArray[Any]


class Upload(Protocol):
    """Makes tensors of the arrays of one step. The arrays are the tensors' from then on."""

    def __call__(self, arrays: Sequence[Array]) -> list[Tensor]: ...


def upload_for(device: torch.device) -> Upload:
    """Tensors on a CPU are the arrays themselves; to a GPU they are copied."""
    return PinnedUpload(device) if device.type == "cuda" else _share


def _share(arrays: Sequence[Array]) -> list[Tensor]:
    return [torch.from_numpy(array) for array in arrays]


class Event(Protocol):
    """What is used of torch.cuda.Event."""

    def record(self) -> None: ...

    def synchronize(self) -> None: ...


def _pinned_memory(num_bytes: int) -> Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)


@dataclass
class _Buffer:
    memory: Tensor  # [capacity] uint8, pinned
    copied: Event  # recorded behind the last copy out of `memory`


class PinnedUpload:
    """Packs the arrays into pinned memory and starts one asynchronous copy on the current stream.

    Two buffers take turns. One is not written again before its last copy has ended; by then another step has
    begun, so there is hardly ever anything to wait for. The tensors are slices of one new tensor, which the
    stream's order protects from reuse while kernels read it. Belongs to the engine thread.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        allocate: Callable[[int], Tensor] = _pinned_memory,
        new_event: Callable[[], Event] = torch.cuda.Event,
    ) -> None:
        self._device = device
        self._allocate = allocate
        self._buffers = [_Buffer(allocate(0), new_event()) for _ in range(NUM_BUFFERS)]

    def __call__(self, arrays: Sequence[Array]) -> list[Tensor]:
        num_bytes = packed_size(arrays)
        buffer = self._buffers.pop(0)
        self._buffers.append(buffer)
        buffer.copied.synchronize()  # returns at once if it was never recorded
        if len(buffer.memory) < num_bytes:
            buffer.memory = self._allocate(2 * num_bytes)
        packed = buffer.memory[:num_bytes]
        pack(arrays, packed.numpy())
        on_device = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
        on_device.copy_(packed, non_blocking=True)
        buffer.copied.record()
        return unpack(on_device, arrays)


def packed_size(arrays: Sequence[Array]) -> int:
    """Bytes that `pack` needs."""
    return sum(_aligned(array.nbytes) for array in arrays)


def pack(arrays: Sequence[Array], packed: npt.NDArray[np.uint8]) -> None:
    """Write the arrays into `packed` `[packed_size(arrays)]`, each at a multiple of ALIGNMENT."""
    start = 0
    for array in arrays:
        packed[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        start += _aligned(array.nbytes)


def unpack(packed: Tensor, arrays: Sequence[Array]) -> list[Tensor]:
    """Views of `packed` `[packed_size(arrays)]` uint8 with the dtypes and shapes of the arrays."""
    tensors = []
    start = 0
    for array in arrays:
        dtype = torch.from_numpy(array).dtype
        tensors.append(packed[start : start + array.nbytes].view(dtype).view(array.shape))
        start += _aligned(array.nbytes)
    return tensors


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
