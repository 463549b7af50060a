"""Bias, min_tokens and penalties: vLLM's formulas, whatever stands beside them in the batch."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from sequences import make_sequence
from torch import Tensor
from transformers import MinNewTokensLengthLogitsProcessor, RepetitionPenaltyLogitsProcessor

from pdengine.engine.batch import build_batch
from pdengine.engine.sequence import Mode, Sequence
from pdengine.engine.step import Chunk
from pdengine.engine.step_extras import NO_EXTRAS, StepExtras
from pdengine.engine.step_upload import Array, upload_for
from pdengine.transport.messages import SamplingParams
from pdengine.triton_kernels.logits import LogitAdjustment

VOCAB_SIZE = 12
EOS = (0, 3)
UPLOAD = upload_for(torch.device("cpu"))


def decoding(sampling: SamplingParams, prompt_ids: list[int], output_ids: list[int]) -> Sequence:
    sequence = make_sequence("request", Mode.WHOLE, prompt_ids, output_ids=output_ids, sampling=sampling)
    sequence.num_computed = len(sequence.token_ids) - 1
    sequence.block_ids = list(range(20))
    return sequence


def extras_of(sequences: list[Sequence]) -> StepExtras:
    """For one step of sequences that decode."""
    chunks = [Chunk(sequence, 1) for sequence in sequences]
    return build_batch(chunks, 4, UPLOAD, eos_token_ids=EOS, vocab_size=VOCAB_SIZE).extras


def changed(logits: Tensor, sequences: list[Sequence]) -> Tensor:
    adjustment, result = extras_of(sequences).adjustment, logits.clone()
    if adjustment is not None:
        before = adjustment.apply(result)
        restored = result.clone()
        adjustment.restore(restored, before)
        assert torch.equal(restored, logits)
    return result


def plainly_changed(logits: Tensor, sequence: Sequence) -> list[float]:
    """Of one row, token by token."""
    sampling, answer = sequence.sampling, sequence.token_ids[sequence.num_prompt_tokens :]
    ends = {*sampling.stop_token_ids, *(() if sampling.ignore_eos else EOS)}
    result = []
    for token, plain in enumerate(logits.tolist()):
        logit = plain + sampling.logit_bias.get(token, 0.0)
        if token in ends and len(answer) < sampling.min_tokens:
            logit = -math.inf
        if token in sequence.token_ids:
            penalty = sampling.repetition_penalty
            logit = logit / penalty if logit > 0 else logit * penalty
        logit -= sampling.frequency_penalty * answer.count(token)
        logit -= sampling.presence_penalty * (token in answer)
        result.append(logit)
    return result


tokens = st.integers(0, VOCAB_SIZE - 1)
penalties = st.one_of(st.just(0.0), st.floats(-2.0, 2.0))
samplings = st.builds(
    SamplingParams,
    max_tokens=st.just(50),
    seed=st.just(1),
    min_tokens=st.integers(0, 4),
    presence_penalty=penalties,
    frequency_penalty=penalties,
    repetition_penalty=st.one_of(st.just(1.0), st.floats(0.1, 3.0)),
    logit_bias=st.one_of(st.just({}), st.dictionaries(tokens, st.floats(-100.0, 100.0), max_size=4)),
    stop_token_ids=st.lists(tokens, max_size=2).map(tuple),
    ignore_eos=st.booleans(),
)
contexts = st.lists(
    st.tuples(samplings, st.lists(tokens, min_size=1, max_size=10), st.lists(tokens, max_size=6)),
    min_size=1,
    max_size=5,
)


@given(contexts, st.lists(st.lists(tokens, min_size=5, max_size=5), max_size=3), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_every_row_is_changed_as_it_would_be_alone(
    rows: list[tuple[SamplingParams, list[int], list[int]]], further: list[list[int]], seed: int
) -> None:
    """Also when the answers have grown by some tokens, and as if they were taken up there."""
    sequences = [decoding(*row) for row in rows]
    logits = 4 * torch.randn(len(rows), VOCAB_SIZE, generator=torch.Generator().manual_seed(seed))
    for new in [None, *further]:
        if new is not None:
            for sequence, token in zip(sequences, new, strict=False):
                sequence.append(token, frozenset())
                sequence.num_computed += 1
        result = changed(logits, sequences)
        expected = torch.tensor([plainly_changed(*pair) for pair in zip(logits, sequences, strict=True)])
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
        anew = [
            decoding(s.sampling, s.token_ids[: s.num_prompt_tokens], s.token_ids[s.num_prompt_tokens :])
            for s in sequences
        ]
        assert torch.equal(changed(logits, anew), result)


@given(st.lists(tokens, min_size=1, max_size=12), st.floats(0.2, 3.0), st.integers(0, 2**31))
@settings(max_examples=50, deadline=None)
def test_the_repetition_penalty_is_that_of_transformers(
    context: list[int], penalty: float, seed: int
) -> None:
    logits = 4 * torch.randn(1, VOCAB_SIZE, generator=torch.Generator().manual_seed(seed))
    sampling = SamplingParams(max_tokens=50, seed=1, repetition_penalty=penalty)
    reference = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([context]), logits.clone())
    torch.testing.assert_close(
        changed(logits, [decoding(sampling, context[:1], context[1:])]), torch.as_tensor(reference)
    )


@pytest.mark.parametrize("num_written", range(5))
def test_min_tokens_is_that_of_transformers(num_written: int) -> None:
    logits, prompt = torch.randn(1, VOCAB_SIZE), [7, 8]
    sampling = SamplingParams(max_tokens=50, seed=1, min_tokens=3)
    processor = MinNewTokensLengthLogitsProcessor(len(prompt), 3, list(EOS))
    written = [5] * num_written
    reference = processor(torch.tensor([prompt + written]), logits.clone())
    assert torch.equal(changed(logits, [decoding(sampling, prompt, written)]), torch.as_tensor(reference))


def test_what_the_vocabulary_does_not_have_is_left_alone() -> None:
    """On a GPU it would end the worker."""
    sampling = SamplingParams(
        max_tokens=5, seed=1, min_tokens=2, logit_bias={VOCAB_SIZE: 5.0, 2**31: 1.0}, stop_token_ids=(10**6,)
    )
    result = changed(torch.zeros(1, VOCAB_SIZE), [decoding(sampling, [1], [])])
    assert result[0].isinf().nonzero().flatten().tolist() == list(EOS)
    assert int(result.count_nonzero()) == len(EOS)


def test_a_batch_that_asks_for_nothing_uploads_nothing_more() -> None:
    uploaded: list[int] = []

    def upload(arrays: list[Array]) -> list[Tensor]:
        uploaded.append(len(arrays))
        return UPLOAD(arrays)

    plain = decoding(SamplingParams(seed=1, temperature=0.7, top_k=3, top_p=0.5, min_p=0.1), [1, 2], [3])
    asking = decoding(SamplingParams(seed=1, logprobs=0), [1, 2], [3])
    batch = build_batch([Chunk(plain, 1)], 4, upload)  # type: ignore[arg-type]
    assert batch.extras is NO_EXTRAS
    assert plain.logit_table is None
    build_batch([Chunk(plain, 1), Chunk(asking, 1)], 4, upload)  # type: ignore[arg-type]
    assert uploaded == [14, 15]


def test_min_tokens_costs_nothing_once_they_are_written() -> None:
    sampling = SamplingParams(max_tokens=9, seed=1, min_tokens=2)
    assert extras_of([decoding(sampling, [1], [4, 5])]).adjustment is None
    assert isinstance(extras_of([decoding(sampling, [1], [4])]).adjustment, LogitAdjustment)


PLAIN = SamplingParams(max_tokens=9, seed=1)


@pytest.mark.parametrize(
    ("sampling", "num_special"),
    [
        (PLAIN, 0),
        (replace(PLAIN, prompt_logprobs=2), 1),
        (replace(PLAIN, min_tokens=2), 2),
        (replace(PLAIN, min_tokens=2, prompt_logprobs=0), 2),
        (replace(PLAIN, min_tokens=2, ignore_eos=True), 0),  # there is no end to keep away
        (replace(PLAIN, min_tokens=2, ignore_eos=True, stop_token_ids=(5,)), 2),
        (replace(PLAIN, min_tokens=1, logit_bias={5: 1.0}), 4),
        (replace(PLAIN, repetition_penalty=1.1), 4),
        (replace(PLAIN, presence_penalty=0.1), 4),
        (replace(PLAIN, frequency_penalty=0.1), 4),
        (replace(PLAIN, min_tokens=1, logprobs=0), 4),
    ],
)
@pytest.mark.parametrize("n", [1, 2])
def test_a_step_is_special_no_longer_than_something_is_asked_for(
    sampling: SamplingParams, num_special: int, n: int
) -> None:
    """num_special: of four steps. What is preempted later and computed anew is not special again."""
    answers = make_sequence("request", Mode.WHOLE, [7, 8, 9], n=n, sampling=sampling).answers
    for answer in answers:
        answer.block_ids = list(range(20))
    chunks = [Chunk(answers[0], 3)]  # the prompt, for all answers
    for num_written in range(4):
        extras = build_batch(chunks, 4, UPLOAD, eos_token_ids=EOS, vocab_size=VOCAB_SIZE).extras
        is_plain = num_written >= num_special
        assert [chunk.sequence.is_plain for chunk in chunks] == [is_plain] * len(chunks)
        assert (extras is NO_EXTRAS) == is_plain
        for answer in answers:
            answer.append(4, frozenset(EOS))
            answer.siblings = []
            answer.num_scored = 3
            answer.num_computed = len(answer.token_ids) - 1
        chunks = [Chunk(answer, 1) for answer in answers]
    for answer in answers:
        answer.num_computed = 0
        assert answer.is_plain == (num_special < 4)
    extras = build_batch(
        [Chunk(a, 7) for a in answers], 4, UPLOAD, eos_token_ids=EOS, vocab_size=VOCAB_SIZE
    ).extras
    assert extras.prompts is None
    assert (extras is NO_EXTRAS) == (num_special < 4)


@pytest.mark.parametrize(("min_tokens", "reasons"), [(0, ["stop"]), (1, [None, "stop"]), (2, [None] * 2)])
def test_nothing_but_max_tokens_ends_an_answer_before_min_tokens(
    min_tokens: int, reasons: list[str | None]
) -> None:
    for token in (0, 9):  # end of sequence, and asked for
        sampling = SamplingParams(max_tokens=9, min_tokens=min_tokens, stop_token_ids=(9,))
        sequence = make_sequence("request", Mode.WHOLE, [1], sampling=sampling)
        for reason in reasons:
            sequence.append(token, frozenset(EOS))
            assert sequence.finish_reason == reason
    short = make_sequence(
        "request", Mode.WHOLE, [1], sampling=SamplingParams(max_tokens=1, min_tokens=1, stop_token_ids=(9,))
    )
    short.append(9, frozenset())
    assert short.finish_reason == "length"
