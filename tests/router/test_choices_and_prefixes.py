"""The router between scripted workers: several answers to one prompt, and what prefix caches have of it."""

import asyncio
from typing import Any

import pytest
from fake_cluster import (
    BLOCK_SIZE,
    FakeCluster,
    FakeWorker,
    names_of,
    next_tokens,
    on_event_loop,
    output_ids,
    running_cluster,
)

from pdengine.client import Completion, Delta, Rejected
from pdengine.models.fingerprint import model_fingerprint
from pdengine.models.prefix_hashes import prefix_root
from pdengine.router.prefixes import PromptPrefix, name_prefix
from pdengine.transport.messages import (
    Abort,
    CacheUpdate,
    Choice,
    Decode,
    KVLease,
    Left,
    Malformed,
    Prefill,
    PrefillAndDecode,
    Prefilled,
    PrefixHit,
    PromptProgress,
    PullEarly,
    ReleaseLeases,
    Reserve,
    Reserved,
    StepTokens,
    Usage,
    Work,
    WorkFailed,
    WorkRefused,
)

THE, RED, VIOLIN = 559, 383, 512
LONG = [THE] * (3 * BLOCK_SIZE + 2)  # three full blocks and a rest of two tokens

Answer = asyncio.Task[Completion]


def ask(cluster: FakeCluster, prompt: Any = "The red violin", **options: Any) -> Answer:
    return asyncio.create_task(cluster.client.generate(prompt, **options))


async def decoding(prefill: FakeWorker, decode: FakeWorker) -> Work:
    """A request comes as far as its decode worker; the first token of every answer is the same."""
    prefill.send_prefilled((await prefill.expect(Prefill)).work, VIOLIN)
    work = (await decode.expect(Decode)).work
    decode.send_accepted(work)
    decode.send_pulled(work)
    return work


# --------------------------------------------------------------------------------- several answers


@on_event_loop
async def test_answers_end_one_by_one_and_the_request_with_the_last() -> None:
    async with running_cluster() as cluster:
        prefill, decode = await cluster.pair()
        stream = cluster.client.stream("The red violin", n=3, max_tokens=3, priority=-4)
        first = asyncio.ensure_future(anext(stream))
        work = (await prefill.expect(Prefill)).work
        assert work.choices == [Choice(0, []), Choice(1, []), Choice(2, [])]
        assert work.priority == -4
        prefill.send_first_tokens(work, [(VIOLIN, None), (1, "stop"), (RED, None)])
        assert await first == Delta(" violin", [VIOLIN])

        work = (await decode.expect(Decode)).work
        assert work.choices == [Choice(0, [VIOLIN]), Choice(2, [RED])]
        decode.send_accepted(work)
        decode.send_pulled(work)
        decode.send(StepTokens(next_tokens(work, [(RED, None), (VIOLIN, "stop")])))
        decode.send_tokens(work, RED, skip=1, choice=2)  # of an answer that has ended
        decode.send_tokens(work, RED, choice=0)  # a position that comes again
        decode.send_tokens(work, VIOLIN, skip=1, choice=0, finish_reason="length")
        assert [delta async for delta in stream] == [
            Delta("", [1], 1, "stop"),
            Delta(" red", [RED], 2),
            Delta(" red", [RED], 0),
            Delta("", [VIOLIN], 2, "stop"),
            Delta(" violin", [VIOLIN], 0, "length"),
        ]
        completion = stream.completion
        assert [choice.text for choice in completion.choices] == [" violin red violin", "", " red"]
        assert [choice.finish_reason for choice in completion.choices] == ["length", "stop", "stop"]
        assert [choice.index for choice in completion.choices] == [0, 1, 2]
        assert (completion.text, completion.token_ids) == (" violin red violin", [VIOLIN, RED, VIOLIN])
        assert completion.usage == Usage(prompt_tokens=4, completion_tokens=6)
        assert completion.attempts == 1


@on_event_loop
async def test_answers_that_all_end_with_their_first_token_are_not_decoded() -> None:
    async with running_cluster() as cluster:
        prefill, decode = await cluster.pair()
        answer = ask(cluster, n=2)
        prefill.send_prefilled((await prefill.expect(Prefill)).work, 1, "stop")
        assert [choice.token_ids for choice in (await answer).choices] == [[1], [1]]
        await decode.sync()
        assert not decode.pending(Decode)


@on_event_loop
async def test_each_answer_has_its_own_unfinished_character() -> None:
    async with running_cluster() as cluster:
        worker = await cluster.worker("unified")
        answer = ask(cluster, n=2)
        work = (await worker.expect(PrefillAndDecode)).work
        first_byte, second_byte = cluster.router._intake._tokenizer.encode("é")[1:]
        for choice in (0, 1):
            worker.send_tokens(work, first_byte, choice=choice)
        worker.send_tokens(work, second_byte, skip=1, choice=0, finish_reason="length")
        worker.send_tokens(work, VIOLIN, skip=1, choice=1, finish_reason="length")
        texts = [choice.text for choice in (await answer).choices]
        assert texts == ["é", "\N{REPLACEMENT CHARACTER} violin"]


