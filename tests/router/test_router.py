"""The router between scripted workers and real clients: each request ends once and leaves nothing behind."""

import asyncio
import socket
import threading
from typing import Any

import pytest
from fake_cluster import (
    DEADLINE_SECONDS,
    MODEL,
    STATS,
    FakeCluster,
    FakeWorker,
    expect_work,
    next_tokens,
    on_event_loop,
    output_ids,
    running_cluster,
)

from pdengine.client import Delta, Failed, Rejected, TimedOut
from pdengine.models.demo.facts import checkpoint_directory
from pdengine.router.config import RouterConfig
from pdengine.router.router import Router
from pdengine.transport import messages
from pdengine.transport.addresses import AddressError, split_tcp_address
from pdengine.transport.messages import (
    Abort,
    Aborted,
    Accepted,
    Cancel,
    Decode,
    Finished,
    Generate,
    GetStatus,
    Heartbeat,
    HeartbeatReply,
    LeasesRenewed,
    Leaving,
    Left,
    Load,
    Malformed,
    PeerJoined,
    PeerLeft,
    PeerLink,
    Prefill,
    PrefillAndDecode,
    Prefilled,
    Refused,
    ReleaseLeases,
    RenewLeases,
    SamplingParams,
    Status,
    StepTokens,
    TextPrompt,
    TokenPrompt,
    Usage,
    Welcome,
    WorkFailed,
)

BEGIN, VIOLIN, RED = 0, 512, 383
PROMPT_IDS = [BEGIN, 559, RED, VIOLIN]  # "The red violin"
OUTCOMES = (Finished, messages.Rejected, Aborted, messages.Failed)


def generate(tag: int, max_tokens: int = 4, timeout: float | None = None) -> Generate:
    return Generate(tag, TextPrompt("The red violin"), SamplingParams(max_tokens=max_tokens), timeout)


async def finish(worker: FakeWorker, task: "asyncio.Task[Any]") -> Any:
    """Let `worker` take the request that it gets next to its end, and return the completion."""
    work = (await expect_work(worker)).work
    worker.send_tokens(work, VIOLIN, finish_reason="stop")
    return await task


# ------------------------------------------------------------------------------------ the whole way


@on_event_loop
async def test_disaggregated_request() -> None:
    async with running_cluster() as cluster:
        prefill, decode = await cluster.pair()
        stream = cluster.client.stream("The red violin", max_tokens=3, temperature=0.5, seed=7)
        first_delta = asyncio.create_task(anext(stream))
        work = (await prefill.expect(Prefill)).work
        assert (work.attempt, work.prompt_ids, output_ids(work)) == (1, PROMPT_IDS, [])
        assert work.sampling == SamplingParams(max_tokens=3, temperature=0.5, seed=7)

        lease = prefill.send_prefilled(work, VIOLIN)
        assert await first_delta == Delta(" violin", [VIOLIN])  # nobody has decoded anything

        message = await decode.expect(Decode)
        assert message.lease == lease
        assert (message.work.attempt, output_ids(message.work)) == (1, [VIOLIN])
        decode.send_accepted(message.work)
        decode.send_pulled(message.work)
        decode.send_tokens(message.work, RED, VIOLIN, finish_reason="length")
        assert [delta async for delta in stream] == [
            Delta(" red", [RED]),
            Delta(" violin", [VIOLIN], finish_reason="length"),
        ]

        completion = stream.completion
        assert completion.text == " violin red violin"
        assert completion.finish_reason == "length"
        assert completion.usage == Usage(prompt_tokens=4, completion_tokens=3)
        assert (completion.prefill_worker, completion.decode_worker) == (prefill.engine_id, decode.engine_id)
        assert (completion.attempts, completion.transfer) == (1, STATS)
        await prefill.sync()
        await decode.sync()
        assert not prefill.pending(ReleaseLeases)  # the decode worker does that
        assert not decode.pending(Abort)


@on_event_loop
async def test_a_request_that_ends_with_its_first_token_is_not_decoded() -> None:
    async with running_cluster() as cluster:
        prefill, decode = await cluster.pair()
        task, work = await cluster.start_request(prefill)
        prefill.send_prefilled(work, 1, "stop")
        completion = await task
        assert (completion.text, completion.token_ids, completion.finish_reason) == ("", [1], "stop")
        await decode.sync()
        assert not decode.pending(Decode)


