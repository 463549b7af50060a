"""Sampling: the noise against Random123, thresholds against their definition, the kernel against torch."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pdengine.triton_kernels import sampling, torch_sampling
from pdengine.triton_kernels.kernels import SamplingBatch
from pdengine.triton_kernels.sampling import _gumbel_noise, _highest_reaching
from pdengine.triton_kernels.torch_kernels import TorchKernels

# Triton's interpreter computes with numpy, which warns of what is meant to overflow or to be infinite.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
TILE = 64  # of the kernel in these tests, so that short rows already have several


@pytest.fixture(scope="module", autouse=True)
def _small_tiles() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "MAX_TILE", TILE)
        yield


# ------------------------------------------------------------------------------------------ noise


def philox4x32(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    """Philox4x32-10 as the paper writes it down."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        product0, product2 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c2 = (product2 >> 32) ^ c1 ^ k0, (product0 >> 32) ^ c3 ^ k1
        c1, c3 = product2 % 2**32, product0 % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers_of_random123(
    counter: tuple[int, ...], key: tuple[int, ...], answer: tuple[int, ...]
) -> None:
    """The file kat_vectors of https://github.com/DEShawResearch/random123."""
    assert philox4x32(counter, key) == answer


def exact_noise(seed: int, position: int, token: int) -> float:
    key = (seed % 2**32, seed % 2**64 >> 32)
    return gumbel_of(philox4x32((token // 4, position % 2**32, position >> 32, 0), key)[token % 4])


def gumbel_of(bits: int) -> float:
    v = (np.float32(bits) + np.float32(0.5)) * np.float32(2**-32)  # what float32 keeps of them
    return -math.log(-math.log1p(-float(min(v, np.float32(1 - 2**-24)))))


@triton.jit
def _noise_kernel(seed_ptr, position_ptr, noise_ptr, start, TILE: tl.constexpr):
    noise = _gumbel_noise(tl.load(seed_ptr), tl.load(position_ptr), start, TILE)
    tl.store(noise_ptr + tl.arange(0, TILE), noise)


seeds = st.sampled_from([0, 1, -1, 2**63 - 1, -(2**63)]) | st.integers(-(2**63), 2**63 - 1)
positions = st.sampled_from([0, 1, 2**31, 2**32 - 1, 2**40]) | st.integers(0, 10**6)


@settings(max_examples=40, deadline=None)
@given(seed=seeds, position=positions, start=st.integers(0, 40_000))
def test_both_paths_draw_the_noise_that_is_defined(
    device: torch.device, seed: int, position: int, start: int
) -> None:
    start = 4 * start
    expected = torch.tensor([exact_noise(seed, position, start + token) for token in range(TILE)])
    seed_tensor, position_tensor = torch.tensor([seed]), torch.tensor([position])
    by_torch = torch_sampling.gumbel_noise(seed_tensor, position_tensor, start + TILE - 1)[0, start:]
    by_kernel = torch.empty(TILE, device=device)
    _noise_kernel[(1,)](seed_tensor.to(device), position_tensor.to(device), by_kernel, start, TILE=TILE)
    torch.testing.assert_close(by_torch, expected[:-1], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(by_kernel.cpu(), expected, rtol=1e-6, atol=1e-6)


@triton.jit
def _ends_of_noise_kernel(bits_ptr, noise_ptr, TILE: tl.constexpr):
    noise = sampling._gumbel(tl.load(bits_ptr + tl.arange(0, TILE)).to(tl.uint32, bitcast=True))
    tl.store(noise_ptr + tl.arange(0, TILE), noise)


def test_the_ends_of_the_random_bits_give_finite_noise(device: torch.device) -> None:
    """What no seed that anybody has seen draws: 0, and what float32 rounds up to 2^32."""
    ends = [0, 1, 2**32 - 1, 2**32 - 128, 2**32 - 129, 2**31, 2**24, 3]
    expected = torch.tensor([gumbel_of(bits) for bits in ends])
    bits = torch.tensor(ends, dtype=torch.int64)
    noise = torch.empty(len(ends), device=device)
    as_int32 = torch.where(bits >= 2**31, bits - 2**32, bits).to(torch.int32)
    _ends_of_noise_kernel[(1,)](as_int32.to(device), noise, TILE=len(ends))
    torch.testing.assert_close(noise.cpu(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(torch_sampling.gumbel(bits.to(torch.float32)), expected, rtol=1e-6, atol=1e-6)


# ------------------------------------------------------------------------------------- thresholds


@triton.jit
def _threshold_kernel(
    logits_ptr, numbers_ptr, threshold_ptr, vocabulary, BY_MASS: tl.constexpr, TILE: tl.constexpr
):
    low, largest = tl.load(numbers_ptr), tl.load(numbers_ptr + 1)
    floor, target = tl.load(numbers_ptr + 2), tl.load(numbers_ptr + 3)
    threshold = _highest_reaching(logits_ptr, vocabulary, low, largest, 1.0, floor, target, BY_MASS, TILE)
    tl.store(threshold_ptr, threshold)


def kernel_threshold(logits: Tensor, floor: float, target: float, *, by_mass: bool) -> float:
    """For logits whose largest is 0, if by_mass."""
    numbers = torch.tensor([float(logits.min()), float(logits.max()), floor, target], device=logits.device)
    threshold = torch.empty(1, device=logits.device)
    _threshold_kernel[(1,)](logits, numbers, threshold, len(logits), BY_MASS=by_mass, TILE=TILE)
    return float(threshold)


finite_floats = st.floats(-(2.0**100), 2.0**100, width=32) | st.floats(-20, 20, width=32)
tied_floats = st.sampled_from([-0.0, 0.0, 1e-45, -1e-45, 1.0, 1.0000001, -3.0, 2.5])
rows = st.lists(st.one_of(finite_floats, tied_floats), min_size=2, max_size=3 * TILE) | st.lists(
    tied_floats, min_size=2, max_size=TILE
)


@settings(max_examples=40, deadline=None)
@given(row=rows, data=st.data())
def test_the_threshold_of_top_k_is_the_kth_largest(
    device: torch.device, row: list[float], data: st.DataObject
) -> None:
    top_k = data.draw(st.integers(1, len(row)))
    logits = torch.tensor(row)
    expected = float(logits.sort(descending=True).values[top_k - 1])
    assert kernel_threshold(logits.to(device), -math.inf, float(top_k), by_mass=False) == expected
    assert torch_sampling._highest_reaching(logits, torch.ones(len(row)), float(top_k)) == expected


@settings(max_examples=40, deadline=None)
@given(
    weights=st.lists(st.integers(1, 40), min_size=1, max_size=2 * TILE),
    share=st.floats(0, 1),
    lightest=st.sampled_from([0, 1, 7]),
)
def test_the_threshold_of_top_p_is_where_the_mass_is_reached(
    device: torch.device, weights: list[int], share: float, lightest: int
) -> None:
    """Weights are whole numbers, and targets lie between two sums of them, so rounding decides nothing."""
    kept = sorted((weight for weight in weights if weight >= min(lightest, max(weights))), reverse=True)
    target = max(1, math.ceil(share * sum(kept))) - 0.5
    mass = 0
    for weight in kept:
        mass += weight
        if mass >= target:
            break
    logits = (torch.tensor(weights, dtype=torch.float64) / max(weights)).log().to(torch.float32)
    expected = float(logits[weights.index(weight)])
    floor = math.log((min(lightest, max(weights)) - 0.5) / max(weights)) if lightest else -math.inf
    scaled_target = target / max(weights)
    assert kernel_threshold(logits.to(device), floor, scaled_target, by_mass=True) == expected
    mass_of = logits.exp().masked_fill(logits < floor, 0.0)
    assert torch_sampling._highest_reaching(logits, mass_of, scaled_target) == expected


# ---------------------------------------------------------------------------------------- batches


def batch_on(device: torch.device, **columns: list[float]) -> SamplingBatch:
    """Rows of temperature 1 without filters, but for `columns`."""
    num_rows = len(next(iter(columns.values())))
    defaults = {"temperatures": 1.0, "min_p": 0.0, "top_k": 0, "top_p": 1.0, "seeds": 0, "positions": 0}
    is_integer = {"top_k", "seeds", "positions"}
    tensors = {
        name: torch.tensor(
            columns.get(name, [default] * num_rows),
            dtype=torch.int64 if name in is_integer else torch.float32,
            device=device,
        )
        for name, default in defaults.items()
    }
    return SamplingBatch(**tensors)


def perturbed(logits: Tensor, batch: SamplingBatch, row: int) -> Tensor:
    """What the row's draw takes the largest of, by the torch path."""
    scaled = (logits[row] - logits[row].max()) / batch.temperatures[row]
    filters = float(batch.min_p[row]), int(batch.top_k[row]), float(batch.top_p[row])
    excluded = torch_sampling.excluded_tokens(logits[row], scaled, *filters)
    noise = torch_sampling.gumbel_noise(batch.seeds[[row]], batch.positions[[row]], logits.shape[1])[0]
    return (scaled + noise).masked_fill(excluded, -math.inf)


parameters = st.fixed_dictionaries(
    {
        "temperatures": st.sampled_from([0.0, 1.0, 0.3, 2.0, 1e-30]),
        "min_p": st.sampled_from([0.0, 0.0, 0.02, 0.5]),
        "top_k": st.sampled_from([0, 0, 1, 3, 50, 10_000]),
        "top_p": st.sampled_from([1.0, 1.0, 0.0, 0.4, 0.9, 0.999]),
        "seeds": seeds,
        "positions": positions,
    }
)


@settings(max_examples=25, deadline=None)
@given(
    vocabulary=st.sampled_from([1, 2, 63, 64, 65, 200, 261]),
    rows=st.lists(parameters, min_size=1, max_size=5),
    steps=st.sampled_from([0, 4]),
    logits_seed=st.integers(0, 1000),
)
def test_the_kernel_draws_the_tokens_of_the_torch_path(
    device: torch.device, vocabulary: int, rows: list[dict[str, float]], steps: int, logits_seed: int
) -> None:
    generator = torch.Generator().manual_seed(logits_seed)
    logits = 3 * torch.randn(len(rows), vocabulary, generator=generator)
    if steps:  # coarse logits, as 16-bit models have them: many are equal
        logits = (logits * steps).round() / steps
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    batch = batch_on(torch.device("cpu"), **columns)
    expected = TorchKernels().sample(logits, batch)
    drawn = sampling.sample(logits.to(device), batch_on(device, **columns))
    assert drawn.dtype == torch.int64
    assert drawn.device.type == device.type
    for row, (token, other) in enumerate(zip(drawn.tolist(), expected.tolist(), strict=True)):
        if token != other:  # then rounding may have decided, and only then
            assert rows[row]["temperatures"] > 0
            values = perturbed(logits, batch, row)
            assert float(values[other] - values[token]) < 1e-5


def test_a_batch_of_greedy_rows_takes_the_first_of_the_largest(device: torch.device) -> None:
    logits = torch.zeros(4, 3 * TILE)
    logits[0, [70, 71, 190]] = 2.0
    logits[1, 5] = -1.0
    logits[2] = -torch.inf
    logits[3, 3 * TILE - 1] = 1e-30
    drawn = sampling.sample(logits.to(device), batch_on(device, temperatures=[0.0] * 4))
    assert drawn.tolist() == [70, 0, 0, 3 * TILE - 1]
    assert (
        drawn.tolist()
        == TorchKernels().sample(logits, batch_on(logits.device, temperatures=[0.0] * 4)).tolist()
    )


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nothing_but_nan_still_gives_a_token_of_the_vocabulary(
    device: torch.device, temperature: float
) -> None:
    """A step must not read an embedding that is not there, whatever a damaged model computes."""
    logits = torch.full((1, 100), torch.nan, device=device)
    batch = batch_on(device, temperatures=[temperature], top_k=[5], top_p=[0.5], min_p=[0.1])
    assert 0 <= sampling.sample(logits, batch).item() < 100
    assert (
        0
        <= TorchKernels().sample(logits.cpu(), batch_on(torch.device("cpu"), temperatures=[0.0])).item()
        < 100
    )


def test_a_row_does_not_depend_on_its_batch(device: torch.device) -> None:
    logits = 3 * torch.randn(6, 150, generator=torch.Generator().manual_seed(2)).to(device)
    columns = {
        "temperatures": [1.0, 0.0, 2.0, 0.5, 1.0, 1.0],
        "top_k": [0, 0, 7, 0, 20, 0],
        "top_p": [1.0, 1.0, 1.0, 0.8, 0.9, 1.0],
        "seeds": [1, 2, 3, -4, 5, 6],
        "positions": [10, 20, 30, 40, 50, 60],
    }
    together = sampling.sample(logits, batch_on(device, **columns)).tolist()
    for row, token in enumerate(together):
        alone = batch_on(device, **{name: [values[row]] for name, values in columns.items()})
        assert sampling.sample(logits[row : row + 1], alone).tolist() == [token]


def test_the_draws_of_the_kernel_follow_the_softmax(device: torch.device) -> None:
    """Pearson's statistic of 200 positions; 24.32 is the limit of 1 in 1000 for 7 degrees of freedom."""
    logits = torch.tensor([1.2, -0.4, 0.9, 2.1, -1.5, 0.0, 1.9, 0.3])
    num_draws = 200
    batch = batch_on(device, positions=list(range(num_draws)), seeds=[77] * num_draws)
    tokens = sampling.sample(logits.expand(num_draws, -1).contiguous().to(device), batch)
    counts = torch.bincount(tokens.cpu(), minlength=8)
    expected = num_draws * logits.double().softmax(dim=0)
    assert float(((counts - expected) ** 2 / expected).sum()) < 24.32
