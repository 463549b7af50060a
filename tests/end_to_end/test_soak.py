"""Workers that come and go under load, and many requests: every one ends, and nothing is left behind."""

import random
import signal
import subprocess
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Lock
from time import monotonic

import psutil
import pytest
from deployment import Deployment
from scenario import FLOAT32, GREEDY, SAMPLED, ask, check_healthy, cluster, kv_memory, random_prompt, tokens

from pdengine.client import Client, Failed

NUM_CLIENTS = 8
MIB = 2**20


class Load:
    """Clients that ask until they are told to stop, and count how their requests end."""

    def __init__(self, client: Client, undisturbed: Client, num_questions: int = 16) -> None:
        self._client = client
        self._stop = Event()
        self._lock = Lock()
        self._questions = [
            (
                random_prompt(20 + 40 * n, n),
                {**(GREEDY if n % 2 else {**SAMPLED, "seed": n}), "max_tokens": 60},
            )
            for n in range(num_questions)
        ]
        self._answers = [tokens(undisturbed, prompt, **options) for prompt, options in self._questions]
        self.outcomes: Counter[str] = Counter()

    @contextmanager
    def running(self) -> Iterator[None]:
        with ThreadPoolExecutor(NUM_CLIENTS) as threads:
            clients = [threads.submit(self._run, number) for number in range(NUM_CLIENTS)]
            try:
                yield
            finally:
                self._stop.set()
                for client in clients:
                    client.result()

    def _run(self, number: int) -> None:
        choose = random.Random(number)
        while not self._stop.is_set():
            outcome = self._ask(choose.randrange(len(self._questions)))
            with self._lock:
                self.outcomes[outcome] += 1

    def _ask(self, number: int) -> str:
        prompt, options = self._questions[number]
        try:
            completion = ask(self._client, prompt, **options)
        except Failed as error:
            return f"failed: {error}"
        assert completion.token_ids == self._answers[number]
        return f"finished after {completion.attempts} attempts"


@pytest.mark.parametrize(
    "seconds",
    [6.0, pytest.param(300.0, marks=[pytest.mark.long, pytest.mark.timeout(600)])],
    ids=["6-s", "5-min"],
)
def test_workers_come_and_go_under_load(
    seconds: float, wandering_model: Path, undisturbed: Client, tmp_path: Path
) -> None:
    """One after the other a worker joins, and the oldest of its role leaves or is killed, in turns."""
    with cluster(wandering_model, tmp_path, router=("--silence-seconds", "2")) as deployment:
        deployment.start_worker("decode", *FLOAT32)
        deployment.wait_workers("prefill", "decode")
        of_role = {"prefill": deque([deployment.processes[1]]), "decode": deque([deployment.processes[2]])}
        with Client(deployment.client_address) as client:
            load = Load(client, undisturbed)
            with load.running():
                ends_at, changes = monotonic() + seconds, 0
                while monotonic() < ends_at:
                    replace_oldest(deployment, of_role, changes)
                    changes += 1
        print(f"\n{changes} workers replaced in {seconds:g} s; {dict(load.outcomes)}")
        assert sum(n for outcome, n in load.outcomes.items() if outcome.startswith("finished")) > changes
        # A request is given up only when it has lost a worker as often as it may.
        assert all(o.startswith(("finished", "failed: after 3 attempts")) for o in load.outcomes)
        deployment.wait_workers("prefill", "decode")
        check_healthy(deployment, undisturbed)


def replace_oldest(
    deployment: Deployment, of_role: dict[str, "deque[subprocess.Popen[bytes]]"], turn: int
) -> None:
    """Start a worker; when it serves, stop the oldest of its role: politely, or not."""
    role = ("prefill", "decode")[turn % 2]
    number = (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL, signal.SIGKILL)[turn % 4]
    of_role[role].append(deployment.start_worker(role, *FLOAT32))
    deployment.wait_workers("prefill", "decode", role)
    status = deployment.stop(of_role[role].popleft(), number)
    assert status == (0 if number == signal.SIGTERM else -number)
    deployment.wait_workers("prefill", "decode")


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_10_000_short_requests_with_random_aborts(
    wandering_model: Path, undisturbed: Client, tmp_path: Path
) -> None:
    """The pools are back at their baseline, and no process has grown."""
    checkpoints = (1_000, 5_000, 10_000)
    with cluster(wandering_model, tmp_path, prefill=kv_memory(100)) as deployment:
        deployment.start_worker("decode", *FLOAT32, *kv_memory(100))
        deployment.wait_workers("prefill", "decode")
        resident: dict[int, list[int]] = {}
        with Client(deployment.client_address) as client:
            for count in requests_done(client, checkpoints[-1]):
                if count in checkpoints:
                    resident[count] = resident_bytes(deployment)
        deployment.wait_baseline()
        print("\nresident MiB of router, prefill, decode:")
        for count, sizes in resident.items():
            print(f"{count:6d} requests: " + ", ".join(f"{size / MIB:.1f}" for size in sizes))
        growth = [after - before for before, after in zip(resident[5_000], resident[10_000], strict=True)]
        assert max(growth) < 4 * MIB
        check_healthy(deployment, undisturbed)


def requests_done(client: Client, total: int) -> Iterator[int]:
    """Run `total` requests, a third of them closed somewhere on the way; yields their count as they end."""
    choose = random.Random(5)

    def run(prompt: list[int], max_tokens: int, read: int) -> None:
        with client.stream(prompt, max_tokens=max_tokens, **GREEDY) as stream:
            for number, _ in enumerate(stream):
                if number == read:
                    return

    def next_request() -> Callable[[], None]:
        prompt = random_prompt(choose.randrange(1, 60), choose.randrange(100))
        max_tokens = choose.randrange(1, 12)
        read = choose.randrange(max_tokens) if choose.random() < 1 / 3 else max_tokens
        return lambda: run(prompt, max_tokens, read)

    with ThreadPoolExecutor(NUM_CLIENTS) as threads:
        waiting: deque[Future[None]] = deque()
        for count in range(1, total + 1):
            waiting.append(threads.submit(next_request()))
            if len(waiting) == 2 * NUM_CLIENTS:
                waiting.popleft().result()
            yield count


def resident_bytes(deployment: Deployment) -> list[int]:
    return [psutil.Process(process.pid).memory_info().rss for process in deployment.processes]
