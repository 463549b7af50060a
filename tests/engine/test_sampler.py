"""The sampler of the CPU path: the right distribution, and noise that knows nothing but seed and position."""

from __future__ import annotations

import math
from collections.abc import Sequence as Sequence_

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sequences import make_sequence
from torch import Tensor

from pdengine.engine.sampler import sampling_arrays
from pdengine.engine.sequence import Mode, Sequence
from pdengine.transport.messages import SamplingParams
from pdengine.triton_kernels import torch_sampling
from pdengine.triton_kernels.kernels import SamplingBatch
from pdengine.triton_kernels.torch_kernels import TorchKernels

LOGITS = torch.tensor([1.2, -0.4, 0.9, 2.1, -1.5, 0.0, 1.9, 0.3])
GOLDEN_NOISE = [0.735887, -0.362421, -1.055104, -0.752318, -0.483301]  # seed 2^63 + 12345, position 1000
CHI_SQUARE_LIMITS = {1: 10.83, 2: 13.82, 3: 16.27, 4: 18.47, 7: 24.32}  # of 1 in 1000, by degrees of freedom


def sampled_sequence(num_tokens: int, sampling: SamplingParams) -> Sequence:
    sequence = make_sequence("request", Mode.WHOLE, range(num_tokens))
    sequence.sampling = sampling
    return sequence


def sample(logits: Tensor, sequences: Sequence_[Sequence]) -> list[int]:
    batch = SamplingBatch(*map(torch.from_numpy, sampling_arrays(sequences)))
    return TorchKernels().sample(logits, batch).tolist()


def sample_positions(
    logits: Tensor, sampling: SamplingParams, num_positions: int, *, first: int = 0
) -> list[int]:
    """Draws from `logits`, `[vocabulary]` or `[num_positions, vocabulary]`, at consecutive positions."""
    rows = logits.expand(num_positions, -1)
    positions = range(first, first + num_positions)
    return sample(rows, [sampled_sequence(position, sampling) for position in positions])


def gumbel_noise(seed: int, position: int, size: int) -> Tensor:
    seeds = torch.from_numpy(np.array([seed % 2**64], np.uint64).view(np.int64))
    return torch_sampling.gumbel_noise(seeds, torch.tensor([position]), size)[0]


def random_logits(rows: int, vocabulary: int, *, seed: int = 0) -> Tensor:
    return 3 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))


# ----------------------------------------------------------------------------------------- greedy


def test_greedy_takes_the_largest_and_of_equals_the_first() -> None:
    greedy = sampled_sequence(3, SamplingParams(temperature=0.0))
    logits = torch.tensor([[0.0, 2.0, 1.0], [5.0, 5.0, 1.0], [-3.0, -1.0, -1.0]])
    assert sample(logits, [greedy, greedy, greedy]) == [1, 0, 1]


def test_greedy_and_sampled_rows_share_a_batch() -> None:
    sampling = SamplingParams(temperature=1.0, seed=5)
    logits = random_logits(2, 50)
    sequences = [sampled_sequence(3, SamplingParams(temperature=0.0)), sampled_sequence(9, sampling)]
    expected = [int(logits[0].argmax()), *sample_positions(logits[1], sampling, 1, first=9)]
    assert sample(logits, sequences) == expected
    assert sample(logits.flip(0), sequences[::-1]) == expected[::-1]


@pytest.mark.parametrize("temperature", [1e-4, 1e-10, 1e-30, 1e-38, 1e-42, 5e-324])
@pytest.mark.parametrize("scale", [1.0, 1e4])
@pytest.mark.parametrize("top_p", [1.0, 0.5])
def test_greedy_is_the_limit_of_small_temperatures(temperature: float, scale: float, top_p: float) -> None:
    logits = scale * random_logits(20, 50)
    sampling = SamplingParams(temperature=temperature, top_p=top_p, seed=1)
    assert sample_positions(logits, sampling, len(logits)) == logits.argmax(dim=-1).tolist()


def test_at_a_small_temperature_equals_share_and_nobody_else_gets_anything() -> None:
    logits = torch.tensor([3.0, 1.0, 3.0, 2.9, 3.0])
    sampling = SamplingParams(temperature=1e-40, seed=2)
    assert set(sample_positions(logits, sampling, 100)) == {0, 2, 4}


def test_a_sequence_without_a_seed_is_a_defect_of_the_caller() -> None:
    with pytest.raises(AssertionError, match="seed"):
        sample_positions(LOGITS, SamplingParams(temperature=1.0), 1)


# ------------------------------------------------------------------------------------------ noise


