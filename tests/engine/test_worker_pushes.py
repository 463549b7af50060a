"""What the control thread of a decode worker does about pushes that nobody wants any more."""

from __future__ import annotations

import asyncio
from time import monotonic

from worker_bench import LEASE_SECONDS, Bench

from pdengine.engine.pushes import UnwantedPush
from pdengine.transport.messages import EndPush, Malformed, PeerLeft, PushEnded, RouterToWorker
from pdengine.transport.sockets import KEY_REVOKED

DEADLINE_SECONDS = 10.0
ORDER = EndPush("request", 1)


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


def test_the_blocks_of_a_writer_that_is_shut_out_wait_until_the_router_says_that_it_is_gone() -> None:
    """It is alive, and its writes go on."""

    async def run() -> None:
        bench = Bench()
        bench.join(bench.writer_descriptor)
        bench.worker._handle_events([UnwantedPush("writer", ORDER)])
        async with asyncio.timeout(DEADLINE_SECONDS):
            identity, _ = await bench.writer.receive()
            bench.writer.send(identity, Malformed(KEY_REVOKED))
            while "writer" in bench.worker._peers:
                await asyncio.sleep(0.001)
            bench.worker._end_pushes(monotonic() + 2 * LEASE_SECONDS)
            assert not bench.has_lost_writer
            words: asyncio.Queue[RouterToWorker] = asyncio.Queue()
            bench.worker._router.receive = words.get  # type: ignore[method-assign]
            words.put_nowait(PeerLeft("writer"))
            hearing = asyncio.create_task(bench.worker._receive_from_router())
            while not bench.has_lost_writer:
                await asyncio.sleep(0.001)
        hearing.cancel()
        bench.context.destroy(linger=0)

    asyncio.run(run())
