"""The CPU's kernels beside attention against those of plain torch."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_batches import make_batch
from torch import Tensor

from pdengine.triton_kernels.cpu_kernels import CpuKernels
from pdengine.triton_kernels.torch_kernels import TorchKernels

EPS = 1e-6
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2**-7, torch.float16: 2**-10}  # between two neighbours


@pytest.fixture(params=[1, 2], ids=["one_thread", "two_threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(1)


def assert_same(actual: Tensor, expected: Tensor, tolerance: float = 2e-6) -> None:
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(
        actual, expected, rtol=ROUNDING[expected.dtype] + tolerance, atol=tolerance, equal_nan=True
    )


@pytest.mark.usefixtures("threads")
@settings(max_examples=40, deadline=None)
@given(
    tokens=st.sampled_from([1, 2, 7, 40]),
    hidden=st.sampled_from([16, 64, 80, 100, 512, 1024]),
    update_dtype=st.sampled_from([None, *DTYPES]),
    dtype=st.sampled_from(DTYPES),
)
def test_add_rms_norm(tokens: int, hidden: int, update_dtype: torch.dtype | None, dtype: torch.dtype) -> None:
    residual = torch.randn(tokens, hidden)
    update = None if update_dtype is None else torch.randn(tokens, hidden).to(update_dtype)
    weight = torch.randn(hidden)
    expected = TorchKernels().add_rms_norm(residual.clone(), update, weight, EPS, dtype)
    summed, normed = CpuKernels().add_rms_norm(residual, update, weight, EPS, dtype)
    assert summed is residual, "the residual stream is changed in place"
    assert torch.equal(summed, expected[0])
    assert_same(normed, expected[1])


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [16, 48, 100, 1408, 3072])
@pytest.mark.parametrize("tokens", [1, 3, 17])
def test_silu_multiply(tokens: int, size: int, dtype: torch.dtype) -> None:
    gate_up = (8 * torch.randn(tokens, 2 * size)).to(dtype)
    assert_same(CpuKernels().silu_multiply(gate_up), TorchKernels().silu_multiply(gate_up), 1e-5)


def test_extreme_gates() -> None:
    gate = torch.tensor(
        [-torch.inf, -3e38, -1e4, -200.0, -88.8, -0.0, 0.0, 88.8, 1e4, 3e38, torch.inf, torch.nan]
    )
    gate = torch.cat((gate, torch.zeros(4)))
    gate_up = torch.stack((torch.cat((gate, torch.ones(16))), torch.cat((gate, torch.full((16,), -3.0)))))
    product = CpuKernels().silu_multiply(gate_up)
    expected = TorchKernels().silu_multiply(gate_up)
    assert_same(product[:, 2:], expected[:, 2:])
    assert bool(product[:, 11].isnan().all())


@pytest.mark.usefixtures("threads")
@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 40), st.sampled_from([1, 1, 2, 9])), min_size=1, max_size=5),
    num_kv_heads=st.integers(1, 3),
    group_size=st.integers(1, 4),
    dims=st.sampled_from([(32, 16), (64, 32), (64, 16), (96, 48), (128, 64), (256, 128), (64, 0), (80, 40)]),
    has_norm=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_rotate_and_store(
    lengths: list[tuple[int, int]],
    num_kv_heads: int,
    group_size: int,
    dims: tuple[int, int],
    has_norm: bool,
    dtype: torch.dtype,
) -> None:
    (head_dim, pairs), num_blocks = dims, 24
    batch = make_batch(lengths, 16, num_blocks)
    tokens = batch.query_starts_on_host[-1]
    qkv = torch.randn(tokens, (group_size + 2) * num_kv_heads, head_dim).to(dtype)
    angles = 100 * torch.randn(tokens, 1, pairs)
    cos, sin = (angles.cos(), angles.sin()) if pairs else (None, None)
    query_norm, key_norm = torch.randn(2, head_dim) if has_norm else (None, None)
    pools = torch.full((2, num_blocks, num_kv_heads, 3, 2, 16, head_dim), torch.nan).to(dtype)
    arguments = (qkv, cos, sin, query_norm, key_norm, EPS)
    expected = TorchKernels().rotate_and_store(*arguments, pools[0], 1, batch)
    query = CpuKernels().rotate_and_store(*arguments, pools[1], 1, batch)
    assert_same(query, expected, 1e-5)
    assert_same(pools[1], pools[0], 1e-5)  # what is not written stays NaN


def test_the_next_process_finds_a_kernel_in_the_cache(tmp_path: Path) -> None:
    """A worker's start must not pay for compilation again."""
    code = (
        "from pdengine.triton_kernels.cpu_elementwise import silu_multiply\n"
        "from pdengine.triton_kernels.cpu_launch import compile_kernel\n"
        "print(compile_kernel(silu_multiply).cache_hits)"
    )
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    hits = [
        subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
        ).stdout.strip()
        for _ in range(2)
    ]
    assert hits == ["0", "1"]
