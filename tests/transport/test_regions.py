"""Region descriptors, runs of blocks and the ranges they become."""

from __future__ import annotations

import ctypes
from itertools import pairwise

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdengine.transport.regions import (
    BlockOutOfRange,
    HeadSlice,
    HeadsOutOfRange,
    InvalidRegion,
    RegionDescriptor,
    RegionMismatch,
    Run,
    block_runs,
    check_heads_compatible,
    check_pull_compatible,
    copy_head_ranges,
    copy_ranges,
    describe_region,
    head_slices,
)

NAMES = ("block", "kv_head", "layer", "kv", "token", "dim")


def region(num_blocks: int = 100, base_address: int = 0x1000, **changes: object) -> RegionDescriptor:
    descriptor = describe_region(
        NAMES, (num_blocks, 8, 32, 2, 16, 128), item_size=2, dtype="bfloat16", base_address=base_address
    )
    return msgspec.structs.replace(descriptor, **changes)


def test_a_llama_3_8b_block_has_two_mebibytes() -> None:
    descriptor = region()
    assert descriptor.block_bytes == 2 * 1024 * 1024
    assert descriptor.num_blocks == 100
    assert descriptor.nbytes == 200 * 1024 * 1024
    assert descriptor.strides == (2097152, 262144, 8192, 4096, 256, 2)


def test_a_descriptor_survives_the_wire() -> None:
    descriptor = region(remote_key=b"\x00\xffkey")
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(descriptor), type=RegionDescriptor) == descriptor


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"names": ("layer", *NAMES[1:])}, "names"),
        ({"names": ("block", "layer", "layer", "kv", "token", "dim")}, "names"),
        ({"names": ()}, "names"),
        ({"sizes": (100, 8)}, "sizes"),
        ({"sizes": (100, 8, 32, 0, 16, 128)}, "sizes"),
        ({"sizes": (100, 8, 32, 2, 16, -128)}, "sizes"),
        ({"strides": (2097152, 262144, 8192, 4096, 256, 0)}, "strides"),
        ({"strides": (2097152, 262144, 8192, 4096, 512, 2)}, "strides"),
        ({"base_address": -1}, "base_address"),
        ({"base_address": 2**63 - 1}, "base_address"),
    ],
)
def test_a_contradictory_descriptor_is_refused_by_field(changes: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidRegion, match=field):
        region(**changes)
    fields = msgspec.structs.asdict(region()) | changes
    with pytest.raises(msgspec.ValidationError, match=field):
        msgspec.msgpack.decode(msgspec.msgpack.encode(fields), type=RegionDescriptor)


def test_pools_may_differ_in_blocks_address_and_key() -> None:
    check_pull_compatible(region(100), region(7, 0x9000, remote_key=b"key"))


@pytest.mark.parametrize(
    ("theirs", "field"),
    [
        (region(names=("block", "layer", "kv_head", "kv", "token", "dim")), "names"),
        (region(dtype="float16"), "dtype"),
        (
            describe_region(NAMES, (100, 8, 32, 2, 32, 128), item_size=2, dtype="bfloat16", base_address=0),
            "sizes[token]",
        ),
        (
            describe_region(NAMES, (100, 8, 32, 2, 16, 128), item_size=4, dtype="bfloat16", base_address=0),
            "strides[block]",
        ),
    ],
)
def test_a_mismatch_names_its_field(theirs: RegionDescriptor, field: str) -> None:
    with pytest.raises(RegionMismatch) as caught:
        check_pull_compatible(region(), theirs)
    assert caught.value.field == field
    assert field in str(caught.value)


# Block ids close together, so that consecutive ones are common
pairs = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), max_size=40)


@given(pairs)
def test_runs_cover_the_pairs_in_order_and_are_maximal(pairs: list[tuple[int, int]]) -> None:
    runs = block_runs([remote for remote, _ in pairs], [local for _, local in pairs])
    covered = [(run.remote_block + step, run.local_block + step) for run in runs for step in range(run.count)]
    assert covered == pairs
    for before, after in pairwise(runs):
        follows = (before.remote_block + before.count, before.local_block + before.count)
        assert follows != (after.remote_block, after.local_block)


