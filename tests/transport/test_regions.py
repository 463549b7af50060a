"""Region descriptors, runs of blocks and the ranges they become."""

from __future__ import annotations

from itertools import pairwise

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdengine.transport.regions import (
    BlockOutOfRange,
    InvalidRegion,
    RegionDescriptor,
    RegionMismatch,
    Run,
    block_runs,
    check_pull_compatible,
    copy_ranges,
    describe_region,
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
