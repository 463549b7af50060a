"""What a copy of memory can reach on this machine: the ceiling of a pull within one host."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from numba import njit, types

from pdengine.transport.native_calls import call_native

MemoryCopy: TypeAlias = Callable[[npt.NDArray[np.int64]], None]
"""Copies ranges as `copy_ranges` gives them: [num_ranges, 3] of (to address, from address, bytes)."""


def compile_copy() -> MemoryCopy:
    """One memmove per range and nothing else between them, on the calling thread."""
    compiled = njit(types.void(types.int64, types.int64[:, ::1]), nogil=True)(_copy)
    memmove = ctypes.cast(ctypes.CDLL(None).memmove, ctypes.c_void_p).value
    return lambda ranges: compiled(memmove, ranges)


def _copy(memmove: Any, ranges: Any) -> None:
    for row in range(len(ranges)):
        call_native(memmove, (ranges[row, 0], ranges[row, 1], ranges[row, 2]))
