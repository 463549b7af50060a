"""What the control thread of a decode worker does about pushes that nobody wants any more."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from time import monotonic
from types import SimpleNamespace
from typing import Any, cast

import zmq.asyncio

from pdengine.engine.metrics import WorkerMetrics
from pdengine.engine.pushes import LoseWriter, UnwantedPush
from pdengine.engine.worker import Worker, WorkerParts
from pdengine.transport.messages import (
    Compatibility,
    EndPush,
    Load,
    PeerDescriptor,
    PeerRequest,
    PushEnded,
    Welcome,
)
from pdengine.transport.regions import describe_region
from pdengine.transport.sockets import ServerSocket

DEADLINE_SECONDS = 10.0
LEASE_SECONDS = 30.0
ORDER = EndPush("request", 1)


def descriptor(engine_id: str, role: Any, control_address: str) -> PeerDescriptor:
    region = describe_region(("block", "byte"), (4, 8), item_size=1, dtype="uint8", base_address=4096)
    return PeerDescriptor(engine_id, role, control_address, b"", region)


class Bench:
    """A worker on the loop, with an engine that only remembers, and the socket of a prefill worker."""

    def __init__(self) -> None:
        self.context = zmq.asyncio.Context()
        self.writer = ServerSocket[PeerRequest](self.context, PeerRequest)
        self.writer_descriptor = descriptor("writer", "prefill", self.writer.bind("tcp://127.0.0.1:0"))
        self.posted: list[object] = []
        nothing = SimpleNamespace(connect=lambda *_: None, disconnect=lambda *_: None)
        parts = WorkerParts(
            descriptor=descriptor("decode", "decode", "tcp://127.0.0.1:1"),
            compatibility=Compatibility(1, "", "", "", 1, "", ""),
            max_context=100,
            block_size=1,
            lease_seconds=LEASE_SECONDS,
            drain_seconds=0.0,
            router_address="tcp://127.0.0.1:1",
            context=self.context,
            peer_server=ServerSocket[PeerRequest](self.context, PeerRequest),
            transfer=cast(Any, nothing),
            engine=cast(Any, SimpleNamespace(post=self.posted.append, load=Load(4, 4), step_age=lambda: 0.0)),
            metrics=WorkerMetrics(),
            died=Future(),
        )
        self.worker = Worker(parts)

    def join(self, *peers: PeerDescriptor) -> None:
        self.worker._join(Welcome("epoch", 1.0, list(peers), pushes=True))

    @property
    def has_lost_writer(self) -> bool:
        return LoseWriter("writer") in self.posted


def test_a_writer_is_asked_until_it_answers_whatever_happens_to_the_router() -> None:
    async def run() -> None:
        bench = Bench()
        bench.join(bench.writer_descriptor)
        bench.worker._handle_events([UnwantedPush("writer", ORDER)])
        async with asyncio.timeout(DEADLINE_SECONDS):
            assert (await bench.writer.receive())[1] == ORDER
            bench.join()  # a new router, which the writer has not found yet
            assert not bench.has_lost_writer
            bench.worker._end_pushes(monotonic())
            bench.join(bench.writer_descriptor)
            bench.worker._end_pushes(monotonic())
            identity, message = await bench.writer.receive()
            assert message == ORDER
            bench.writer.send(identity, PushEnded(ORDER.request_id, ORDER.attempt))
            while PushEnded(ORDER.request_id, ORDER.attempt) not in bench.posted:
                await asyncio.sleep(0)
        bench.worker._end_pushes(monotonic() + 2 * LEASE_SECONDS)
        assert not bench.has_lost_writer
        bench.worker._forget_peer("writer")
        bench.context.destroy(linger=0)

    asyncio.run(run())


def test_a_writer_that_is_not_met_again_is_taken_for_dead() -> None:
    async def run() -> None:
        bench = Bench()
        bench.join()
        bench.worker._handle_events([UnwantedPush("writer", ORDER)])
        bench.worker._end_pushes(monotonic())
        assert not bench.has_lost_writer
        bench.worker._end_pushes(monotonic() + 2 * LEASE_SECONDS)
        assert bench.has_lost_writer
        bench.context.destroy(linger=0)

    asyncio.run(run())
