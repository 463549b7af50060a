"""Torch's own OpenMP threads, for kernels compiled by numba.

A second pool of threads would spin against torch's after each of its operations, so numba's own is not used:
the runtime that torch is linked with is asked to run a compiled function on each of its threads.
"""

import ctypes
from pathlib import Path

import torch


def gomp_parallel_address() -> int:
    """The address of `void GOMP_parallel(void (*function)(void *), void *data, unsigned threads, unsigned
    flags)` of the OpenMP runtime that torch uses, or 0 where it uses none.

    LLVM's and Intel's runtimes have this function of GCC's, too. It returns when `function(data)` has
    returned on all threads; the calling thread is one of them.
    """
    return _address("GOMP_parallel")


def gomp_barrier_address() -> int:
    """The address of `void GOMP_barrier(void)`, in which each thread of `GOMP_parallel` waits for all of
    them; 0 as above. Outside of a team it returns at once."""
    return _address("GOMP_barrier")


def _address(name: str) -> int:
    # Of a handle, dlsym looks in what the library is linked with: no other runtime of the process is found.
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        function = ctypes.CDLL(str(library))[name]
    except (OSError, AttributeError):
        return 0
    return ctypes.cast(function, ctypes.c_void_p).value or 0
