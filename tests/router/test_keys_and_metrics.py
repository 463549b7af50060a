"""Keys that are taken away while their owners are connected, and what the router counts."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from exposition import families, samples
from fake_cluster import FakeCluster, expect_work, on_event_loop, running_cluster

from pdengine.cli.main import main
from pdengine.client import AsyncClient, Failed, GenerateError, RouterUnavailable
from pdengine.transport import doorkeeper, handshakes
from pdengine.transport.keys import KeyRole, read_key_file, write_key_file
from pdengine.transport.messages import Heartbeat, Malformed, PrefillAndDecode, RenewLeases
from pdengine.transport.sockets import KEY_REVOKED

RED = 100


@pytest.fixture
def keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of a cluster; its files are looked at often."""
    monkeypatch.setattr(doorkeeper, "LOOK_SECONDS", 0.01)
    directory = tmp_path / "keys"
    assert CliRunner().invoke(main, ["keygen", str(directory)]).exit_code == 0
    return directory


def take_away(keys: Path, role: KeyRole) -> None:
    """The router admits nobody of this role any more."""
    path = keys / "router.toml"
    router = read_key_file(path, ["router"])
    write_key_file(path, replace(router, admitted={**router.admitted, role: {}}), overwrite=True)


@on_event_loop
async def test_the_requests_of_a_client_end_when_its_key_is_taken_away(keys: Path) -> None:
    async with running_cluster(keys=keys) as cluster:
        worker = await cluster.worker("unified")
        operator = AsyncClient(cluster.router.client_address, keys=keys / "operator.toml", retries=0)
        stays = asyncio.create_task(operator.generate("The red violin"))
        of_operator = (await expect_work(worker)).work
        client, cluster.client = cluster.client, operator
        stream = client.stream("The red violin")
        reading = asyncio.create_task(anext(stream))
        work = (await expect_work(worker)).work
        worker.send_tokens(work, RED)
        await reading
        take_away(keys, "client")
        with pytest.raises(Failed, match=KEY_REVOKED):
            await anext(stream)
        with pytest.raises(RouterUnavailable, match=KEY_REVOKED):
            await client.generate("The red violin")
        assert not worker.pending(PrefillAndDecode)
        worker.send_tokens(of_operator, RED, finish_reason="stop")
        assert (await stays).token_ids == [RED]
        await client.close()


@on_event_loop
async def test_a_worker_is_given_up_when_its_key_is_taken_away(keys: Path) -> None:
    """It need not say anything for it, and what it says is not heard."""
    async with running_cluster(keys=keys) as cluster:
        worker = await cluster.worker("unified")
        task, work = await cluster.start_request(worker)
        take_away(keys, "worker")
        with pytest.raises(GenerateError, match="no worker"):
            await task
        assert (await cluster.client.status()).workers == []
        worker.send_tokens(work, RED, finish_reason="stop")
        worker.send(worker.hello)
        for _ in range(2):
            assert (await worker.expect(Malformed)).reason == KEY_REVOKED
        assert (await cluster.client.status()).workers == []


def figures(cluster: FakeCluster) -> dict[str, float]:
    return {name: value for name, value in samples(cluster.router.metrics.exposition()).items() if value}


@on_event_loop
async def test_requests_and_workers_are_counted() -> None:
    async with running_cluster() as cluster:
        assert cluster.router.metrics.why_not_ready() == "no worker has joined this router"
        worker = await cluster.worker("unified")
        assert cluster.router.metrics.why_not_ready() is None
        assert figures(cluster) == {"pdengine_router_workers{unified}": 1}
        for reason in ("x" * 5000, ""):
            with pytest.raises(GenerateError):
                await cluster.client.generate(reason)
        task, work = await cluster.start_request(worker)
        assert figures(cluster)["pdengine_router_requests_in_flight"] == 1
        worker.send_tokens(work, RED, finish_reason="stop")
        await task
        assert figures(cluster) == {
            "pdengine_router_workers{unified}": 1,
            "pdengine_router_requests_total{rejected}": 2,
            "pdengine_router_requests_total{finished}": 1,
        }
        outcomes = families(cluster.router.metrics.exposition())["pdengine_router_requests_total"].samples
        assert {sample.labels["outcome"] for sample in outcomes} == {
            *("finished", "rejected", "failed", "cancelled", "timeout", "client gone")
        }


@on_event_loop
async def test_what_is_refused_is_counted_by_port_and_reason(
    keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handshakes, "REPORT_SECONDS", 0.01)
    async with running_cluster(keys=keys) as cluster, AsyncClient(cluster.router.worker_address, keys=keys):
        worker = await cluster.worker("unified")
        worker.send(RenewLeases(1, [1]))
        worker.socket._socket.send(b"\xc1")
        for _ in range(2):
            await worker.expect(Malformed)
        take_away(keys, "worker")
        while cluster.router.metrics.why_not_ready() is None:
            await asyncio.sleep(0.001)
        worker.send(Heartbeat(worker.hello.load))
        await worker.expect(Malformed)
        while "pdengine_refused_connections_total{workers}{not_admitted}" not in figures(cluster):
            await asyncio.sleep(0.001)
        assert figures(cluster) == {
            "pdengine_refused_connections_total{workers}{not_admitted}": 1,
            "pdengine_refused_messages_total{workers}{malformed}": 1,
            "pdengine_refused_messages_total{workers}{disallowed}": 1,
            "pdengine_refused_messages_total{workers}{revoked}": 1,
        }
