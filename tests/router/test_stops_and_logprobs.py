"""The router between scripted workers: stop strings end answers, and log probabilities pass through."""

from typing import Any

import pytest
from fake_cluster import (
    FakeCluster,
    FakeWorker,
    Peer,
    logprobs_of,
    next_tokens,
    on_event_loop,
    running_cluster,
)

from pdengine.transport import messages
from pdengine.transport.messages import (
    Abort,
    Accepted,
    Choice,
    Decode,
    Delta,
    Deltas,
    Failed,
    Finished,
    Generate,
    Left,
    Prefill,
    PrefillAndDecode,
    PromptLogprobs,
    PullEarly,
    ReleaseLeases,
    RouterToClient,
    SamplingParams,
    StepTokens,
    TextPrompt,
    TokenPrompt,
    TokenUpdate,
    Usage,
)

BEGIN, VIOLIN, RED = 0, 512, 383
PROMPT_IDS = [BEGIN, 559, RED, VIOLIN]  # "The red violin"

Client = Peer[RouterToClient]


def ask(cluster: FakeCluster, *, stop: tuple[str, ...] = (), n: int = 1, **sampling: Any) -> Client:
    """A client that has asked, as its request 1."""
    client = cluster.raw_client()
    options = {"max_tokens": 8, **sampling}
    client.send(Generate(1, TextPrompt("The red violin"), SamplingParams(**options), n=n, stop=stop))
    return client


async def answer(client: Client) -> tuple[list[Delta], Finished]:
    """All that request 1 was told, in order."""
    finished = await client.expect(Finished)
    return [delta for message in client.pending(Deltas) for delta in message.deltas], finished


async def check_released(prefill: FakeWorker, lease_id: int, worker: FakeWorker | None = None) -> None:
    await prefill.expect(ReleaseLeases, lease_ids=[lease_id])
    if worker is not None:
        await worker.sync()
        assert not worker.pending(Decode)


# ------------------------------------------------------------------------------------- one engine step


@on_event_loop
async def test_the_tokens_of_a_step_are_one_message_to_each_client() -> None:
    async with running_cluster() as cluster:
        worker = await cluster.worker("unified")
        clients = [cluster.raw_client(), cluster.raw_client()]
        works = []
        for tag in (1, 2):
            for client in clients:
                client.send(Generate(tag, TokenPrompt([tag])))
                works.append((await worker.expect(PrefillAndDecode)).work)
        worker.send(StepTokens([t for work in works for t in next_tokens(work, [(RED, None)])]))
        # One of them ends in a step; what ends it comes after all that was written.
        ends = [TokenUpdate(w.request_id, 1, 0, 1, VIOLIN, "stop" if w is works[0] else None) for w in works]
        worker.send(StepTokens(ends))
        worker.send(StepTokens([TokenUpdate(w.request_id, 1, 0, 2, RED, "length") for w in works[1:]]))
        for client in clients:
            await client.expect(Finished, tag=2)
        first, second = ([m for m in c.inbox if not isinstance(m, Accepted)] for c in clients)
        assert first == [
            Deltas([Delta(1, " red", [RED]), Delta(2, " red", [RED])]),
            Deltas([Delta(1, "", [VIOLIN], 0, "stop"), Delta(2, " violin", [VIOLIN])]),
            Finished(1, ["stop"], Usage(1, 2), worker.engine_id, worker.engine_id, 1),
            Deltas([Delta(2, " red", [RED], 0, "length")]),
        ]
        assert [len(message.deltas) for message in second if isinstance(message, Deltas)] == [2, 2, 2]


# ---------------------------------------------------------------------------------------- stop strings


@on_event_loop
async def test_a_stop_string_ends_an_answer_and_its_worker_is_told() -> None:
    """What may begin it is withheld; tokens that come later are ignored."""
    async with running_cluster() as cluster:
        worker = await cluster.worker("unified")
        client = ask(cluster, stop=("d vio", "never"))
        work = (await worker.expect(PrefillAndDecode)).work
        worker.send_tokens(work, RED, RED, VIOLIN, RED)
        deltas, finished = await answer(client)
        assert deltas == [
            Delta(1, " re", [RED]),
            Delta(1, "d re", [RED]),
            Delta(1, "", [VIOLIN], 0, "stop"),
        ]
        assert (finished.finish_reasons, finished.usage) == (["stop"], Usage(4, 3))
        await worker.expect(Abort, request_id=work.request_id, choices=None)


