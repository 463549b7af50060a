"""The copies of one pull between two mapped pools, in one call without the GIL."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from numba import njit, types
from numba.extending import register_jitable

from pdengine.transport.native_calls import (
    LINE_BYTES,
    call_native,
    compile_with_cache,
    fence,
    monotonic_ns,
    stream_line,
)
from pdengine.transport.regions import RegionDescriptor

# From this size on a pull goes past the caches, where it would not stay until it is read: measured, the
# copy takes two thirds of the time, and reading it afterwards no longer. Below, it is better in the caches.
STREAMING_BYTES = 32 * 2**20
MADV_POPULATE_READ = 22  # <linux/mman.h>, Linux 5.14
MADV_POPULATE_WRITE = 23

Vector: TypeAlias = npt.NDArray[np.int64]
Ranges: TypeAlias = npt.NDArray[np.int64]


@dataclass(frozen=True)
class MappedPool:
    """A pool as it lies in this process. region: its base address is the one here. populated: [num_blocks]
    uint8, 1 for blocks whose pages a pull has touched."""

    region: RegionDescriptor
    populated: npt.NDArray[np.uint8]


def mapped_pool(region: RegionDescriptor) -> MappedPool:
    return MappedPool(region, np.zeros(region.num_blocks, np.uint8))


class Copier:
    """Copies ranges of bytes; compiled, or loaded from numba's cache, when it is made.

    Pages that no pull touched before are populated range by range, which takes half the time of faulting
    them in one by one. It is asked for once per block, because asking costs a third of the copy itself.
    """

    def __init__(self, streaming_bytes: int = STREAMING_BYTES) -> None:
        """streaming_bytes: of a pull, from which on it goes past the caches."""
        self._streaming_bytes = streaming_bytes
        libc = ctypes.CDLL(None)
        functions = (libc.memcpy, libc.madvise, libc.clock_gettime)
        self._functions = tuple(ctypes.cast(function, ctypes.c_void_p).value for function in functions)
        self._timespec: Vector = np.zeros(2, np.int64)
        self._copy = compile_with_cache(_compile)

    def copy(self, ranges: Ranges, source: MappedPool, destination: MappedPool) -> tuple[int, int]:
        """Copy `ranges` (see `regions.copy_ranges`); CLOCK_MONOTONIC in ns before and after."""
        started_at, ended_at = self._copy(
            self._functions,
            self._timespec,
            ranges,
            source.region.base_address,
            source.populated,
            destination.region.base_address,
            destination.populated,
            destination.region.block_bytes,
            self._streaming_bytes,
        )
        return started_at, ended_at


def _compile(cache: bool) -> Callable[..., tuple[int, int]]:
    # Signatures make numba compile here and not at the first call.
    word, vector, table = types.int64, types.int64[::1], types.int64[:, ::1]
    pool = (word, types.uint8[::1])
    arguments = (types.UniTuple(word, 3), vector, table, *pool, *pool, word, word)
    signature = types.UniTuple(word, 2)(*arguments)
    compiled: Callable[..., tuple[int, int]] = njit(signature, nogil=True, cache=cache)(copy_ranges_natively)
    return compiled


def copy_ranges_natively(  # type: ignore[no-untyped-def]
    functions,
    timespec,
    ranges,
    source,
    source_populated,
    destination,
    destination_populated,
    block_bytes,
    streaming_bytes,
):
    """functions: addresses of memcpy, madvise and clock_gettime; timespec: scratch; source, destination:
    base addresses of the pools."""
    memcpy, madvise, clock_gettime = functions
    started_at = monotonic_ns(clock_gettime, timespec)
    is_streaming = ranges[:, 2].sum() >= streaming_bytes
    for row in range(len(ranges)):
        local, remote, length = ranges[row, 0], ranges[row, 1], ranges[row, 2]
        _populate(madvise, MADV_POPULATE_READ, remote, length, source, source_populated, block_bytes)
        _populate(
            madvise, MADV_POPULATE_WRITE, local, length, destination, destination_populated, block_bytes
        )
        if is_streaming:
            _stream(memcpy, local, remote, length)
        else:
            call_native(memcpy, (local, remote, length))
    fence()
    return started_at, monotonic_ns(clock_gettime, timespec)


@register_jitable
def _populate(madvise, advice, address, length, pool, populated, block_bytes):  # type: ignore[no-untyped-def]
    """Before Linux 5.14, or without memory, the kernel refuses; then the copy faults the pages in."""
    first, last = (address - pool) // block_bytes, (address + length - 1 - pool) // block_bytes
    if populated[first : last + 1].all():
        return
    start = address - address % mmap.PAGESIZE
    call_native(madvise, (start, address + length - start, advice))
    populated[first : last + 1] = 1


@register_jitable
def _stream(memcpy, destination, source, length):  # type: ignore[no-untyped-def]
    head = min(-destination % LINE_BYTES, length)
    body = (length - head) // LINE_BYTES * LINE_BYTES
    call_native(memcpy, (destination, source, head))
    for offset in range(head, head + body, LINE_BYTES):
        stream_line(destination + offset, source + offset)
    done = head + body
    call_native(memcpy, (destination + done, source + done, length - done))
