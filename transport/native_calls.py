"""What native loops compiled by numba are made of: calls of C functions by address, loads and stores.

The address of a C function is always an argument, so that compiled code can be cached on disk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, register_jitable

LINE_BYTES = 64  # what `stream_line` moves
_CLOCK_MONOTONIC = 1
_WORD = ir.IntType(64)
_LINE = ir.VectorType(_WORD, LINE_BYTES // 8)

Compiled = TypeVar("Compiled")


def compile_with_cache(build: Callable[[bool], Compiled]) -> Compiled:
    """`build(cache)` with numba's cache on disk; without one where no folder for it can be written."""
    try:
        return build(True)
    except (RuntimeError, OSError):  # numba's "no locator available", or a folder that cannot be written
        return build(False)


@intrinsic
def call_native(typing_context, address, arguments):  # type: ignore[no-untyped-def]
    """Call the C function at `address` with integers or pointers; the result is the raw 64-bit register."""

    def generate(context, builder, signature, values):  # type: ignore[no-untyped-def]
        unpacked = [
            context.cast(builder, value, value_type, types.int64)
            for value, value_type in zip(cgutils.unpack_tuple(builder, values[1]), arguments, strict=True)
        ]
        function_type = ir.FunctionType(_WORD, [_WORD] * len(unpacked))
        function = builder.inttoptr(values[0], function_type.as_pointer())
        return builder.call(function, unpacked)

    return types.int64(types.int64, arguments), generate


@intrinsic
def load_int64(typing_context, address):  # type: ignore[no-untyped-def]
    """The int64 at `address`."""

    def generate(context, builder, signature, values):  # type: ignore[no-untyped-def]
        return builder.load(builder.inttoptr(values[0], _WORD.as_pointer()))

    return types.int64(types.int64), generate


@intrinsic
def stream_line(typing_context, destination, source):  # type: ignore[no-untyped-def]
    """Copy one line of LINE_BYTES past the caches; `destination` must be a multiple of that.

    Other threads may see the stores late: `fence` comes before anything that tells of them.
    """

    def generate(context, builder, signature, values):  # type: ignore[no-untyped-def]
        line = builder.load(builder.inttoptr(values[1], _LINE.as_pointer()), align=1)
        store = builder.store(line, builder.inttoptr(values[0], _LINE.as_pointer()), align=LINE_BYTES)
        store.set_metadata("nontemporal", builder.module.add_metadata([ir.IntType(32)(1)]))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def fence(typing_context):  # type: ignore[no-untyped-def]
    """All stores so far are visible to other threads before any that follows."""

    def generate(context, builder, signature, values):  # type: ignore[no-untyped-def]
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate


@register_jitable
def monotonic_ns(clock_gettime, timespec):  # type: ignore[no-untyped-def]
    """time.monotonic_ns(); timespec: int64[2], scratch."""
    call_native(clock_gettime, (_CLOCK_MONOTONIC, timespec.ctypes.data))
    return timespec[0] * 1_000_000_000 + timespec[1]