@pytest.mark.parametrize("finish_reason", ["length", "stop"])
@on_event_loop
async def test_what_was_withheld_is_shown_if_nothing_comes_of_it(finish_reason: Any) -> None:
    async with running_cluster() as cluster:
        worker = await cluster.worker("unified")
        client = ask(cluster, stop=("d violet",))
        work = (await worker.expect(PrefillAndDecode)).work
        worker.send_tokens(work, RED)
        worker.send_tokens(work, VIOLIN, skip=1, finish_reason=finish_reason)
        deltas, finished = await answer(client)
        assert "".join(delta.text for delta in deltas) == (
            " red violin" if finish_reason == "length" else " red"
        )
        assert finished.finish_reasons == [finish_reason]
        await worker.sync()
        assert not worker.pending(Abort), "the worker has nothing left of it"


@on_event_loop
async def test_a_stop_string_that_is_complete_with_the_last_token_stops() -> None:
    async with running_cluster() as cluster:
        worker = await cluster.worker("unified")
        client = ask(cluster, stop=("iol",), max_tokens=1)
        work = (await worker.expect(PrefillAndDecode)).work
        worker.send_tokens(work, VIOLIN, finish_reason="length")
        deltas, finished = await answer(client)
        assert deltas == [Delta(1, " v", [VIOLIN], 0, "stop")]
        assert finished.finish_reasons == ["stop"]


@on_event_loop
async def test_a_stop_string_across_parts_of_a_character() -> None:
    async with running_cluster() as cluster:
        worker = await cluster.worker("unified")
        client = ask(cluster, stop=("é ",))
        work = (await worker.expect(PrefillAndDecode)).work
        first_byte, second_byte = cluster.router._intake._tokenizer.encode("é")[1:]
        worker.send_tokens(work, RED, first_byte, second_byte, RED)
        deltas, _ = await answer(client)
        assert [delta.text for delta in deltas] == [" red", "", "", ""]
        assert deltas[-1].finish_reason == "stop"


@pytest.mark.parametrize("transfer", ["early-pull", "pull"])
@on_event_loop
async def test_a_stop_string_in_the_first_token_releases_the_lease(transfer: Any) -> None:
    async with running_cluster(transfer=transfer) as cluster:
        prefill, decode = await cluster.pair()
        client = ask(cluster, stop=("iol",))
        work = (await prefill.expect(Prefill)).work
        lease = prefill.send_prefilled(work, VIOLIN)
        deltas, finished = await answer(client)
        assert (deltas, finished.decode_worker) == ([Delta(1, " v", [VIOLIN], 0, "stop")], "")
        assert lease is not None
        await check_released(prefill, lease.lease_id, decode)


@on_event_loop
async def test_a_stop_string_in_the_first_token_ends_the_early_pull() -> None:
    async with running_cluster() as cluster:
        prefill, decode = await cluster.pair()
        client = ask(cluster, stop=("iol",))
        work = (await prefill.expect(Prefill)).work
        lease = messages.KVLease(7, prefill.engine_id, [0], 4, 30.0)
        prefill.send(messages.PromptProgress(work.request_id, work.attempt, 2, lease))
        await decode.expect(PullEarly)
        prefill.send(messages.Prefilled(work.request_id, 1, next_tokens(work, [(VIOLIN, None)]), lease))
        await answer(client)
        await decode.expect(Abort, request_id=work.request_id)
        await check_released(prefill, 7, decode)


@on_event_loop
async def test_a_stop_string_in_the_first_token_of_a_pushed_prompt() -> None:
    """Whoever waits for the KV cache, and whoever sends it, is told."""
    async with running_cluster(transfer="push") as cluster:
        prefill, decode = await cluster.pair()
        client = ask(cluster, stop=("iol",))
        work = (await decode.expect(messages.Reserve)).work
        decode.send(messages.Reserved(work.request_id, work.attempt, [3]))
        await prefill.expect(Prefill)
        tokens = next_tokens(work, [(VIOLIN, None)])
        prefill.send(messages.Prefilled(work.request_id, 1, tokens, None, pushed=True))
        await answer(client)
        for worker in (prefill, decode):
            await worker.expect(Abort, request_id=work.request_id)
        decode.send(messages.Pushed(work.request_id, 1, messages.TransferStats(1, 1, 1, 0.1, "x")))
        await decode.sync()
        assert not decode.pending(Decode)


