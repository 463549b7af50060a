"""A cluster that pushes: the tokens are those of one that pulls, and no failure leaves anything behind."""

import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from scenario import FLOAT32, GREEDY, ask, check_healthy, cluster, random_prompt, tokens

from pdengine.client import Client, RouterUnavailable, TimedOut

PUSH = ("--transfer", "push", "--silence-seconds", "2")
SMALL_STEPS = ("--max-batch-tokens", "64")
SHORT_LEASES = ("--lease-seconds", "5")  # blocks are kept so long for a writer that is not heard of
PROMPT_LENGTHS = (1, 15, 16, 17, 100, 300)


def test_pushed_tokens_are_those_of_one_worker(
    wandering_model: Path, undisturbed: Client, tmp_path: Path
) -> None:
    prompts = [random_prompt(length) for length in PROMPT_LENGTHS]
    with cluster(wandering_model, tmp_path, router=PUSH, prefill=SMALL_STEPS) as deployment:
        decode = deployment.start_worker("decode", *FLOAT32)
        deployment.wait_workers("prefill", "decode")
        with Client(deployment.client_address) as client, ThreadPoolExecutor(len(prompts)) as threads:
            answers = list(threads.map(lambda prompt: ask(client, prompt, **GREEDY), prompts))
        for prompt, answer in zip(prompts, answers, strict=True):
            assert answer.token_ids == tokens(undisturbed, prompt, **GREEDY)
            assert answer.prefill_worker != answer.decode_worker
            assert answer.transfer is not None
            # 2 KV heads and 3 layers
            assert answer.transfer.num_gets == 2 * 3 * answer.transfer.num_blocks == 6 * -(-len(prompt) // 16)
            assert "mapping" not in answer.transfer.lanes
        deployment.wait_baseline()
        assert deployment.stop(decode) == 0


def test_aborted_pushes_leave_nothing_behind(
    wandering_model: Path, undisturbed: Client, tmp_path: Path
) -> None:
    def times_out(number: int) -> bool:
        """A request that is aborted somewhere between its reservation and its last token."""
        try:
            ask(client, random_prompt(1500, number), max_tokens=200, timeout=0.02 * (number + 1), **GREEDY)
        except TimedOut:
            return True
        return False

    with cluster(wandering_model, tmp_path, router=PUSH, prefill=SMALL_STEPS) as deployment:
        deployment.start_worker("decode", *FLOAT32)
        deployment.wait_workers("prefill", "decode")
        with Client(deployment.client_address) as client, ThreadPoolExecutor(4) as threads:
            assert sum(threads.map(times_out, range(24))) > 12
        check_healthy(deployment, undisturbed)


def test_workers_that_stand_still_or_die_in_a_push(
    wandering_model: Path, undisturbed: Client, tmp_path: Path
) -> None:
    prompts = [random_prompt(3000, seed) for seed in range(4)]
    with (
        cluster(wandering_model, tmp_path, router=PUSH, prefill=SMALL_STEPS) as deployment,
        Client(deployment.client_address) as client,
        ThreadPoolExecutor() as threads,
    ):
        sleeper = deployment.start_worker("decode", *FLOAT32, *SHORT_LEASES)
        deployment.wait_workers("prefill", "decode")
        answers = [threads.submit(ask, client, prompt, **GREEDY) for prompt in prompts]
        deployment.wait_status(
            lambda status: any(w.role == "decode" and w.load.running for w in status.workers) or None
        )
        deployment.pause(sleeper)
        deployment.wait_workers("prefill")
        deployment.start_worker("decode", *FLOAT32, *SHORT_LEASES)
        deployment.resume(sleeper)
        for prompt, answer in zip(prompts, answers, strict=True):
            assert answer.result().token_ids == tokens(undisturbed, prompt, **GREEDY)
        deployment.wait_workers("prefill", "decode", "decode")
        deployment.wait_baseline()

        victim = deployment.processes[1]
        again = [threads.submit(ask, client, prompt, **GREEDY) for prompt in prompts]
        deployment.wait_status(
            lambda status: any(w.role == "prefill" and w.load.running for w in status.workers) or None
        )
        deployment.stop(victim, signal.SIGKILL)
        deployment.start_worker("prefill", *FLOAT32)
        for before, after in zip(answers, again, strict=True):
            assert after.result().token_ids == before.result().token_ids
        deployment.wait_workers("prefill", "decode", "decode")
        check_healthy(deployment, undisturbed)


def test_a_router_that_is_lost_between_the_reservation_and_the_prompt(
    wandering_model: Path, undisturbed: Client, tmp_path: Path
) -> None:
    """The prefill worker stands still, so what is reserved cannot be written until the router is another."""
    never = ("--transfer", "push", "--silence-seconds", "600")
    with cluster(wandering_model, tmp_path, router=never) as deployment:
        router, prefiller = deployment.processes
        deployment.start_worker("decode", *FLOAT32)
        deployment.wait_workers("prefill", "decode")
        with Client(deployment.client_address, retries=0) as client, ThreadPoolExecutor() as threads:
            deployment.pause(prefiller)
            waiting = threads.submit(ask, client, random_prompt(100), **GREEDY)
            deployment.wait_status(
                lambda status: any(w.role == "decode" and w.load.running for w in status.workers) or None
            )
            deployment.stop(router, signal.SIGKILL)
            with pytest.raises(RouterUnavailable):
                waiting.result()
        deployment.start_router(deployment.client_address, deployment.worker_address, never)
        deployment.wait_status(lambda status: [w.role for w in status.workers] == ["decode"] or None)
        deployment.resume(prefiller)
        deployment.wait_workers("prefill", "decode")
        check_healthy(deployment, undisturbed)
