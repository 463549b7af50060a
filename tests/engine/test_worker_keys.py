"""A worker whose neighbours' keys are taken away, and what it counts of those who are refused."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import pytest
import zmq.asyncio
from exposition import samples
from worker_bench import Bench

from pdengine.transport import doorkeeper
from pdengine.transport.keys import new_key_file, write_key_file
from pdengine.transport.messages import Malformed, PeerLink, PeerReply, RenewLeases
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