@on_event_loop
async def test_a_lease_that_comes_with_the_last_token_is_released() -> None:
    async with running_cluster() as cluster:
        prefill, decode = await cluster.pair()
        task, work = await cluster.start_request(prefill)
        lease = messages.KVLease(5, prefill.engine_id, [0], 4, duration=30.0)
        prefill.send(Prefilled(work.request_id, work.attempt, next_tokens(work, [(VIOLIN, "length")]), lease))
        await task
        await prefill.expect(ReleaseLeases, lease_ids=[5])
        await decode.sync()
        assert not decode.pending(Decode)


@pytest.mark.parametrize("role", ["unified", "prefill", "decode"])
@on_event_loop
async def test_a_worker_without_the_other_side_runs_whole_requests(role: messages.Role) -> None:
    async with running_cluster() as cluster:
        worker = await cluster.worker(role)
        task = asyncio.create_task(cluster.client.generate("The red violin"))
        work = (await worker.expect(PrefillAndDecode)).work
        worker.send_tokens(work, RED, VIOLIN, finish_reason="stop")
        completion = await task
        assert completion.text == " red"  # the token that stops is no part of the text
        assert completion.usage.completion_tokens == 2
        assert completion.prefill_worker == completion.decode_worker == worker.engine_id


@on_event_loop
async def test_a_seed_is_drawn_where_the_client_gives_none() -> None:
    async with running_cluster() as cluster:
        worker = await cluster.worker("unified")
        seeds = []
        for _ in range(2):
            task, work = await cluster.start_request(worker)
            seeds.append(work.sampling.seed)
            worker.send_tokens(work, VIOLIN, finish_reason="stop")
            await task
        assert None not in seeds
        assert seeds[0] != seeds[1]


@on_event_loop
async def test_text_that_is_held_back_comes_with_the_end() -> None:
    async with running_cluster() as cluster:
        worker = await cluster.worker("unified")
        task, work = await cluster.start_request(worker)
        first_byte_of_e_acute = cluster.router._intake._tokenizer.encode("é")[1]
        worker.send_tokens(work, VIOLIN, first_byte_of_e_acute, finish_reason="length")
        assert (await task).text == " violin\N{REPLACEMENT CHARACTER}"


@on_event_loop
async def test_tokens_of_many_requests_in_one_message() -> None:
    async with running_cluster() as cluster:
        worker = await cluster.worker("unified")
        started = [await cluster.start_request(worker, seed=seed) for seed in range(3)]
        updates = [
            messages.TokenUpdate(work.request_id, 1, 0, 0, VIOLIN - index, "length")
            for index, (_, work) in enumerate(started)
        ]
        worker.send(StepTokens(updates))
        for index, (task, _) in enumerate(started):
            assert (await task).token_ids == [VIOLIN - index]


# ----------------------------------------------------------------------------------------- fencing


@on_event_loop
async def test_a_position_that_comes_again_is_ignored() -> None:
    async with running_cluster() as cluster:
        worker = await cluster.worker("unified")
        task, work = await cluster.start_request(worker)
        worker.send_tokens(work, VIOLIN)
        worker.send_tokens(work, RED)  # position 0 again
        worker.send_tokens(work, VIOLIN, skip=1, finish_reason="length")
        completion = await task
        assert completion.token_ids == [VIOLIN, VIOLIN]
        assert completion.finish_reason == "length"


@on_event_loop
async def test_a_gap_between_positions_is_a_failed_attempt() -> None:
    async with running_cluster() as cluster:
        worker = await cluster.worker("unified")
        task, work = await cluster.start_request(worker)
        worker.send_tokens(work, VIOLIN)
        worker.send_tokens(work, RED, skip=2, finish_reason="stop")  # position 1 is lost
        again = (await worker.expect(PrefillAndDecode)).work
        assert (again.attempt, output_ids(again)) == (work.attempt + 1, [VIOLIN])
        worker.send_tokens(again, RED, finish_reason="stop")
        assert (await task).token_ids == [VIOLIN, RED]


@on_event_loop
async def test_the_request_of_a_holder_that_is_gone_is_done_again() -> None:
    """Its KV cache was not pulled yet: nobody may trust what is read from now on."""
    async with running_cluster() as cluster:
        prefill, decode = await cluster.pair()
        task, work = await cluster.start_request(prefill)
        prefill.send_prefilled(work, VIOLIN)
        decoding = (await decode.expect(Decode)).work
        decode.send_accepted(decoding)
        prefill.send(Left())
        await decode.expect(Abort, request_id=work.request_id)
        again = (await decode.expect(PrefillAndDecode)).work
        assert (again.attempt, output_ids(again)) == (work.attempt + 1, [VIOLIN])
        decode.send_tokens(again, RED, finish_reason="stop")
        assert (await task).token_ids == [VIOLIN, RED]


