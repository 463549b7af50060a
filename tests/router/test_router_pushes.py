"""The router between scripted workers of a cluster that pushes."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from fake_cluster import (
    STATS,
    FakeCluster,
    FakeWorker,
    next_tokens,
    on_event_loop,
    output_ids,
    running_cluster,
)

from pdengine.client import Completion, Failed, Rejected
from pdengine.transport.messages import (
    Abort,
    Decode,
    Left,
    PeerLeft,
    PeerLink,
    Prefill,
    PrefillAndDecode,
    Prefilled,
    Pushed,
    PushTarget,
    Reserve,
    Reserved,
    Work,
    WorkFailed,
    WorkRefused,
)

RED, VIOLIN = 383, 512

Answer = asyncio.Task[Completion]


@asynccontextmanager
async def pushing(**config: Any) -> AsyncIterator[tuple[FakeCluster, FakeWorker, FakeWorker]]:
    """A cluster with a prefill and a decode worker."""
    async with running_cluster(transfer="push", **config) as cluster:
        yield cluster, *await cluster.pair()


async def reserve(cluster: FakeCluster, decode: FakeWorker) -> tuple[Answer, Work]:
    """A request of the client, for which `decode` is asked to hold blocks."""
    answer = asyncio.create_task(cluster.client.generate("The red violin", max_tokens=3))
    return answer, (await decode.expect(Reserve)).work


async def prefill_for(prefill: FakeWorker, decode: FakeWorker, work: Work) -> Work:
    """`decode` holds blocks, and `prefill` is given the prompt."""
    decode.send(Reserved(work.request_id, work.attempt, [4, 5]))
    message = await prefill.expect(Prefill)
    assert message.push_to == PushTarget(decode.engine_id, [4, 5])
    assert message.may_wait
    return message.work


def send_prefilled(prefill: FakeWorker, work: Work) -> None:
    tokens = next_tokens(work, [(VIOLIN, None)])
    prefill.send(Prefilled(work.request_id, work.attempt, tokens, None, pushed=True))


async def finish(prefill: FakeWorker, decode: FakeWorker, work: Work) -> None:
    """From the first token to the last one."""
    send_prefilled(prefill, work)
    prefill.send(Pushed(work.request_id, work.attempt, STATS))
    message = await decode.expect(Decode)
    assert (message.lease, output_ids(message.work)) == (None, [*output_ids(work), VIOLIN])
    decode.send_tokens(message.work, RED, finish_reason="length")


@on_event_loop
async def test_workers_are_told_that_the_cluster_pushes() -> None:
    async with running_cluster(transfer="push") as cluster:
        assert (await cluster.new_worker("decode").join()).pushes
    async with running_cluster(transfer="pull") as cluster:
        assert not (await cluster.new_worker("decode").join()).pushes


@on_event_loop
async def test_blocks_are_reserved_before_the_prompt_is_computed() -> None:
    async with pushing() as (cluster, prefill, decode):
        answer = asyncio.create_task(cluster.client.generate("The red violin", max_tokens=3))
        message = await decode.expect(Reserve)
        assert message.writer == prefill.engine_id
        await prefill.sync()
        assert not prefill.pending(Prefill)
        work = await prefill_for(prefill, decode, message.work)
        await finish(prefill, decode, work)
        completion = await answer
        assert (completion.token_ids, completion.attempts) == ([VIOLIN, RED], 1)
        assert (completion.prefill_worker, completion.decode_worker) == (prefill.engine_id, decode.engine_id)
        assert completion.transfer == STATS


@on_event_loop
async def test_the_first_token_does_not_wait_for_the_push() -> None:
    async with pushing() as (cluster, prefill, decode):
        stream = cluster.client.stream("The red violin", max_tokens=3)
        first = asyncio.ensure_future(anext(stream))
        work = await prefill_for(prefill, decode, (await decode.expect(Reserve)).work)
        send_prefilled(prefill, work)
        assert (await first).token_ids == [VIOLIN]
        await decode.sync()
        assert not decode.pending(Decode)
        prefill.send(Pushed(work.request_id, work.attempt, STATS))
        decode.send_tokens((await decode.expect(Decode)).work, RED, finish_reason="length")
        assert [delta.token_ids async for delta in stream] == [[RED]]


@on_event_loop
async def test_a_request_that_ends_with_its_first_token_gives_its_blocks_back() -> None:
    async with pushing() as (cluster, prefill, decode):
        answer, work = await reserve(cluster, decode)
        work = await prefill_for(prefill, decode, work)
        prefill.send_prefilled(work, VIOLIN, "stop")
        await answer
        assert (await decode.expect(Abort)).request_id == work.request_id


@on_event_loop
async def test_a_decode_worker_can_refuse_a_writer_and_take_it_back() -> None:
    """The prefill worker tells of the same link: whoever tells, it is the decode worker's."""
    async with pushing() as (cluster, prefill, decode):
        for teller, other in ((decode, prefill), (prefill, decode)):
            teller.send(PeerLink(other.engine_id, error="its key is not admitted here"))
            await teller.sync()
            entry = cluster.router._registry.get(decode.engine_id)
            assert entry is not None
            assert entry.broken_links == {prefill.engine_id}
            answer = asyncio.create_task(cluster.client.generate("The red violin", max_tokens=3))
            whole = (await prefill.expect(PrefillAndDecode)).work
            prefill.send_tokens(whole, RED, finish_reason="stop")
            await answer
            teller.send(PeerLink(other.engine_id))
            await teller.sync()
            answer, work = await reserve(cluster, decode)
            await finish(prefill, decode, await prefill_for(prefill, decode, work))
            await answer


