"""The router stands still or is killed while requests are between their two workers."""

import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from scenario import FLOAT32, GREEDY, SAMPLED, ask, check_healthy, cluster, random_prompt, tokens

from pdengine.client import Client, RouterUnavailable

ROUTER = ("--silence-seconds", "600")


def test_the_router_is_lost_after_prefill_has_answered_and_before_decode_has_taken_over(
    wandering_model: Path, undisturbed: Client, tmp_path: Path
) -> None:
    """Nobody renews the lease then. The decode worker stands still, so that it cannot take over."""
    prompt = random_prompt(100)
    prefill = ("--lease-seconds", "2")
    with (
        cluster(wandering_model, tmp_path, router=ROUTER, prefill=prefill) as deployment,
        ThreadPoolExecutor() as threads,
    ):
        router, prefiller = deployment.processes
        deployment.start_worker("decode", *FLOAT32)
        deployment.wait_workers("prefill", "decode")
        decoder = deployment.processes[-1]

        # The router stands still for longer than the lease, and goes on: the prompt is computed anew.
        with (
            Client(deployment.client_address) as client,
            client.stream(prompt, max_tokens=24, **SAMPLED) as stream,
        ):
            deployment.pause(decoder)
            received = next(stream).token_ids
            deployment.pause(router)
            deployment.wait_log(prefiller, r"lease \d+ has expired")
            deployment.resume(router)
            deployment.resume(decoder)
            for delta in stream:
                received += delta.token_ids
            assert received == tokens(undisturbed, prompt, **SAMPLED)
            assert stream.completion.attempts == 2
        check_healthy(deployment, undisturbed)

        # The router is killed: its client is told, and the workers join the next one.
        with Client(deployment.client_address, retries=0) as client:
            deployment.pause(decoder)
            stream = client.stream(prompt, **GREEDY)
            next(stream)
            waiting = threads.submit(ask, client, prompt, **GREEDY)
            deployment.stop(router, signal.SIGKILL)
            with pytest.raises(RouterUnavailable):
                list(stream)
            with pytest.raises(RouterUnavailable):
                waiting.result()
        deployment.start_router(deployment.client_address, deployment.worker_address, ROUTER)
        deployment.wait_workers("prefill")
        deployment.wait_log(prefiller, r"lease \d+ has expired", times=2)
        deployment.wait_baseline()
        deployment.resume(decoder)
        deployment.wait_workers("prefill", "decode")
        check_healthy(deployment, undisturbed)
