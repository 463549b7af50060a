"""Metrics and probes of real workers."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from http.client import HTTPConnection
from pathlib import Path

from checkpoints import write_checkpoint
from deployment import DEADLINE_SECONDS, Deployment, wait_for

from pdengine.client import Client
from pdengine.models.demo.facts import checkpoint_directory


def free_ports(count: int) -> int:
    """The first of `count` consecutive ports that nobody uses."""
    while True:
        with ExitStack() as stack:
            first = stack.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1]
            with suppress(OSError, OverflowError):
                for port in range(first + 1, first + count):
                    stack.enter_context(socket.create_server(("127.0.0.1", port)))
                return int(first)


def get(address: str, path: str) -> tuple[int, str]:
    connection = HTTPConnection(address, timeout=DEADLINE_SECONDS)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def value(address: str, series: str) -> float:
    [line] = re.findall(rf"^{re.escape(series)} (\S+)$", get(address, "/metrics")[1], re.MULTILINE)
    return float(line)


def test_a_worker_is_ready_once_a_router_has_welcomed_it_and_until_it_leaves(tmp_path: Path) -> None:
    write_checkpoint("qwen3", tmp_path / "model")
    with Deployment(tmp_path / "model", tmp_path) as deployment:
        deployment.worker_address = f"tcp://127.0.0.1:{free_ports(1)}"
        worker = deployment.start_worker("unified", "--metrics-address", "0")
        found = wait_for(lambda: re.search(r"metrics on http://(\S+)/metrics", deployment.log_of(worker)))
        address = found[1]
        assert get(address, "/live") == (200, "live\n")
        status, reason = get(address, "/ready")
        assert status == 503
        assert reason in ("the weights are not loaded yet\n", "no router has welcomed this worker\n")
        wait_for(lambda: "no router" in get(address, "/ready")[1] or None, process=worker)
        log = deployment.log_of(worker)
        assert log.index("metrics on") < log.index("MiB of weights"), (
            "it is live before the weights are loaded"
        )

        deployment.start_router(worker_address=deployment.worker_address)
        wait_for(lambda: get(address, "/ready") == (200, "ready\n") or None, process=worker)
        with Client(deployment.client_address) as client:
            stream = client.stream([1, 2, 3], max_tokens=100, ignore_eos=True)
            next(stream)
            worker.send_signal(signal.SIGTERM)
            wait_for(lambda: get(address, "/ready") == (503, "the worker is leaving\n") or None)
            assert get(address, "/live")[0] == 200
            stream.close()


@contextmanager
def up(log: Path, *options: str) -> Iterator[str]:
    """`pdengine up` with the demo's model, once it is ready; gives the address for clients."""
    arguments = ["--client-address", "tcp://127.0.0.1:0", "--model", str(checkpoint_directory())]
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "pdengine.cli", "up", *arguments, *options],
            stdout=output,
            stderr=output,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    try:
        yield wait_for(lambda: re.search(r"^ready: .* behind (\S+)", log.read_text(), re.MULTILINE))[1]
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(DEADLINE_SECONDS)


def test_the_workers_of_up_count_a_request_at_consecutive_ports(tmp_path: Path) -> None:
    port = free_ports(2)
    options = ["--kv-memory", "1MiB", "--metrics-address", str(port)]
    prefill, decode = f"127.0.0.1:{port}", f"127.0.0.1:{port + 1}"
    with up(tmp_path / "up.log", *options) as client_address, Client(client_address) as client:
        assert get(prefill, "/ready") == get(decode, "/ready") == (200, "ready\n")
        completion = client.generate(list(range(1, 41)), max_tokens=8, ignore_eos=True)
        assert completion.transfer is not None
        wait_for(lambda: value(prefill, "pdengine_kv_leases_granted") == 0 or None)
        assert value(prefill, 'pdengine_requests_total{outcome="prefilled"}') == 1
        assert value(prefill, "pdengine_prompt_tokens_total") == 40
        assert value(prefill, "pdengine_generation_tokens_total") == 1
        wait_for(lambda: value(decode, "pdengine_kv_used_blocks") == 0 or None)
        assert value(decode, 'pdengine_requests_total{outcome="length"}') == 1
        assert value(decode, "pdengine_generation_tokens_total") == 7
        assert value(decode, "pdengine_kv_pulled_blocks_total") == 3
        assert value(decode, "pdengine_kv_pull_bytes_count") == 1
        assert value(decode, "pdengine_kv_pull_bytes_sum") == completion.transfer.num_bytes
        assert value(decode, "pdengine_kv_pull_gets_total") == completion.transfer.num_gets
        assert value(decode, 'pdengine_ucx_progress_gap_seconds_bucket{le="+Inf"}') >= 0
