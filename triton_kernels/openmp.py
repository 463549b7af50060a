"""Torch's own OpenMP threads, for kernels compiled by numba.

A second pool of threads would spin against torch's after each of its operations, so numba's own is not used:
the runtime that torch is linked with is asked to run a compiled function on each of its threads.
"""

import ctypes
from pathlib import Path
from typing import Any

import torch

OMP_PAUSE_HARD = 2  # omp_pause_resource_t in <omp.h>


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


def end_threads() -> None:
    """End the threads that wait for the calling thread's next parallel region; it gets new ones when it needs
    some. Each thread that computes has a team of its own, and GCC's runtime lets threads wait by spinning
    only while all teams together have no more threads than there are cores: with more, every wait is a sleep,
    and every region starts by waking them."""
    pause_resources = _function("omp_pause_resource_all")  # OpenMP 5.0, 3.2.44
    if pause_resources is not None:
        pause_resources(OMP_PAUSE_HARD)


def _address(name: str) -> int:
    function = _function(name)
    return 0 if function is None else ctypes.cast(function, ctypes.c_void_p).value or 0


def _function(name: str) -> Any:
    # Of a handle, dlsym looks in what the library is linked with: no other runtime of the process is found.
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        return ctypes.CDLL(str(library))[name]
    except (OSError, AttributeError):
        return None
