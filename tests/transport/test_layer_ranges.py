"""The pieces of one layer: together the layers make the whole blocks, and each byte comes once."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdengine.transport.regions import (
    BlockOutOfRange,
    RegionDescriptor,
    Run,
    copy_ranges,
    describe_region,
    layer_ranges,
)

NAMES = ("block", "kv_head", "layer", "kv", "token", "dim")


def region(num_blocks: int, num_heads: int, num_layers: int, base_address: int) -> RegionDescriptor:
    sizes = (num_blocks, num_heads, num_layers, 2, 4, 3)
    return describe_region(NAMES, sizes, item_size=2, dtype="bfloat16", base_address=base_address)


def moved_bytes(ranges: np.ndarray[tuple[int, int], np.dtype[np.int64]]) -> list[tuple[int, int]]:
    """(local address, remote address) of every byte, sorted."""
    return sorted(
        (local + step, remote + step) for local, remote, length in ranges.tolist() for step in range(length)
    )


@given(
    num_heads=st.integers(1, 3),
    num_layers=st.integers(1, 3),
    runs=st.lists(
        st.builds(Run, st.integers(0, 3), st.integers(0, 3), st.integers(1, 3)),
        max_size=3,
        unique_by=(lambda run: run.remote_block, lambda run: run.local_block),
    ),
)
def test_all_layers_together_are_the_blocks(num_heads: int, num_layers: int, runs: list[Run]) -> None:
    remote, local = region(6, num_heads, num_layers, 10_000), region(6, num_heads, num_layers, 90_000)
    layers = [layer_ranges(remote, local, runs, layer) for layer in range(num_layers)]
    assert [len(ranges) for ranges in layers] == [num_heads * sum(run.count for run in runs)] * num_layers
    assert moved_bytes(np.concatenate(layers)) == moved_bytes(copy_ranges(remote, local, runs))


def test_what_is_not_there_is_refused() -> None:
    pool = region(6, 2, 3, 0)
    with pytest.raises(ValueError, match="layer 3 is outside of 3 layers"):
        layer_ranges(pool, pool, [Run(0, 0, 1)], 3)
    with pytest.raises(BlockOutOfRange, match="local blocks 6 to 6"):
        layer_ranges(pool, pool, [Run(4, 5, 2)], 0)
