"""The fused add and RMSNorm against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rounding import rounding_of

from pdengine.triton_kernels.rms_norm import MAX_HIDDEN, add_rms_norm
from pdengine.triton_kernels.torch_kernels import TorchKernels

EPS = 1e-6
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HIDDEN_SIZES = [1, 2, 63, 64, 65, 80, 96, 896, 1024, 1536, 4096, 5120]


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(1, 20),
    hidden=st.sampled_from(HIDDEN_SIZES),
    dtype=st.sampled_from(DTYPES),
    has_update=st.booleans(),
    scale=st.sampled_from([1e-4, 1.0, 1e4]),
)
def test_against_float64(
    device: torch.device, tokens: int, hidden: int, dtype: torch.dtype, has_update: bool, scale: float
) -> None:
    generator = torch.Generator().manual_seed(tokens * hidden)
    residual = scale * torch.randn(tokens, hidden, generator=generator)
    update = torch.randn(tokens, hidden, generator=generator).to(dtype) if has_update else None
    weight = torch.randn(hidden, generator=generator)
    total = residual if update is None else residual + update
    exact = total.double()
    expected = exact / (exact.square().mean(dim=-1, keepdim=True) + EPS).sqrt() * weight.double()

    on_device = residual.to(device, copy=True)
    summed, normed = add_rms_norm(
        on_device, None if update is None else update.to(device), weight.to(device), EPS, dtype
    )
    assert summed is on_device, "the residual stream is changed in place"
    assert torch.equal(summed.cpu(), total)
    assert normed.dtype == dtype
    tolerance = rounding_of(dtype, device) + 1e-6
    torch.testing.assert_close(normed.cpu().double(), expected, rtol=tolerance, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_torch_path_gives_the_same(device: torch.device, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    residual, update = torch.randn(2, 7, 640, generator=generator)
    weight = torch.randn(640, generator=generator)
    expected = TorchKernels().add_rms_norm(residual.clone(), update.to(dtype), weight, EPS, dtype)
    arguments = (residual.to(device), update.to(dtype).to(device), weight.to(device))
    summed, normed = add_rms_norm(*arguments, EPS, dtype)
    assert torch.equal(summed.cpu(), expected[0])
    torch.testing.assert_close(
        normed.cpu(), expected[1], rtol=2 * rounding_of(dtype, device) + 2e-6, atol=1e-6
    )


def test_a_row_that_no_program_can_hold_is_refused(device: torch.device) -> None:
    hidden = MAX_HIDDEN + 1
    with pytest.raises(ValueError, match=f"hidden size is {hidden}, .* {MAX_HIDDEN} at most"):
        add_rms_norm(
            torch.zeros(1, hidden, device=device), None, torch.ones(hidden, device=device), EPS, torch.float32
        )
