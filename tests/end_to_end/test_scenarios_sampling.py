"""The edges of prompts and of sampling: two workers write what one worker would have written."""

from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from deployment import Deployment
from scenario import CLIENT_SECONDS, GREEDY, SAMPLED, check_healthy, random_prompt

from pdengine.client import Client, Completion
from pdengine.transport.messages import Usage

BLOCK_SIZE = 16


@pytest.fixture(scope="module")
def disaggregated_client(calm_cluster: Deployment, undisturbed: Client) -> Iterator[Client]:
    with Client(calm_cluster.client_address) as client:
        yield client
    check_healthy(calm_cluster, undisturbed)


def streamed(client: Client, prompt: list[int], **options: Any) -> Completion:
    """The answer as it comes in pieces, which must be the one at the end."""
    with client.stream(prompt, timeout=CLIENT_SECONDS, **options) as stream:
        deltas = list(stream)
    token_ids = [token_id for delta in deltas for token_id in delta.token_ids]
    assert token_ids == stream.completion.token_ids
    assert "".join(delta.text for delta in deltas) == stream.completion.text
    return stream.completion


def uncached(usage: Usage) -> Usage:
    """What does not depend on what was asked before."""
    return msgspec.structs.replace(usage, cached_tokens=0)


def check_same(client: Client, undisturbed: Client, prompt: list[int], **options: Any) -> Completion:
    """Streamed or not, by one worker or by two: the same answer. Returns that of two workers."""
    one = undisturbed.generate(prompt, timeout=CLIENT_SECONDS, **options)
    two = client.generate(prompt, timeout=CLIENT_SECONDS, **options)
    for other in (two, streamed(undisturbed, prompt, **options), streamed(client, prompt, **options)):
        assert (other.token_ids, other.text) == (one.token_ids, one.text)
        assert (other.finish_reason, uncached(other.usage)) == (one.finish_reason, uncached(one.usage))
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
        answer = check_same(disaggregated_client, undisturbed, random_prompt(20), max_tokens=1, **sampling)
        assert (answer.finish_reason, answer.usage.completion_tokens) == ("length", 1)
        assert answer.transfer is None


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
