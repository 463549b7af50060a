"""The kernels at both ends of a step of single tokens."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pdengine.models.rope import rope_cos_sin
from pdengine.triton_kernels.cpu_launch import float_bits
from pdengine.triton_kernels.cpu_native import native_kernels


def largest(logits: torch.Tensor) -> list[int]:
    rows, vocabulary = logits.shape
    native, chosen = native_kernels(), np.full(rows, -1, np.int64)
    # What stands behind the last row is readable, and larger than everything.
    memory = torch.cat([logits.flatten(), torch.full((16,), torch.inf, dtype=logits.dtype)])
    native.launcher.run(
        native.choose_largest.address, True, memory.data_ptr(), chosen.ctypes.data, rows, vocabulary,
        logits.dtype == torch.bfloat16, 0, 0, 0, 0, 0, 0, 0,
    )  # fmt: skip
    tokens: list[int] = chosen.tolist()
    return tokens


@given(
    rows=st.integers(1, 5),
    vocabulary=st.integers(1, 1200),
    values=st.integers(1, 3000),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**32),
)
def test_of_equal_logits_the_first(
    rows: int, vocabulary: int, values: int, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randint(values, (rows, vocabulary), generator=generator) - values / 2).to(dtype)
    expected = logits.to(torch.float32).numpy().argmax(axis=1).tolist()
    assert largest(logits) == expected


@pytest.mark.parametrize("value", [-torch.inf, torch.nan])
def test_a_row_without_a_largest_logit_gives_a_token_of_the_vocabulary(value: float) -> None:
    assert 0 <= largest(torch.full((1, 700), value))[0] < 700


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embeddings_and_angles(dtype: torch.dtype) -> None:
    native, hidden, pairs, scale = native_kernels(), 48, 32, 1.25
    embeddings = torch.randn(50, hidden).to(dtype)
    token_ids, positions = torch.tensor([7, 0, 49]), torch.tensor([0, 5, 131_071])
    frequencies = 10_000.0 ** -(torch.arange(pairs) / pairs)
    residual = torch.full((3, hidden), torch.nan)
    cos, sin = torch.full((3, pairs), torch.nan), torch.full((3, pairs), torch.nan)
    native.launcher.run(
        native.start_tokens.address, True, token_ids.data_ptr(), positions.data_ptr(), embeddings.data_ptr(),
        residual.data_ptr(), hidden, 3, cos.data_ptr(), sin.data_ptr(), frequencies.data_ptr(), pairs,
        float_bits(scale), dtype == torch.bfloat16,
    )  # fmt: skip
    assert torch.equal(residual, embeddings[token_ids].to(torch.float32))
    expected_cos, expected_sin = rope_cos_sin(positions, frequencies, scale)
    torch.testing.assert_close(cos, expected_cos[:, 0], rtol=0, atol=3e-7)
    torch.testing.assert_close(sin, expected_sin[:, 0], rtol=0, atol=3e-7)