@on_event_loop
async def test_workers_that_fall_silent_together_cost_one_attempt() -> None:
    async with running_cluster(silence_seconds=0.6) as cluster:
        silent = [await cluster.worker("unified") for _ in range(3)]
        task, work = await cluster.start_request(silent[0])
        talking = await cluster.worker("unified")
        heartbeats = asyncio.create_task(send_heartbeats(talking))
        again = (await talking.expect(PrefillAndDecode)).work
        assert (again.request_id, again.attempt) == (work.request_id, 2)
        talking.send_tokens(again, VIOLIN, finish_reason="stop")
        assert (await task).attempts == 2
        heartbeats.cancel()


@on_event_loop
async def test_tokens_and_failures_of_an_older_attempt_are_ignored() -> None:
    async with running_cluster() as cluster:
        worker = await cluster.worker("unified")
        task, old = await cluster.start_request(worker)
        worker.send(WorkFailed(old.request_id, old.attempt, "out of blocks", retry=True))
        new = (await worker.expect(PrefillAndDecode)).work
        assert new.attempt == old.attempt + 1
        worker.send_tokens(old, RED)
        worker.send(WorkFailed(old.request_id, old.attempt, "again", retry=False))
        worker.send_tokens(new, VIOLIN, finish_reason="length")
        completion = await task
        assert (completion.token_ids, completion.attempts) == ([VIOLIN], 2)


@on_event_loop
async def test_a_late_prefill_gets_its_lease_back() -> None:
    async with running_cluster() as cluster:
        prefill, _ = await cluster.pair()
        task, work = await cluster.start_request(prefill)
        task.cancel()
        await prefill.expect(Abort, request_id=work.request_id)
        lease = prefill.send_prefilled(work, VIOLIN)
        assert lease is not None
        await prefill.expect(ReleaseLeases, lease_ids=[lease.lease_id])


# ----------------------------------------------------------------------------------------- retries


@on_event_loop
async def test_a_retry_carries_the_tokens_over_and_releases_the_lease() -> None:
    async with running_cluster() as cluster:
        prefill, decode = await cluster.pair()
        task, work = await cluster.start_request(prefill, max_tokens=3)
        lease = prefill.send_prefilled(work, VIOLIN)
        assert lease is not None
        decoding = (await decode.expect(Decode)).work
        decode.send_accepted(decoding)
        decode.send_tokens(decoding, RED)
        decode.send(WorkFailed(decoding.request_id, decoding.attempt, "the pull failed", retry=True))

        await prefill.expect(ReleaseLeases, lease_ids=[lease.lease_id])
        again = (await prefill.expect(Prefill)).work
        assert (again.attempt, output_ids(again), again.sampling) == (2, [VIOLIN, RED], work.sampling)
        prefill.send_prefilled(again, VIOLIN, "length")
        completion = await task
        assert completion.token_ids == [VIOLIN, RED, VIOLIN]
        assert completion.attempts == 2


@on_event_loop
async def test_a_request_fails_after_its_last_attempt() -> None:
    async with running_cluster(max_attempts=2) as cluster:
        worker = await cluster.worker("unified")
        task, work = await cluster.start_request(worker)
        worker.send(WorkFailed(work.request_id, 1, "first reason", retry=True))
        await worker.expect(PrefillAndDecode)
        worker.send(WorkFailed(work.request_id, 2, "second reason", retry=True))
        with pytest.raises(Failed, match="after 2 attempts: second reason"):
            await task


@on_event_loop
async def test_a_failure_for_good_is_not_tried_again() -> None:
    async with running_cluster() as cluster:
        worker = await cluster.worker("unified")
        task, work = await cluster.start_request(worker)
        worker.send(WorkFailed(work.request_id, 1, "the model gave NaN", retry=False))
        with pytest.raises(Failed, match="the model gave NaN"):
            await task
        await worker.sync()
        assert not worker.pending(PrefillAndDecode)


@on_event_loop
async def test_a_prefill_worker_that_gives_no_lease_is_a_failed_attempt() -> None:
    async with running_cluster(max_attempts=1) as cluster:
        prefill, _ = await cluster.pair()
        task, work = await cluster.start_request(prefill)
        prefill.send(Prefilled(work.request_id, 1, next_tokens(work, [(VIOLIN, None)]), None))
        with pytest.raises(Failed, match="no lease"):
            await task