@pytest.mark.parametrize("index", [-1, 2, 2**40])
@on_event_loop
async def test_tokens_of_an_answer_that_nobody_asked_for_are_ignored(index: int) -> None:
    async with running_cluster() as cluster:
        worker = await cluster.worker("unified")
        answer = ask(cluster, n=2, max_tokens=1)
        work = (await worker.expect(PrefillAndDecode)).work
        stray = Work(work.request_id, work.attempt, [], [Choice(index, [])], work.sampling)
        worker.send_tokens(stray, RED, finish_reason="length")
        worker.send(StepTokens(next_tokens(work, [(VIOLIN, "length")] * 2)))
        assert (await answer).usage.completion_tokens == 2


@on_event_loop
async def test_first_tokens_that_are_not_those_of_the_unfinished_answers_cost_an_attempt() -> None:
    async with running_cluster() as cluster:
        prefill, _ = await cluster.pair()
        answer = ask(cluster, n=2)
        work = (await prefill.expect(Prefill)).work
        one = Work(work.request_id, work.attempt, work.prompt_ids, [Choice(1, [])], work.sampling)
        lease = prefill.send_prefilled(one, RED)
        assert lease is not None
        await prefill.expect(ReleaseLeases, lease_ids=[lease.lease_id])
        again = (await prefill.expect(Prefill)).work
        assert again.attempt == work.attempt + 1
        prefill.send_prefilled(again, VIOLIN, "length")
        assert [choice.token_ids for choice in (await answer).choices] == [[VIOLIN], [VIOLIN]]


@on_event_loop
async def test_too_many_answers_are_rejected_at_the_door() -> None:
    async with running_cluster() as cluster:
        await cluster.worker("unified")
        with pytest.raises(Rejected, match="n is 1000000000, it must be at least 1 and at most 128"):
            await ask(cluster, n=10**9)


# ------------------------------------------------------------------------------- several, retried


@on_event_loop
async def test_answers_that_differ_are_continued_by_one_worker_that_does_all() -> None:
    async with running_cluster() as cluster:
        prefill, decode = await cluster.pair()
        answer = ask(cluster, n=3, max_tokens=4)
        work = await decoding(prefill, decode)
        decode.send_tokens(work, RED, choice=0)
        decode.send_tokens(work, 1, choice=1, finish_reason="stop")
        decode.send(WorkFailed(work.request_id, work.attempt, "out of luck", retry=True))
        await decode.expect(Abort)
        (busy,) = [entry for entry in cluster.router._registry if entry.assigned]
        worker = prefill if busy.engine_id == prefill.engine_id else decode
        again = (await worker.expect(PrefillAndDecode)).work
        assert again.attempt == 2
        assert again.choices == [Choice(0, [VIOLIN, RED]), Choice(2, [VIOLIN])]
        assert again.prefix == work.prefix
        worker.send_tokens(work, 5, skip=1, choice=0)  # of the older attempt
        worker.send_tokens(again, RED, choice=0, finish_reason="stop")
        worker.send_tokens(again, RED, choice=2, finish_reason="stop")
        completion = await answer
        assert [choice.token_ids for choice in completion.choices] == [
            [VIOLIN, RED, RED],
            [VIOLIN, 1],
            [VIOLIN, RED],
        ]
        assert (completion.attempts, completion.transfer) == (2, None)
        assert completion.prefill_worker == completion.decode_worker == worker.engine_id


@on_event_loop
async def test_the_one_answer_that_is_left_is_prefilled_again() -> None:
    async with running_cluster() as cluster:
        prefill, decode = await cluster.pair()
        answer = ask(cluster, n=2, max_tokens=3)
        work = await decoding(prefill, decode)
        decode.send_tokens(work, 1, choice=0, finish_reason="stop")
        decode.send(WorkFailed(work.request_id, work.attempt, "out of luck", retry=True))
        again = (await prefill.expect(Prefill)).work
        assert again.choices == [Choice(1, [VIOLIN])]
        prefill.send_prefilled(again, RED)
        last = (await decode.expect(Decode)).work
        assert last.choices == [Choice(1, [VIOLIN, RED])]
        decode.send_tokens(last, VIOLIN, finish_reason="length")
        assert [c.token_ids for c in (await answer).choices] == [[VIOLIN, 1], [VIOLIN, RED, VIOLIN]]


