"""Tiny pools, and prompts that are cached in part or as a whole: the tokens of one calm worker."""

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

import pytest
from deployment import Deployment, wait_for
from scenario import (
    CLIENT_SECONDS,
    FLOAT32,
    GREEDY,
    SAMPLED,
    check_healthy,
    cluster,
    kv_memory,
    random_prompt,
)
from test_worker_metrics import value

from pdengine.client import Client, Completion

BLOCK_SIZE = 16
NUM_REQUESTS = 64
NUM_BLOCKS = 8
LENGTHS = [1, BLOCK_SIZE - 1, BLOCK_SIZE, BLOCK_SIZE + 1, 2 * BLOCK_SIZE]


@pytest.fixture(scope="module")
def calm(calm_cluster: Deployment, undisturbed: Client) -> Iterator[Client]:
    with Client(calm_cluster.client_address) as client:
        yield client
    check_healthy(calm_cluster, undisturbed)


def generate(client: Client, prompt: list[int], **options: Any) -> Completion:
    return client.generate(prompt, timeout=CLIENT_SECONDS, **options)


def answers_of(completion: Completion) -> list[tuple[list[int], str]]:
    return [(choice.token_ids, choice.finish_reason) for choice in completion.choices]


# -------------------------------------------------------------------------------------- tiny pools


def requests(seed: int) -> list[tuple[list[int], dict[str, Any]]]:
    """Each fits into a pool of NUM_BLOCKS; some share the beginning of their prompts."""
    rng = Random(seed)
    beginnings = [random_prompt(40, seed=number) for number in range(3)]
    found: list[tuple[list[int], dict[str, Any]]] = []
    for number in range(NUM_REQUESTS):
        prompt = rng.choice(beginnings)[: rng.randint(1, 40)] + random_prompt(rng.randint(1, 30), seed=number)
        options = {**SAMPLED, "seed": number, "max_tokens": rng.randint(1, 48), "priority": rng.randint(0, 1)}
        found.append((prompt, options))
    return found


@pytest.mark.parametrize("transfer", ["early-pull", pytest.param("push", marks=pytest.mark.long)])
def test_64_requests_at_once_on_tiny_pools_all_end(
    transfer: str, wandering_model: Path, tmp_path: Path, undisturbed: Client
) -> None:
    asked = requests(seed=5)
    with ThreadPoolExecutor(NUM_REQUESTS) as threads:
        expected = list(threads.map(lambda r: generate(undisturbed, r[0], **r[1]).token_ids, asked))
    tiny = (*kv_memory(NUM_BLOCKS), "--metrics-address", "0")
    options = ("--transfer", transfer)
    with cluster(wandering_model, tmp_path, router=options, prefill=tiny) as deployment:
        decode = deployment.start_worker("decode", *FLOAT32, *tiny)
        deployment.wait_workers("prefill", "decode")
        with Client(deployment.client_address) as client, ThreadPoolExecutor(NUM_REQUESTS) as threads:
            found = list(threads.map(lambda r: generate(client, r[0], **r[1]).token_ids, asked))
        assert found == expected
        deployment.wait_baseline()
        page = wait_for(lambda: re.search(r"metrics on http://(\S+)/metrics", deployment.log_of(decode)))
        assert value(page[1], "pdengine_preemptions_total") > 0


