"""Norm, rotation and KV store in one kernel, against float64, on pools whose unowned memory is NaN."""

from __future__ import annotations

import mmap
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rounding import rounding_of
from torch import Tensor

from pdengine.triton_kernels.attention import AttentionBatch
from pdengine.triton_kernels.rotary_store import rotate_and_store
from pdengine.triton_kernels.torch_kernels import TorchKernels

EPS = 1e-6
MAP_NORESERVE = 0x4000
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@dataclass(frozen=True)
class Case:
    """pairs: half of the dimensions that are rotated, 0 in a layer without rope."""

    tokens: int
    num_kv_heads: int
    group_size: int
    head_dim: int
    pairs: int
    has_norm: bool
    dtype: torch.dtype
    block_size: int = 16
    num_layers: int = 2
    num_blocks: int = 5

    @property
    def num_heads(self) -> int:
        return self.num_kv_heads * self.group_size

    @property
    def pool_shape(self) -> tuple[int, ...]:
        return (
            self.num_blocks, self.num_kv_heads, self.num_layers, 2, self.block_size, self.head_dim
        )  # fmt: skip


@dataclass(frozen=True)
class Inputs:
    qkv: Tensor
    cos: Tensor | None
    sin: Tensor | None
    query_norm: Tensor | None
    key_norm: Tensor | None
    slots: Tensor  # [tokens], block * block_size + offset

    def to(self, target: torch.device | torch.dtype) -> Inputs:
        """The float tensors on another device, or in another dtype."""

        def move(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(target)

        return Inputs(
            self.qkv.to(target),
            move(self.cos),
            move(self.sin),
            move(self.query_norm),
            move(self.key_norm),
            self.slots,
        )


def make_inputs(case: Case) -> Inputs:
    generator = torch.Generator().manual_seed(case.tokens + case.head_dim)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    angles = 100 * random(case.tokens, 1, case.pairs)
    return Inputs(
        random(case.tokens, case.num_heads + 2 * case.num_kv_heads, case.head_dim).to(case.dtype),
        angles.cos() if case.pairs else None,
        angles.sin() if case.pairs else None,
        random(case.head_dim) if case.has_norm else None,
        random(case.head_dim) if case.has_norm else None,
        torch.randperm(case.num_blocks * case.block_size, generator=generator)[: case.tokens],
    )


def make_batch(slots: Tensor, block_size: int, device: torch.device) -> AttentionBatch:
    """Only where the new tokens go matters here."""
    nothing = torch.zeros(0, dtype=torch.int64)
    return AttentionBatch(
        block_ids=(slots // block_size).to(device),
        block_offsets=(slots % block_size).to(device),
        block_tables=nothing,
        query_starts=nothing,
        context_lengths=nothing,
        query_starts_on_host=[],
        context_lengths_on_host=[],
        num_decodes=0,
    )


def exact_heads(heads: Tensor, norm: Tensor | None, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    """What becomes of queries or keys, in the dtype of the arguments: float64."""
    if norm is not None:
        heads = heads / (heads.square().mean(dim=-1, keepdim=True) + EPS).sqrt() * norm
    if cos is None or sin is None:
        return heads
    pairs = cos.shape[-1]
    turned = torch.complex(heads[..., :pairs], heads[..., pairs : 2 * pairs]) * torch.complex(cos, sin)
    return torch.cat((turned.real, turned.imag, heads[..., 2 * pairs :]), dim=-1)


def run(case: Case, inputs: Inputs, pool: Tensor, layer: int, device: torch.device) -> Tensor:
    moved = inputs.to(device)
    batch = make_batch(inputs.slots, case.block_size, device)
    return rotate_and_store(
        moved.qkv, moved.cos, moved.sin, moved.query_norm, moved.key_norm, EPS, pool, layer, batch
    )


def check(case: Case, device: torch.device, pool: Tensor | None = None) -> None:
    inputs = make_inputs(case)
    if pool is None:
        pool = torch.full(case.pool_shape, torch.nan, dtype=case.dtype, device=device)
    layer = case.num_layers - 1
    query = run(case, inputs, pool, layer, device)

    exact = inputs.to(torch.float64)
    counts = (case.num_heads, case.num_kv_heads, case.num_kv_heads)
    expected_query, expected_key, expected_value = exact.qkv.split(counts, dim=1)
    expected_query = exact_heads(expected_query, exact.query_norm, exact.cos, exact.sin)
    expected_key = exact_heads(expected_key, exact.key_norm, exact.cos, exact.sin)
    assert query.dtype == case.dtype
    tolerances = {"rtol": rounding_of(case.dtype, device) + 1e-6, "atol": 2e-6}
    torch.testing.assert_close(query.cpu().double(), expected_query, **tolerances)
    for token, slot in enumerate(inputs.slots.tolist()):
        block, offset = divmod(slot, case.block_size)
        stored = pool[block, :, layer, :, offset].cpu().double()  # [kv_heads, 2, head_dim]
        torch.testing.assert_close(stored[:, 0], expected_key[token], **tolerances)
        assert torch.equal(stored[:, 1], expected_value[token])


@st.composite
def cases(draw: st.DrawFn) -> Case:
    head_dim = draw(st.sampled_from([64, 80, 96, 128, 256]))
    return Case(
        tokens=draw(st.integers(1, 5)),
        num_kv_heads=draw(st.integers(1, 3)),
        group_size=draw(st.integers(1, 8)),
        head_dim=head_dim,
        pairs=draw(st.sampled_from([0, head_dim // 8, 3 * head_dim // 8, head_dim // 2])),
        has_norm=draw(st.booleans()),
        dtype=draw(st.sampled_from(DTYPES)),
        block_size=draw(st.sampled_from([16, 64])),
        num_layers=draw(st.integers(1, 3)),
    )


@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_against_float64(device: torch.device, case: Case) -> None:
    check(case, device)


@pytest.mark.parametrize("head_dim", [16, 32, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_head_dim_and_dtype(device: torch.device, head_dim: int, dtype: torch.dtype) -> None:
    check(Case(3, 2, 4, head_dim, head_dim // 2, has_norm=True, dtype=dtype), device)


@pytest.mark.parametrize("has_norm", [True, False])
@pytest.mark.parametrize("pairs", [0, 24, 48])
def test_the_torch_path_gives_the_same(device: torch.device, has_norm: bool, pairs: int) -> None:
    case = Case(4, 2, 3, 96, pairs, has_norm, torch.float32)
    inputs = make_inputs(case)
    expected_pool, pool = torch.zeros(case.pool_shape), torch.zeros(case.pool_shape, device=device)
    batch = make_batch(inputs.slots, case.block_size, torch.device("cpu"))
    expected = TorchKernels().rotate_and_store(
        inputs.qkv, inputs.cos, inputs.sin, inputs.query_norm, inputs.key_norm, EPS, expected_pool, 1, batch
    )
    query = run(case, inputs, pool, 1, device)
    torch.testing.assert_close(query.cpu(), expected, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(pool.cpu(), expected_pool, rtol=2e-6, atol=2e-6)


def test_no_layer_or_head_or_slot_but_its_own_is_written(device: torch.device) -> None:
    case = Case(3, 2, 2, 80, 40, has_norm=True, dtype=torch.float32, num_layers=3)
    inputs = make_inputs(case)
    pool = torch.full(case.pool_shape, torch.nan, device=device)
    run(case, inputs, pool, 1, device)
    written = pool.isfinite().cpu()
    slots = written[:, :, 1].permute(0, 3, 1, 2, 4).reshape(-1, case.num_kv_heads * 2 * case.head_dim)
    assert torch.all(slots[inputs.slots])
    assert int(written.sum()) == case.tokens * case.num_kv_heads * 2 * case.head_dim


def test_offsets_beyond_31_bits(device: torch.device) -> None:
    """A pool of 2^32 elements; on a CPU a sparse one: only the pages that are touched exist."""
    case = Case(
        6, 8, 2, 128, 64, has_norm=False, dtype=torch.bfloat16, num_layers=32, num_blocks=2**32 // 2**20
    )
    assert int(make_inputs(case).slots.max()) > case.num_blocks * case.block_size // 2
    if device.type == "cpu":
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
        memory = mmap.mmap(-1, 2 * 2**32, flags=flags)
        pool = torch.frombuffer(memory, dtype=torch.bfloat16).view(case.pool_shape)
    else:
        pool = torch.empty(case.pool_shape, dtype=torch.bfloat16, device=device)
    check(case, device, pool)
