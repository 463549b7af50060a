"""Taking the pages of a KV pool in host memory shortly before they are used.

The kernel gives a page when it is first touched. Left to that, the threads of a step fault in the blocks of
every new prompt page by page, in each other's way: in a virtual machine with two cores a tenth of the time to
first token of 512 tokens (4 MiB of KV cache), and of a pull of 1.4 MB two thirds. To take the same pages in
one call is cheaper, and an engine that waits for work can do so in advance. The whole pool is not taken at
once: beyond what is used and the 64 MiB that follow, a large pool costs nothing.
"""

import ctypes
import errno
import logging
import mmap
from collections.abc import Callable, Iterable

from pdengine.engine.step import Chunk

logger = logging.getLogger(__name__)

AHEAD_BYTES = 64 * 2**20
PIECE_BYTES = 256 * 2**10  # in advance, at a time: a command waits for that, about 0.2 ms
MADV_POPULATE_WRITE = 23  # <linux/mman.h>, Linux 5.14


class PoolPages:
    """Belongs to the engine thread. A pool is used from its beginning on: `FreeBlocks` leaves the long last
    run alone while a shorter one will do.

    address: of the pool, at the beginning of a page. ahead_bytes: how much more than what was used is taken
    in advance. populate: takes an address and a number of bytes; False if the kernel cannot do that, and
    then pages come when they are touched.
    """

    def __init__(
        self,
        address: int,
        *,
        num_blocks: int,
        block_bytes: int,
        block_size: int,
        ahead_bytes: int = AHEAD_BYTES,
        populate: Callable[[int, int], bool] | None = None,
    ) -> None:
        self._address = address
        self._num_bytes = num_blocks * block_bytes
        self._block_bytes = block_bytes
        self._block_size = block_size
        self._ahead_bytes = ahead_bytes
        self._populate = populate or _populate_by_madvise()
        self._used = 0
        self._populated = 0

    def use(self, chunks: Iterable[Chunk]) -> None:
        """Take the pages that these chunks write to, and all before them, if they were not taken yet."""
        if self._populated == self._num_bytes:
            return
        self._used = max([self._used, *(self._end(chunk) for chunk in chunks)])
        if self._used > self._populated:
            self._take(self._used)

    def populate_ahead(self) -> bool:
        """Take a few pages in advance; whether there are more to take."""
        target = min(self._used + self._ahead_bytes, self._num_bytes)
        if self._populated < target:
            self._take(min(self._populated + PIECE_BYTES, target))
        return self._populated < target

    def _end(self, chunk: Chunk) -> int:
        """Bytes of the pool up to the last block that the chunk writes to."""
        sequence, num_tokens = chunk
        first = sequence.num_computed // self._block_size
        last = (sequence.num_computed + num_tokens - 1) // self._block_size
        return (max(sequence.block_ids[first : last + 1], default=-1) + 1) * self._block_bytes

    def _take(self, end: int) -> None:
        if self._populate(self._address + self._populated, end - self._populated):
            self._populated = end
        else:
            self._populated = self._num_bytes  # it is not asked again


def _populate_by_madvise() -> Callable[[int, int], bool]:
    libc = ctypes.CDLL(None, use_errno=True)  # which calls without the GIL; mmap.madvise keeps it

    def populate(address: int, num_bytes: int) -> bool:
        start = address - address % mmap.PAGESIZE  # a block may end within a page
        arguments = ctypes.c_void_p(start), ctypes.c_size_t(address + num_bytes - start), MADV_POPULATE_WRITE
        if libc.madvise(*arguments) == 0:
            return True
        name = errno.errorcode.get(ctypes.get_errno(), "?")
        logger.info("pages of the KV pool are not taken ahead: %s", name)
        return False

    return populate