def test_a_token_depends_neither_on_its_batch_nor_on_its_row() -> None:
    logits = random_logits(6, 100)
    sequences = [sampled_sequence(length, SamplingParams(seed=length)) for length in range(1, 7)]
    together = sample(logits, sequences)
    alone = [sample(row[None], [sequence])[0] for row, sequence in zip(logits, sequences, strict=True)]
    backwards = sample(logits.flip(0), sequences[::-1])
    assert together == alone == backwards[::-1]


def test_noise_is_a_function_of_seed_and_position() -> None:
    noise = gumbel_noise(7, 5, 1000)
    assert torch.equal(noise, gumbel_noise(7, 5, 1000))
    # Whatever else was drawn in this process, by numpy or by torch, does not matter.
    np.random.seed(1)
    torch.manual_seed(1)
    assert torch.equal(noise, gumbel_noise(7, 5, 1000))
    others = [gumbel_noise(seed, position, 1000) for seed, position in [(7, 4), (7, 6), (8, 5), (5, 7)]]
    for other in others:
        assert abs(float(torch.corrcoef(torch.stack([noise, other]))[0, 1])) < 0.1


def test_noise_is_the_same_in_every_release() -> None:
    """A request may move between two workers, and goes on as it began."""
    expected = torch.tensor(GOLDEN_NOISE)
    torch.testing.assert_close(gumbel_noise(2**63 + 12345, 1000, 5), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seed", [0, -1, 2**63, 2**64 - 1])
@pytest.mark.parametrize("position", [0, 2**31, 2**40])
def test_every_seed_and_position_gives_finite_noise(seed: int, position: int) -> None:
    noise = gumbel_noise(seed, position, 100_000)
    assert noise.dtype == torch.float32
    assert bool(noise.isfinite().all())
    # Mean and variance of the standard Gumbel distribution.
    assert float(noise.mean()) == pytest.approx(0.5772, abs=0.02)
    assert float(noise.var()) == pytest.approx(math.pi**2 / 6, abs=0.05)


# ---------------------------------------------------------------------------- min_p, top_k, top_p


def plain_survivors(weights: list[int], min_p: float, top_k: int, top_p: float) -> tuple[set[int], float]:
    """What stays by definition, and how close a comparison came to a tie that rounding decides."""
    margin = min(abs(weight / max(weights) - min_p) for weight in weights)
    kept = [weight for weight in weights if weight >= min_p * max(weights)]
    if top_k > 0:  # ties with the k-th stay
        kept = [weight for weight in kept if weight >= sorted(weights, reverse=True)[:top_k][-1]]
    last, mass = max(weights), 0
    for last in sorted(kept, reverse=True) if top_p < 1 else []:
        mass += last
        margin = min(margin, abs(mass / sum(kept) - top_p))
        if mass >= top_p * sum(kept):
            kept = [weight for weight in kept if weight >= last]  # and ties with the last one, too
            break
    return {token for token, weight in enumerate(weights) if weight >= min(kept)}, margin


def survivors(logits: Tensor, sampling: SamplingParams) -> Tensor:
    """[vocabulary] bool"""
    scaled = (logits - logits.max()) / sampling.temperature
    excluded = torch_sampling.excluded_tokens(logits, scaled, sampling.min_p, sampling.top_k, sampling.top_p)
    return ~excluded


@given(
    weights=st.lists(st.integers(1, 30), min_size=1, max_size=20),
    min_p=st.one_of(st.just(0.0), st.floats(0.0, 1.0)),
    top_k=st.integers(0, 25),
    top_p=st.one_of(st.just(1.0), st.floats(0.0, 1.0)),
)
@settings(max_examples=100, deadline=None)
def test_the_filters_keep_what_their_definition_says(
    weights: list[int], min_p: float, top_k: int, top_p: float
) -> None:
    expected, margin = plain_survivors(weights, min_p, top_k, top_p)
    assume(margin > 1e-5)  # else rounding decides
    logits = torch.tensor(weights, dtype=torch.float32).log()
    kept = survivors(logits, SamplingParams(min_p=min_p, top_k=top_k, top_p=top_p))
    assert set(kept.nonzero().flatten().tolist()) == expected


def test_sampling_leaves_the_logits_alone() -> None:
    logits = random_logits(3, 40)
    before = logits.clone()
    sample_positions(logits, SamplingParams(temperature=0.7, min_p=0.01, top_k=9, top_p=0.8, seed=1), 3)
    assert torch.equal(logits, before)


@pytest.mark.parametrize(
    "sampling",
    [SamplingParams(top_k=1, seed=3), SamplingParams(top_p=0.0, seed=3), SamplingParams(min_p=1.0, seed=3)],
    ids=["top_k", "top_p", "min_p"],
)
def test_the_narrowest_choice_is_greedy(sampling: SamplingParams) -> None:
    logits = random_logits(30, 40)
    assert sample_positions(logits, sampling, len(logits)) == logits.argmax(dim=-1).tolist()


def test_ties_with_the_last_of_the_top_k_stay() -> None:
    kept = survivors(torch.tensor([1.0, 3.0, 2.0, 2.0, 0.0]), SamplingParams(top_k=2))
    assert kept.tolist() == [False, True, True, True, False]


def test_ties_with_the_last_of_the_top_p_stay() -> None:
    kept = survivors(torch.tensor([0.0, 2.0, 0.0, 1.0, 0.0, 1.0]), SamplingParams(top_p=0.6))
    assert kept.tolist() == [False, True, False, True, False, True]


def test_min_p_comes_after_temperature_and_before_top_p() -> None:
    logits = torch.tensor([0.5, 0.2, 0.2, 0.1]).log()
    # 0.45 of the largest leaves one token at temperature 1; at 2 the roots of the probabilities count.
    assert survivors(logits, SamplingParams(min_p=0.45)).tolist() == [True, False, False, False]
    hot = SamplingParams(temperature=2.0, min_p=0.45)
    assert survivors(logits, hot).tolist() == [True, True, True, False]
    # 0.5 is less than 0.55 of everything, but more than 0.55 of 0.9.
    assert survivors(logits, SamplingParams(top_p=0.55)).tolist() == [True, True, True, False]
    assert survivors(logits, SamplingParams(top_p=0.55, min_p=0.3)).tolist() == [True, False, False, False]


# ----------------------------------------------------------------------------------- distribution


def chi_square(tokens: list[int], probabilities: Tensor) -> tuple[float, int]:
    """Pearson's statistic of draws, and its degrees of freedom."""
    counts = torch.bincount(torch.tensor(tokens), minlength=len(probabilities))
    possible = probabilities > 0
    assert int(counts[~possible].sum()) == 0, "an excluded token was drawn"
    expected = len(tokens) * probabilities[possible]
    return float(((counts[possible] - expected) ** 2 / expected).sum()), len(expected) - 1


def probabilities_of(logits: Tensor, sampling: SamplingParams) -> Tensor:
    scaled = logits.double() / sampling.temperature
    return scaled.masked_fill(~survivors(logits, sampling), -math.inf).softmax(dim=-1)


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(temperature=1.0, seed=11),
        SamplingParams(temperature=0.5, seed=12),
        SamplingParams(temperature=3.0, seed=13),
        SamplingParams(temperature=1.0, top_k=3, seed=14),
        SamplingParams(temperature=1.0, top_p=0.7, seed=15),
        SamplingParams(temperature=1.0, min_p=0.2, seed=16),
    ],
    ids=["softmax", "cold", "hot", "top_k", "top_p", "min_p"],
)
def test_the_tokens_of_one_request_follow_the_softmax(sampling: SamplingParams) -> None:
    tokens = sample_positions(LOGITS, sampling, 5000)
    statistic, freedom = chi_square(tokens, probabilities_of(LOGITS, sampling))
    assert statistic < CHI_SQUARE_LIMITS[freedom]


