"""A prefill worker is killed, stopped or asked to leave while its KV cache is being pulled."""

import signal
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from deployment import Deployment, wait_for
from scenario import (
    FLOAT32,
    GREEDY,
    MAPPING,
    SAMPLED,
    UCX_SHARED_MEMORY,
    UCX_TCP,
    FaultyWorker,
    TransferPath,
    ask,
    check_healthy,
    cluster,
    random_prompt,
    tokens,
)

from pdengine.client import Client, TimedOut

NEVER_NOTICED = ("--silence-seconds", "600")
LONG = (pytest.mark.long, pytest.mark.timeout(1200))


def free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{probe.getsockname()[1]}"


@pytest.mark.parametrize(
    ("path", "rounds"),
    [
        pytest.param(MAPPING, 1, id="mapping"),
        pytest.param(UCX_TCP, 1, id="tcp"),
        pytest.param(MAPPING, 20, id="mapping-20-times", marks=LONG),
        pytest.param(UCX_SHARED_MEMORY, 20, id="shared-memory-20-times", marks=LONG),
        pytest.param(UCX_TCP, 20, id="tcp-20-times", marks=LONG),
    ],
)
def test_prefill_is_killed_in_the_middle_of_a_pull_and_started_again_on_the_same_port(
    path: TransferPath,
    rounds: int,
    wandering_model: Path,
    undisturbed: Client,
    tmp_path: Path,
) -> None:
    """The decode worker lives on, the request is computed anew, and the next one finds the new process."""
    options, environment = path
    # Small steps, so that the pull begins before the prompt is done.
    own_options = ("--bind", free_address(), "--max-batch-tokens", "64")
    with Deployment(wandering_model, tmp_path) as deployment, ThreadPoolExecutor() as threads:
        deployment.start_router(options=("--silence-seconds", "2"))
        decoder = FaultyWorker(deployment, "decode", *FLOAT32, *options, environment=environment)
        for number in range(rounds):
            prefiller = deployment.start_worker(
                "prefill", *FLOAT32, *options, *own_options, environment=environment
            )
            deployment.wait_workers("prefill", "decode")
            check_healthy(deployment, undisturbed)
            with Client(deployment.client_address) as client:
                prompt = random_prompt(300, number)
                decoder.hold_next_pull()
                answers = [threads.submit(ask, client, prompt, **sampling) for sampling in (GREEDY, SAMPLED)]
                decoder.wait_held()
                deployment.pause(prefiller)
                decoder.let_pull_go()
                decoder.wait_pull_begun()
                deployment.stop(prefiller, signal.SIGKILL)
                for answer, sampling in zip(answers, (GREEDY, SAMPLED), strict=True):
                    assert answer.result().token_ids == tokens(undisturbed, prompt, **sampling)
                    # Memory that is mapped can be read although its owner stands still or is dead.
                    assert answer.result().attempts > 1 or path is MAPPING
            deployment.wait_workers("decode")
        check_healthy(deployment, undisturbed)
        assert decoder.process.poll() is None


def test_prefill_stands_still_for_longer_than_a_pull_may_take_and_goes_on(
    wandering_model: Path, undisturbed: Client, tmp_path: Path
) -> None:
    """The pull is given up; what arrives late harms nobody, and the request gets its answer in the end."""
    options, environment = UCX_TCP
    prompts = [random_prompt(300, seed) for seed in (0, 1, 2, 3, 5, 7)]
    with (
        Deployment(wandering_model, tmp_path) as deployment,
        ThreadPoolExecutor() as threads,
    ):
        deployment.start_router(options=NEVER_NOTICED)
        sleeper = deployment.start_worker("prefill", *FLOAT32, *options, environment=environment)
        decoder = FaultyWorker(
            deployment, "decode", *FLOAT32, *options, "--pull-seconds", "1", environment=environment
        )
        deployment.wait_workers("prefill", "decode")
        with Client(deployment.client_address) as client:
            decoder.hold_next_pull()
            answer = threads.submit(ask, client, prompts[0], **GREEDY)
            decoder.wait_held()
            deployment.pause(sleeper)
            decoder.let_pull_go()
            deployment.wait_status(lambda status: num_quarantined(deployment) > 0 or None)
            with pytest.raises(TimedOut):
                ask(client, prompts[1], timeout=1.0, **GREEDY)

            # The second deadline passes while another prefill worker starts.
            deployment.start_worker("prefill", *FLOAT32, *options, environment=environment)
            deployment.wait_workers("prefill", "prefill", "decode")
            for prompt in prompts[2:4]:
                assert tokens(client, prompt, **GREEDY) == tokens(undisturbed, prompt, **GREEDY)
            assert num_quarantined(deployment) > 0
            during = [threads.submit(tokens, client, p, max_tokens=300, **GREEDY) for p in prompts[4:]]
            deployment.resume(sleeper)
            for prompt, other in zip(prompts[4:], during, strict=True):
                assert other.result() == tokens(undisturbed, prompt, max_tokens=300, **GREEDY)
            assert answer.result().token_ids == tokens(undisturbed, prompts[0], **GREEDY)
            assert answer.result().attempts == 2
        check_healthy(deployment, undisturbed)