@given(st.permutations(range(30)), st.permutations(range(40)), st.integers(0, 30))
def test_ranges_of_distinct_blocks_are_disjoint(remote: list[int], local: list[int], count: int) -> None:
    runs = block_runs(remote[:count], local[:count])
    theirs, ours = region(30, 0x7000_0000_0000), region(40, 0x1000)
    ranges = copy_ranges(theirs, ours, runs)
    assert ranges.dtype == np.int64
    assert ranges.shape == (len(runs), 3)
    assert ranges[:, 2].sum() == count * ours.block_bytes
    for column, pool in ((0, ours), (1, theirs)):
        spans = sorted((int(row[column]), int(row[column] + row[2])) for row in ranges)
        assert all(end <= start for (_, end), (start, _) in pairwise(spans))
        assert all(
            pool.base_address <= start and end <= pool.base_address + pool.nbytes for start, end in spans
        )


@given(st.integers(0, 2**22 - 1), st.integers(0, 2**22 - 1))
def test_ranges_are_exact_in_huge_pools(remote_block: int, local_block: int) -> None:
    pool = region(2**22, 0x7FFF_1234_5678)  # 8 TiB
    ranges = copy_ranges(pool, pool, [Run(remote_block, local_block, 1)])
    assert ranges.tolist() == [
        [pool.base_address + local_block * 2**21, pool.base_address + remote_block * 2**21, 2**21]
    ]


def test_no_runs_are_no_ranges() -> None:
    assert block_runs([], []) == []
    assert copy_ranges(region(), region(), []).shape == (0, 3)


@pytest.mark.parametrize(
    ("run", "side"),
    [
        (Run(-1, 0, 1), "remote"),
        (Run(99, 0, 2), "remote"),
        (Run(2**70, 0, 1), "remote"),
        (Run(0, 50, 1), "local"),
        (Run(0, -(2**70), 1), "local"),
        (Run(0, 0, 0), "remote"),
        (Run(5, 5, -1), "remote"),
    ],
)
def test_a_run_outside_a_pool_is_refused(run: Run, side: str) -> None:
    with pytest.raises(BlockOutOfRange) as caught:
        copy_ranges(region(100), region(50), [Run(1, 1, 1), run])
    assert caught.value.side == side


def test_lists_of_different_length_are_refused() -> None:
    with pytest.raises(ValueError, match="2 and 1"):
        block_runs([1, 2], [1])


HEAD_SHAPE = (3, 2, 4, 5)  # layer, kv, token, dim


def pool_of_heads(num_blocks: int, num_heads: int, seed: int) -> npt.NDArray[np.float32]:
    """[num_blocks, num_heads, *HEAD_SHAPE]"""
    shape = (num_blocks, num_heads, *HEAD_SHAPE)
    return np.random.default_rng(seed).random(shape, np.float32)


def describe_pool(pool: npt.NDArray[np.float32]) -> RegionDescriptor:
    return describe_region(NAMES, pool.shape, item_size=4, dtype="float32", base_address=pool.ctypes.data)


def copy_heads(
    remote: npt.NDArray[np.float32], local: npt.NDArray[np.float32], runs: list[Run], heads: HeadSlice
) -> int:
    """Copy the bytes; the number of copies."""
    theirs, ours = describe_pool(remote), describe_pool(local)
    check_heads_compatible(ours, theirs)
    ranges = copy_head_ranges(theirs, ours, runs, heads)
    for local_address, remote_address, length in ranges.tolist():
        ctypes.memmove(local_address, remote_address, length)
    return len(ranges)


