"""The torch path of paged attention against dense attention in float64."""

import mmap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_batches import Shape, make_batch, make_case, select, shapes_and_lengths

from pdengine.triton_kernels import torch_attention
from pdengine.triton_kernels.torch_kernels import TorchKernels

MAP_NORESERVE = 0x4000

paged_attention = TorchKernels().paged_attention


def check(case, tolerance=1e-5):
    # 16-bit results are rounded once, at the end: by half a unit in the last place at most.
    relative = {torch.float32: 0, torch.bfloat16: 2**-8, torch.float16: 2**-11}[case.query.dtype]
    attended = paged_attention(case.query, case.pool, case.layer, case.batch, case.scale)
    assert attended.dtype == case.query.dtype
    torch.testing.assert_close(attended.double(), case.expected, atol=tolerance, rtol=relative)


@settings(max_examples=150, deadline=None)
@given(shapes_and_lengths(), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_mixed_batches(shape_and_lengths, dtype):
    check(make_case(*shape_and_lengths, dtype))


@pytest.mark.parametrize("lengths", [[(0, 600)], [(300, 513)], [(0, 257), (1000, 1), (255, 256)]])
def test_chunks_longer_than_a_tile(lengths):
    check(make_case(Shape(num_kv_heads=2, group_size=3, head_dim=64, block_size=16), lengths, torch.float32))


def test_no_layer_or_head_or_block_but_its_own_is_written():
    pool = torch.zeros(5, 2, 3, 2, 16, 64)
    batch = make_batch([(17, 2)], block_size=16, num_blocks=5)
    keys, values = torch.ones(2, 2, 64), torch.full((2, 2, 64), 2.0)
    torch_attention.store_kv(pool, 1, keys, values, batch.block_ids, batch.block_offsets)
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
    check(make_case(shape, [(0, 160), (200, 33), (150, 1), (70, 1)], torch.bfloat16, pool=pool))


def test_a_result_does_not_depend_on_the_rest_of_the_batch():
    torch.manual_seed(1)
    pool = torch.randn(64, 2, 1, 2, 16, 64)
    batch = make_batch([(100, 1), (3, 1), (0, 30), (400, 1), (40, 20)], block_size=16, num_blocks=64)
    query = torch.randn(int(batch.query_starts[-1]), 8, 64)
    together = paged_attention(query, pool, 0, batch, 0.125)
    for sequence in range(5):
        start, end = batch.query_starts_on_host[sequence : sequence + 2]
        attended = paged_attention(query[start:end], pool, 0, select(batch, sequence), 0.125)
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
    check(make_case(Shape(num_kv_heads=2, group_size=2, head_dim=64, block_size=16), lengths, torch.float32))
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
