"""What a running cluster promises: joining and leaving, concurrency, refusals, faults."""

import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from checkpoints import VOCAB_SIZE, write_checkpoint
from deployment import Deployment, disaggregated

from pdengine.client import Client, Completion, Failed, Rejected, RouterUnavailable, TimedOut

FLOAT32 = ("--dtype", "float32")
NOTICED_SOON = ("--silence-seconds", "2")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint") / "model"
    write_checkpoint("qwen3", directory)
    return directory


@pytest.fixture(scope="module")
def lasting_cluster(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with disaggregated(model, tmp_path_factory.mktemp("logs"), *FLOAT32) as deployment:
        yield deployment


@pytest.fixture
def shared_cluster(lasting_cluster: Deployment) -> Iterator[Deployment]:
    """For tests that leave the processes as they are."""
    yield lasting_cluster
    lasting_cluster.wait_baseline()


@pytest.fixture
def cluster(model: Path, tmp_path: Path) -> Iterator[Deployment]:
    with disaggregated(model, tmp_path, *FLOAT32, router=NOTICED_SOON) as deployment:
        yield deployment


def random_prompts(count: int, longest: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(count)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(10, VOCAB_SIZE - 40, (n,), generator=generator).tolist() for n in lengths]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_64_streams_at_once_give_the_answers_of_one_by_one(shared_cluster: Deployment) -> None:
    prompts = random_prompts(64, 120)
    with Client(shared_cluster.client_address) as client, ThreadPoolExecutor(64) as threads:

        def stream(item: tuple[int, list[int]]) -> Completion:
            seed, prompt = item
            # Half of them are sampled: noise depends on seed and position, not on the batch.
            with client.stream(
                prompt, max_tokens=24, temperature=seed % 2, seed=seed, ignore_eos=True, timeout=240
            ) as answer:
                token_ids = [token_id for delta in answer for token_id in delta.token_ids]
            assert token_ids == answer.completion.token_ids
            return answer.completion

        at_once = list(threads.map(stream, enumerate(prompts)))
        one_by_one = [stream(item) for item in enumerate(prompts)]
    assert [a.token_ids for a in at_once] == [a.token_ids for a in one_by_one]
    assert [a.text for a in at_once] == [a.text for a in one_by_one]
    assert all(a.finish_reason == "length" and len(a.token_ids) == 24 for a in at_once)
    assert all(a.transfer is not None and a.transfer.lanes == "mapping" for a in at_once)


def test_one_get_per_run_of_consecutive_blocks(shared_cluster: Deployment) -> None:
    """In empty pools a prompt is one run on both sides, however long: one GET moves all of it."""
    with Client(shared_cluster.client_address) as client:
        for length in (1, 16, 17, 300):
            completion = client.generate(
                list(range(10, 310))[:length], max_tokens=2, temperature=0, cache_salt=str(length)
            )
            assert completion.transfer is not None
            assert completion.transfer.num_gets == 1
            assert completion.transfer.num_blocks == -(-length // 16)
            block_bytes = 2 * 3 * 2 * 16 * 32 * 4  # KV heads, layers, K and V, tokens, head_dim, float32
            assert completion.transfer.num_bytes == completion.transfer.num_blocks * block_bytes
            assert completion.transfer.lanes == "mapping"


def test_processes_find_each_other_in_any_order(model: Path, tmp_path: Path) -> None:
    """Workers first, the router last; then a router of another life on the same ports."""
    clients, workers = (f"tcp://127.0.0.1:{free_port()}" for _ in range(2))
    with Deployment(model, tmp_path) as deployment:
        deployment.worker_address = workers
        deployment.start_worker("decode", *FLOAT32)
        deployment.start_worker("prefill", *FLOAT32)
        router = deployment.start_router(clients, workers)
        deployment.wait_workers("prefill", "decode")
        with Client(clients) as client:
            before = client.generate("the cat sat", max_tokens=12, temperature=0)
            stream = client.stream("the dog", max_tokens=900, temperature=0, ignore_eos=True)
            next(stream)
            deployment.stop(router, signal.SIGKILL)
            with pytest.raises(RouterUnavailable):
                list(stream)
            deployment.start_router(clients, workers)
            deployment.wait_workers("prefill", "decode")
            deployment.wait_baseline()
            after = client.generate("the cat sat", max_tokens=12, temperature=0)
        assert before.token_ids == after.token_ids
        deployment.wait_baseline()


def test_a_second_decode_worker_joins_and_one_leaves_under_load(cluster: Deployment) -> None:
    prompts = random_prompts(48, 60)
    first = cluster.processes[2]
    with Client(cluster.client_address) as client, ThreadPoolExecutor(8) as threads:

        def ask(prompt: list[int]) -> Completion:
            return client.generate(prompt, max_tokens=32, temperature=0, ignore_eos=True, timeout=240)

        expected = [ask(prompt).token_ids for prompt in prompts]
        answers = [threads.submit(ask, prompt) for prompt in prompts * 2]
        cluster.start_worker("decode", *FLOAT32)
        status = cluster.wait_workers("prefill", "decode", "decode")
        answers += [threads.submit(ask, prompt) for prompt in prompts]
        assert cluster.stop(first) == 0, "a worker that leaves finishes what it has"
        answers += [threads.submit(ask, prompt) for prompt in prompts]
        completions = [answer.result() for answer in answers]
    assert [completion.token_ids for completion in completions] == expected * 4
    assert all(completion.attempts == 1 for completion in completions)
    decoders = {worker.engine_id for worker in status.workers if worker.role == "decode"}
    assert {completion.decode_worker for completion in completions} == decoders
    cluster.wait_workers("prefill", "decode")


@pytest.mark.parametrize("victim", ["prefill", "decode"])
def test_a_killed_worker_loses_no_request_while_another_is_there(victim: str, cluster: Deployment) -> None:
    """The answer goes on elsewhere, from the tokens written so far, with none lost and none repeated."""
    cluster.start_worker("unified", *FLOAT32)
    cluster.wait_workers("prefill", "decode", "unified")
    killed = cluster.processes[1 if victim == "prefill" else 2]
    prompts = random_prompts(8, 400)
    with Client(cluster.client_address) as client, ThreadPoolExecutor(8) as threads:

        def ask(prompt: list[int]) -> Completion:
            return client.generate(prompt, max_tokens=200, temperature=0, ignore_eos=True, timeout=240)

        expected = [ask(prompt).token_ids for prompt in prompts]
        answers = [threads.submit(ask, prompt) for prompt in prompts]
        with client.stream(prompts[0], max_tokens=200, temperature=0, ignore_eos=True) as stream:
            next(stream)
            cluster.stop(killed, signal.SIGKILL)
            for _ in stream:
                pass
        assert stream.completion.token_ids == expected[0]
        assert [answer.result().token_ids for answer in answers] == expected
    cluster.wait_status(lambda status: len(status.workers) == 2)


def test_without_a_worker_that_can_go_on_the_request_fails_with_a_reason(model: Path, tmp_path: Path) -> None:
    with Deployment(model, tmp_path) as deployment:
        deployment.start_router(options=NOTICED_SOON)
        worker = deployment.start_worker("unified", *FLOAT32)
        deployment.wait_workers("unified")
        with Client(deployment.client_address) as client:
            stream = client.stream("the cat", max_tokens=900, temperature=0, ignore_eos=True)
            next(stream)
            deployment.stop(worker, signal.SIGKILL)
            with pytest.raises(Failed, match="no worker"):
                list(stream)
            with pytest.raises(Failed, match="no worker has joined"):
                client.generate("the cat")


def test_cancelled_and_overdue_requests_free_their_blocks(shared_cluster: Deployment) -> None:
    with Client(shared_cluster.client_address) as client:
        with pytest.raises(TimedOut):
            client.generate("the cat", max_tokens=1000, temperature=0, ignore_eos=True, timeout=0.02)
        for _ in range(20):
            with client.stream("the cat", max_tokens=1000, temperature=0, ignore_eos=True) as stream:
                next(stream)
        shared_cluster.wait_baseline()
    # Clients that vanish with streams open.
    for _ in range(5):
        client = Client(shared_cluster.client_address)
        next(client.stream("the dog", max_tokens=1000, temperature=0, ignore_eos=True))
        client.close()


def test_bad_requests_are_refused_with_the_limit_and_hurt_nobody(model: Path, tmp_path: Path) -> None:
    # 64 blocks of 12 KiB x 2: pools of 1 024 tokens; the context of the model is 1 024, too.
    small = ("--kv-memory", str(40 * 24576), *FLOAT32)
    with disaggregated(model, tmp_path, *small) as deployment, Client(deployment.client_address) as client:
        refused = {
            "maximum context length is 1024": {"prompt": [20] * 1024},
            "prompt has 1000 tokens and max_tokens is 100": {"prompt": [20] * 1000, "max_tokens": 100},
            "KV cache holds: 640": {"prompt": [20] * 700},
            "together 716, the maximum context length here": {"prompt": [20] * 600, "max_tokens": 116},
            "prompt is empty": {"prompt": ""},
            "prompt is empty, it must": {"prompt": []},
            f"token id {VOCAB_SIZE}, the vocabulary is 0 to {VOCAB_SIZE - 1}": {"prompt": [VOCAB_SIZE]},
            "token id -1": {"prompt": [-1]},
            "temperature is -1.0": {"prompt": "the cat", "temperature": -1.0},
            "temperature is nan": {"prompt": "the cat", "temperature": float("nan")},
            "top_p is 0.0": {"prompt": "the cat", "top_p": 0.0},
            "min_p is 2.0": {"prompt": "the cat", "min_p": 2.0},
            "top_k is -2": {"prompt": "the cat", "top_k": -2},
            "max_tokens is 0": {"prompt": "the cat", "max_tokens": 0},
            "stop_token_ids has token id 9999": {"prompt": "the cat", "stop_token_ids": [9999]},
            "characters, the limit is": {"prompt": "the cat " * 10**6},
        }
        for sentence, arguments in refused.items():
            with pytest.raises(Rejected) as caught:
                client.generate(**arguments)
            assert sentence in str(caught.value)
        assert len(client.generate("the cat sat", max_tokens=5, ignore_eos=True).token_ids) == 5


def test_a_pool_that_is_too_small_for_all_serves_them_in_turn(model: Path, tmp_path: Path) -> None:
    tiny = ("--kv-memory", str(8 * 24576), "--max-requests", "3", *FLOAT32)
    with disaggregated(model, tmp_path, *tiny) as deployment:
        with Client(deployment.client_address) as client, ThreadPoolExecutor(32) as threads:

            def ask(prompt: list[int]) -> Completion:
                return client.generate(prompt, max_tokens=16, temperature=0, ignore_eos=True, timeout=240)

            completions = list(threads.map(ask, random_prompts(32, 100)))
        assert all(len(completion.token_ids) == 16 for completion in completions)
