"""A decode worker is killed or stands still in the middle of its work: the answers are right anyway."""

import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

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

from pdengine.client import Client, Completion

NOTICED_SOON = ("--silence-seconds", "2")
NEVER_NOTICED = ("--silence-seconds", "600")


def test_decode_is_killed_in_the_middle_of_a_pull(
    wandering_model: Path, undisturbed: Client, tmp_path: Path
) -> None:
    prompt = random_prompt(200)
    with (
        cluster(wandering_model, tmp_path, router=NOTICED_SOON) as deployment,
        ThreadPoolExecutor() as threads,
    ):
        victim = FaultyWorker(deployment, "decode", *FLOAT32)
        deployment.wait_workers("prefill", "decode")
        with Client(deployment.client_address) as client:
            victim.hold_next_pull()
            answers = [threads.submit(ask, client, prompt, **sampling) for sampling in (GREEDY, SAMPLED)]
            victim.wait_held()
            deployment.stop(victim.process, signal.SIGKILL)
            for answer, sampling in zip(answers, (GREEDY, SAMPLED), strict=True):
                assert answer.result().token_ids == tokens(undisturbed, prompt, **sampling)
                assert answer.result().attempts == 2
        deployment.wait_workers("prefill")
        deployment.wait_baseline()
        deployment.start_worker("decode", *FLOAT32)
        deployment.wait_workers("prefill", "decode")
        check_healthy(deployment, undisturbed)


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
    wandering_model: Path, undisturbed: Client, tmp_path: Path
) -> None:
    """No token is lost or comes twice, whether it was chosen greedily or sampled."""
    num_tokens = 800
    prompts = {seed: random_prompt(40, seed) for seed in range(2)}

    def sampling(seed: int) -> dict[str, Any]:
        return GREEDY if seed % 2 else {**SAMPLED, "seed": seed}

    with (
        cluster(wandering_model, tmp_path, router=NOTICED_SOON) as deployment,
        ThreadPoolExecutor() as threads,
    ):
        deployment.start_worker("decode", *FLOAT32)
        deployment.wait_workers("prefill", "decode")
        sleeper = deployment.processes[-1]

        def stream(client: Client, seed: int) -> Completion:
            with client.stream(prompts[seed], max_tokens=num_tokens, **sampling(seed)) as deltas:
                streamed = [token_id for delta in deltas for token_id in delta.token_ids]
            assert streamed == deltas.completion.token_ids
            return deltas.completion

        with Client(deployment.client_address) as client:
            answers = {seed: threads.submit(stream, client, seed) for seed in prompts}
            wait_decoding(deployment)
            deployment.pause(sleeper)
            deployment.wait_workers("prefill")
            deployment.resume(sleeper)
            deployment.wait_workers("prefill", "decode")
            for seed, answer in answers.items():
                completion = answer.result()
                expected = tokens(undisturbed, prompts[seed], max_tokens=num_tokens, **sampling(seed))
                assert completion.token_ids == expected
                assert completion.attempts == 2
        check_healthy(deployment, undisturbed)


def wait_decoding(deployment: Deployment) -> None:
    """Wait until the decode worker writes two answers."""
    deployment.wait_status(
        lambda status: any(w.role == "decode" and w.load.running == 2 for w in status.workers) or None
    )
