"""The memory of a pool: sealed, lazily allocated, not inherited, refused with a sentence."""

from __future__ import annotations

import ctypes
import fcntl
import gc
import mmap
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from pdengine.transport.shared_memory import F_SEAL_FUTURE_WRITE, MappedMemory, SharedMemory
from pdengine.transport.transfer import TransferError


def test_another_mapping_shows_the_same_bytes_and_outlives_the_owner() -> None:
    memory = SharedMemory(10_000)
    mapped = MappedMemory(memory.file, 10_000)
    memory.buffer[9_995:] = b"after"
    assert ctypes.string_at(mapped.address + 9_995, 5) == b"after"
    del memory
    gc.collect()
    assert ctypes.string_at(mapped.address + 9_995, 5) == b"after"
    mapped.close()
    mapped.close()


def test_nobody_else_can_write_it_or_change_its_size() -> None:
    memory = SharedMemory(8192)
    seals = fcntl.fcntl(memory.file, fcntl.F_GET_SEALS)
    size_seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
    assert seals == size_seals | fcntl.F_SEAL_SEAL | F_SEAL_FUTURE_WRITE
    again = os.open(f"/proc/self/fd/{memory.file}", os.O_RDWR)  # a peer of the same user can do that
    for attempt in (
        lambda: mmap.mmap(again, 8192),
        lambda: os.pwrite(again, b"x", 0),
        lambda: os.ftruncate(again, 0),
        lambda: os.ftruncate(again, 10_000),
        lambda: fcntl.fcntl(again, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE),
    ):
        with pytest.raises(PermissionError):
            attempt()
    os.close(again)
    memory.buffer[:1] = b"o"  # the owner still can


def test_pages_are_allocated_when_they_are_touched() -> None:
    memory = SharedMemory(8 * 2**30)
    memory.buffer[7 * 2**30] = 1
    allocated = os.fstat(memory.file).st_blocks * 512
    assert 0 < allocated <= 4 * 2**20  # one page, or a huge one


def test_the_file_is_closed_with_its_owner() -> None:
    before = len(os.listdir("/proc/self/fd"))
    memories = [SharedMemory(4096) for _ in range(5)]
    assert len(os.listdir("/proc/self/fd")) > before
    del memories
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_limit_of_the_system_is_a_sentence() -> None:
    """In a process of its own, because the limit stays."""
    script = """
import resource
from pdengine.transport.shared_memory import SharedMemory
from pdengine.transport.transfer import TransferError
resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
try:
    SharedMemory(2**21)
except TransferError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert result.stdout == "the KV pool of 2097152 bytes cannot be created: File too large\n", result.stderr
    with pytest.raises(TransferError, match="cannot be created"):
        SharedMemory(2**62)


def test_without_address_space_it_is_not_mapped() -> None:
    memory = SharedMemory(2**30)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**29, hard))
    try:
        with pytest.raises(TransferError, match="cannot be mapped: Cannot allocate memory"):
            MappedMemory(memory.file, 2**30)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