@on_event_loop
async def test_answers_without_a_token_are_begun_anew() -> None:
    async with running_cluster() as cluster:
        prefill, _ = await cluster.pair()
        answer = ask(cluster, n=2)
        work = (await prefill.expect(Prefill)).work
        prefill.send(WorkFailed(work.request_id, work.attempt, "out of luck", retry=True))
        again = (await prefill.expect(Prefill)).work
        assert again.choices == [Choice(0, []), Choice(1, [])]
        prefill.send_prefilled(again, VIOLIN, "length")
        assert (await answer).attempts == 2


@on_event_loop
async def test_a_refused_decode_gives_its_lease_back() -> None:
    """As by a worker that runs fewer requests at once than answers are asked for."""
    async with running_cluster() as cluster:
        prefill, decode = await cluster.pair()
        answer = ask(cluster, n=2, max_tokens=2)
        lease = prefill.send_prefilled((await prefill.expect(Prefill)).work, VIOLIN)
        assert lease is not None
        work = (await decode.expect(Decode)).work
        decode.send(WorkRefused(work.request_id, work.attempt, "2 answers, at most 1 at once"))
        await prefill.expect(ReleaseLeases, lease_ids=[lease.lease_id])
        again = (await prefill.expect(PrefillAndDecode)).work
        assert (again.attempt, again.choices) == (2, [Choice(0, [VIOLIN]), Choice(1, [VIOLIN])])
        prefill.send(StepTokens(next_tokens(again, [(RED, "length")] * 2)))
        await answer


@on_event_loop
async def test_several_answers_in_a_cluster_that_pushes() -> None:
    async with running_cluster(transfer="push") as cluster:
        prefill, decode = await cluster.pair()
        answer = ask(cluster, n=2, max_tokens=2)
        reserve = (await decode.expect(Reserve)).work
        decode.send(Reserved(reserve.request_id, reserve.attempt, [4]))
        work = (await prefill.expect(Prefill)).work
        tokens = next_tokens(work, [(VIOLIN, None), (RED, None)])
        prefill.send(Prefilled(work.request_id, work.attempt, tokens, None, pushed=True))
        decode.send(Left())
        again = (await prefill.expect(PrefillAndDecode)).work
        assert again.choices == [Choice(0, [VIOLIN]), Choice(1, [RED])]
        prefill.send(StepTokens(next_tokens(again, [(RED, "length")] * 2)))
        await answer


# ----------------------------------------------------------------------------------------- prefixes


@on_event_loop
async def test_work_carries_the_names_of_the_full_blocks_under_its_salt() -> None:
    async with running_cluster() as cluster:
        prefill, decode = await cluster.pair()
        model = model_fingerprint(cluster.router._config.model_directory)
        for salt in ("", "tenant"):
            answer = ask(cluster, LONG, cache_salt=salt, max_tokens=2)
            work = (await prefill.expect(Prefill)).work
            assert work.prefix is not None
            assert work.prefix.root == prefix_root(model, salt)
            assert work.prefix.blocks == b"".join(names_of(LONG, salt))
            lease = KVLease(1, prefill.engine_id, [0], len(LONG), duration=30.0)
            prefill.send(PromptProgress(work.request_id, work.attempt, 16, lease))
            assert (await decode.expect(PullEarly)).prefix == work.prefix
            prefill.send_prefilled(work, VIOLIN)
            work = (await decode.expect(Decode)).work
            assert work.prefix is not None
            decode.send_tokens(work, RED, finish_reason="length")
            await answer


@on_event_loop
async def test_a_prompt_goes_to_the_prefill_worker_that_has_its_prefix() -> None:
    async with running_cluster() as cluster:
        others = [await cluster.worker("prefill") for _ in range(2)]
        having = await cluster.worker("prefill", "having")
        others += [await cluster.worker("prefill") for _ in range(2)]
        await cluster.worker("decode")
        having.announce(LONG)
        await having.sync()
        answer = ask(cluster, LONG)
        work = (await having.expect(Prefill)).work
        assert sum(cluster.router._registry.get("having").assigned.values()) == 2  # type: ignore[union-attr]
        having.send_prefilled(work, VIOLIN, "length")
        await answer
        having.send(CacheUpdate(b"", b"", reset=True))
        others[0].announce(LONG)
        await having.sync()
        await others[0].sync()
        answer = ask(cluster, LONG)
        others[0].send_prefilled((await others[0].expect(Prefill)).work, VIOLIN, "length")
        await answer