def num_quarantined(deployment: Deployment) -> int:
    with Client(deployment.client_address) as client:
        return sum(worker.load.quarantined_blocks for worker in client.status().workers)


def test_prefill_is_asked_to_leave_while_it_is_being_read(
    wandering_model: Path, undisturbed: Client, tmp_path: Path
) -> None:
    """It gets no new work, waits for the pull to end, and leaves with exit status 0."""
    mine, later = random_prompt(200, 1), random_prompt(200, 2)
    with (
        cluster(wandering_model, tmp_path, router=NEVER_NOTICED) as deployment,
        ThreadPoolExecutor() as threads,
    ):
        router, prefiller = deployment.processes
        decoder = FaultyWorker(deployment, "decode", *FLOAT32)
        deployment.wait_workers("prefill", "decode")
        with Client(deployment.client_address) as client:
            decoder.hold_next_pull()
            answer = threads.submit(ask, client, mine, **SAMPLED)
            decoder.wait_held()
            prefiller.send_signal(signal.SIGTERM)
            deployment.wait_log(router, "prefill worker .* is leaving")
            refused = threads.submit(ask, client, later, **GREEDY)
            deployment.wait_status(lambda status: status.requests == 2 or None)
            assert prefiller.poll() is None
            decoder.let_pull_go()
            wait_for(prefiller.poll)
            assert deployment.stop(prefiller) == 0
            assert answer.result().token_ids == tokens(undisturbed, mine, **SAMPLED)
            assert answer.result().attempts == 1
            assert refused.result().token_ids == tokens(undisturbed, later, **GREEDY)
            assert refused.result().prefill_worker == refused.result().decode_worker, "decode had to do it"
            assert refused.result().attempts == 1
        assert "expired" not in deployment.log_of(prefiller)
        deployment.wait_workers("decode")
        check_healthy(deployment, undisturbed)


def test_prefill_is_busy_with_a_long_prompt_while_it_is_read_over_tcp(
    wandering_model: Path, undisturbed: Client, tmp_path: Path
) -> None:
    """The pull does not wait for that prompt, which is one long step."""
    options, environment = UCX_TCP
    short, long = random_prompt(200), random_prompt(8000)
    with Deployment(wandering_model, tmp_path) as deployment, ThreadPoolExecutor() as threads:
        deployment.start_router()
        for role in ("prefill", "decode"):
            deployment.start_worker(
                role, *FLOAT32, *options, "--max-batch-tokens", "8192", environment=environment
            )
        deployment.wait_workers("prefill", "decode")
        with Client(deployment.client_address) as client:
            order: list[str] = []

            def ask_long() -> list[int]:
                with client.stream(long, max_tokens=2, **GREEDY) as stream:
                    first = next(stream)
                    order.append("the long prompt is done")
                    return [token_id for delta in (first, *stream) for token_id in delta.token_ids]

            with client.stream(short, max_tokens=8, **GREEDY) as stream:
                first = next(stream)
                long_answer = threads.submit(ask_long)
                rest = list(stream)
                order.append("the short answer is done")
            received = [token_id for delta in (first, *rest) for token_id in delta.token_ids]
            assert received == tokens(undisturbed, short, max_tokens=8, **GREEDY)
            assert stream.completion.transfer is not None
            assert "tcp" in stream.completion.transfer.lanes
            assert long_answer.result() == tokens(undisturbed, long, max_tokens=2, **GREEDY)
            assert order == ["the short answer is done", "the long prompt is done"]
        check_healthy(deployment, undisturbed)
