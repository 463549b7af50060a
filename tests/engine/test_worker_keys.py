"""A worker whose neighbours' keys are taken away, and what it counts of those who are refused."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
import zmq.asyncio
from exposition import samples
from sequences import make_work
from worker_bench import Bench

from pdengine.engine.commands import AbortAll, LoseLease
from pdengine.transport import doorkeeper
from pdengine.transport.keys import new_key_file, write_key_file
from pdengine.transport.messages import (
    Choice,
    Decode,
    KVLease,
    Malformed,
    PeerJoined,
    PeerLeft,
    PeerLink,
    PeerReply,
    PrefillAndDecode,
    RenewLeases,
    RouterToWorker,
    Welcome,
)
from pdengine.transport.sockets import KEY_REVOKED, PeerSocket

DEADLINE_SECONDS = 10.0
ROUTER = new_key_file("router")
OWN, OTHER = (new_key_file("worker", router_key=ROUTER.public_key) for _ in range(2))


def test_a_worker_lets_go_of_a_peer_whose_key_is_taken_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reads nothing from it and hears nothing of it any more, on the connections that are there."""
    monkeypatch.setattr(doorkeeper, "LOOK_SECONDS", 0.01)
    path = tmp_path / "worker.toml"
    write_key_file(path, OWN.admitting("worker", "other", OTHER.public_key))

    async def run() -> None:
        bench = Bench(path)
        assert bench.keys is not None
        server, context = bench.worker._parts.peer_server, zmq.asyncio.Context()
        bench.join(msgspec.structs.replace(bench.writer_descriptor, public_key=OTHER.public_key))
        assert list(bench.worker._peers) == ["writer"]
        letting_in = asyncio.create_task(bench.keys.run(bench.worker._shut_out))
        keys = OTHER.to_connect(OWN.public_key)
        peer = PeerSocket[PeerReply](context, server.bind("tcp://127.0.0.1:0"), PeerReply, keys=keys)
        async with asyncio.timeout(DEADLINE_SECONDS):
            peer.send(RenewLeases(1, [1]))
            await server.receive()
            write_key_file(path, OWN, overwrite=True)
            while "writer" in bench.worker._peers:
                await asyncio.sleep(0.001)
            [link] = [message for message in bench.sent if isinstance(message, PeerLink)]
            assert link.engine_id == "writer"
            assert OTHER.public_key in link.error
            serving = asyncio.create_task(bench.worker._serve_peers())
            peer.send(RenewLeases(2, [1]))
            assert await peer.receive() == Malformed(KEY_REVOKED)
        figures = samples(bench.worker._parts.metrics.exposition())
        assert figures["pdengine_refused_messages_total{workers}{revoked}"] == 1
        assert figures["pdengine_refused_connections_total{workers}{not_admitted}"] == 0
        for task in (letting_in, serving):
            task.cancel()
        await asyncio.gather(letting_in, serving, return_exceptions=True)
        for each in (bench.context, context):
            each.destroy(linger=0)

    asyncio.run(run())


Hear = Callable[..., Awaitable[None]]


@asynccontextmanager
async def listening(keys: Path | None = None) -> AsyncIterator[tuple[Bench, Hear]]:
    """A worker whose keys are looked after, and how it hears its router."""
    bench = Bench(keys)
    words: asyncio.Queue[RouterToWorker] = asyncio.Queue()
    bench.worker._router.receive = words.get  # type: ignore[method-assign]
    tasks = [asyncio.create_task(bench.worker._receive_from_router())]
    if bench.keys is not None:
        tasks.append(asyncio.create_task(bench.keys.run(bench.worker._shut_out)))

    async def hear(*said: RouterToWorker) -> None:
        for word in said:
            words.put_nowait(word)
        while not words.empty():
            await asyncio.sleep(0)
        await asyncio.sleep(0)

    try:
        async with asyncio.timeout(DEADLINE_SECONDS):
            yield bench, hear
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for engine_id in bench.worker._peers:
            bench.worker._forget_peer(engine_id)
        bench.context.destroy(linger=0)


def links(bench: Bench) -> list[tuple[str, bool]]:
    """What the router was told of connections: of whom, and whether there is none."""
    return [(link.engine_id, bool(link.error)) for link in bench.sent if isinstance(link, PeerLink)]


@pytest.mark.parametrize("gone", ["", "left", "join"])
def test_a_peer_is_met_once_its_key_is_admitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gone: str
) -> None:
    """Whether it was admitted too late or is admitted again; not if it has gone meanwhile."""
    monkeypatch.setattr(doorkeeper, "LOOK_SECONDS", 0.01)
    path = tmp_path / "worker.toml"
    write_key_file(path, OWN)

    async def run() -> None:
        async with listening(path) as (bench, hear):
            peer = msgspec.structs.replace(bench.writer_descriptor, public_key=OTHER.public_key)
            await hear(Welcome("epoch", 1.0, [], pushes=True), PeerJoined(peer))
            told = [("writer", True)]
            for _ in range(2):
                assert "writer" not in bench.worker._peers
                write_key_file(path, OWN.admitting("worker", "other", OTHER.public_key), overwrite=True)
                while "writer" not in bench.worker._peers:
                    await asyncio.sleep(0.001)
                told += [("writer", False)]
                assert links(bench) == told
                write_key_file(path, OWN, overwrite=True)
                while "writer" in bench.worker._peers:
                    await asyncio.sleep(0.001)
                told += [("writer", True)]
                assert links(bench) == told
            if gone == "left":
                await hear(PeerLeft("writer"))
            elif gone == "join":
                await hear(Welcome("another", 1.0, [], pushes=True))
            bench.worker._peers._keys = None  # everybody is admitted
            bench.worker._shut_out()
            assert ("writer" in bench.worker._peers) == (not gone)

    asyncio.run(run())


def test_a_peer_that_admits_this_worker_no_more_is_let_go_of(caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        async with listening() as (bench, hear):
            await hear(Welcome("epoch", 1.0, [bench.writer_descriptor]))
            lease = KVLease(1, "writer", [0], 1, 30.0)
            await hear(Decode(make_work("request", [1], [Choice(0, [5])], max_tokens=2), lease))
            identity, _ = await bench.writer.receive()
            for _ in range(3):
                bench.writer.send(identity, Malformed(KEY_REVOKED))
            while "writer" in bench.worker._peers:
                await asyncio.sleep(0.001)
            assert links(bench) == [("writer", True)]
            [lost] = [command for command in bench.posted if isinstance(command, LoseLease)]
            assert lost.borrowed.lease == lease
            await hear(PeerJoined(bench.writer_descriptor))
            assert "writer" in bench.worker._peers

    asyncio.run(run())
    assert caplog.text.count("refused a message") == 1
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_a_worker_that_is_not_admitted_any_more_drops_its_work_and_is_not_ready(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The router gives what it has to others. It joins again when it is admitted."""

    async def run() -> None:
        async with listening() as (bench, hear):
            work = PrefillAndDecode(make_work("request", [1], max_tokens=2))
            await hear(Welcome("epoch", 1.0, []), work, Malformed("something else"))
            assert bench.worker.why_not_ready() is None
            assert not bench.worker._is_idle()
            assert bench.posted.count(AbortAll()) == 1
            await hear(*[Malformed(KEY_REVOKED)] * 5)
            assert bench.worker.why_not_ready() is not None
            assert bench.worker._is_idle()
            assert bench.posted.count(AbortAll()) == 2
            await hear(Welcome("epoch", 1.0, []))
            assert bench.worker.why_not_ready() is None

    asyncio.run(run())
    assert caplog.text.count("the router refused a message") == 1