@on_event_loop
async def test_cached_tokens_are_those_that_the_prefill_worker_found() -> None:
    async with running_cluster() as cluster:
        prefill, decode = await cluster.pair()
        answer = ask(cluster, LONG, max_tokens=3)
        work = (await prefill.expect(Prefill)).work
        prefill.send(PrefixHit(work.request_id, work.attempt, 16))
        await prefill.sync()
        prefill.send(WorkFailed(work.request_id, work.attempt, "out of luck", retry=True))
        again = (await prefill.expect(Prefill)).work
        prefill.send(PrefixHit(work.request_id, work.attempt, 48))  # of the older attempt
        prefill.send(PrefixHit(again.request_id, again.attempt, 32))
        prefill.send_prefilled(again, VIOLIN)
        work = (await decode.expect(Decode)).work
        decode.send(PrefixHit(work.request_id, work.attempt, 48))
        decode.send_tokens(work, RED, finish_reason="stop")
        assert (await answer).usage == Usage(len(LONG), 2, cached_tokens=32)


@on_event_loop
async def test_damaged_cache_updates_do_no_harm() -> None:
    async with running_cluster() as cluster:
        worker = await cluster.worker("unified")
        worker.send(CacheUpdate(b"1234567", b""))
        assert "CacheUpdate" in (await worker.expect(Malformed)).reason
        answer = ask(cluster, LONG)
        work = (await worker.expect(PrefillAndDecode)).work
        worker.send_tokens(work, VIOLIN, finish_reason="stop")
        await answer


@on_event_loop
async def test_names_for_blocks_of_another_size_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """All workers have left while the prompt was tokenized, and others have come: a name stands for other
    tokens there."""

    def for_others(model: str, salt: str, token_ids: list[int], block_size: int) -> PromptPrefix:
        return name_prefix(model, salt, token_ids, 2 * block_size)

    monkeypatch.setattr("pdengine.router.intake.name_prefix", for_others)
    async with running_cluster() as cluster:
        worker = await cluster.worker("unified")
        answer = ask(cluster, LONG)
        work = (await worker.expect(PrefillAndDecode)).work
        assert work.prefix is None
        worker.send_tokens(work, VIOLIN, finish_reason="stop")
        await answer


# --------------------------------------------------------------- prompts that decode workers have


async def having_pair(cluster: FakeCluster) -> tuple[FakeWorker, FakeWorker]:
    """A prefill worker, and a decode worker with the full blocks of LONG."""
    prefill, decode = await cluster.pair()
    decode.announce(LONG)
    await decode.sync()
    return prefill, decode


@on_event_loop
async def test_the_next_turn_is_done_by_the_decode_worker_that_has_the_last_one() -> None:
    async with running_cluster(local_prefill_tokens=10) as cluster:
        prefill, decode = await having_pair(cluster)
        answer = ask(cluster, [*LONG, *[RED] * 8])
        message = await decode.expect(PrefillAndDecode)
        assert not message.may_wait
        work = message.work
        decode.send(PrefixHit(work.request_id, work.attempt, 48))
        decode.send_tokens(work, VIOLIN, finish_reason="stop")
        completion = await answer
        assert completion.prefill_worker == completion.decode_worker == decode.engine_id
        assert (completion.usage.cached_tokens, completion.transfer) == (48, None)
        await prefill.sync()
        assert not prefill.pending(Prefill)


@pytest.mark.parametrize("why", ["rest", "off", "salt", "room", "leaving", "nothing cached"])
@on_event_loop
async def test_all_others_go_the_usual_way(why: str) -> None:
    limit = 0 if why == "off" else 10
    async with running_cluster(local_prefill_tokens=limit) as cluster:
        prefill, decode = await having_pair(cluster)
        spare = await cluster.worker("decode", "spare") if why == "leaving" else None
        entry = cluster.router._registry.get(decode.engine_id)
        assert entry is not None
        if why == "room":
            entry.assigned["another"] = entry.capacity - len(LONG)
        entry.leaving = why == "leaving"
        prompt = {"rest": [*LONG, *[RED] * 9], "nothing cached": [RED] * 5}.get(why, LONG)
        answer = ask(cluster, prompt, cache_salt="x" if why == "salt" else "", max_tokens=2)
        prefill.send_prefilled((await prefill.expect(Prefill)).work, VIOLIN)
        decoder = spare or decode
        work = (await decoder.expect(Decode)).work
        decoder.send_tokens(work, RED, finish_reason="length")
        await answer
        assert not decode.pending(PrefillAndDecode)
        entry.assigned.pop("another", None)


@on_event_loop
async def test_a_decode_worker_that_refuses_its_next_turn_leaves_it_to_a_prefill_worker() -> None:
    async with running_cluster() as cluster:
        prefill, decode = await having_pair(cluster)
        answer = ask(cluster, LONG)
        work = (await decode.expect(PrefillAndDecode)).work
        decode.send(WorkRefused(work.request_id, work.attempt, "it is full"))
        offer = await prefill.expect(Prefill)
        assert (offer.may_wait, output_ids(offer.work)) == (True, [])
        prefill.send_prefilled(offer.work, VIOLIN, "length")
        assert (await answer).attempts == 1
