"""The CPU's attention kernels against dense attention in float64, on pools whose unowned memory is NaN."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_batches import Case, Shape, make_batch, make_case, select
from torch import Tensor

from pdengine.triton_kernels import torch_attention
from pdengine.triton_kernels.attention import AttentionBatch
from pdengine.triton_kernels.cpu_attention import CpuAttention, plan_decodes
from pdengine.triton_kernels.cpu_native import native_kernels

DTYPES = [torch.float32, torch.bfloat16]
LARGE = Shape(num_kv_heads=2, group_size=2, head_dim=128, block_size=16)


def attend(case: Case, uses_dot_product: bool = True) -> Tensor:
    case.batch.plans.clear()
    attention = CpuAttention(native_kernels(), uses_dot_product)
    return attention.attend(case.query, case.pool, case.layer, case.batch, case.scale)


def check(case: Case, uses_dot_product: bool = True) -> None:
    attended = attend(case, uses_dot_product)
    assert attended.dtype == case.query.dtype
    # Stored once, and where bfloat16 are multiplied, weights of chunks are rounded too.
    roundings = {torch.float32: 0.0, torch.bfloat16: 2**-8}[case.query.dtype]
    error = (attended.double() - case.expected).abs()
    assert bool((error <= case.magnitude * (2 * roundings + 1e-5)).all())


@st.composite
def shapes_and_lengths(draw: st.DrawFn) -> tuple[Shape, list[tuple[int, int]]]:
    shape = Shape(
        num_kv_heads=draw(st.integers(1, 3)),
        group_size=draw(st.integers(1, 8)),
        head_dim=draw(st.sampled_from([32, 64, 96, 128, 256])),
        block_size=draw(st.sampled_from([16, 32, 64])),
    )
    edges = [15, 16, 17, 63, 64, 65]
    cached = st.sampled_from([0, 1, *edges, 127, 128, 129]) | st.integers(0, 300)
    new = st.sampled_from([1, 1, 1, 2, 5, 6, 7, *edges])
    lengths = draw(st.lists(st.tuples(cached, new), min_size=1, max_size=6))
    return shape, lengths


@settings(max_examples=80, deadline=None)
@given(shapes_and_lengths(), st.sampled_from(DTYPES), st.booleans())
def test_mixed_batches(
    shape_and_lengths: tuple[Shape, list[tuple[int, int]]], dtype: torch.dtype, uses_dot_product: bool
) -> None:
    check(make_case(*shape_and_lengths, dtype), uses_dot_product)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", [[(0, 600)], [(700, 300)], [(0, 257), (1000, 1), (255, 256)]])
def test_several_blocks_of_queries(dtype: torch.dtype, lengths: list[tuple[int, int]]) -> None:
    check(make_case(LARGE, lengths, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_several_threads(dtype: torch.dtype) -> None:
    torch.set_num_threads(2)
    try:
        check(make_case(LARGE, [(900, 1), (5, 1), (0, 300), (100, 70), (700, 1)], dtype))
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("lengths", [[(2000, 1)], [(2000, 1), (3, 1), (900, 1), (0, 20), (500, 1)]])
def test_contexts_split_among_tasks(monkeypatch: pytest.MonkeyPatch, lengths: list[tuple[int, int]]) -> None:
    """As for 16 threads: parts are put together by the second kernel, for sequences that have several."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
    case = make_case(LARGE, lengths, torch.float32)
    attention = CpuAttention(
        replace(native_kernels(), launcher=replace(native_kernels().launcher, gomp_parallel=0))
    )
    attended = attention.attend(case.query, case.pool, case.layer, case.batch, case.scale)
    (plan,) = case.batch.plans.values()
    assert plan.num_split == sum(new == 1 for _, new in lengths)
    torch.testing.assert_close(attended.double(), case.expected, atol=1e-5, rtol=0)