def test_the_same_position_of_many_requests_follows_the_softmax() -> None:
    sequences = [sampled_sequence(17, SamplingParams(seed=seed)) for seed in range(5000)]
    statistic, freedom = chi_square(sample(LOGITS.expand(5000, -1), sequences), LOGITS.double().softmax(-1))
    assert statistic < CHI_SQUARE_LIMITS[freedom]


def test_the_statistic_notices_a_wrong_temperature() -> None:
    tokens = sample_positions(LOGITS, SamplingParams(temperature=1.2, seed=11), 5000)
    statistic, freedom = chi_square(tokens, LOGITS.double().softmax(dim=-1))
    assert statistic > CHI_SQUARE_LIMITS[freedom]


def test_a_rare_token_is_drawn_as_often_as_it_should_be() -> None:
    """One draw in 200 goes to 100 000 tokens of which each has one in 2 * 10^7: the far tail of the noise."""
    vocabulary, share, num_draws = 100_001, 1 / 200, 1500
    logits = torch.full((vocabulary,), math.log(share / (vocabulary - 1)))
    logits[0] = math.log(1 - share)
    tokens = sample_positions(logits, SamplingParams(seed=5), num_draws)
    num_rare = sum(token != 0 for token in tokens)
    deviation = math.sqrt(num_draws * share * (1 - share))
    assert abs(num_rare - num_draws * share) < 3.3 * deviation  # 1 in 1000
