"""A decode worker is killed or stands still in the middle of its work: the answers are right anyway."""

import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from deployment import Deployment
from scenario import (
    FLOAT32,
    GREEDY,
    SAMPLED,
    FaultyWorker,
    ask,
    check_healthy,
    cluster,
    kv_memory,
    random_prompt,
    tokens,
)

from pdengine.client import Client, Completion, Failed

NEVER_NOTICED = ("--silence-seconds", "600")
NOTICED_SOON = ("--silence-seconds", "2")
SMALL_STEPS = ("--max-batch-tokens", "64")  # so that pulls begin before the prompt is done


@pytest.fixture(scope="module")
def lasting(wandering_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    logs = tmp_path_factory.mktemp("logs")
    with cluster(wandering_model, logs, router=NOTICED_SOON, prefill=SMALL_STEPS) as deployment:
        yield deployment


@pytest.fixture
def decoder(lasting: Deployment, undisturbed: Client) -> Iterator[FaultyWorker]:
    """A decode worker beside the one prefill worker; after the test what is left must serve."""
    worker = FaultyWorker(lasting, "decode", *FLOAT32)
    lasting.wait_workers("prefill", "decode")
    yield worker
    check_healthy(lasting, undisturbed)
    if worker.process.poll() is None:
        assert lasting.stop(worker.process) == 0
    lasting.wait_workers("prefill")


def test_decode_is_killed_in_the_middle_of_a_pull(
    lasting: Deployment, decoder: FaultyWorker, undisturbed: Client
) -> None:
    prompt = random_prompt(200)
    with Client(lasting.client_address) as client, ThreadPoolExecutor() as threads:
        decoder.hold_next_pull()
        answers = [threads.submit(ask, client, prompt, **sampling) for sampling in (GREEDY, SAMPLED)]
        decoder.wait_held()
        lasting.stop(decoder.process, signal.SIGKILL)
        for answer, sampling in zip(answers, (GREEDY, SAMPLED), strict=True):
            assert answer.result().token_ids == tokens(undisturbed, prompt, **sampling)
            assert answer.result().attempts == 2
    lasting.wait_workers("prefill")


def test_decode_stands_still_in_a_pull_until_its_lease_is_gone_and_the_blocks_have_been_reused(
    wandering_model: Path, undisturbed: Client, tmp_path: Path
) -> None:
    """What it reads when it goes on is somebody else's: it is discarded, and the prompt is computed anew."""
    mine, others = random_prompt(500), [random_prompt(500, seed) for seed in range(1, 4)]
    prefill = ("--lease-seconds", "2", *kv_memory(40))  # of which a prompt takes 32
    with (
        cluster(wandering_model, tmp_path, router=NEVER_NOTICED, prefill=prefill) as deployment,
        ThreadPoolExecutor() as threads,
    ):
        router, prefiller = deployment.processes
        sleeper = FaultyWorker(deployment, "decode", *FLOAT32)
        deployment.wait_workers("prefill", "decode")
        with Client(deployment.client_address) as client:
            sleeper.hold_next_pull()
            answer = threads.submit(ask, client, mine, **GREEDY)
            sleeper.wait_held()
            deployment.pause(sleeper.process)
            deployment.start_worker("decode", *FLOAT32)
            deployment.wait_workers("prefill", "decode", "decode")
            deployment.wait_log(prefiller, r"lease \d+ has expired")
            for prompt in others:
                assert tokens(client, prompt, **GREEDY) == tokens(undisturbed, prompt, **GREEDY)
            sleeper.let_pull_go()
            deployment.resume(sleeper.process)
            assert answer.result().token_ids == tokens(undisturbed, mine, **GREEDY)
            assert answer.result().attempts == 2
        assert "attempt 1: the lease" in deployment.log_of(router)
        check_healthy(deployment, undisturbed)


def test_a_stopped_decode_worker_wakes_up_and_goes_on_with_requests_that_others_have_by_then(
    lasting: Deployment, decoder: FaultyWorker, undisturbed: Client
) -> None:
    """No token is lost or comes twice, whether it was chosen greedily or sampled."""
    prompt, num_tokens = random_prompt(40, seed=2), 800
    decoder.slow_down()

    def stream(client: Client, sampling: dict[str, Any]) -> Completion:
        with client.stream(prompt, max_tokens=num_tokens, **sampling) as deltas:
            streamed = [token_id for delta in deltas for token_id in delta.token_ids]
        assert streamed == deltas.completion.token_ids
        return deltas.completion

    with Client(lasting.client_address) as client, ThreadPoolExecutor() as threads:
        answers = [threads.submit(stream, client, sampling) for sampling in (GREEDY, SAMPLED)]
        lasting.wait_status(
            lambda status: any(w.role == "decode" and w.load.running == 2 for w in status.workers)
        )
        lasting.pause(decoder.process)
        lasting.wait_workers("prefill")
        lasting.resume(decoder.process)
        lasting.wait_workers("prefill", "decode")
        for answer, sampling in zip(answers, (GREEDY, SAMPLED), strict=True):
            expected = tokens(undisturbed, prompt, max_tokens=num_tokens, **sampling)
            assert answer.result().token_ids == expected
            assert answer.result().attempts == 2


def test_where_requests_are_not_to_be_computed_anew_a_killed_decode_worker_fails_its_own(
    wandering_model: Path, undisturbed: Client, tmp_path: Path
) -> None:
    """The client is told why, and never that a half answer is a whole one."""
    router = (*NOTICED_SOON, "--on-failure", "fail")
    with (
        cluster(wandering_model, tmp_path, router=router) as deployment,
        ThreadPoolExecutor() as threads,
    ):
        decoder = FaultyWorker(deployment, "decode", *FLOAT32)
        deployment.wait_workers("prefill", "decode")
        with Client(deployment.client_address) as client:
            with client.stream(random_prompt(30), max_tokens=8000, **GREEDY) as half_written:
                next(half_written)
                next(half_written)
                decoder.hold_next_pull()
                pulling = threads.submit(ask, client, random_prompt(200), **GREEDY)
                decoder.wait_held()
                deployment.stop(decoder.process, signal.SIGKILL)
                with pytest.raises(Failed, match="the decode worker that had it is gone"):
                    list(half_written)
            with pytest.raises(Failed, match="the decode worker that had it is gone"):
                pulling.result()
        deployment.wait_workers("prefill")
        check_healthy(deployment, undisturbed)