@pytest.mark.parametrize("reserved", [False, True])
@on_event_loop
async def test_a_cancelled_request_is_taken_back_from_both(reserved: bool) -> None:
    async with pushing() as (cluster, prefill, decode):
        answer, work = await reserve(cluster, decode)
        if reserved:
            await prefill_for(prefill, decode, work)
        answer.cancel()
        assert (await prefill.expect(Abort)).request_id == work.request_id
        assert (await decode.expect(Abort)).request_id == work.request_id


@pytest.mark.parametrize("reserved", [False, True])
@on_event_loop
async def test_when_the_decode_worker_is_lost_another_one_reserves(reserved: bool) -> None:
    async with pushing() as (cluster, prefill, lost):
        answer, work = await reserve(cluster, lost)
        if reserved:
            send_prefilled(prefill, await prefill_for(prefill, lost, work))
            await prefill.sync()
        other = await cluster.worker("decode", "other")
        lost.send(Left())
        again = (await other.expect(Reserve)).work
        assert (again.attempt, output_ids(again)) == (2, [VIOLIN] if reserved else [])
        prefill.send(Pushed(work.request_id, work.attempt, STATS))  # of the older attempt
        await finish(prefill, other, await prefill_for(prefill, other, again))
        completion = await answer
        assert (completion.attempts, completion.decode_worker) == (2, "other")


@pytest.mark.parametrize("computed", [False, True])
@on_event_loop
async def test_when_the_prefill_worker_is_lost_another_one_pushes(computed: bool) -> None:
    async with pushing() as (cluster, lost, decode):
        answer, work = await reserve(cluster, decode)
        work = await prefill_for(lost, decode, work)
        if computed:
            send_prefilled(lost, work)
            await lost.sync()
        other = await cluster.worker("prefill", "other")
        lost.send(Left())
        assert (await decode.expect(PeerLeft)).engine_id == lost.engine_id
        assert (await decode.expect(Abort)).request_id == work.request_id
        message = await decode.expect(Reserve)
        assert (message.writer, message.work.attempt) == ("other", 2)
        await finish(other, decode, await prefill_for(other, decode, message.work))
        await answer


@on_event_loop
async def test_a_failed_push_is_tried_again() -> None:
    async with pushing() as (cluster, prefill, decode):
        answer, work = await reserve(cluster, decode)
        work = await prefill_for(prefill, decode, work)
        send_prefilled(prefill, work)
        prefill.send(WorkFailed(work.request_id, work.attempt, "the push failed", retry=True))
        assert (await decode.expect(Abort)).request_id == work.request_id
        again = (await decode.expect(Reserve)).work
        assert (again.attempt, output_ids(again)) == (2, [VIOLIN])
        await finish(prefill, decode, await prefill_for(prefill, decode, again))
        assert (await answer).token_ids == [VIOLIN, VIOLIN, RED]


@on_event_loop
async def test_a_decode_worker_that_fails_after_the_push_is_replaced() -> None:
    async with pushing(on_failure="fail") as (cluster, prefill, decode):
        answer, work = await reserve(cluster, decode)
        work = await prefill_for(prefill, decode, work)
        send_prefilled(prefill, work)
        prefill.send(Pushed(work.request_id, work.attempt, STATS))
        await decode.expect(Decode)
        decode.send(Left())
        with pytest.raises(Failed, match="the decode worker that had it is gone"):
            await answer


@pytest.mark.parametrize("who", ["prefill", "decode"])
@on_event_loop
async def test_refused_by_all_queues_it_is_rejected(who: str) -> None:
    async with pushing() as (cluster, prefill, decode):
        answer, work = await reserve(cluster, decode)
        if who == "prefill":
            await prefill_for(prefill, decode, work)
        worker = prefill if who == "prefill" else decode
        worker.send(WorkRefused(work.request_id, work.attempt, "the queue is full"))
        assert (await decode.expect(Abort)).request_id == work.request_id
        again = (await decode.expect(Reserve)).work
        assert again.attempt == 2
        worker.send(WorkRefused(again.request_id, again.attempt, "the queue is full"))
        with pytest.raises(Rejected, match="no worker has room: the queue is full"):
            await answer


@on_event_loop
async def test_links_are_told_by_the_prefill_worker_and_belong_to_the_decode_worker() -> None:
    async with pushing() as (cluster, prefill, decode):
        prefill.send(PeerLink(decode.engine_id, lanes="sysv"))
        prefill.send(PeerLink("nobody", lanes="sysv"))
        await prefill.sync()
        links = {worker.role: worker.links for worker in (await cluster.client.status()).workers}
        assert links == {"prefill": {}, "decode": {prefill.engine_id: "sysv"}}
        prefill.send(PeerLink(decode.engine_id, error="unreachable"))
        await prefill.sync()
        answer = asyncio.create_task(cluster.client.generate("The red violin", max_tokens=1))
        whole = (await prefill.expect(PrefillAndDecode)).work
        prefill.send_tokens(whole, RED, finish_reason="length")
        await answer
