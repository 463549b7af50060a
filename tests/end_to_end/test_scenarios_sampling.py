"""The edges of prompts and of sampling: two workers write what one worker would have written."""

from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from deployment import Deployment
from scenario import CLIENT_SECONDS, GREEDY, SAMPLED, check_healthy, random_prompt

from pdengine.client import Client, Completion
from pdengine.transport.messages import TokenLogprobs, Usage

BLOCK_SIZE = 16


@pytest.fixture(scope="module")
def disaggregated_client(calm_cluster: Deployment, undisturbed: Client) -> Iterator[Client]:
    with Client(calm_cluster.client_address) as client:
        yield client
    check_healthy(calm_cluster, undisturbed)


def streamed(client: Client, prompt: list[int], **options: Any) -> Completion:
    """The answers as they come in pieces, which must be those at the end."""
    with client.stream(prompt, timeout=CLIENT_SECONDS, **options) as stream:
        deltas = list(stream)
    for choice in stream.completion.choices:
        pieces = [delta for delta in deltas if delta.index == choice.index]
        assert [token_id for delta in pieces for token_id in delta.token_ids] == choice.token_ids
        assert "".join(delta.text for delta in pieces) == choice.text
        assert [delta.finish_reason for delta in pieces][-1] == choice.finish_reason
        for delta in pieces if choice.logprobs is not None else []:
            assert len(delta.logprobs or []) == len(delta.token_ids)
    return stream.completion


def uncached(usage: Usage) -> Usage:
    """What does not depend on what was asked before."""
    return msgspec.structs.replace(usage, cached_tokens=0)


def check_same_logprobs(one: list[TokenLogprobs] | None, other: list[TokenLogprobs] | None) -> None:
    """But for the rounding of float32, which depends on what was in the prefix cache."""
    assert (one is None) == (other is None)
    for mine, theirs in zip(one or [], other or [], strict=True):
        assert [token_id for token_id, _ in mine.top] == [token_id for token_id, _ in theirs.top]
        assert mine.rank == theirs.rank
        mine_all, theirs_all = ([entry.logprob, *(p for _, p in entry.top)] for entry in (mine, theirs))
        assert mine_all == pytest.approx(theirs_all, abs=1e-4)


