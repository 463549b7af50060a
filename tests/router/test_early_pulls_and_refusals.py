"""The router between scripted workers: prompts pulled while they are computed, and work that is refused."""

import asyncio

import pytest
from fake_cluster import FakeCluster, FakeWorker, on_event_loop, running_cluster

from pdengine.client import Failed, Rejected
from pdengine.transport.messages import (
    Abort,
    Decode,
    EarlyPullDropped,
    Heartbeat,
    HeartbeatReply,
    KVLease,
    Leaving,
    Left,
    PeerLeft,
    Prefill,
    PrefillAndDecode,
    PromptProgress,
    PullEarly,
    ReleaseLeases,
    Work,
    WorkFailed,
    WorkRefused,
)

RED, VIOLIN = 383, 512


def send_progress(prefill: FakeWorker, work: Work, num_tokens: int) -> KVLease:
    """What a prefill worker says of a prompt whose lease will be the next one that it grants."""
    lease = KVLease(1, prefill.engine_id, [0], len(work.prompt_ids), duration=30.0)
    prefill.send(PromptProgress(work.request_id, work.attempt, num_tokens, lease))
    return lease


async def finish(decode: FakeWorker, work: Work) -> None:
    decode.send_tokens(work, RED, finish_reason="length")


# --------------------------------------------------------------------------------------- early pulls


@on_event_loop
async def test_news_of_a_prompt_go_to_the_worker_that_will_decode_it() -> None:
    async with running_cluster() as cluster:
        prefill = await cluster.worker("prefill")
        decodes = {name: await cluster.worker("decode", name) for name in ("first", "second")}
        task, work = await cluster.start_request(prefill, max_tokens=2)
        lease = send_progress(prefill, work, 2)
        send_progress(prefill, work, 3)
        await prefill.sync()
        busy = [entry for entry in cluster.router._registry if entry.role == "decode" and entry.assigned]
        (name,) = (entry.engine_id for entry in busy)
        decode = decodes[name]
        for num_tokens in (2, 3):
            news = await decode.expect(PullEarly)
            assert news == PullEarly(work.request_id, 1, num_tokens, lease, work.prefix)
        assert prefill.send_prefilled(work, VIOLIN) == lease
        await finish(decode, (await decode.expect(Decode)).work)
        assert (await task).decode_worker == name


@on_event_loop
async def test_without_a_decode_worker_with_room_nothing_is_pulled_early() -> None:
    async with running_cluster() as cluster:
        prefill, decode = await cluster.pair()
        (entry,) = [entry for entry in cluster.router._registry if entry.role == "decode"]
        entry.assigned["another"] = entry.capacity
        task, work = await cluster.start_request(prefill, max_tokens=2)
        send_progress(prefill, work, 2)
        prefill.send_prefilled(work, VIOLIN)
        await finish(decode, (await decode.expect(Decode)).work)
        await task
        assert not decode.pending(PullEarly)
        del entry.assigned["another"]


@on_event_loop
async def test_nothing_is_pulled_early_where_that_is_turned_off() -> None:
    async with running_cluster(transfer="pull") as cluster:
        prefill, decode = await cluster.pair()
        task, work = await cluster.start_request(prefill, max_tokens=2)
        send_progress(prefill, work, 2)
        prefill.send_prefilled(work, VIOLIN)
        await finish(decode, (await decode.expect(Decode)).work)
        await task
        assert not decode.pending(PullEarly)


@on_event_loop
async def test_an_aborted_request_is_taken_back_from_who_pulls_early() -> None:
    async with running_cluster() as cluster:
        prefill, decode = await cluster.pair()
        task, work = await cluster.start_request(prefill, max_tokens=2)
        send_progress(prefill, work, 2)
        await decode.expect(PullEarly)
        task.cancel()
        assert (await prefill.expect(Abort)).request_id == work.request_id
        assert (await decode.expect(Abort)).request_id == work.request_id


@on_event_loop
async def test_a_request_that_ends_with_its_first_token_is_taken_back_from_who_pulls_early() -> None:
    async with running_cluster() as cluster:
        prefill, decode = await cluster.pair()
        task, work = await cluster.start_request(prefill, max_tokens=2)
        send_progress(prefill, work, 2)
        await decode.expect(PullEarly)
        prefill.send_prefilled(work, VIOLIN, "stop")
        await task
        assert (await decode.expect(Abort)).request_id == work.request_id


@on_event_loop
async def test_when_who_pulls_early_is_lost_another_worker_decodes() -> None:
    async with running_cluster() as cluster:
        prefill = await cluster.worker("prefill")
        lost = await cluster.worker("decode", "lost")
        task, work = await cluster.start_request(prefill, max_tokens=2)
        send_progress(prefill, work, 2)
        await lost.expect(PullEarly)
        other = await cluster.worker("decode", "other")
        lost.send(Left())
        assert (await prefill.expect(PeerLeft)).engine_id == "lost"
        prefill.send_prefilled(work, VIOLIN)
        await finish(other, (await other.expect(Decode)).work)
        completion = await task
        assert (completion.attempts, completion.decode_worker) == (1, "other")


@on_event_loop
async def test_when_who_pulls_early_is_leaving_another_worker_decodes() -> None:
    async with running_cluster() as cluster:
        prefill = await cluster.worker("prefill")
        leaving = await cluster.worker("decode", "leaving")
        task, work = await cluster.start_request(prefill, max_tokens=2)
        send_progress(prefill, work, 2)
        await leaving.expect(PullEarly)
        other = await cluster.worker("decode", "other")
        leaving.send(Leaving())
        leaving.send(Heartbeat(leaving.hello.load))
        assert (await leaving.expect(HeartbeatReply)).leaving, "what was sent before it knew has come now"
        prefill.send_prefilled(work, VIOLIN)
        assert (await leaving.expect(Abort)).request_id == work.request_id
        await finish(other, (await other.expect(Decode)).work)
        await task