@on_event_loop
async def test_one_answer_stops_and_the_others_go_on() -> None:
    async with running_cluster() as cluster:
        prefill, decode = await cluster.pair()
        client = ask(cluster, stop=("iol",), n=3)
        work = (await prefill.expect(Prefill)).work
        prefill.send_first_tokens(work, [(VIOLIN, None), (RED, None), (RED, None)])
        work = (await decode.expect(Decode)).work
        assert work.choices == [Choice(1, [RED]), Choice(2, [RED])]
        decode.send_accepted(work)
        decode.send_pulled(work)
        decode.send(StepTokens(next_tokens(work, [(RED, None), (VIOLIN, None)])))
        assert (await decode.expect(Abort)).choices == [2]
        decode.send_tokens(work, RED, skip=1, choice=2)  # it was on its way
        decode.send_tokens(work, RED, skip=1, choice=1, finish_reason="length")
        deltas, finished = await answer(client)
        texts = ["".join(d.text for d in deltas if d.index == index) for index in range(3)]
        assert texts == [" v", " red red red", " red v"]
        assert finished.finish_reasons == ["stop", "length", "stop"]
        assert finished.usage == Usage(4, 1 + 3 + 2)
        await decode.sync()
        assert not decode.pending(Abort), "the worker has ended the last one by itself"


@on_event_loop
async def test_answers_that_stop_in_one_step() -> None:
    async with running_cluster() as cluster:
        worker = await cluster.worker("unified")
        client = ask(cluster, stop=("iol",), n=2)
        work = (await worker.expect(PrefillAndDecode)).work
        worker.send(StepTokens(next_tokens(work, [(VIOLIN, None), (VIOLIN, None)])))
        _, finished = await answer(client)
        assert finished.finish_reasons == ["stop", "stop"]
        assert (await worker.expect(Abort)).choices == [0]
        assert (await worker.expect(Abort)).choices is None


@on_event_loop
async def test_stop_strings_go_on_with_the_next_worker() -> None:
    """What the first one wrote is not searched again, and a string may begin in it."""
    async with running_cluster() as cluster:
        first = await cluster.worker("unified")
        client = ask(cluster, stop=("d vio",))
        work = (await first.expect(PrefillAndDecode)).work
        first.send_tokens(work, RED)
        await client.expect(Deltas)
        second = await cluster.worker("unified")
        first.send(Left())
        work = (await second.expect(PrefillAndDecode)).work
        assert work.choices == [Choice(0, [RED])]
        second.send_tokens(work, VIOLIN)
        deltas, finished = await answer(client)
        assert deltas == [Delta(1, "", [VIOLIN], 0, "stop")]
        assert finished.attempts == 2


# ----------------------------------------------------------------------------------- log probabilities


@on_event_loop
async def test_log_probabilities_are_those_of_the_tokens_also_where_text_is_withheld() -> None:
    async with running_cluster() as cluster:
        prefill, decode = await cluster.pair()
        client = ask(cluster, stop=("d vio",), logprobs=2)
        work = (await prefill.expect(Prefill)).work
        assert (work.sampling.logprobs, work.prefix is None) == (2, False)
        prefill.send_prefilled(work, RED)
        work = (await decode.expect(Decode)).work
        decode.send_pulled(work)
        decode.send_tokens(work, VIOLIN)
        deltas, _ = await answer(client)
        assert deltas == [
            Delta(1, " re", [RED], 0, None, [logprobs_of(RED, 2)]),
            Delta(1, "", [VIOLIN], 0, "stop", [logprobs_of(VIOLIN, 2)]),
        ]


@on_event_loop
async def test_a_worker_that_does_not_tell_log_probabilities_loses_the_request() -> None:
    async with running_cluster(max_attempts=1) as cluster:
        worker = await cluster.worker("unified")
        client = ask(cluster, logprobs=0)
        work = (await worker.expect(PrefillAndDecode)).work
        worker.send(StepTokens([TokenUpdate(work.request_id, 1, 0, 0, RED, None)]))
        assert "no log probabilities" in (await client.expect(Failed)).reason


@on_event_loop
async def test_log_probabilities_that_nobody_asked_for_are_not_told() -> None:
    async with running_cluster() as cluster:
        worker = await cluster.worker("unified")
        client = ask(cluster)
        work = (await worker.expect(PrefillAndDecode)).work
        worker.send(StepTokens([TokenUpdate(work.request_id, 1, 0, 0, RED, "stop", logprobs_of(RED, 1))]))
        assert (await answer(client))[0] == [Delta(1, "", [RED], 0, "stop")]