@given(
    st.sampled_from([1, 2, 4, 8]),
    st.sampled_from([1, 2, 4, 8]),
    st.permutations(range(6)),
    st.permutations(range(7)),
    st.integers(1, 6),
)
def test_workers_of_any_degrees_get_their_heads(
    degree: int, remote_degree: int, remote_blocks: list[int], local_blocks: list[int], count: int
) -> None:
    whole = pool_of_heads(6, 8, seed=1)
    remotes = np.split(whole, remote_degree, axis=1)
    runs = block_runs(remote_blocks[:count], local_blocks[:count])
    for rank in range(degree):
        local = pool_of_heads(7, 8 // degree, seed=2)
        expected = local.copy()
        heads = slice(rank * 8 // degree, (rank + 1) * 8 // degree)
        expected[local_blocks[:count]] = whole[remote_blocks[:count], heads]
        slices = head_slices(8, rank=rank, degree=degree, remote_degree=remote_degree)
        for remote_rank, head_slice in slices:
            remote = np.ascontiguousarray(remotes[remote_rank])
            assert copy_heads(remote, local, runs, head_slice) == count
        assert np.array_equal(local, expected)  # the heads of the blocks, and nothing else
        assert len(slices) == max(1, remote_degree // degree)


def test_all_heads_of_a_run_are_the_bytes_of_the_run() -> None:
    theirs, ours = region(30, 0x7000_0000_0000), region(40, 0x1000)
    runs = [Run(3, 7, 4), Run(20, 1, 2)]
    by_head = copy_head_ranges(theirs, ours, runs, HeadSlice(0, 0, 8))
    by_run = copy_ranges(theirs, ours, runs)
    assert by_head.tolist() == [
        [local + step * 2**21, remote + step * 2**21, 2**21]
        for local, remote, length in by_run.tolist()
        for step in range(length // 2**21)
    ]
    assert copy_head_ranges(theirs, ours, [], HeadSlice(0, 0, 8)).shape == (0, 3)


@pytest.mark.parametrize(
    ("heads", "problem"),
    [
        (HeadSlice(6, 0, 3), "remote KV heads 6 to 8 are outside a pool of 8"),
        (HeadSlice(-1, 0, 1), "remote KV heads -1"),
        (HeadSlice(0, 1, 2), "local KV heads 1 to 2 are outside a pool of 2"),
        (HeadSlice(0, 0, 0), "remote KV heads 0 to -1"),
    ],
)
def test_a_slice_outside_a_pool_is_refused(heads: HeadSlice, problem: str) -> None:
    theirs, ours = describe_pool(pool_of_heads(2, 8, 1)), describe_pool(pool_of_heads(2, 2, 1))
    with pytest.raises(HeadsOutOfRange, match=problem):
        copy_head_ranges(theirs, ours, [Run(0, 0, 1)], heads)
    with pytest.raises(BlockOutOfRange):
        copy_head_ranges(theirs, ours, [Run(1, 0, 2)], HeadSlice(0, 0, 2))


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"rank": 0, "degree": 3, "remote_degree": 1}, "8 KV heads cannot be dealt out to 3 workers"),
        ({"rank": 0, "degree": 1, "remote_degree": 16}, "to 16 workers"),
        ({"rank": 0, "degree": 0, "remote_degree": 1}, "to 0 workers"),
        ({"rank": 2, "degree": 2, "remote_degree": 1}, "no rank 2 among 2 workers"),
    ],
)
def test_degrees_that_do_not_fit_are_refused(arguments: dict[str, int], problem: str) -> None:
    with pytest.raises(HeadsOutOfRange, match=problem):
        head_slices(8, **arguments)


def test_pools_whose_heads_differ_inside_are_refused_by_field() -> None:
    ours = describe_pool(pool_of_heads(2, 2, 1))
    check_heads_compatible(ours, describe_pool(pool_of_heads(5, 8, 1)))
    with pytest.raises(RegionMismatch, match=r"sizes\[kv_head\]"):
        check_pull_compatible(ours, describe_pool(pool_of_heads(5, 8, 1)))
    theirs = describe_region(NAMES, (5, 8, 3, 2, 4, 6), item_size=4, dtype="float32", base_address=0)
    with pytest.raises(RegionMismatch, match=r"sizes\[dim\]"):
        check_heads_compatible(ours, theirs)
    with pytest.raises(RegionMismatch, match="dtype"):
        check_heads_compatible(ours, msgspec.structs.replace(ours, dtype="int32"))
    layers_first = ("block", "layer", "kv_head", "kv", "token", "dim")
    with pytest.raises(RegionMismatch, match="names"):
        check_heads_compatible(ours, msgspec.structs.replace(ours, names=layers_first))
    ours = msgspec.structs.replace(ours, names=layers_first)
    with pytest.raises(InvalidRegion, match="kv_head"):
        check_heads_compatible(ours, ours)
