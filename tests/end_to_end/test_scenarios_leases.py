"""The KV cache of a prompt is kept for as long as somebody waits for it, and no longer."""

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import monotonic
from urllib.request import urlopen

import pytest
from deployment import DEADLINE_SECONDS, Deployment
from scenario import FLOAT32, GREEDY, FaultyWorker, ask, check_healthy, cluster, random_prompt, tokens

from pdengine.client import Client, TimedOut
from pdengine.client.client import Stream

LEASE_SECONDS = 2.0


@pytest.fixture(scope="module")
def lasting(
    wandering_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Deployment, FaultyWorker]]:
    """A prefill worker with short leases, and a decode worker that writes one answer at a time."""
    logs = tmp_path_factory.mktemp("logs")
    router = ("--silence-seconds", "600")
    prefill = ("--lease-seconds", str(LEASE_SECONDS), "--metrics-address", "127.0.0.1:0")
    with cluster(wandering_model, logs, router=router, prefill=prefill) as deployment:
        decoder = FaultyWorker(deployment, "decode", *FLOAT32, "--max-requests", "1")
        decoder.slow_down()
        deployment.wait_workers("prefill", "decode")
        yield deployment, decoder


@pytest.fixture
def short_leases(
    lasting: tuple[Deployment, FaultyWorker], undisturbed: Client
) -> Iterator[tuple[Deployment, FaultyWorker]]:
    yield lasting
    check_healthy(lasting[0], undisturbed)


def num_expired(deployment: Deployment) -> int:
    """Of the leases of the prefill worker, by its metrics."""
    [url] = re.findall(r"metrics on (\S+)", deployment.log_of(deployment.processes[1]))
    with urlopen(url, timeout=DEADLINE_SECONDS) as answer:
        metrics = answer.read().decode()
    [count] = re.findall(r"^pdengine_kv_leases_expired_total (\S+)$", metrics, re.MULTILINE)
    return int(float(count))


def read_for(stream: Stream, seconds: float) -> None:
    """Read an answer for so long; it must not end before."""
    begun_at = monotonic()
    while monotonic() < begun_at + seconds:
        next(stream)


def test_32_requests_queue_for_two_leases_at_a_decode_worker_with_one_slot(
    short_leases: tuple[Deployment, FaultyWorker], undisturbed: Client
) -> None:
    deployment, _ = short_leases
    expired_before = num_expired(deployment)
    prompts = [random_prompt(50, seed) for seed in range(32)]
    with Client(deployment.client_address) as client, ThreadPoolExecutor(32) as threads:
        with client.stream(random_prompt(20), max_tokens=8000, **GREEDY) as first_in_line:
            next(first_in_line)
            answers = [threads.submit(ask, client, prompt, max_tokens=8, **GREEDY) for prompt in prompts]
            read_for(first_in_line, 2 * LEASE_SECONDS)
            assert not any(answer.done() for answer in answers)
        for prompt, answer in zip(prompts, answers, strict=True):
            assert answer.result().token_ids == tokens(undisturbed, prompt, max_tokens=8, **GREEDY)
            assert answer.result().attempts == 1
    assert num_expired(deployment) == expired_before


def test_a_request_that_waits_in_vain_for_room_ends_with_its_deadline(
    short_leases: tuple[Deployment, FaultyWorker],
) -> None:
    deployment, _ = short_leases
    with (
        Client(deployment.client_address) as client,
        client.stream(random_prompt(20), max_tokens=8000, **GREEDY) as first_in_line,
    ):
        next(first_in_line)
        with pytest.raises(TimedOut):
            ask(client, random_prompt(30), **{**GREEDY, "timeout": LEASE_SECONDS / 2})
        next(first_in_line)


def test_no_decode_worker_takes_the_request_for_two_leases(
    short_leases: tuple[Deployment, FaultyWorker], undisturbed: Client
) -> None:
    """The router keeps the lease alive until the decode worker, which stands still, has room again."""
    deployment, decoder = short_leases
    expired_before = num_expired(deployment)
    prompt = random_prompt(100)
    deployment.pause(decoder.process)
    with (
        Client(deployment.client_address) as client,
        client.stream(prompt, max_tokens=24, **GREEDY) as stream,
    ):
        received = next(stream).token_ids
        granted_at = monotonic()
        deployment.wait_status(lambda status: monotonic() > granted_at + 2 * LEASE_SECONDS or None)
        deployment.resume(decoder.process)
        for delta in stream:
            received += delta.token_ids
    assert received == tokens(undisturbed, prompt, **GREEDY)
    assert stream.completion.attempts == 1
    assert num_expired(deployment) == expired_before


def test_the_message_that_gives_a_lease_back_is_lost(
    short_leases: tuple[Deployment, FaultyWorker], undisturbed: Client
) -> None:
    """The answer is right, and the blocks are freed by the end of the lease."""
    deployment, decoder = short_leases
    expired_before = num_expired(deployment)
    prompt = random_prompt(60)
    with Client(deployment.client_address) as client:
        decoder.lose_releases()
        assert tokens(client, prompt, **GREEDY) == tokens(undisturbed, prompt, **GREEDY)
        deployment.wait_log(decoder.process, "^a release is lost$")
        decoder.stop_losing_releases()
    deployment.wait_baseline()
    assert num_expired(deployment) == expired_before + 1
