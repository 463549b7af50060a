"""CPU kernel that runs other kernels one after the other, on threads that stay together until the last.

A launch of its own per kernel would wake the threads each time, and have Python between every two.
"""

from __future__ import annotations

from numba.extending import register_jitable

from pdengine.triton_kernels.cpu_launch import NUM_WORDS, call_barrier, call_kernel
from pdengine.triton_kernels.vector_code import load_integer

KERNEL_WORD = NUM_WORDS  # the address of the kernel, behind the words that it finds; 0: nothing to do
LAUNCH_WORDS = 24  # to the next launch: whole cache lines


@register_jitable
def run_program(words: int) -> None:
    """words: the counter, unused; the address of the launches, how many; that of the threads' barrier, or 0
    where they have none, and there is a single one."""
    launches, count, barrier = load_integer(words + 8), load_integer(words + 16), load_integer(words + 24)
    for index in range(count):
        launch = launches + index * 8 * LAUNCH_WORDS
        kernel = load_integer(launch + 8 * KERNEL_WORD)
        if kernel != 0:
            call_kernel(kernel, launch)
            if barrier != 0:  # what a kernel wrote, any thread of the next one may read
                call_barrier(barrier)
