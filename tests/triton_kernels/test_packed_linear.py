"""Packed linear layers against the plain product, in both of their kernels and at every edge of a panel."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from pdengine.triton_kernels import packed_linear
from pdengine.triton_kernels.linear_code import MAX_TILE_ROWS, PANEL_COLUMNS
from pdengine.triton_kernels.packed_linear import OWN_ROWS, PackedLinear

# Of one rounding of the result, and of sums of up to 1000 products in any order.
TOLERANCE = {torch.float32: 3e-5, torch.bfloat16: 2**-8, torch.float16: 2**-10}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (5, 3), (63, 64), (64, 50), (65, 130), (96, 96), (100, 33), (200, 1000), (640, 72)]


def make(outputs: int, inputs: int, has_bias: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(outputs * 1000 + inputs)
    weight = torch.randn(outputs, inputs, generator=generator) / inputs**0.5
    bias = torch.randn(outputs, generator=generator).to(dtype) if has_bias else None
    return weight.to(dtype), bias


def check(packed: PackedLinear, weight: Tensor, bias: Tensor | None, num_rows: int) -> None:
    generator = torch.Generator().manual_seed(num_rows)
    inputs = torch.randn(num_rows, weight.shape[1], generator=generator).to(weight.dtype)
    outputs = packed(inputs)
    exact = F.linear(inputs.double(), weight.double(), None if bias is None else bias.double())
    assert outputs.dtype == weight.dtype
    torch.testing.assert_close(
        outputs.double(), exact, rtol=TOLERANCE[weight.dtype], atol=TOLERANCE[weight.dtype] / 4
    )


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(1)


@torch.inference_mode()
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_every_number_of_rows(outputs: int, inputs: int, has_bias: bool, dtype: torch.dtype) -> None:
    weight, bias = make(outputs, inputs, has_bias, dtype)
    packed = PackedLinear(weight, bias)
    for num_rows in range(41):
        check(packed, weight, bias, num_rows)


@torch.inference_mode()
@settings(max_examples=60, deadline=None)
@given(
    outputs=st.integers(1, 3 * PANEL_COLUMNS),
    inputs=st.integers(1, 300),
    num_rows=st.integers(1, 3 * MAX_TILE_ROWS),
    has_bias=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape(outputs: int, inputs: int, num_rows: int, has_bias: bool, dtype: torch.dtype) -> None:
    weight, bias = make(outputs, inputs, has_bias, dtype)
    check(PackedLinear(weight, bias), weight, bias, num_rows)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_need_not_be_contiguous(dtype: torch.dtype) -> None:
    weight, _ = make(128, 64, False, dtype)
    inputs = torch.randn(8, 200).to(dtype)[::2, 7:71]
    expected = PackedLinear(weight, None)(inputs.contiguous())
    assert torch.equal(PackedLinear(weight, None)(inputs), expected)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_not_a_number_stays_in_its_row_and_column(dtype: torch.dtype) -> None:
    weight, _ = make(130, 64, False, dtype)
    weight[129, 5] = torch.nan
    inputs = torch.ones(9, 64, dtype=dtype)
    inputs[3, 0] = torch.inf
    outputs = PackedLinear(weight, None)(inputs)
    assert outputs[:, 129].isnan().all()
    assert not outputs[3].isfinite().any()
    outputs[3] = outputs[:, 129] = 0
    assert outputs.isfinite().all()


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("missing", ["_can_pack", "_panels_of"])
def test_without_what_not_every_cpu_has(
    missing: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_linear, missing, lambda *_: None)
    weight, bias = make(100, 96, True, dtype)
    packed = PackedLinear(weight, bias)
    for num_rows in (0, 1, 7, OWN_ROWS + 1):
        check(packed, weight, bias, num_rows)


@torch.inference_mode()
def test_panels_in_another_order_are_not_taken_for_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, _ = make(128, 64, False, torch.float32)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight)
    assert packed_linear._panels_of(packed, weight.flip(0)) is None
