"""Paged attention against dense attention in float64, on pools whose unowned memory is NaN."""

import mmap
from dataclasses import dataclass
from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pdengine.triton_kernels import torch_attention
from pdengine.triton_kernels.attention import AttentionBatch, paged_attention, store_kv

MAP_NORESERVE = 0x4000


@dataclass(frozen=True)
class Shape:
    num_kv_heads: int
    group_size: int
    head_dim: int
    block_size: int
    num_layers: int = 2


def make_batch(lengths, block_size, num_blocks):
    """`lengths` are (cached, new) tokens by sequence; their blocks are drawn at random from the pool."""
    free_blocks = torch.randperm(num_blocks).tolist()
    tables, block_ids, block_offsets = [], [], []
    for cached, new in lengths:
        table = torch.tensor([free_blocks.pop() for _ in range(-(-(cached + new) // block_size))])
        positions = torch.arange(cached, cached + new)
        tables.append(table)
        block_ids.append(table[positions // block_size])
        block_offsets.append(positions % block_size)
    return AttentionBatch(
        block_ids=torch.cat(block_ids),
        block_offsets=torch.cat(block_offsets),
        block_tables=torch.nn.utils.rnn.pad_sequence(tables, batch_first=True),
        query_starts=torch.tensor([0, *accumulate(new for _, new in lengths)]),
        context_lengths=torch.tensor([cached + new for cached, new in lengths]),
    )


def dense_attention(query, key, value, scale):
    """`query` `[new, heads, dim]`, `key` and `value` `[context, kv_heads, dim]`, all in float64."""
    new, context = len(query), len(key)
    group_size = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group_size, dim=1), value.repeat_interleave(group_size, dim=1)
    scores = torch.einsum("qhd,khd->hqk", query, key) * scale
    future = torch.arange(context) > torch.arange(context - new, context).unsqueeze(1)
    weights = scores.masked_fill(future, -torch.inf).softmax(dim=-1)
    return torch.einsum("hqk,khd->qhd", weights, value)


def check(shape, lengths, dtype, tolerance, relative_tolerance=0.0, pool=None):
    """Store prefixes and new tokens of all sequences, attend, and compare with the dense reference."""
    torch.manual_seed(0)
    num_blocks = sum(-(-(cached + new) // shape.block_size) for cached, new in lengths) + 3
    if pool is None:
        pool_shape = (num_blocks, shape.num_kv_heads, shape.num_layers, 2, shape.block_size, shape.head_dim)
        pool = torch.full(pool_shape, torch.nan, dtype=dtype)
    batch = make_batch(lengths, shape.block_size, len(pool))
    layer, scale = shape.num_layers - 1, shape.head_dim**-0.5
    keys, values, queries = [], [], []
    for sequence, (cached, new) in enumerate(lengths):
        key, value = torch.randn(2, cached + new, shape.num_kv_heads, shape.head_dim).to(dtype)
        for position in range(cached):
            block = batch.block_tables[sequence, position // shape.block_size]
            offset = position % shape.block_size
            pool[block, :, layer, 0, offset], pool[block, :, layer, 1, offset] = (
                key[position],
                value[position],
            )
        keys.append(key)
        values.append(value)
        queries.append(torch.randn(new, shape.num_kv_heads * shape.group_size, shape.head_dim).to(dtype))
    new_keys = torch.cat([key[cached:] for key, (cached, _) in zip(keys, lengths, strict=True)])
    new_values = torch.cat([value[cached:] for value, (cached, _) in zip(values, lengths, strict=True)])

    store_kv(pool, layer, new_keys, new_values, batch)
    attended = paged_attention(torch.cat(queries), pool, layer, batch, scale)

    expected = torch.cat(
        [
            dense_attention(query.double(), key.double(), value.double(), scale)
            for query, key, value in zip(queries, keys, values, strict=True)
        ]
    )
    assert attended.dtype == dtype
    torch.testing.assert_close(attended.double(), expected, atol=tolerance, rtol=relative_tolerance)


@st.composite
def shapes_and_lengths(draw):
    shape = Shape(
        num_kv_heads=draw(st.integers(1, 3)),
        group_size=draw(st.integers(1, 8)),
        head_dim=draw(st.sampled_from([64, 80, 96, 128, 256])),
        block_size=draw(st.sampled_from([16, 32, 64])),
    )
    edges = [shape.block_size - 1, shape.block_size, shape.block_size + 1]
    cached = st.sampled_from([0, 1, *edges]) | st.integers(0, 200)
    new = st.sampled_from([1, 1, 1, 2, *edges])
    lengths = draw(st.lists(st.tuples(cached, new), min_size=1, max_size=8))
    return shape, lengths


@settings(max_examples=150, deadline=None)
@given(shapes_and_lengths(), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_mixed_batches(case, dtype):
    shape, lengths = case
    # 16-bit results are rounded once, at the end: by half a unit in the last place at most.
    relative = {torch.float32: 0, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    check(shape, lengths, dtype, 1e-5, relative)


@pytest.mark.parametrize("lengths", [[(0, 600)], [(300, 513)], [(0, 257), (1000, 1), (255, 256)]])
def test_chunks_longer_than_a_tile(lengths):
    check(Shape(num_kv_heads=2, group_size=3, head_dim=64, block_size=16), lengths, torch.float32, 1e-5)


def test_no_layer_or_head_or_block_but_its_own_is_written():
    pool = torch.zeros(5, 2, 3, 2, 16, 64)
    batch = make_batch([(17, 2)], block_size=16, num_blocks=5)
    store_kv(pool, 1, torch.ones(2, 2, 64), torch.full((2, 2, 64), 2.0), batch)
    block = batch.block_tables[0, 1]
    assert torch.all(pool[block, :, 1, 0, 1:3] == 1)
    assert torch.all(pool[block, :, 1, 1, 1:3] == 2)
    assert torch.count_nonzero(pool) == 2 * 2 * 2 * 64


def test_offsets_beyond_31_bits():
    """A sparse pool of 2^32 elements, used at both ends: only the pages that are touched exist."""
    shape = Shape(num_kv_heads=8, group_size=4, head_dim=128, block_size=16, num_layers=32)
    block_elements = shape.num_kv_heads * shape.num_layers * 2 * shape.block_size * shape.head_dim
    num_blocks = 2**32 // block_elements
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    memory = mmap.mmap(-1, 2 * num_blocks * block_elements, flags=flags)
    pool = torch.frombuffer(memory, dtype=torch.bfloat16).view(
        num_blocks, shape.num_kv_heads, shape.num_layers, 2, shape.block_size, shape.head_dim
    )
    # 40 random blocks out of 4096: that all of them lie in the lower half is a matter of 2^-40.
    check(shape, [(0, 160), (200, 33), (150, 1), (70, 1)], torch.bfloat16, 1e-5, 2**-8, pool=pool)


def test_a_result_does_not_depend_on_the_rest_of_the_batch():
    torch.manual_seed(1)
    pool = torch.randn(64, 2, 1, 2, 16, 64)
    batch = make_batch([(100, 1), (3, 1), (0, 30), (400, 1), (40, 20)], block_size=16, num_blocks=64)
    query = torch.randn(int(batch.query_starts[-1]), 8, 64)
    together = paged_attention(query, pool, 0, batch, 0.125)
    for sequence in range(5):
        start, end = batch.query_starts_on_host[sequence], batch.query_starts_on_host[sequence + 1]
        alone = AttentionBatch(
            block_ids=batch.block_ids[start:end],
            block_offsets=batch.block_offsets[start:end],
            block_tables=batch.block_tables[sequence : sequence + 1],
            query_starts=torch.tensor([0, end - start]),
            context_lengths=batch.context_lengths[sequence : sequence + 1],
        )
        attended = paged_attention(query[start:end], pool, 0, alone, 0.125)
        torch.testing.assert_close(attended, together[start:end], atol=2e-6, rtol=0)


def test_decodes_of_similar_length_are_one_call(monkeypatch):
    calls = []
    attend = torch_attention._attend_decodes
    monkeypatch.setattr(
        torch_attention,
        "_attend_decodes",
        lambda query, *rest: calls.append(len(query)) or attend(query, *rest),
    )
    lengths = [(length, 1) for length in range(20, 39)]
    check(Shape(num_kv_heads=2, group_size=2, head_dim=64, block_size=16), lengths, torch.float32, 1e-5)
    assert calls == [len(lengths)]


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=60), st.integers(1, 20_000))
def test_decode_groups_hold_every_sequence_once_and_bound_the_padding(context_lengths, limit):
    sequences = list(range(0, len(context_lengths), 2))
    groups = torch_attention._decode_groups(sequences, context_lengths, limit)
    assert sorted(sequence for group in groups for sequence in group) == sequences
    for group in groups:
        lengths = [context_lengths[sequence] for sequence in group]
        assert max(lengths) <= 2 * min(lengths)
        assert len(group) == 1 or len(group) * max(lengths) <= limit
