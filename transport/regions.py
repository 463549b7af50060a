"""KV pools as named tensors, and the byte ranges that move blocks from one pool to another.

A worker publishes the descriptor of its KV pool once; a peer computes every remote address from it, so that
nothing is gathered into staging buffers and the owner takes no part in a pull (tensor-centric transfer,
KVDirect, arXiv 2501.14743, section 4). Addresses and lengths are bytes and exact in int64.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

MAX_ADDRESS = 2**63 - 1  # addresses travel as int64; user space ends far below on every Linux platform


class InvalidRegion(ValueError):
    """A region descriptor that contradicts itself; the message names the field."""


class RegionMismatch(ValueError):
    """Two pools whose blocks cannot be copied into each other, because `field` differs."""

    def __init__(self, field: str, ours: object, theirs: object) -> None:
        super().__init__(f"KV regions differ in {field}: ours is {ours!r}, theirs is {theirs!r}")
        self.field = field
        self.ours = ours
        self.theirs = theirs


class BlockOutOfRange(ValueError):
    """A run that leaves its pool; `side` is "remote" or "local"."""

    def __init__(self, side: str, first_block: int, count: int, num_blocks: int) -> None:
        last_block = first_block + count - 1
        super().__init__(
            f"{side} blocks {first_block} to {last_block} are outside a pool of {num_blocks} blocks"
        )
        self.side = side
        self.first_block = first_block
        self.count = count
        self.num_blocks = num_blocks


class RegionDescriptor(msgspec.Struct, frozen=True):
    """A contiguous KV pool in some process's memory, dimension by dimension.

    The first dimension is the block; all bytes of one block are contiguous. `strides` are in bytes, so the
    last one is the size of an element. `remote_key` is the packed key that a peer needs to read the pool;
    it is empty until the pool is registered.

    Raises InvalidRegion if the fields contradict each other (msgspec reports it as a ValidationError when
    the descriptor comes off the wire).
    """

    names: tuple[str, ...]  # ("block", "kv_head", "layer", "kv", "token", "dim")
    sizes: tuple[int, ...]  # elements per dimension
    strides: tuple[int, ...]  # bytes per step in a dimension
    dtype: str
    base_address: int
    remote_key: bytes = b""

    def __post_init__(self) -> None:
        if not self.names or self.names[0] != "block":
            raise InvalidRegion(f"names must begin with 'block', got {self.names!r}")
        if len(set(self.names)) != len(self.names):
            raise InvalidRegion(f"names must be distinct, got {self.names!r}")
        if not len(self.names) == len(self.sizes) == len(self.strides):
            raise InvalidRegion(
                f"names, sizes and strides must have one length, got {len(self.names)}, {len(self.sizes)} "
                f"and {len(self.strides)}"
            )
        if min(self.sizes) < 1:
            raise InvalidRegion(f"sizes must be at least 1, got {self.sizes!r}")
        expected = _contiguous_strides(self.sizes, self.strides[-1])
        if self.strides[-1] < 1 or self.strides != expected:
            raise InvalidRegion(f"strides must be those of a contiguous pool, got {self.strides!r}")
        if not 0 <= self.base_address <= MAX_ADDRESS - self.nbytes:
            raise InvalidRegion(
                f"base_address {self.base_address} and {self.nbytes} bytes do not fit in int64"
            )

    @property
    def num_blocks(self) -> int:
        return self.sizes[0]

    @property
    def block_bytes(self) -> int:
        return self.strides[0]

    @property
    def nbytes(self) -> int:
        return self.num_blocks * self.block_bytes


class Run(NamedTuple):
    """`count` blocks that are consecutive in both pools: one copy moves them."""

    remote_block: int
    local_block: int
    count: int  # type: ignore[assignment]  # shadows tuple.count, which nobody needs here


def describe_region(
    names: Sequence[str],
    sizes: Sequence[int],
    *,
    item_size: int,
    dtype: str,
    base_address: int,
    remote_key: bytes = b"",
) -> RegionDescriptor:
    """The descriptor of a contiguous pool of `sizes` elements of `item_size` bytes at `base_address`."""
    strides = _contiguous_strides(sizes, item_size)
    return RegionDescriptor(tuple(names), tuple(sizes), strides, dtype, base_address, remote_key)


def check_pull_compatible(local: RegionDescriptor, remote: RegionDescriptor) -> None:
    """Raise RegionMismatch unless a block of `remote` has the very layout of a block of `local`.

    The number of blocks, the address and the key may differ; everything else may not.
    """
    if local.names != remote.names:
        raise RegionMismatch("names", local.names, remote.names)
    if local.dtype != remote.dtype:
        raise RegionMismatch("dtype", local.dtype, remote.dtype)
    for name, ours, theirs in zip(local.names[1:], local.sizes[1:], remote.sizes[1:], strict=True):
        if ours != theirs:
            raise RegionMismatch(f"sizes[{name}]", ours, theirs)
    for name, ours, theirs in zip(local.names, local.strides, remote.strides, strict=True):
        if ours != theirs:
            raise RegionMismatch(f"strides[{name}]", ours, theirs)


def block_runs(remote_blocks: Sequence[int], local_blocks: Sequence[int]) -> list[Run]:
    """Join pairs (remote block, local block) into the fewest runs, in order.

    Raises ValueError if the two lists differ in length.
    """
    if len(remote_blocks) != len(local_blocks):
        raise ValueError(
            f"remote_blocks and local_blocks differ in length: {len(remote_blocks)} and {len(local_blocks)}"
        )
    runs: list[Run] = []
    remote_start = local_start = count = 0
    for remote, local in zip(remote_blocks, local_blocks, strict=True):
        if count and remote == remote_start + count and local == local_start + count:
            count += 1
            continue
        if count:
            runs.append(Run(remote_start, local_start, count))
        remote_start, local_start, count = remote, local, 1
    if count:
        runs.append(Run(remote_start, local_start, count))
    return runs


def copy_ranges(
    remote: RegionDescriptor, local: RegionDescriptor, runs: Iterable[Run]
) -> npt.NDArray[np.int64]:
    """The copies that `runs` ask for: [num_runs, 3] int64 of (local address, remote address, bytes).

    The two regions must be pull-compatible. Raises BlockOutOfRange for a run that leaves either pool.
    """
    runs = list(runs)
    for run in runs:
        for side, first_block, region in (
            ("remote", run.remote_block, remote),
            ("local", run.local_block, local),
        ):
            if first_block < 0 or run.count < 1 or first_block + run.count > region.num_blocks:
                raise BlockOutOfRange(side, first_block, run.count, region.num_blocks)
    blocks = np.array(runs, dtype=np.int64).reshape(len(runs), 3)
    ranges = np.empty_like(blocks)
    ranges[:, 0] = local.base_address + blocks[:, 1] * local.block_bytes
    ranges[:, 1] = remote.base_address + blocks[:, 0] * remote.block_bytes
    ranges[:, 2] = blocks[:, 2] * local.block_bytes
    return ranges


def _contiguous_strides(sizes: Sequence[int], item_size: int) -> tuple[int, ...]:
    return tuple(item_size * prod(sizes[axis + 1 :]) for axis in range(len(sizes)))