@given(
    lengths=st.lists(st.integers(1, 3000), min_size=1, max_size=20),
    num_threads=st.sampled_from([1, 2, 16, 64]),
)
def test_parts_cover_every_context_once_and_none_is_large(lengths: list[int], num_threads: int) -> None:
    batch = make_batch([(length - 1, 1) for length in lengths], 16, sum(-(-n // 16) for n in lengths))
    pool = torch.empty(1, 4, 1, 2, 16, 64)
    plan, is_split = plan_decodes(batch, torch.arange(len(lengths)).numpy(), 8, pool, num_threads)
    parts, part_tokens = plan.arrays[0], int(plan.words[2])
    covered = [0] * len(lengths)
    for sequence, first, row in parts.tolist():
        assert row == sequence
        assert first == covered[sequence]
        covered[sequence] = min(first + part_tokens, lengths[sequence])
    assert covered == lengths
    assert is_split == (len(parts) > len(lengths))
    if num_threads > 1:
        assert part_tokens * num_threads < sum(lengths) * 4 / 3 + 128 * num_threads


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_blocks_shared_by_sequences_with_garbage_behind_their_ends(
    dtype: torch.dtype, garbage: float
) -> None:
    """Two sequences read the same two blocks of a prefix; behind the end of each lies what others left."""
    torch.manual_seed(0)
    pool = torch.randn(8, 2, 1, 2, 16, 64).to(dtype)
    pool[4, :, :, :, 5:] = garbage
    pool[6, :, :, :, 9:] = garbage
    pool[[0, 1, 7]] = garbage
    tables = torch.tensor([[2, 3, 4], [2, 3, 6]])
    batch = replace(make_batch([(36, 1), (30, 11)], 16, 8), block_tables=tables)
    query = torch.randn(12, 8, 64).to(dtype)
    attended = CpuAttention(native_kernels()).attend(query, pool, 0, batch, 0.125)
    clean = pool.nan_to_num(0.0, 0.0, 0.0)
    expected = torch_attention.attend(query.float(), clean.float(), 0, batch, 0.125)
    torch.testing.assert_close(
        attended.float(), expected, atol=1e-5 if dtype == torch.float32 else 0.02, rtol=0
    )


@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0])
def test_scores_that_rise_and_fall_along_the_context(scale: float) -> None:
    """The running maximum changes often, by little and by much, and weights vanish."""
    torch.manual_seed(0)
    case = make_case(LARGE, [(700, 1), (0, 300)], torch.float32)
    query = case.query * scale
    attended = CpuAttention(native_kernels()).attend(query, case.pool, case.layer, case.batch, case.scale)
    expected = torch_attention.attend(query, case.pool, case.layer, case.batch, case.scale)
    torch.testing.assert_close(attended, expected, atol=2e-5 * max(1.0, scale), rtol=0)


@pytest.mark.parametrize(
    "shape",
    [
        Shape(num_kv_heads=2, group_size=2, head_dim=80, block_size=16),
        Shape(num_kv_heads=2, group_size=2, head_dim=64, block_size=8),
        Shape(num_kv_heads=1, group_size=17, head_dim=32, block_size=16),
        Shape(num_kv_heads=1, group_size=16, head_dim=256, block_size=16),
    ],
)
def test_other_shapes_are_left_to_torch(shape: Shape) -> None:
    case = make_case(shape, [(20, 1), (3, 9)], torch.float32)
    assert torch.equal(
        attend(case), torch_attention.attend(case.query, case.pool, case.layer, case.batch, case.scale)
    )


def test_a_result_does_not_depend_on_the_rest_of_the_batch() -> None:
    torch.manual_seed(1)
    pool = torch.randn(64, 2, 1, 2, 16, 64)
    batch = make_batch([(100, 1), (3, 1), (0, 30), (400, 1), (40, 20)], block_size=16, num_blocks=64)
    query = torch.randn(int(batch.query_starts[-1]), 8, 64)
    attention = CpuAttention(native_kernels())
    together = attention.attend(query, pool, 0, batch, 0.125)
    for sequence in range(5):
        start, end = batch.query_starts_on_host[sequence : sequence + 2]
        alone: AttentionBatch = select(batch, sequence)
        attended = attention.attend(query[start:end], pool, 0, alone, 0.125)
        torch.testing.assert_close(attended, together[start:end], atol=2e-6, rtol=0)