def check_same(client: Client, undisturbed: Client, prompt: list[int], **options: Any) -> Completion:
    """Streamed or not, by one worker or by two: the same answers. Returns those of two workers."""
    one = undisturbed.generate(prompt, timeout=CLIENT_SECONDS, **options)
    two = client.generate(prompt, timeout=CLIENT_SECONDS, **options)
    for other in (two, streamed(undisturbed, prompt, **options), streamed(client, prompt, **options)):
        assert uncached(other.usage) == uncached(one.usage)
        check_same_logprobs(other.prompt_logprobs, one.prompt_logprobs)
        for mine, theirs in zip(one.choices, other.choices, strict=True):
            assert (theirs.token_ids, theirs.text) == (mine.token_ids, mine.text)
            assert theirs.finish_reason == mine.finish_reason
            assert (mine.logprobs is None) == (options.get("logprobs") is None)
            check_same_logprobs(mine.logprobs, theirs.logprobs)
    return two


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("length", [1, BLOCK_SIZE - 1, BLOCK_SIZE, BLOCK_SIZE + 1, 2 * BLOCK_SIZE])
def test_prompts_around_the_size_of_a_block(
    length: int, sampling: dict[str, Any], disaggregated_client: Client, undisturbed: Client
) -> None:
    answer = check_same(
        disaggregated_client, undisturbed, random_prompt(length), max_tokens=2 * BLOCK_SIZE + 1, **sampling
    )
    assert len(answer.token_ids) == 2 * BLOCK_SIZE + 1
    assert answer.transfer is not None
    transfer = answer.transfer
    assert transfer.num_blocks + transfer.num_cached_blocks == -(-length // BLOCK_SIZE)


def test_an_answer_of_one_token(disaggregated_client: Client, undisturbed: Client) -> None:
    for sampling in (GREEDY, SAMPLED):
        options = {**sampling, "max_tokens": 1, "logprobs": 3}
        answer = check_same(disaggregated_client, undisturbed, random_prompt(20), **options)
        assert (answer.finish_reason, answer.usage.completion_tokens) == ("length", 1)
        assert answer.transfer is None
        answer = check_same(disaggregated_client, undisturbed, random_prompt(20), n=2, **options)
        assert [choice.finish_reason for choice in answer.choices] == ["length", "length"]
        assert answer.usage.completion_tokens == 2


@pytest.mark.parametrize("position", [0, 1, 5])
def test_a_stop_token(position: int, disaggregated_client: Client, undisturbed: Client) -> None:
    """On the first token, which prefill writes, on the first that decode writes, and later."""
    prompt = random_prompt(33)
    written = undisturbed.generate(prompt, max_tokens=10, **GREEDY).token_ids
    stop = written[position]
    assert stop not in written[:position], "choose another prompt"
    answer = check_same(disaggregated_client, undisturbed, prompt, stop_token_ids=[stop], **GREEDY)
    assert answer.finish_reason == "stop"
    assert answer.token_ids == written[: position + 1]


def test_the_end_of_the_sequence_on_the_first_token(
    disaggregated_client: Client, undisturbed: Client
) -> None:
    def ends_at_once(prompt: list[int]) -> bool:
        return undisturbed.generate(prompt, max_tokens=1, temperature=0).finish_reason == "stop"

    prompt = next(p for p in (random_prompt(3, seed) for seed in range(5_000)) if ends_at_once(p))
    answer = check_same(disaggregated_client, undisturbed, prompt, temperature=0)
    assert (answer.finish_reason, answer.usage.completion_tokens, answer.text) == ("stop", 1, "")
    # Told to ignore it, the answer goes on at the decode worker.
    answer = check_same(disaggregated_client, undisturbed, prompt, max_tokens=5, **GREEDY)
    assert answer.usage.completion_tokens == 5


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.3},
        {"temperature": 2.0},
        {"temperature": 1.0, "top_k": 5},
        {"temperature": 1.0, "top_p": 0.5},
        {"temperature": 1.0, "min_p": 0.05},
        {"temperature": 1.5, "top_k": 20, "top_p": 0.9, "min_p": 0.01},
    ],
    ids=str,
)
def test_a_seed_gives_the_same_answer_everywhere(
    sampling: dict[str, Any], disaggregated_client: Client, undisturbed: Client
) -> None:
    prompt = random_prompt(25)
    answers = [
        check_same(disaggregated_client, undisturbed, prompt, max_tokens=32, seed=seed, **sampling)
        for seed in (1, 2, 2**64 - 1)
    ]
    assert len({tuple(answer.token_ids) for answer in answers}) == 3, "another seed is another answer"


def test_several_answers_with_log_probabilities(disaggregated_client: Client, undisturbed: Client) -> None:
    """Each is what it would be alone, with its own seed."""
    prompt = random_prompt(25)
    options = {**SAMPLED, "max_tokens": 20, "logprobs": 5}
    several = check_same(disaggregated_client, undisturbed, prompt, n=3, **options)
    for choice in several.choices:
        alone = disaggregated_client.generate(prompt, **{**options, "seed": SAMPLED["seed"] + choice.index})
        assert alone.token_ids == choice.token_ids
        check_same_logprobs(alone.logprobs, choice.logprobs)


def test_log_probabilities_of_a_prompt(disaggregated_client: Client, undisturbed: Client) -> None:
    """All of them also where the prompt, or its beginning, was asked before."""
    for length in (1, 2, BLOCK_SIZE, 5 * BLOCK_SIZE + 3):
        prompt = random_prompt(length)
        answer = check_same(
            disaggregated_client, undisturbed, prompt, max_tokens=3, prompt_logprobs=2, logprobs=0, **GREEDY
        )
        assert answer.prompt_logprobs is not None
        assert len(answer.prompt_logprobs) == length - 1
        assert answer.usage.cached_tokens == 0
    # What a prompt says of its tokens is what an answer said of them when they were written.
    told = check_same(disaggregated_client, undisturbed, prompt, max_tokens=8, logprobs=2, **GREEDY)
    again = disaggregated_client.generate([*prompt, *told.token_ids], max_tokens=1, prompt_logprobs=2)
    assert again.prompt_logprobs is not None
    check_same_logprobs(told.logprobs, again.prompt_logprobs[-8:])


