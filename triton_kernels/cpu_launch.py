"""Starting a compiled kernel on torch's OpenMP threads, with one call from Python.

A kernel is a C function of the address of its arguments: 64-bit words, of which the first counts the tasks
that have been taken (see `take_ticket`). Every thread runs the same function and takes tasks until there are
none: a thread that loses its core for a while keeps nobody waiting for more than one task.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from llvmlite import ir  # type: ignore[import-untyped]
from numba import cfunc, njit, types
from numba.extending import intrinsic, register_jitable

from pdengine.triton_kernels.openmp import gomp_parallel_address
from pdengine.triton_kernels.vector_code import store_integer

NUM_WORDS = 16  # arguments of a kernel, the counter included
THREAD_COUNTER = 8 * 13  # bytes from the first word to a second counter, for the threads to number themselves
SCRATCH_BYTES = 2**16

_WORD = ir.IntType(64)
Compiled = TypeVar("Compiled")


def compile_with_cache(build: Callable[[bool], Compiled]) -> Compiled:
    """`build(cache)` with numba's cache on disk; without one where no folder for it can be written."""
    try:
        return build(True)
    except (RuntimeError, OSError):  # numba's "no locator available", or a folder that cannot be written
        return build(False)


@cache
def source_digest() -> int:
    """Of the code of this folder. Kernels are found in numba's cache by it, because numba would only notice
    changes of the file that the cached function is in, not of those that it calls."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return int.from_bytes(digest.digest()[:7], "little")


def compile_kernel(kernel: Callable[[int], None]) -> Any:
    """A C function `void kernel(int64_t *words)`; the result must be kept as long as its `address` is used.

    `kernel` is a function of a module, and what it calls are globals of that: numba cannot cache others.
    """
    digest = source_digest()
    register_jitable(kernel)

    # What stands in a closure is part of the key in numba's cache.
    def entry(words: int) -> None:
        if digest != 0:
            kernel(words)

    entry.__qualname__ = f"{kernel.__module__}.{kernel.__qualname__}"

    def build(cache: bool) -> Any:
        return cfunc("void(int64)", cache=cache, error_model="numpy")(entry)

    return compile_with_cache(build)


@intrinsic
def _words_on_the_stack(typing_context):  # type: ignore[no-untyped-def]
    def generate(context, builder, signature, values):  # type: ignore[no-untyped-def]
        with builder.goto_entry_block():
            memory = builder.alloca(ir.ArrayType(_WORD, NUM_WORDS))
        return builder.ptrtoint(memory, _WORD)

    return types.int64(), generate


@intrinsic
def scratch_on_the_stack(typing_context):  # type: ignore[no-untyped-def]
    """The address of SCRATCH_BYTES that belong to the running kernel, at a multiple of 64."""

    def generate(context, builder, signature, values):  # type: ignore[no-untyped-def]
        with builder.goto_entry_block():  # numba's alloca_once would fill it with zeros, a store per word
            memory = builder.alloca(ir.ArrayType(_WORD, SCRATCH_BYTES // 8))
        memory.align = 64
        return builder.ptrtoint(memory, _WORD)

    return types.int64(), generate


@intrinsic
def call_kernel(typing_context, kernel, words):  # type: ignore[no-untyped-def]
    """Call the kernel at an address, on this thread."""

    def generate(context, builder, signature, values):  # type: ignore[no-untyped-def]
        function_type = ir.FunctionType(ir.VoidType(), [_WORD])
        builder.call(builder.inttoptr(values[0], function_type.as_pointer()), [values[1]])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def call_barrier(typing_context, barrier):  # type: ignore[no-untyped-def]
    """Call `void barrier(void)` at an address."""

    def generate(context, builder, signature, values):  # type: ignore[no-untyped-def]
        function_type = ir.FunctionType(ir.VoidType(), [])
        builder.call(builder.inttoptr(values[0], function_type.as_pointer()), [])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic
def _call_gomp_parallel(typing_context, gomp_parallel, kernel, words, num_threads):  # type: ignore[no-untyped-def]
    def generate(context, builder, signature, values):  # type: ignore[no-untyped-def]
        unsigned = ir.IntType(32)
        function_type = ir.FunctionType(ir.VoidType(), [_WORD, _WORD, unsigned, unsigned])
        arguments = [values[1], values[2], builder.trunc(values[3], unsigned), ir.Constant(unsigned, 0)]
        builder.call(builder.inttoptr(values[0], function_type.as_pointer()), arguments)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), generate


def _launch(  # type: ignore[no-untyped-def]
    gomp_parallel, num_threads, kernel,
    word1, word2, word3, word4, word5, word6, word7, word8, word9, word10, word11, word12
):  # fmt: skip
    words = _words_on_the_stack()
    store_integer(words, 0)
    store_integer(words + THREAD_COUNTER, 0)
    store_integer(words + 8, word1)
    store_integer(words + 16, word2)
    store_integer(words + 24, word3)
    store_integer(words + 32, word4)
    store_integer(words + 40, word5)
    store_integer(words + 48, word6)
    store_integer(words + 56, word7)
    store_integer(words + 64, word8)
    store_integer(words + 72, word9)
    store_integer(words + 80, word10)
    store_integer(words + 88, word11)
    store_integer(words + 96, word12)
    if num_threads > 1:
        _call_gomp_parallel(gomp_parallel, kernel, words, num_threads)
    else:
        call_kernel(kernel, words)


@dataclass(frozen=True)
class Launcher:
    """Runs kernels, without the GIL. `run` returns when the kernel has ended on all threads.

    Teams are as large as torch's own, or the calling thread alone: the runtime would build its team anew at
    each change of size.
    """

    gomp_parallel: int  # 0: torch uses no OpenMP here, and kernels run on the calling thread
    launch: Callable[..., None]

    def run(self, kernel: int, in_parallel: bool, *words: int) -> None:
        """Call the kernel at an address with 12 words; it finds them behind the counter."""
        num_threads = torch.get_num_threads() if in_parallel and self.gomp_parallel else 1
        self.launch(self.gomp_parallel, num_threads, kernel, *words)


def make_launcher() -> Launcher:
    digest = source_digest()
    register_jitable(_launch)

    # For numba's cache, as in compile_kernel.
    def launch(  # type: ignore[no-untyped-def]
        gomp_parallel, num_threads, kernel,
        word1, word2, word3, word4, word5, word6, word7, word8, word9, word10, word11, word12
    ):  # fmt: skip
        if digest != 0:
            _launch(  # type: ignore[no-untyped-call]
                gomp_parallel, num_threads, kernel,
                word1, word2, word3, word4, word5, word6, word7, word8, word9, word10, word11, word12,
            )  # fmt: skip

    def build(cache: bool) -> Any:
        words = ", ".join(["int64"] * 15)
        return njit(f"void({words})", nogil=True, cache=cache)(launch)

    return Launcher(gomp_parallel_address(), compile_with_cache(build))


@cache
def float_bits(value: float) -> int:
    """A float32 as the word that hands it to a kernel, which reads it with `load_number`."""
    bits: int = struct.unpack("<I", struct.pack("<f", value))[0]
    return bits
