from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pdengine.triton_kernels.copy_blocks import copy_blocks

NUM_BLOCKS = 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@given(
    copies=st.lists(
        st.tuples(st.integers(0, NUM_BLOCKS - 1), st.integers(0, NUM_BLOCKS - 1)),
        unique_by=lambda copy: copy[1],
    )
)
def test_whole_blocks_arrive_and_no_other_changes(
    device: torch.device, dtype: torch.dtype, copies: list[tuple[int, int]]
) -> None:
    pool = torch.randn(NUM_BLOCKS, 2, 3, 2, 4, 8).to(dtype).to(device)
    expected = pool.clone()
    for source, destination in copies:
        expected[destination] = pool[source]
    copy_blocks(pool, [source for source, _ in copies], [destination for _, destination in copies])
    assert torch.equal(pool, expected)


@pytest.mark.parametrize(
    ("sources", "destinations", "message"),
    [
        ([0, 1], [2], "2 sources cannot be copied to 1"),
        ([0, 1], [2, 2], "destination of two"),
        ([0], [NUM_BLOCKS], f"block {NUM_BLOCKS} is not in a pool of {NUM_BLOCKS}"),
        ([-1], [0], "block -1 is not"),
    ],
)
def test_what_cannot_be_copied_is_refused(sources: list[int], destinations: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        copy_blocks(torch.zeros(NUM_BLOCKS, 1), sources, destinations)