# ------------------------------------------------------------------------------- cached prefixes


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("length", LENGTHS)
def test_cold_and_cached_prompts_give_the_same_tokens(
    length: int, sampling: dict[str, Any], calm: Client, undisturbed: Client
) -> None:
    prompt, num_tokens = random_prompt(3 * BLOCK_SIZE)[:length], 2 * BLOCK_SIZE + 1
    salt = f"{length} {sampling['temperature']}"
    options = {**sampling, "max_tokens": num_tokens}
    expected = generate(undisturbed, prompt, cache_salt=f"cold {salt}", **options).token_ids
    cold = generate(calm, prompt, cache_salt=f"cold {salt}", **options)
    cached = generate(calm, prompt, cache_salt=f"cold {salt}", **options)
    beginning = prompt[: length // 2 // BLOCK_SIZE * BLOCK_SIZE] or [1]
    generate(calm, beginning, cache_salt=f"partly {salt}", **options)  # an answer of one token is not pulled
    partly = generate(calm, prompt, cache_salt=f"partly {salt}", **options)
    assert [cold.token_ids, cached.token_ids, partly.token_ids] == [expected] * 3
    num_full, num_blocks = length // BLOCK_SIZE, -(-length // BLOCK_SIZE)
    assert cold.usage.cached_tokens == 0
    assert cached.usage.cached_tokens == min(num_full * BLOCK_SIZE, length - 1)
    num_with_answer = min((length + 1) // BLOCK_SIZE, num_blocks)  # with its first token, a block may be full
    for answer, num_cached in ((cold, 0), (cached, num_with_answer), (partly, length // 2 // BLOCK_SIZE)):
        assert answer.transfer is not None
        transfer = answer.transfer
        assert (transfer.num_cached_blocks, transfer.num_blocks) == (num_cached, num_blocks - num_cached)


def test_the_next_turn_of_a_conversation_runs_where_its_beginning_is(
    wandering_model: Path, tmp_path: Path, undisturbed: Client
) -> None:
    router = ("--local-prefill-tokens", "64")
    with cluster(wandering_model, tmp_path, router=router) as deployment:
        deployment.start_worker("decode", *FLOAT32)
        deployment.wait_workers("prefill", "decode")
        with Client(deployment.client_address) as client:
            history, num_cached = random_prompt(70), 0
            for turn in range(4):
                options = {**SAMPLED, "seed": turn, "max_tokens": 30}
                expected = generate(undisturbed, history, **options).token_ids
                answer = generate(client, history, **options)
                assert answer.token_ids == expected
                assert (answer.transfer is None) == (turn > 0)
                assert (answer.prefill_worker == answer.decode_worker) == (turn > 0)
                assert answer.usage.cached_tokens == num_cached
                num_cached = (len(history) + 29) // BLOCK_SIZE * BLOCK_SIZE
                history += [*expected, *random_prompt(20, seed=turn)]
                deployment.wait_heartbeats()  # the update of the cache came before
        deployment.wait_baseline()


# ------------------------------------------------------------------------------- several answers


@pytest.mark.parametrize("length", [1, BLOCK_SIZE, 2 * BLOCK_SIZE + 5])
@pytest.mark.parametrize("n", [2, 4])
def test_several_answers_are_the_same_from_one_worker_and_from_two(
    n: int, length: int, calm: Client, undisturbed: Client
) -> None:
    prompt = random_prompt(length)
    options = {**SAMPLED, "max_tokens": 30, "n": n}
    one, two = generate(undisturbed, prompt, **options), generate(calm, prompt, **options)
    assert answers_of(one) == answers_of(two)
    assert two.transfer is not None
    assert len({tuple(choice.token_ids) for choice in two.choices}) == n
    assert two.usage.completion_tokens == 30 * n
    for index in range(n):  # each is the answer to a request of its own
        alone = generate(undisturbed, prompt, **{**SAMPLED, "seed": SAMPLED["seed"] + index}, max_tokens=30)
        assert alone.token_ids == two.choices[index].token_ids


def test_answers_that_end_at_different_times(calm: Client, undisturbed: Client) -> None:
    prompt = random_prompt(33)
    long = generate(undisturbed, prompt, **SAMPLED, max_tokens=20, n=4)
    stops = [long.choices[0].token_ids[0], long.choices[1].token_ids[7]]
    options = {**SAMPLED, "max_tokens": 20, "n": 4, "stop_token_ids": stops}
    one, two = generate(undisturbed, prompt, **options), generate(calm, prompt, **options)
    assert answers_of(one) == answers_of(two)
    assert one.choices[0].token_ids == stops[:1], "it ended at the prefill worker"
    assert {choice.finish_reason for choice in one.choices} == {"stop", "length"}
