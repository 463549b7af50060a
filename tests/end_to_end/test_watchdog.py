"""A worker whose engine loop hangs: its probes, and a supervisor that does what systemd does."""

import os
import re
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from time import monotonic
from urllib.parse import urlsplit

import pytest
from deployment import DEADLINE_SECONDS, Deployment, wait_for
from fork_server import ForkedProcess
from scenario import FLOAT32, SAMPLED, FaultyWorker, ask, random_prompt, tokens
from test_worker_metrics import get

from pdengine.client import Client

WATCHDOG_SECONDS = 2.0
STEP_SECONDS = 0.5  # a longer turn of the engine loop makes the worker not ready


class Supervisor:
    """The other end of NOTIFY_SOCKET."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self.environment = {
            "NOTIFY_SOCKET": str(path),
            "WATCHDOG_USEC": str(round(WATCHDOG_SECONDS * 1e6)),
            "MAX_STEP_SECONDS": str(STEP_SECONDS),
        }

    def close(self) -> None:
        self._socket.close()

    def next_message(self, seconds: float = DEADLINE_SECONDS) -> str:
        """Raises TimeoutError."""
        self._socket.settimeout(seconds)
        return self._socket.recv(4096).decode()

    def wait_message(self, start: str) -> str:
        while True:
            message = self.next_message()
            if message.startswith(start):
                return message

    def watch(self, process: ForkedProcess) -> None:
        """Kill the process as systemd does, once it has not been fed for in time."""
        fed_at = monotonic()
        while (left := fed_at + WATCHDOG_SECONDS - monotonic()) > 0:
            with suppress(TimeoutError):
                if self.next_message(left) == "WATCHDOG=1":
                    fed_at = monotonic()
        process.send_signal(signal.SIGABRT)


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[Supervisor]:
    supervisor = Supervisor(tmp_path / "notify")
    yield supervisor
    supervisor.close()


def metrics_address(deployment: Deployment, worker: FaultyWorker) -> str:
    def look() -> re.Match[str] | None:
        return re.search(r"metrics on http://(\S+)/metrics", deployment.log_of(worker.process))

    return wait_for(look, worker.process)[1]


def test_an_engine_loop_that_hangs_is_not_fed_for_and_its_requests_go_on_after_the_restart(
    wandering_model: Path, undisturbed: Client, tmp_path: Path, supervisor: Supervisor
) -> None:
    prompt, environment = random_prompt(40), supervisor.environment
    options = (*FLOAT32, "--metrics-address", "0")
    with (
        Deployment(wandering_model, tmp_path) as deployment,
        ThreadPoolExecutor() as threads,
    ):
        deployment.start_router()
        worker = FaultyWorker(deployment, "unified", *options, environment=environment)
        address = metrics_address(deployment, worker)
        assert supervisor.wait_message("READY=1").startswith("READY=1\nSTATUS=")
        assert supervisor.wait_message("STATUS=") == "STATUS=serving"
        for _ in range(3):
            supervisor.wait_message("WATCHDOG=1")  # also while there is nothing to do
        with Client(deployment.client_address) as client:
            worker.hang_next_step()
            answer = threads.submit(ask, client, prompt, **SAMPLED)
            worker.wait_hanging()
            watching = threads.submit(supervisor.watch, worker.process)
            wait_for(lambda: get(address, "/ready")[0] == 503 or None, worker.process)
            assert "the engine loop has not turned" in get(address, "/ready")[1]
            assert get(address, "/live") == (200, "live\n")
            watching.result()
            wait_for(worker.process.poll)
            assert deployment.stop(worker.process) == -signal.SIGABRT
            assert "Fatal Python error: Aborted" in deployment.log_of(worker.process)
            assert " in run_step_unless_it_hangs" in deployment.log_of(worker.process), (
                "it does not say where it hung"
            )

            restarted = FaultyWorker(deployment, "unified", *options, environment=environment)
            assert answer.result().token_ids == tokens(undisturbed, prompt, **SAMPLED)
            assert answer.result().attempts == 2
            assert "STOPPING=1" not in supervisor.wait_message("READY=1")
            assert deployment.stop(restarted.process) == 0
            supervisor.wait_message("STOPPING=1")


def test_a_router_and_an_http_server_are_ready_fed_and_stop(
    wandering_model: Path, tmp_path: Path, supervisor: Supervisor
) -> None:
    with Deployment(wandering_model, tmp_path) as deployment:
        router = deployment.start_router(environment=supervisor.environment)
        assert supervisor.next_message() == f"READY=1\nSTATUS=clients on {deployment.client_address}"
        assert supervisor.next_message() == "WATCHDOG=1"
        assert deployment.stop(router) == 0
        supervisor.wait_message("STOPPING=1")

        both = deployment.start_router(options=("--http", "127.0.0.1:0"), environment=supervisor.environment)
        assert "HTTP on http://127.0.0.1:" in supervisor.wait_message("READY=1")
        assert supervisor.next_message() == "WATCHDOG=1"

        http = deployment.start_http(environment=supervisor.environment)
        assert supervisor.wait_message("READY=1").startswith("READY=1\nSTATUS=HTTP on http://127.0.0.1:")
        assert deployment.stop(both) == 0
        supervisor.wait_message("STOPPING=1")
        assert supervisor.next_message() == "WATCHDOG=1", "it does not depend on its router"
        assert deployment.stop(http) == 0
        supervisor.wait_message("STOPPING=1")


def test_an_http_server_whose_loop_hangs_is_not_fed_for(
    wandering_model: Path, tmp_path: Path, supervisor: Supervisor
) -> None:
    with Deployment(wandering_model, tmp_path) as deployment:
        deployment.start_router()
        here = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])}
        http = deployment.start_http(module="hanging_http", environment={**supervisor.environment, **here})
        ready = supervisor.wait_message("READY=1")
        supervisor.wait_message("WATCHDOG=1")
        address = urlsplit(ready.partition("STATUS=HTTP on ")[2])
        with socket.create_connection((address.hostname, address.port)) as client:
            client.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            deployment.wait_log(http, "^the loop hangs$")
            supervisor.watch(http)
        assert deployment.stop(http) == -signal.SIGABRT
        assert " in hang_in_status" in deployment.log_of(http), "it does not say where it hung"