@on_event_loop
async def test_a_prefill_worker_that_sends_other_tokens_is_a_failed_attempt() -> None:
    async with running_cluster(max_attempts=1) as cluster:
        prefill, _ = await cluster.pair()
        task, work = await cluster.start_request(prefill)
        lease = messages.KVLease(5, prefill.engine_id, [0], 4, duration=30.0)
        prefill.send(Prefilled(work.request_id, 1, [], lease))
        await prefill.expect(ReleaseLeases, lease_ids=[5])
        with pytest.raises(Failed, match="other tokens"):
            await task


@on_event_loop
async def test_a_silent_worker_is_given_up() -> None:
    async with running_cluster(silence_seconds=0.5) as cluster:
        silent = await cluster.worker("unified", "silent")
        task, work = await cluster.start_request(silent)
        talking = await cluster.worker("unified", "talking")
        heartbeats = asyncio.create_task(send_heartbeats(talking))
        await talking.expect(PeerLeft, engine_id="silent")
        again = (await talking.expect(PrefillAndDecode)).work
        assert (again.request_id, again.attempt) == (work.request_id, 2)
        silent.send_tokens(work, RED, finish_reason="stop")  # it wakes up: nobody listens
        silent.send(Heartbeat(silent.hello.load))
        await silent.expect(HeartbeatReply, known=False)
        talking.send_tokens(again, VIOLIN, finish_reason="stop")
        assert (await task).token_ids == [VIOLIN]
        heartbeats.cancel()


async def send_heartbeats(worker: FakeWorker) -> None:
    while True:
        worker.send(Heartbeat(worker.hello.load))
        await asyncio.sleep(0.1)


@on_event_loop
async def test_a_worker_that_cannot_be_reached_is_given_up_at_once() -> None:
    async with running_cluster() as cluster:
        dead, living = await cluster.worker("unified", "dead"), await cluster.worker("unified", "living")
        (entry,) = [entry for entry in cluster.router._registry if entry.engine_id == "living"]
        entry.assigned["another"] = 1  # so that the dead one comes first
        await cluster.drop_worker(dead)
        task = asyncio.create_task(cluster.client.generate("The red violin"))
        work = (await living.expect(PrefillAndDecode)).work
        assert work.attempt == 2
        living.send_tokens(work, RED, finish_reason="stop")
        assert (await task).token_ids == [RED]
        del entry.assigned["another"]


@on_event_loop
async def test_what_a_worker_had_that_left_is_done_elsewhere() -> None:
    async with running_cluster() as cluster:
        leaver, other = await cluster.worker("unified"), await cluster.worker("unified")
        task, work = await cluster.start_request(leaver)
        leaver.send_tokens(work, RED)
        leaver.send(Left())
        await other.expect(PeerLeft, engine_id=leaver.engine_id)
        again = (await other.expect(PrefillAndDecode)).work
        assert output_ids(again) == [RED]
        other.send_tokens(again, VIOLIN, finish_reason="stop")
        assert (await task).attempts == 2


@on_event_loop
async def test_the_last_worker_leaves() -> None:
    async with running_cluster() as cluster:
        worker = await cluster.worker("unified")
        task, _ = await cluster.start_request(worker)
        worker.send(Left())
        with pytest.raises(Failed, match="no worker"):
            await task


@on_event_loop
async def test_a_decode_worker_that_leaves_while_the_prompt_is_computed() -> None:
    async with running_cluster() as cluster:
        prefill, decode = await cluster.pair()
        task, work = await cluster.start_request(prefill)
        decode.send(Left())
        await prefill.expect(PeerLeft, engine_id=decode.engine_id)
        lease = prefill.send_prefilled(work, VIOLIN)
        assert lease is not None
        await prefill.expect(ReleaseLeases, lease_ids=[lease.lease_id])
        whole = (await prefill.expect(PrefillAndDecode)).work
        assert output_ids(whole) == [VIOLIN]
        prefill.send_tokens(whole, RED, finish_reason="length")
        assert (await task).token_ids == [VIOLIN, RED]


@on_event_loop
async def test_a_leaving_worker_finishes_but_gets_no_new_work() -> None:
    async with running_cluster() as cluster:
        leaving, other = await cluster.worker("unified"), await cluster.worker("unified")
        task, work = await cluster.start_request(leaving)
        leaving.send(Leaving())
        await leaving.sync()
        tasks = [asyncio.create_task(cluster.client.generate("The")) for _ in range(3)]
        for _ in tasks:
            new = (await other.expect(PrefillAndDecode)).work
            other.send_tokens(new, VIOLIN, finish_reason="stop")
        await asyncio.gather(*tasks)
        leaving.send_tokens(work, VIOLIN, finish_reason="stop")
        assert (await task).attempts == 1
        await leaving.sync()
        assert not leaving.pending(PrefillAndDecode)


