"""Pulls between two hosts, which are network namespaces joined by a veth pair, and between containers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from mortal_peer import mortal_peer
from network_namespaces import two_hosts
from ucx_peer import Worker

from pdengine.bench.network_namespaces import NetworkNamespace
from pdengine.bench.scatter import Scatter
from pdengine.bench.transfer import Plan, run_plan
from pdengine.transport.regions import Run
from pdengine.transport.transfer import PeerConnected, PeerFailed, PullCompleted

DEADLINE = 60
INTERFACES = "import json, os; print(json.dumps(sorted(os.listdir('/sys/class/net'))))"


IN_A_PID_NAMESPACE = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]


@pytest.fixture
def without_ucx_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("UCX_"):
            monkeypatch.delenv(name)


@pytest.fixture
def hosts() -> Iterator[tuple[NetworkNamespace, NetworkNamespace]]:
    with two_hosts() as hosts:
        yield hosts


def run_on(host: NetworkNamespace, *arguments: str) -> str:
    command = host.command([sys.executable, *arguments])
    return subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE, check=True).stdout


def test_hosts_see_each_other_and_nothing_else(hosts: tuple[NetworkNamespace, NetworkNamespace]) -> None:
    first, second = hosts
    assert first.address != second.address
    for host in hosts:
        assert json.loads(run_on(host, "-c", INTERFACES)) == ["eth0", "lo"]
        assert run_on(host, "-c", "import os; print(os.getcwd())").strip() == str(Path.cwd())
    listen = f"""
import socket
server = socket.create_server(("{first.address}", 7000))
print("listening", flush=True)
connection, (peer, _) = server.accept()
print(peer)
"""
    connect = f"import socket; socket.create_connection(('{first.address}', 7000), timeout=10)"
    with subprocess.Popen(
        first.command([sys.executable, "-c", listen]), stdout=subprocess.PIPE, text=True
    ) as server:
        try:
            assert server.stdout is not None
            assert server.stdout.readline() == "listening\n"
            run_on(second, "-c", connect)
            assert server.stdout.readline() == f"{second.address}\n"
        finally:
            server.kill()


def test_namespaces_end_with_their_block() -> None:
    with two_hosts() as (first, second):
        keepers = [first.process_id, second.process_id]
        assert all(Path(f"/proc/{keeper}").exists() for keeper in keepers)
    assert not any(Path(f"/proc/{keeper}").exists() for keeper in keepers)


def test_a_link_can_be_shaped() -> None:
    with two_hosts(rate="200mbit") as (first, _):
        shown = subprocess.run(
            first.command(["tc", "qdisc", "show", "dev", first.interface]), capture_output=True, text=True
        )
        assert "tbf" in shown.stdout
        assert "rate 200Mbit" in shown.stdout


@pytest.mark.usefixtures("without_ucx_variables", "hosts")
def test_kv_blocks_are_pulled_over_the_advertised_interface() -> None:
    """The benchmark's processes are a worker's transfer; they check every byte range that arrives."""
    plan = Plan(("network",), pool_bytes=2**22, block_sizes=(2**18,), repetitions=2)
    result = run_plan(plan, lambda description: None)
    assert result.lanes == {"network": "tcp/eth0"}
    assert [Scatter(2**22, 2**18, f.num_blocks, f.longest_run) for f in result.figures] == plan.scatters


@pytest.mark.usefixtures("without_ucx_variables")
def test_containers_that_share_no_more_than_the_ipc_namespace_use_the_network() -> None:
    """UCX would take its shared memory, over which nothing arrives there."""
    if subprocess.run([*IN_A_PID_NAMESPACE, "true"], capture_output=True).returncode != 0:
        pytest.skip("a PID namespace cannot be made here")
    worker = Worker(1024)
    worker.pool.blocks[:] = 0xAA
    with mortal_peer(IN_A_PID_NAMESPACE) as (_, worker_address, region):
        worker.transfer.connect("container", worker_address, region)
        assert worker.next_event() == PeerConnected("container", "tcp/lo")
        worker.transfer.pull(1, "container", [Run(7, 3, 2)])
        completed = worker.next_event()
        assert isinstance(completed, PullCompleted), completed
        assert [block.any() for block in worker.pool.blocks[2:6]] == [True, False, False, True]
        worker.transfer.close()


def test_a_host_that_cannot_be_reached_is_refused_at_once() -> None:
    with two_hosts() as (elsewhere, _):
        worker = Worker()
        with mortal_peer(elsewhere.command([])) as (_, worker_address, region):
            worker.transfer.connect("elsewhere", worker_address, region)
            failed = worker.next_event()
            assert isinstance(failed, PeerFailed), failed
            assert "unreachable" in failed.reason
        worker.transfer.close()
