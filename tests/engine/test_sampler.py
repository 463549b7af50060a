"""The sampler: the right distribution, and noise that knows nothing but seed and position."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sequences import make_sequence
from torch import Tensor

from pdengine.engine.sampler import gumbel_noise, keep_likeliest, sample, sample_one
from pdengine.engine.sequence import Mode, Sequence
from pdengine.transport.messages import SamplingParams

LOGITS = torch.tensor([1.2, -0.4, 0.9, 2.1, -1.5, 0.0, 1.9, 0.3])
GOLDEN_NOISE = [1.289111, -0.994199, -0.392873, 2.070983, 0.634658]  # seed 2^63 + 12345, position 1000
CHI_SQUARE_LIMITS = {1: 10.83, 2: 13.82, 3: 16.27, 7: 24.32}  # of 1 in 1000, by degrees of freedom


def sampled_sequence(num_tokens: int, sampling: SamplingParams) -> Sequence:
    sequence = make_sequence("request", Mode.WHOLE, range(num_tokens))
    sequence.sampling = sampling
    return sequence


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
    expected = [int(logits[0].argmax()), sample_one(logits[1], sampling, position=9)]
    assert sample(logits, sequences) == expected


@pytest.mark.parametrize("temperature", [1e-4, 1e-10, 1e-30, 1e-38, 1e-42, 5e-324])
@pytest.mark.parametrize("scale", [1.0, 1e4])
@pytest.mark.parametrize("top_p", [1.0, 0.5])
def test_greedy_is_the_limit_of_small_temperatures(temperature: float, scale: float, top_p: float) -> None:
    logits = scale * random_logits(20, 50)
    sampling = SamplingParams(temperature=temperature, top_p=top_p, seed=1)
    sampled = [sample_one(row, sampling, position) for position, row in enumerate(logits)]
    assert sampled == logits.argmax(dim=-1).tolist()


def test_at_a_small_temperature_equals_share_and_nobody_else_gets_anything() -> None:
    logits = torch.tensor([3.0, 1.0, 3.0, 2.9, 3.0])
    sampling = SamplingParams(temperature=1e-40, seed=2)
    assert {sample_one(logits, sampling, position) for position in range(100)} == {0, 2, 4}


def test_a_sequence_without_a_seed_is_a_defect_of_the_caller() -> None:
    with pytest.raises(AssertionError, match="seed"):
        sample_one(LOGITS, SamplingParams(temperature=1.0), 0)


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


def test_noise_is_the_same_in_every_version_of_numpy() -> None:
    """Two workers may have different ones, and a request that moves between them goes on as it began."""
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


def test_zero_from_the_generator_is_finite_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    class Zeros:
        def random(self, size: int, dtype: type) -> np.ndarray:
            return np.zeros(size, dtype)

    monkeypatch.setattr(np.random, "Generator", lambda bits: Zeros())
    assert bool(gumbel_noise(0, 0, 4).isfinite().all())


# ------------------------------------------------------------------------------- top_k and top_p


def plain_survivors(weights: list[int], top_k: int, top_p: float) -> tuple[set[int], float]:
    """What stays by definition, and how close a partial sum came to top_p."""
    kept = list(range(len(weights)))
    if 0 < top_k < len(weights):
        threshold = sorted(weights, reverse=True)[top_k - 1]
        kept = [token for token in kept if weights[token] >= threshold]  # ties with the k-th stay
    if top_p >= 1:
        return set(kept), 1.0
    total = sum(weights[token] for token in kept)
    survivors: set[int] = set()
    mass, margin = 0.0, 1.0
    for token in sorted(kept, key=lambda token: -weights[token]):
        if mass >= top_p and survivors:
            break
        survivors.add(token)
        mass += weights[token] / total
        margin = min(margin, abs(mass - top_p))
    return survivors, margin


@given(
    weights=st.lists(st.integers(1, 30), min_size=1, max_size=20),
    top_k=st.integers(0, 25),
    top_p=st.one_of(st.just(1.0), st.floats(0.0, 1.0)),
)
@settings(max_examples=400, deadline=None)
def test_top_k_and_top_p_keep_what_the_definition_says(weights: list[int], top_k: int, top_p: float) -> None:
    expected, margin = plain_survivors(weights, top_k, top_p)
    assume(margin > 1e-5)  # else rounding decides
    logits = torch.tensor(weights, dtype=torch.float32).log()
    before = logits.clone()
    kept = keep_likeliest(logits, top_k, top_p)
    assert torch.equal(logits, before), "the caller's logits are left alone"
    assert set(kept.isfinite().nonzero().flatten().tolist()) == expected
    assert torch.equal(kept[kept.isfinite()], logits[kept.isfinite()])


@pytest.mark.parametrize("sampling", [SamplingParams(top_k=1, seed=3), SamplingParams(top_p=0.0, seed=3)])
def test_the_narrowest_choice_is_greedy(sampling: SamplingParams) -> None:
    logits = random_logits(30, 40)
    sampled = [sample_one(row, sampling, position) for position, row in enumerate(logits)]
    assert sampled == logits.argmax(dim=-1).tolist()


def test_ties_with_the_last_of_the_top_k_stay() -> None:
    kept = keep_likeliest(torch.tensor([1.0, 3.0, 2.0, 2.0, 0.0]), top_k=2, top_p=1.0)
    assert kept.isfinite().tolist() == [False, True, True, True, False]


def test_of_equals_at_the_border_of_top_p_the_first_stay() -> None:
    kept = keep_likeliest(torch.zeros(8), top_k=0, top_p=0.5)
    assert kept.isfinite().tolist() == [True] * 4 + [False] * 4


# ----------------------------------------------------------------------------------- distribution


def chi_square(draw: Callable[[int], int], probabilities: Tensor, num_draws: int) -> tuple[float, int]:
    """Pearson's statistic of draws 0 .. num_draws - 1, and its degrees of freedom."""
    counts = Counter(draw(number) for number in range(num_draws))
    possible = probabilities.nonzero().flatten().tolist()
    assert set(counts) <= set(possible), "an excluded token was drawn"
    expected = {token: num_draws * float(probabilities[token]) for token in possible}
    return sum((counts[token] - e) ** 2 / e for token, e in expected.items()), len(possible) - 1


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(temperature=1.0, seed=11),
        SamplingParams(temperature=0.5, seed=12),
        SamplingParams(temperature=3.0, seed=13),
        SamplingParams(temperature=1.0, top_k=3, seed=14),
        SamplingParams(temperature=1.0, top_p=0.7, seed=15),
    ],
    ids=["softmax", "cold", "hot", "top_k", "top_p"],
)
def test_the_tokens_of_one_request_follow_the_softmax(sampling: SamplingParams) -> None:
    kept = keep_likeliest(LOGITS / sampling.temperature, sampling.top_k, sampling.top_p)
    probabilities = kept.double().softmax(dim=-1)
    statistic, freedom = chi_square(
        lambda position: sample_one(LOGITS, sampling, position), probabilities, num_draws=5000
    )
    assert statistic < CHI_SQUARE_LIMITS[freedom]


def test_the_same_position_of_many_requests_follows_the_softmax() -> None:
    def draw(seed: int) -> int:
        return sample_one(LOGITS, SamplingParams(seed=seed), position=17)

    statistic, freedom = chi_square(draw, LOGITS.double().softmax(dim=-1), num_draws=5000)
    assert statistic < CHI_SQUARE_LIMITS[freedom]


def test_the_statistic_notices_a_wrong_temperature() -> None:
    sampling = SamplingParams(temperature=1.2, seed=11)
    statistic, freedom = chi_square(
        lambda position: sample_one(LOGITS, sampling, position),
        LOGITS.double().softmax(dim=-1),
        num_draws=5000,
    )
    assert statistic > CHI_SQUARE_LIMITS[freedom]
