"""The gate of the MLP against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rounding import rounding_of

from pdengine.triton_kernels.silu_multiply import COLUMNS, silu_multiply
from pdengine.triton_kernels.torch_kernels import TorchKernels

# Triton's interpreter computes with numpy, which warns of what is meant to overflow.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(1, 9),
    size=st.sampled_from([1, 3, 96, 344, COLUMNS - 1, COLUMNS, COLUMNS + 1, 2 * COLUMNS + 8]),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([0.1, 1.0, 30.0]),
)
def test_against_float64(
    device: torch.device, tokens: int, size: int, dtype: torch.dtype, scale: float
) -> None:
    generator = torch.Generator().manual_seed(tokens * size)
    gate_up = (scale * torch.randn(tokens, 2 * size, generator=generator)).to(dtype)
    gate, up = gate_up.double().chunk(2, dim=-1)
    output = silu_multiply(gate_up.to(device)).cpu()
    assert output.dtype == dtype
    assert output.shape == (tokens, size)
    # The exponential of x has a relative error of x times that of a float32.
    tolerance = rounding_of(dtype, device) + 1e-6 * max(1.0, scale)
    smallest = 1e-7 if dtype == torch.float16 else 1e-9  # float16 has steps of 6e-8 near 0
    torch.testing.assert_close(output.double(), gate * gate.sigmoid() * up, rtol=tolerance, atol=smallest)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_gates_are_those_of_the_torch_path(device: torch.device, dtype: torch.dtype) -> None:
    gate = torch.tensor([-1e4, -200.0, -88.8, -0.0, 0.0, 88.8, 200.0, 1e4])
    gate_up = torch.stack((torch.cat((gate, torch.ones(8))), torch.cat((gate, torch.full((8,), -3.0)))))
    expected = TorchKernels().silu_multiply(gate_up.to(dtype))
    output = silu_multiply(gate_up.to(dtype).to(device)).cpu()
    assert bool(output.isfinite().all())
    torch.testing.assert_close(output, expected, rtol=2 * rounding_of(dtype, device) + 1e-6, atol=1e-35)
