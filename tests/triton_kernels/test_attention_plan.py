"""Every token attends to every key that it sees, once, and the device is kept busy."""

from collections import deque
from itertools import chain

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pdengine.triton_kernels.attention_plan import plan_decodes, plan_prefills
from pdengine.triton_kernels.attention_tiles import (
    DecodeTile,
    PrefillTile,
    decode_tile,
    resident_decode_programs,
)
from pdengine.triton_kernels.device_limits import DeviceLimits

CPU = torch.device("cpu")
H200 = DeviceLimits(capability=90, num_multiprocessors=132)


def decode_plan(context_lengths, window=None, num_kv_heads=8, tokens=64, num_resident=396):
    return plan_decodes(
        context_lengths,
        window=window,
        num_heads=4 * num_kv_heads,
        num_kv_heads=num_kv_heads,
        head_dim=128,
        tile=DecodeTile(tokens, num_warps=4, num_stages=3),
        num_resident=num_resident,
        device=CPU,
    )


@given(
    st.lists(st.integers(1, 100) | st.integers(1, 10_000), min_size=1, max_size=20),
    st.none() | st.integers(1, 5000),
    st.integers(1, 8),
    st.sampled_from([16, 32, 64, 128]),
    st.integers(1, 2000),
)
def test_parts_hold_what_is_visible_once(lengths, window, num_kv_heads, tokens, num_resident):
    plan = decode_plan(lengths, window, num_kv_heads, tokens, num_resident)
    rows_of = {}
    for sequence, length in enumerate(lengths):
        parts = sorted(part[1:] for part in plan.parts.tolist() if part[0] == sequence)
        firsts, ends, rows = zip(*parts, strict=True)
        assert firsts[0] == max(0, length - window if window else 0)
        assert ends[-1] == length
        assert firsts[1:] == ends[:-1]
        assert all(first % tokens == 0 for first in firsts[1:])
        if len(parts) == 1:
            assert rows == (-1,)
        else:
            rows_of[sequence] = list(rows)
    reductions = {
        sequence: list(range(row, row + count)) for sequence, row, count in plan.reductions.tolist()
    }
    assert rows_of == reductions
    assert sorted(chain.from_iterable(rows_of.values())) == list(range(len(plan.partial_lse)))
    sizes = (plan.parts[:, 2] - plan.parts[:, 1]).tolist()
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize(
    "lengths",
    [
        [4096] * 64,
        [131_072],
        [512] * 256,
        [131_072] + [512] * 255,
        [100_000, 50_000, 3],
        list(range(1, 8000, 77)),
    ],
    ids=["64 x 4096", "1 x 131072", "256 x 512", "one long", "two long", "mixed"],
)
def test_the_memory_is_kept_busy(lengths):
    """A simulation: programs start in order, whenever one ends, and share the bandwidth, which half of those
    that fit the device already use up."""
    tile = decode_tile(torch.bfloat16, 128)
    num_resident = resident_decode_programs(tile, torch.bfloat16, 128, H200)
    assert num_resident == 3 * 132
    plan = decode_plan(lengths, num_resident=num_resident)
    sizes = [end - first for _, first, end, _ in plan.parts.tolist() for _ in range(8)]
    waiting = deque(size + tile.tokens for size in sizes)
    running, clock = [], 0.0
    while waiting or running:
        while waiting and len(running) < num_resident:
            running.append(waiting.popleft())
        step = min(running)
        clock += step * max(len(running), num_resident / 2)
        running = [left - step for left in running if left > step]
    assert 8 * sum(lengths) / clock > 0.75


def test_a_full_device_splits_nothing():
    assert len(decode_plan([512] * 256).reductions) == 0


@given(
    st.lists(st.tuples(st.integers(0, 3000), st.integers(1, 3000)), min_size=1, max_size=10),
    st.integers(1, 8),
    st.sampled_from([16, 64, 128]),
    st.data(),
)
def test_tiles_hold_every_row_of_a_chunk_once(lengths, group_size, rows, data):
    first_sequence = data.draw(st.integers(0, len(lengths) - 1))
    query_starts = [0]
    for _, new in lengths:
        query_starts.append(query_starts[-1] + new)
    plan = plan_prefills(
        query_starts,
        [cached + new for cached, new in lengths],
        first_sequence,
        group_size=group_size,
        tile=PrefillTile(rows, 64, 4, 3),
        window=None,
        device=CPU,
    )
    first_rows = {sequence: [] for sequence in range(first_sequence, len(lengths))}
    for sequence, first_query, num_tokens, context_length, first_row in plan.tiles.tolist():
        cached, new = lengths[sequence]
        assert (first_query, num_tokens, context_length) == (query_starts[sequence], new, cached + new)
        first_rows[sequence].append(first_row)
    for sequence, firsts in first_rows.items():
        assert sorted(firsts) == list(range(0, lengths[sequence][1] * group_size, rows))
    last_keys = [
        context - new + min((first + rows - 1) // group_size, new - 1)
        for _, _, new, context, first in plan.tiles.tolist()
    ]
    assert last_keys == sorted(last_keys, reverse=True)