# ------------------------------------------------------------------------------------------ leases


@on_event_loop
async def test_the_router_renews_a_lease_until_decode_accepts() -> None:
    async with running_cluster() as cluster:
        prefill, decode = await cluster.pair()
        task, work = await cluster.start_request(prefill)
        lease = prefill.send_prefilled(work, VIOLIN)
        assert lease is not None
        decoding = (await decode.expect(Decode)).work
        for _ in range(2):
            renewal = await prefill.expect(RenewLeases, lease_ids=[lease.lease_id])
            prefill.send(LeasesRenewed(renewal.sequence, [lease.lease_id], []))
        decode.send_accepted(decoding)
        await decode.sync()
        await prefill.sync()
        prefill.inbox.clear()

        # One more lease: when the router renews that one, it has looked at both.
        other_task, other_work = await cluster.start_request(prefill)
        other_lease = prefill.send_prefilled(other_work, VIOLIN)
        assert other_lease is not None
        renewal = await prefill.expect(RenewLeases)
        assert renewal.lease_ids == [other_lease.lease_id]

        for running in (decoding, (await decode.expect(Decode)).work):
            decode.send_pulled(running)
            decode.send_tokens(running, RED, finish_reason="stop")
        await asyncio.gather(task, other_task)


@on_event_loop
async def test_a_lost_lease_is_another_attempt() -> None:
    async with running_cluster() as cluster:
        prefill, decode = await cluster.pair()
        task, work = await cluster.start_request(prefill)
        lease = prefill.send_prefilled(work, VIOLIN)
        assert lease is not None
        await decode.expect(Decode)
        renewal = await prefill.expect(RenewLeases)
        prefill.send(LeasesRenewed(renewal.sequence, [], [lease.lease_id]))
        await decode.expect(Abort, request_id=work.request_id)
        again = (await prefill.expect(Prefill)).work
        assert (again.attempt, output_ids(again)) == (2, [VIOLIN])
        prefill.send_prefilled(again, RED, "length")
        assert (await task).token_ids == [VIOLIN, RED]


@on_event_loop
async def test_a_lease_that_decode_has_taken_over_is_not_the_routers_to_lose() -> None:
    async with running_cluster() as cluster:
        prefill, decode = await cluster.pair()
        task, work = await cluster.start_request(prefill)
        lease = prefill.send_prefilled(work, VIOLIN)
        assert lease is not None
        decoding = (await decode.expect(Decode)).work
        decode.send_accepted(decoding)
        await decode.sync()
        prefill.send(LeasesRenewed(0, [], [lease.lease_id, 99]))
        await prefill.sync()
        decode.send_pulled(decoding)
        decode.send_tokens(decoding, RED, finish_reason="stop")
        assert (await task).attempts == 1


# ------------------------------------------------------------------------- cancel, timeout, clients


