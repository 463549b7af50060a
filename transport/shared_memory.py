"""Host memory that other processes of this machine can map: a sealed memfd."""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import weakref

import numpy as np

from pdengine.transport.transfer import TransferError

MAP_NORESERVE = 0x4000  # <linux/mman.h>; the mmap module has no name for it before Python 3.13
F_SEAL_FUTURE_WRITE = 0x10  # <linux/fcntl.h>, Linux 5.1: nobody can map it for writing from now on
_SIZE_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


class SharedMemory:
    """`nbytes` of zeroed memory, mapped here for reading and writing, with a file that others map read-only.

    Pages are allocated when they are first touched, so what nobody uses costs nothing; like all shared
    memory they count for the process, and the cgroup, that touches them first. The seals promise readers
    that the file keeps its size (reading beyond the end of a file kills a process) and keep them from
    writing to it (memfd_create(2), fcntl(2)). The mapping is not inherited by fork.

    Raises TransferError if the system refuses it, for instance for `ulimit -f`.
    """

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        try:
            descriptor = os.memfd_create("pdengine-pool", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        except OSError as error:
            raise TransferError(f"the KV pool cannot be created: memfd_create: {error.strerror}") from None
        try:
            os.ftruncate(descriptor, nbytes)
            self.buffer = mmap.mmap(descriptor, nbytes, flags=mmap.MAP_SHARED | MAP_NORESERVE)
            _seal(descriptor)
            # Opened anew, because a descriptor that is handed over keeps its mode.
            self.file = os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            reason = f"the KV pool of {nbytes} bytes cannot be created: {error.strerror}"
            raise TransferError(reason) from None
        finally:
            os.close(descriptor)
        weakref.finalize(self, os.close, self.file)
        self.address = _address_of(self.buffer)
        self.buffer.madvise(mmap.MADV_DONTFORK)
        with contextlib.suppress(OSError):  # a kernel without huge pages
            self.buffer.madvise(mmap.MADV_HUGEPAGE)


class MappedMemory:
    """The `SharedMemory` of another process, mapped read-only; it stays valid after that process has died."""

    def __init__(self, descriptor: int, nbytes: int) -> None:
        """Takes a file descriptor, which the caller may close. Raises TransferError unless it is sealed
        memory of exactly `nbytes`."""
        try:
            seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
        except OSError:
            raise TransferError("what the peer handed over is not a memfd") from None
        if seals & _SIZE_SEALS != _SIZE_SEALS:
            raise TransferError("the peer's pool is not sealed against another size")
        size = os.fstat(descriptor).st_size
        if size != nbytes:
            raise TransferError(f"the peer's pool has {size} bytes, its region {nbytes}")
        try:
            flags = mmap.MAP_SHARED | MAP_NORESERVE
            self._buffer = mmap.mmap(descriptor, nbytes, flags=flags, prot=mmap.PROT_READ)
        except OSError as error:
            raise TransferError(f"the peer's pool cannot be mapped: {error.strerror}") from None
        self.address = _address_of(self._buffer)
        self._buffer.madvise(mmap.MADV_DONTFORK)

    def close(self) -> None:
        """Unmap it; nothing may read from it any more. Idempotent."""
        self._buffer.close()


def _seal(descriptor: int) -> None:
    """After the owner has mapped it, because a sealed file cannot be mapped for writing."""
    with contextlib.suppress(OSError):  # before Linux 5.1; then only the mode of the descriptor protects it
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, F_SEAL_FUTURE_WRITE)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SIZE_SEALS | fcntl.F_SEAL_SEAL)


def _address_of(buffer: mmap.mmap) -> int:
    return int(np.frombuffer(buffer, np.uint8).ctypes.data)