@on_event_loop
async def test_news_of_an_older_attempt_are_ignored() -> None:
    async with running_cluster() as cluster:
        prefill, decode = await cluster.pair()
        task, work = await cluster.start_request(prefill, max_tokens=2)
        prefill.send(WorkFailed(work.request_id, 1, "try again", retry=True))
        again = (await prefill.expect(Prefill)).work
        send_progress(prefill, work, 2)
        prefill.send_prefilled(again, VIOLIN)
        await finish(decode, (await decode.expect(Decode)).work)
        await task
        assert not decode.pending(PullEarly)


# ------------------------------------------------------------------------------------------ refusals


async def workers_in_order(cluster: FakeCluster) -> tuple[FakeWorker, FakeWorker]:
    """Two workers that run whole requests; the first one is the less loaded."""
    workers = [await cluster.worker("unified", name) for name in ("first", "second")]
    for entry in cluster.router._registry:
        if entry.engine_id == "second":
            entry.assigned["another"] = 1
    return workers[0], workers[1]


def forget_load(cluster: FakeCluster) -> None:
    for entry in cluster.router._registry:
        entry.assigned.pop("another", None)


@on_event_loop
async def test_refused_work_is_offered_to_the_next_worker_at_once() -> None:
    async with running_cluster() as cluster:
        first, second = await workers_in_order(cluster)
        task, work = await cluster.start_request(first, max_tokens=1)
        first.send(WorkRefused(work.request_id, work.attempt, "it is full"))
        offer = await second.expect(PrefillAndDecode)
        assert (offer.may_wait, offer.work.attempt) == (False, 1)
        second.send_tokens(offer.work, RED, finish_reason="length")
        assert (await task).attempts == 1
        forget_load(cluster)


@on_event_loop
async def test_when_all_have_refused_the_least_loaded_one_queues_it() -> None:
    async with running_cluster() as cluster:
        first, second = await workers_in_order(cluster)
        task, work = await cluster.start_request(first, max_tokens=1)
        first.send(WorkRefused(work.request_id, work.attempt, "it is full"))
        offer = await second.expect(PrefillAndDecode)
        second.send(WorkRefused(work.request_id, work.attempt, "it is full, too"))
        offer = await first.expect(PrefillAndDecode)
        assert (offer.may_wait, offer.work.attempt) == (True, 1)
        first.send_tokens(offer.work, RED, finish_reason="length")
        await task
        forget_load(cluster)


@on_event_loop
async def test_the_only_worker_may_queue_it() -> None:
    async with running_cluster() as cluster:
        worker = await cluster.worker("unified")
        task = asyncio.create_task(cluster.client.generate("The red violin", max_tokens=1))
        offer = await worker.expect(PrefillAndDecode)
        assert offer.may_wait
        worker.send_tokens(offer.work, RED, finish_reason="length")
        await task


@on_event_loop
async def test_who_has_dropped_its_early_pull_is_not_waited_for() -> None:
    async with running_cluster() as cluster:
        prefill = await cluster.worker("prefill")
        first = await cluster.worker("decode", "first")
        task, work = await cluster.start_request(prefill, max_tokens=2)
        send_progress(prefill, work, 2)
        await first.expect(PullEarly)
        first.send(EarlyPullDropped(work.request_id, work.attempt))
        await first.sync()
        second = await cluster.worker("decode", "second")
        (entry,) = [entry for entry in cluster.router._registry if entry.engine_id == "first"]
        assert not entry.assigned
        entry.assigned["another"] = 1
        prefill.send_prefilled(work, VIOLIN)
        await finish(second, (await second.expect(Decode)).work)
        assert (await task).decode_worker == "second"
        del entry.assigned["another"]


@on_event_loop
async def test_a_request_for_which_all_queues_are_full_is_rejected() -> None:
    async with running_cluster() as cluster:
        worker = await cluster.worker("unified")
        task, work = await cluster.start_request(worker, max_tokens=1)
        worker.send(WorkRefused(work.request_id, work.attempt, "1024 requests are waiting"))
        await worker.expect(PrefillAndDecode)
        worker.send(WorkRefused(work.request_id, work.attempt, "1024 requests are waiting"))
        with pytest.raises(Rejected, match="no worker has room: 1024 requests are waiting"):
            await task


@on_event_loop
async def test_a_refusal_by_who_has_not_got_it_is_ignored() -> None:
    async with running_cluster() as cluster:
        first, second = await workers_in_order(cluster)
        task, work = await cluster.start_request(first, max_tokens=1)
        second.send(WorkRefused(work.request_id, work.attempt, "it is full"))
        await second.sync()
        first.send_tokens(work, RED, finish_reason="length")
        await task
        assert not second.pending(PrefillAndDecode)
        forget_load(cluster)


# ----------------------------------------------------------------------------------------- on_failure


@on_event_loop
async def test_on_failure_fail_does_not_try_again() -> None:
    async with running_cluster(on_failure="fail") as cluster:
        prefill, decode = await cluster.pair()
        task, work = await cluster.start_request(prefill, max_tokens=3)
        prefill.send_prefilled(work, VIOLIN)
        await decode.expect(Decode)
        decode.send(Left())
        with pytest.raises(Failed, match="the decode worker that had it is gone"):
            await task
        await prefill.expect(ReleaseLeases)
        await prefill.sync()
        assert not prefill.pending(Prefill)
        assert not prefill.pending(PrefillAndDecode)
