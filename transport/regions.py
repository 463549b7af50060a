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


class HeadsOutOfRange(ValueError):
    """A slice of heads that leaves its pool, or a tensor-parallel degree that does not divide the heads."""


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


class HeadSlice(NamedTuple):
    """`count` KV heads: those from `remote_head` of the remote pool are those from `local_head` of ours."""

    remote_head: int
    local_head: int
    count: int  # type: ignore[assignment]  # as in Run


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
    _check_same_layout(local, remote, first_dimension=1)


def check_heads_compatible(local: RegionDescriptor, remote: RegionDescriptor) -> None:
    """Raise RegionMismatch unless a KV head of a block of `remote` has the very layout of one of `local`.

    As for `check_pull_compatible`, but the number of heads may differ, too. The heads must be the second
    dimension, so that some heads of a block are one piece; raises InvalidRegion if they are not.
    """
    if local.names[1:2] != ("kv_head",):
        raise InvalidRegion(f"names must begin with 'block', 'kv_head', got {local.names!r}")
    _check_same_layout(local, remote, first_dimension=2)


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
    blocks = _checked_blocks(remote, local, runs)
    ranges = np.empty_like(blocks)
    ranges[:, 0] = local.base_address + blocks[:, 1] * local.block_bytes
    ranges[:, 1] = remote.base_address + blocks[:, 0] * remote.block_bytes
    ranges[:, 2] = blocks[:, 2] * local.block_bytes
    return ranges


def head_slices(
    num_kv_heads: int, *, rank: int, degree: int, remote_degree: int
) -> list[tuple[int, HeadSlice]]:
    """(rank of a remote worker, what to read from it) for the worker of `rank` among `degree`.

    The heads of a model are dealt out to tensor-parallel workers in order, num_kv_heads / degree to each
    (Megatron-LM, arXiv 1909.08053, section 3); the remote workers are `remote_degree`. Raises
    HeadsOutOfRange if a degree does not divide the heads, or there is no such rank.
    """
    for each in (degree, remote_degree):
        if each < 1 or num_kv_heads % each:
            raise HeadsOutOfRange(f"{num_kv_heads} KV heads cannot be dealt out to {each} workers")
    if not 0 <= rank < degree:
        raise HeadsOutOfRange(f"there is no rank {rank} among {degree} workers")
    ours, theirs = num_kv_heads // degree, num_kv_heads // remote_degree
    slices = []
    head, end = rank * ours, (rank + 1) * ours  # of the model
    while head < end:
        remote_rank, remote_head = divmod(head, theirs)
        count = min(end - head, theirs - remote_head)
        slices.append((remote_rank, HeadSlice(remote_head, head - rank * ours, count)))
        head += count
    return slices


def copy_head_ranges(
    remote: RegionDescriptor, local: RegionDescriptor, runs: Iterable[Run], heads: HeadSlice
) -> npt.NDArray[np.int64]:
    """As `copy_ranges`, for some heads of every block: [num_blocks of all runs, 3], one copy per block.

    The two regions must be heads-compatible. Raises BlockOutOfRange, or HeadsOutOfRange for a slice that
    leaves either pool.
    """
    for side, first, region in (("remote", heads.remote_head, remote), ("local", heads.local_head, local)):
        if first < 0 or heads.count < 1 or first + heads.count > region.sizes[1]:
            raise HeadsOutOfRange(
                f"{side} KV heads {first} to {first + heads.count - 1} are outside a pool of "
                f"{region.sizes[1]}"
            )
    blocks = _checked_blocks(remote, local, runs)
    counts = blocks[:, 2]
    run_of_block = np.repeat(np.arange(len(blocks)), counts)
    step = np.arange(len(run_of_block)) - (np.cumsum(counts) - counts)[run_of_block]  # within its run
    head_bytes = local.strides[1]
    ranges = np.empty((len(run_of_block), 3), np.int64)
    ranges[:, 0] = local.base_address + (blocks[run_of_block, 1] + step) * local.block_bytes
    ranges[:, 1] = remote.base_address + (blocks[run_of_block, 0] + step) * remote.block_bytes
    ranges[:, 0] += heads.local_head * head_bytes
    ranges[:, 1] += heads.remote_head * head_bytes
    ranges[:, 2] = heads.count * head_bytes
    return ranges


def _check_same_layout(local: RegionDescriptor, remote: RegionDescriptor, *, first_dimension: int) -> None:
    """Raise RegionMismatch if names, dtype, or what lies inside an element of a dimension before
    `first_dimension` differ."""
    if local.names != remote.names:
        raise RegionMismatch("names", local.names, remote.names)
    if local.dtype != remote.dtype:
        raise RegionMismatch("dtype", local.dtype, remote.dtype)
    for axis in range(first_dimension, len(local.names)):
        if local.sizes[axis] != remote.sizes[axis]:
            raise RegionMismatch(f"sizes[{local.names[axis]}]", local.sizes[axis], remote.sizes[axis])
    for axis in range(first_dimension - 1, len(local.names)):
        if local.strides[axis] != remote.strides[axis]:
            raise RegionMismatch(f"strides[{local.names[axis]}]", local.strides[axis], remote.strides[axis])


def _checked_blocks(
    remote: RegionDescriptor, local: RegionDescriptor, runs: Iterable[Run]
) -> npt.NDArray[np.int64]:
    """The runs as [num_runs, 3] int64. Raises BlockOutOfRange for a run that leaves either pool."""
    runs = list(runs)
    for run in runs:
        for side, first_block, region in (
            ("remote", run.remote_block, remote),
            ("local", run.local_block, local),
        ):
            if first_block < 0 or run.count < 1 or first_block + run.count > region.num_blocks:
                raise BlockOutOfRange(side, first_block, run.count, region.num_blocks)
    return np.array(runs, dtype=np.int64).reshape(len(runs), 3)


def layer_ranges(
    remote: RegionDescriptor, local: RegionDescriptor, runs: Iterable[Run], layer: int
) -> npt.NDArray[np.int64]:
    """The copies that move one layer of `runs`: like `copy_ranges`, but one per block and KV head.

    The two regions must be pull-compatible. Raises ValueError if they have no such layer, and what
    `copy_ranges` raises.
    """
    axis = local.names.index("layer")
    if not 0 <= layer < local.sizes[axis]:
        raise ValueError(f"layer {layer} is outside of {local.sizes[axis]} layers")
    blocks = [Run(run.remote_block + i, run.local_block + i, 1) for run in runs for i in range(run.count)]
    addresses = copy_ranges(remote, local, blocks)[:, np.newaxis, :2]  # [blocks, 1, local and remote]
    offsets = np.arange(prod(local.sizes[1:axis])) * local.strides[axis - 1] + layer * local.strides[axis]
    pieces = (addresses + offsets[:, np.newaxis]).reshape(-1, 2)
    return np.column_stack([pieces, np.full(len(pieces), local.strides[axis])])


def _contiguous_strides(sizes: Sequence[int], item_size: int) -> tuple[int, ...]:
    return tuple(item_size * prod(sizes[axis + 1 :]) for axis in range(len(sizes)))