@pytest.fixture(params=["prefill", "decode", "accepted", "pulled"])
def stage(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Stage:
    """A request that has come as far as `stage` says, and what the workers must hear when it is given up."""

    def __init__(self, cluster: FakeCluster, prefill: FakeWorker, decode: FakeWorker, stage: str) -> None:
        self.cluster, self.prefill, self.decode, self.stage = cluster, prefill, decode, stage

    async def reach(self) -> messages.Work:
        work = (await self.prefill.expect(Prefill)).work
        if self.stage == "prefill":
            return work
        self.prefill.send_prefilled(work, VIOLIN)
        work = (await self.decode.expect(Decode)).work
        if self.stage in ("accepted", "pulled"):
            self.decode.send_accepted(work)
        if self.stage == "pulled":
            self.decode.send_pulled(work)
        await self.decode.sync()
        return work

    async def expect_given_up(self, work: messages.Work) -> None:
        worker = self.prefill if self.stage == "prefill" else self.decode
        await worker.expect(Abort, request_id=work.request_id)
        if self.stage in ("decode", "accepted"):
            await self.prefill.expect(ReleaseLeases, lease_ids=[1])
        await self.prefill.sync()
        assert not self.prefill.pending(ReleaseLeases)


@on_event_loop
async def test_cancel(stage: str) -> None:
    async with running_cluster() as cluster:
        scene = Stage(cluster, *await cluster.pair(), stage)
        client = cluster.raw_client()
        client.send(generate(1))
        work = await scene.reach()
        client.send(Cancel(1))
        assert (await client.expect(Aborted)).cause == "cancelled"
        await scene.expect_given_up(work)
        client.send(Cancel(1))  # too late, and harmless
        client.send(GetStatus(2))
        await client.expect(Status, requests=0)
        assert not [message for message in client.inbox if isinstance(message, OUTCOMES)]


@on_event_loop
async def test_timeout(stage: str) -> None:
    async with running_cluster() as cluster:
        scene = Stage(cluster, *await cluster.pair(), stage)
        task = asyncio.create_task(cluster.client.generate("The red violin", timeout=0.3))
        work = await scene.reach()
        with pytest.raises(TimedOut):
            await task
        await scene.expect_given_up(work)


@pytest.mark.parametrize("stage", ["decode", "accepted", "pulled"], indirect=True)
@on_event_loop
async def test_a_client_that_is_gone(stage: str) -> None:
    async with running_cluster() as cluster:
        scene = Stage(cluster, *await cluster.pair(), stage)
        client = cluster.raw_client()
        client.send(generate(1))
        work = await scene.reach()
        await cluster.drop_client(client)
        scene.decode.send_tokens(work, RED)  # it is noticed when there is something to say
        await scene.expect_given_up(work)


@pytest.mark.parametrize("end", ["Left", "shutdown", "lost lease"])
@on_event_loop
async def test_a_client_that_is_gone_when_several_of_its_requests_end(end: str) -> None:
    """The first outcome that cannot be sent ends them all, while the router is still going through them."""
    async with running_cluster(max_attempts=1) as cluster:
        prefill, decode = await cluster.pair()
        client = cluster.raw_client()
        leases = []
        for tag in range(3):
            client.send(generate(tag))
            lease = prefill.send_prefilled((await prefill.expect(Prefill)).work, VIOLIN)
            assert lease is not None
            leases.append(lease.lease_id)
            await decode.expect(Decode)
        await cluster.drop_client(client)
        if end == "shutdown":
            await cluster.stop()
            assert cluster.running.cancelled()
            assert len(cluster.router._ledger) == 0
            return
        if end == "Left":
            decode.send(Left())
        else:
            prefill.send(LeasesRenewed(0, [], leases))
        await prefill.expect(ReleaseLeases)
        await prefill.sync()


@on_event_loop
async def test_cancel_while_the_prompt_is_tokenized(monkeypatch: pytest.MonkeyPatch) -> None:
    release, started = threading.Event(), threading.Event()

    def slow_tokenize(*_: object) -> list[int]:
        started.set()
        assert release.wait(DEADLINE_SECONDS)
        return PROMPT_IDS

    monkeypatch.setattr("pdengine.router.intake.tokenize", slow_tokenize)
    async with running_cluster() as cluster:
        worker = await cluster.worker("unified")
        client = cluster.raw_client()
        client.send(generate(1))
        assert await asyncio.to_thread(started.wait, DEADLINE_SECONDS)
        client.send(Cancel(1))
        await client.expect(Aborted)
        release.set()
        await worker.sync()
        assert not worker.pending(PrefillAndDecode)
        assert not client.pending(Accepted)


@on_event_loop
async def test_a_tokenizer_that_breaks_fails_the_request_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> list[int]:
        raise RuntimeError("out of luck")

    async with running_cluster() as cluster:
        worker = await cluster.worker("unified")
        with monkeypatch.context() as patch:
            patch.setattr("pdengine.router.intake.tokenize", broken)
            with pytest.raises(Failed, match="could not be tokenized: out of luck"):
                await cluster.client.generate("The")
        task = asyncio.create_task(cluster.client.generate("The"))
        assert (await finish(worker, task)).finish_reason == "stop"


@on_event_loop
async def test_a_tag_in_use_is_rejected() -> None:
    async with running_cluster() as cluster:
        worker = await cluster.worker("unified")
        client = cluster.raw_client()
        client.send(generate(1))
        await client.expect(Accepted, tag=1)
        client.send(generate(1))
        rejected = await client.expect(messages.Rejected)
        assert (rejected.tag, rejected.field) == (1, "tag")
        work = (await worker.expect(PrefillAndDecode)).work
        worker.send_tokens(work, VIOLIN, finish_reason="stop")
        await client.expect(Finished, tag=1)
        client.send(generate(1))  # free again
        await client.expect(Accepted, tag=1)
        client.send(Cancel(1))
        await client.expect(Aborted, tag=1)


@on_event_loop
async def test_the_same_tag_of_two_clients_are_two_requests() -> None:
    async with running_cluster() as cluster:
        worker = await cluster.worker("unified")
        clients = [cluster.raw_client(), cluster.raw_client()]
        for client in clients:
            client.send(generate(1))
            await client.expect(Accepted)
        clients[0].send(Cancel(1))
        await clients[0].expect(Aborted)
        aborted = await worker.expect(Abort)
        works = [(await worker.expect(PrefillAndDecode)).work for _ in clients]
        (survivor,) = [work for work in works if work.request_id != aborted.request_id]
        worker.send_tokens(survivor, VIOLIN, finish_reason="stop")
        await clients[1].expect(Finished)


@on_event_loop
async def test_requests_without_workers_fail_and_those_that_do_not_fit_are_rejected() -> None:
    async with running_cluster() as cluster:
        with pytest.raises(Failed, match="no worker has joined") as failed:
            await cluster.client.generate("The")
        assert failed.value.retry
        await cluster.worker("unified", max_context=10)
        with pytest.raises(Rejected, match="maximum context length is 10") as caught:
            await cluster.client.generate("The", max_tokens=9)
        assert caught.value.field == "max_tokens"
        with pytest.raises(Rejected, match="temperature") as caught:
            await cluster.client.generate("The", temperature=-1.0, timeout=5.0)
        assert caught.value.field == "temperature"


@on_event_loop
async def test_shutdown_tells_every_client() -> None:
    async with running_cluster() as cluster:
        worker = await cluster.worker("unified")
        client = cluster.raw_client()
        for tag in range(3):
            client.send(generate(tag, timeout=3600.0))
        works = [(await worker.expect(PrefillAndDecode)).work for _ in range(3)]
        await cluster.stop()
        for tag in range(3):
            assert "shutting down" in (await client.expect(messages.Failed, tag=tag)).reason
        for work in works:
            await worker.expect(Abort, request_id=work.request_id)
        assert len(cluster.router._ledger) == 0


# ---------------------------------------------------------------------------------------- workers


@pytest.mark.parametrize(
    ("field", "theirs"), [("model", "another"), ("dtype", "bfloat16"), ("block_size", 32), ("protocol", 99)]
)
@on_event_loop
async def test_a_worker_that_does_not_match_is_refused(field: str, theirs: Any) -> None:
    async with running_cluster() as cluster:
        await cluster.worker("prefill")
        stranger = cluster.new_worker("decode", **{field: theirs})
        stranger.send(stranger.hello)
        refused = await stranger.expect(Refused)
        assert (refused.field, refused.theirs) == (field, str(theirs))
        if field == "model":
            assert refused.ours == MODEL
        assert [worker.role for worker in (await cluster.client.status()).workers] == ["prefill"]


@on_event_loop
async def test_workers_hear_of_each_other() -> None:
    async with running_cluster(heartbeat_seconds=0.25) as cluster:
        first = cluster.new_worker("prefill")
        welcome = await first.join()
        assert (welcome.peers, welcome.heartbeat_interval) == ([], 0.25)
        second = cluster.new_worker("decode")
        assert (await second.join()).peers == [first.hello.peer]
        await first.expect(PeerJoined, peer=second.hello.peer)
        await second.sync()
        assert not second.pending(PeerJoined)

        second.send(PeerLink(first.engine_id, lanes="memory"))
        second.send(PeerLink("nobody", lanes="memory"))
        await second.sync()
        status = {worker.engine_id: worker for worker in (await cluster.client.status()).workers}
        assert status[second.engine_id].links == {first.engine_id: "memory"}
        second.send(PeerLink(first.engine_id, error="unreachable"))
        await second.sync()
        status = {worker.engine_id: worker for worker in (await cluster.client.status()).workers}
        assert status[second.engine_id].links == {}


@on_event_loop
async def test_status_shows_the_load_of_the_last_heartbeat() -> None:
    async with running_cluster() as cluster:
        worker = await cluster.worker("unified")
        load = Load(num_blocks=64, free_blocks=3, running=2, waiting=1)
        worker.send(Heartbeat(load))
        await worker.expect(HeartbeatReply)
        (status,) = (await cluster.client.status()).workers
        assert status.load == load


@on_event_loop
async def test_a_second_hello_on_the_same_connection_changes_nothing() -> None:
    async with running_cluster() as cluster:
        worker = await cluster.worker("unified")
        task, work = await cluster.start_request(worker)
        worker.send(worker.hello)
        await worker.sync()
        assert not worker.pending(Welcome)
        worker.send_tokens(work, VIOLIN, finish_reason="stop")
        assert (await task).attempts == 1


@on_event_loop
async def test_a_worker_that_connects_anew_starts_afresh() -> None:
    async with running_cluster() as cluster:
        worker = await cluster.worker("unified", "the-same")
        bystander = await cluster.worker("decode")
        task, work = await cluster.start_request(worker)
        worker.send_tokens(work, RED)
        await worker.sync()

        again = cluster.new_worker("unified", "the-same")
        again.send(Heartbeat(again.hello.load))
        reply = await again.expect(HeartbeatReply)
        assert not reply.known
        welcome = await again.join()
        assert welcome.epoch == reply.epoch
        await bystander.expect(PeerLeft, engine_id="the-same")
        await bystander.expect(PeerJoined, peer=again.hello.peer)
        # The request went to the only other worker meanwhile, with its tokens.
        carried = (await bystander.expect(PrefillAndDecode)).work
        assert output_ids(carried) == [RED]
        bystander.send_tokens(carried, VIOLIN, finish_reason="stop")
        assert (await task).attempts == 2
        assert len((await cluster.client.status()).workers) == 2


@on_event_loop
async def test_a_worker_that_never_said_hello_is_not_listened_to() -> None:
    async with running_cluster() as cluster:
        worker = await cluster.worker("unified")
        task, work = await cluster.start_request(worker)
        stranger = cluster.new_worker("unified")
        stranger.send_tokens(work, RED, finish_reason="stop")
        stranger.send(Left())
        stranger.send(Heartbeat(stranger.hello.load))
        await stranger.expect(HeartbeatReply, known=False)
        worker.send_tokens(work, VIOLIN, finish_reason="stop")
        assert (await task).token_ids == [VIOLIN]


# ------------------------------------------------------------------------------------------ damage


@pytest.fixture
def garbage() -> list[bytes]:
    return [b"", b"\xff", b"\xc1" * 100, b"\x80\x04\x95", b"\x81\xa4type\xa4Nope", bytes(range(256)) * 50]


@on_event_loop
async def test_random_bytes_do_no_harm(garbage: list[bytes]) -> None:
    async with running_cluster() as cluster:
        worker = await cluster.worker("unified")
        task, work = await cluster.start_request(worker)
        client = cluster.raw_client()
        for peer in (client, worker):
            for frame in garbage:
                peer.socket._socket.send(frame)
                await peer.expect(Malformed)
            peer.socket._socket.send_multipart([b"", b"two frames"])
            await peer.expect(Malformed)
        assert cluster.router._clients.refused_messages["malformed"] == len(garbage) + 1
        assert cluster.router._workers.refused_messages["malformed"] == len(garbage) + 1
        worker.send_tokens(work, VIOLIN, finish_reason="stop")
        assert (await task).attempts == 1


@on_event_loop
async def test_strangers_that_do_not_speak_zeromq_do_no_harm(garbage: list[bytes]) -> None:
    async with running_cluster() as cluster:
        worker = await cluster.worker("unified")
        for address in (cluster.router.client_address, cluster.router.worker_address):
            for frame in garbage:
                with socket.create_connection(split_tcp_address(address)) as connection:
                    connection.sendall(frame * 10)
        task = asyncio.create_task(cluster.client.generate("The"))
        assert (await finish(worker, task)).attempts == 1


@pytest.mark.parametrize("token_id", [-1, 2**31, 2**32, 2**63])
@on_event_loop
async def test_token_ids_that_no_tokenizer_takes_are_malformed(token_id: int) -> None:
    async with running_cluster() as cluster:
        worker = await cluster.worker("unified")
        task, work = await cluster.start_request(worker)
        worker.send_tokens(work, token_id)
        await worker.expect(Malformed)
        worker.send_tokens(work, VIOLIN, finish_reason="stop")
        assert (await task).token_ids == [VIOLIN]


@on_event_loop
async def test_a_client_prompt_of_huge_numbers_is_rejected() -> None:
    async with running_cluster() as cluster:
        await cluster.worker("unified")
        client = cluster.raw_client()
        client.send(Generate(1, TokenPrompt([2**64 - 1])))
        assert (await client.expect(messages.Rejected)).field == "prompt"


@pytest.mark.parametrize("port", ["client", "worker"])
def test_a_port_in_use_is_an_address_error(port: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        addresses: dict[str, Any] = {f"{side}_address": "tcp://127.0.0.1:0" for side in ("client", "worker")}
        with pytest.raises(AddressError, match=address):
            Router(RouterConfig(checkpoint_directory(), **{**addresses, f"{port}_address": address}))