@pytest.mark.parametrize(
    "penalties",
    [
        {"presence_penalty": 1.5},
        {"frequency_penalty": 0.5},
        {"repetition_penalty": 1.5},
        {"logit_bias": {7: 100.0}, "frequency_penalty": 2.0},
        {"presence_penalty": -2.0, "frequency_penalty": 1.0, "repetition_penalty": 0.9, "min_tokens": 5},
    ],
    ids=str,
)
@pytest.mark.parametrize("sampling", [GREEDY, {**SAMPLED, "temperature": 0.3}], ids=["greedy", "sampled"])
def test_penalties(
    penalties: dict[str, Any], sampling: dict[str, Any], disaggregated_client: Client, undisturbed: Client
) -> None:
    """They are counted from the tokens of the prompt and those that the prefill worker has written."""
    prompt = random_prompt(25)
    options = {"max_tokens": 40, "n": 2, **sampling, "logprobs": 1}
    answer = check_same(disaggregated_client, undisturbed, prompt, **options, **penalties)
    without = disaggregated_client.generate(prompt, **options)
    assert answer.choices != without.choices, "choose another prompt"


def test_a_token_that_is_forbidden_or_forced(disaggregated_client: Client, undisturbed: Client) -> None:
    prompt = random_prompt(25)
    options = {**GREEDY, "max_tokens": 6}
    forced = check_same(disaggregated_client, undisturbed, prompt, logit_bias={7: 100}, **options)
    assert forced.token_ids == [7] * 6
    first = undisturbed.generate(prompt, **options).token_ids[0]
    answer = check_same(disaggregated_client, undisturbed, prompt, logit_bias={first: -100}, **options)
    assert first not in answer.token_ids


@pytest.mark.parametrize("min_tokens", [1, 2, 3])
def test_an_answer_is_not_shorter_than_it_must_be(
    min_tokens: int, disaggregated_client: Client, undisturbed: Client
) -> None:
    """Though a stop token is the likeliest from the beginning."""
    prompt = random_prompt(33)
    stop = undisturbed.generate(prompt, max_tokens=1, **GREEDY).token_ids
    options = {"stop_token_ids": stop, "max_tokens": 12, "n": 2, "logprobs": 1, **GREEDY}
    answer = check_same(disaggregated_client, undisturbed, prompt, min_tokens=min_tokens, **options)
    for choice in answer.choices:
        assert len(choice.token_ids) > min_tokens
        assert stop[0] not in choice.token_ids[:min_tokens]


@pytest.mark.parametrize("position", [0, 1, 5])
@pytest.mark.parametrize("n", [1, 2])
def test_a_stop_string(position: int, n: int, disaggregated_client: Client, undisturbed: Client) -> None:
    """On the first token, which prefill writes, on the first that decode writes, and later."""

    def pieces_of(prompt: list[int]) -> list[str]:
        with undisturbed.stream(prompt, max_tokens=10, **GREEDY) as stream:
            return [delta.text for delta in stream]

    prompts = (random_prompt(35, seed) for seed in range(100))
    prompt, pieces = next((p, pieces) for p in prompts if all(pieces := pieces_of(p)))
    whole, stop = "".join(pieces), pieces[position]
    assert whole.index(stop) == len("".join(pieces[:position])), "choose another prompt"
    answer = check_same(
        disaggregated_client,
        undisturbed,
        prompt,
        stop=["never", stop],
        n=n,
        max_tokens=500,
        logprobs=1,
        **GREEDY,
    )
    for choice in answer.choices:
        assert choice.text == whole[: whole.index(stop)]
        assert choice.finish_reason == "stop"
        assert len(choice.token_ids) == position + 1
    assert answer.usage.completion_tokens == n * (position + 1)


def test_a_stop_string_of_one_of_several_answers(disaggregated_client: Client, undisturbed: Client) -> None:
    """The others go on to their ends."""
    prompt = random_prompt(35)
    options = {**SAMPLED, "max_tokens": 30, "n": 3}
    texts = [choice.text for choice in undisturbed.generate(prompt, **options).choices]
    stop = next(
        texts[0][place : place + 3]
        for place in range(3, len(texts[0]) - 3)
        if not any(texts[0][place : place + 3] in text for text in texts[1:])
    )
    answer = check_same(disaggregated_client, undisturbed, prompt, stop=stop, **options)
    assert [choice.finish_reason for choice in answer.choices] == ["stop", "length", "length"]
    assert [choice.text for choice in answer.choices] == [texts[0][: texts[0].index(stop)], *texts[1:]]