@on_event_loop
async def test_log_probabilities_of_a_prompt_are_one_message() -> None:
    """Without holes and without anything twice, and the prefix cache is not used."""
    async with running_cluster() as cluster:
        prefill, decode = await cluster.pair()
        client = ask(cluster, prompt_logprobs=1)
        work = (await prefill.expect(Prefill)).work
        assert work.prefix is None
        prefill.send_scored(work, 1, 2)
        prefill.send_scored(work, 1, 3)  # one of them again
        await prefill.sync()
        assert not client.pending(PromptLogprobs)
        prefill.send_scored(work, 3)
        prefill.send_scored(work)  # all of them again
        prefill.send_prefilled(work, RED, "length")
        await client.expect(Finished)
        told, deltas = [m for m in client.inbox if not isinstance(m, Accepted)]
        assert told == PromptLogprobs(1, [logprobs_of(token_id, 1) for token_id in PROMPT_IDS[1:]])
        assert isinstance(deltas, Deltas)
        await decode.sync()


@on_event_loop
async def test_log_probabilities_of_a_prompt_are_told_once_after_a_failure() -> None:
    async with running_cluster() as cluster:
        workers = [await cluster.worker("unified")]
        client = ask(cluster, prompt_logprobs=0)
        work = (await workers[0].expect(PrefillAndDecode)).work
        workers[0].send_scored(work, 1, 3)
        await workers[0].sync()
        for _ in range(2):
            workers.append(await cluster.worker("unified"))
            workers[-2].send(Left())
            work = (await workers[-1].expect(PrefillAndDecode)).work
            if len(workers) == 2:
                assert work.sampling.prompt_logprobs == 0, "some of them are missing"
                workers[-1].send_scored(work)
                workers[-1].send_tokens(work, RED)
                await client.expect(Deltas)
        assert work.sampling.prompt_logprobs is None, "all of them were told"
        assert work.prefix is None
        workers[-1].send_tokens(work, RED, finish_reason="length")
        await client.expect(Finished)
        [told] = client.pending(PromptLogprobs)
        assert told.logprobs == [logprobs_of(token_id, 0) for token_id in PROMPT_IDS[1:]]


@on_event_loop
async def test_a_prompt_of_one_token_has_no_log_probabilities() -> None:
    async with running_cluster() as cluster:
        worker = await cluster.worker("unified")
        client = cluster.raw_client()
        client.send(Generate(1, TokenPrompt([RED]), SamplingParams(prompt_logprobs=2)))
        work = (await worker.expect(PrefillAndDecode)).work
        assert (await client.expect(PromptLogprobs)).logprobs == []
        worker.send_tokens(work, RED, finish_reason="stop")
        await client.expect(Finished)


@pytest.mark.parametrize("position", [0, 2, -1])
@on_event_loop
async def test_a_hole_in_the_log_probabilities_of_a_prompt_loses_the_request(position: int) -> None:
    async with running_cluster(max_attempts=1) as cluster:
        worker = await cluster.worker("unified")
        client = ask(cluster, prompt_logprobs=1)
        work = (await worker.expect(PrefillAndDecode)).work
        worker.send(
            messages.PromptScored(work.request_id, 1, position, [logprobs_of(RED, 1)] * 3),
        )
        assert "were lost" in (await client.expect(Failed)).reason


@on_event_loop
async def test_a_token_before_the_log_probabilities_of_the_prompt_loses_the_request() -> None:
    async with running_cluster(max_attempts=1) as cluster:
        worker = await cluster.worker("unified")
        client = ask(cluster, prompt_logprobs=1)
        work = (await worker.expect(PrefillAndDecode)).work
        worker.send_scored(work, 1, 3)
        worker.send_tokens(work, RED)
        assert "no log probabilities" in (await client.expect(Failed)).reason


# ------------------------------------------------------------------------------------------------ logs


@on_event_loop
async def test_every_request_is_one_line_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "pdengine.router")
    async with running_cluster() as cluster:
        worker = await cluster.worker("unified")
        client = ask(cluster)
        work = (await worker.expect(PrefillAndDecode)).work
        worker.send_tokens(work, RED, finish_reason="length")
        await client.expect(Finished)
        client = ask(cluster, logprobs=21)
        await client.expect(messages.Rejected)
        client = ask(cluster)
        await worker.expect(PrefillAndDecode)
        client.send(messages.Cancel(1))
        await client.expect(messages.Aborted)
    lines = [vars(record) for record in caplog.records if record.getMessage() == "request finished"]
    assert [line["outcome"] for line in lines] == ["finished", "rejected", "cancelled"]
    assert len({line["request_id"] for line in lines}) == 3
    first, second, _ = lines
    assert first["request_id"] == work.request_id
    assert (first["prompt_tokens"], first["output_tokens"], first["attempts"]) == (4, 1, 1)
    assert first["prefill_worker"] == first["decode_worker"] == worker.engine_id
    assert second["reason"].startswith("logprobs is 21")
