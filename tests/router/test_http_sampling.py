"""Stop strings, log probabilities, echoes and penalties over HTTP, with a scripted worker."""

import logging
import math
from typing import Any

import pytest
from fake_cluster import logprobs_of, next_tokens, on_event_loop
from http_service import TEXT, Served, events_of, served

from pdengine.models.demo.facts import checkpoint_directory
from pdengine.models.tokenizer import Tokenizer
from pdengine.router.http.logprobs import TokenNames, chat_logprobs
from pdengine.transport.messages import Abort, SamplingParams, StepTokens, TokenLogprobs

TOKENIZER = Tokenizer.load(checkpoint_directory())
RED, VIOLIN = TOKENIZER.encode(" red violin", add_special_tokens=False)[:2]
FIRST_BYTE, SECOND_BYTE = TOKENIZER.encode("é")[1:]
MESSAGES = [{"role": "user", "content": "hi"}]
CHAT = "/v1/chat/completions"


async def answered(service: Served, *token_ids: int, path: str = "/v1/completions", **fields: Any) -> Any:
    """What a request is told, whose worker writes these tokens: a body, or the events of a stream."""
    prompt = {"messages": MESSAGES} if path == CHAT else {}
    answer = service.start(path, max_tokens=len(token_ids), **{**prompt, **fields})
    work = await service.work()
    if work.sampling.prompt_logprobs is not None:
        service.worker.send_scored(work)
    for choice in work.choices:
        service.worker.send_tokens(work, *token_ids, choice=choice.index, finish_reason="length")
    response = await answer
    assert response.status_code == 200, response.text
    if not fields.get("stream"):
        return response.json()
    *chunks, done = events_of(response.text)
    assert done == "[DONE]"
    return chunks


def name(token_id: int) -> str:
    return TOKENIZER.token_bytes(token_id).decode()


def scores(token_id: int, num_top: int) -> dict[str, float]:
    """Of the likeliest tokens, and of the token itself."""
    top = {name(other): logprob for other, logprob in logprobs_of(token_id, num_top).top}
    return top | {name(token_id): -token_id / 1000}


@on_event_loop
async def test_every_field_of_sampling_reaches_the_worker() -> None:
    fields = {
        "min_tokens": 2,
        "presence_penalty": 0.5,
        "frequency_penalty": -1,
        "repetition_penalty": 1.25,
        "logit_bias": {"5": -100, "300": 2.5},
    }
    expected = {**fields, "logit_bias": {5: -100.0, 300: 2.5}, "max_tokens": 3, "seed": 1}
    async with served() as service:
        for path in ("/v1/completions", CHAT):
            prompt = {"messages": MESSAGES} if path == CHAT else {}
            answer = service.start(path, max_tokens=3, seed=1, **prompt, **fields)
            work = await service.work()
            assert work.sampling == SamplingParams(**expected)
            service.worker.send_tokens(work, RED, finish_reason="stop")
            assert (await answer).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("stop", ["d vio", ["never", "d vio"]])
@on_event_loop
async def test_a_stop_string(stop: Any, stream: bool) -> None:
    async with served() as service:
        answer = service.start(
            stop=stop, stream=stream, stream_options={"include_usage": True} if stream else None
        )
        work = await service.work()
        service.worker.send_tokens(work, RED, VIOLIN, RED)
        await service.worker.expect(Abort, request_id=work.request_id)
        if stream:
            *chunks, last, _ = events_of((await answer).text)
            choices = [chunk["choices"][0] for chunk in chunks]
            text, usage = "".join(choice["text"] for choice in choices), last["usage"]
        else:
            choices, usage = (await answer).json()["choices"], (await answer).json()["usage"]
            text = choices[0]["text"]
    assert text == " re"
    assert choices[-1]["finish_reason"] == "stop"
    assert usage["completion_tokens"] == 2


@on_event_loop
async def test_what_stops_an_answer_is_shown_if_asked_for() -> None:
    """Also a token, but no special one."""
    async with served() as service:
        answer = service.start(stop=["d vio"], include_stop_str_in_output=True)
        work = await service.work()
        service.worker.send_tokens(work, RED, VIOLIN)
        await service.worker.expect(Abort, request_id=work.request_id)
        assert (await answer).json()["choices"][0]["text"] == " red vio"
        for shows, token_id, text in (
            (True, VIOLIN, " red violin"),
            (True, 1, " red"),
            (False, VIOLIN, " red"),
        ):
            answer = service.start(stop_token_ids=[VIOLIN], include_stop_str_in_output=shows)
            work = await service.work()
            service.worker.send_tokens(work, RED, token_id, finish_reason="stop")
            assert (await answer).json()["choices"][0]["text"] == text


@on_event_loop
async def test_one_of_several_answers_stops() -> None:
    async with served() as service:
        answer = service.start(CHAT, messages=MESSAGES, stop="d", n=2, max_tokens=2)
        work = await service.work()
        service.worker.send(StepTokens(next_tokens(work, [(RED, None), (VIOLIN, None)])))
        assert (await service.worker.expect(Abort)).choices == [0]
        service.worker.send_tokens(work, VIOLIN, skip=1, choice=1, finish_reason="length")
        choices = (await answer).json()["choices"]
    assert [choice["message"]["content"] for choice in choices] == [" re", " violin violin"]
    assert [choice["finish_reason"] for choice in choices] == ["stop", "length"]


# ----------------------------------------------------------------------------------- log probabilities


@on_event_loop
async def test_log_probabilities_of_completions() -> None:
    async with served() as service:
        body = await answered(service, RED, FIRST_BYTE, SECOND_BYTE, VIOLIN, logprobs=2, n=2)
        chunks = await answered(service, RED, FIRST_BYTE, SECOND_BYTE, VIOLIN, logprobs=2, stream=True)
        for choice in body["choices"]:
            logprobs = choice["logprobs"]
            assert logprobs["tokens"] == [" red", "bytes:\\xc3", "bytes:\\xa9", " violin"]
            assert logprobs["token_logprobs"] == [-t / 1000 for t in (RED, FIRST_BYTE, SECOND_BYTE, VIOLIN)]
            assert logprobs["top_logprobs"][0] == scores(RED, 2)
            assert len(logprobs["top_logprobs"][0]) == 3, "the token itself is not among the likeliest two"
            assert logprobs["text_offset"] == [0, 4, 4, 5]
            assert choice["text"] == " redé violin"
        pieces = [chunk["choices"][0]["logprobs"] for chunk in chunks]
        joined = {field: [entry for piece in pieces for entry in piece[field]] for field in logprobs}
        assert joined == logprobs
        # Of the likeliest none, of the token itself its own.
        body = await answered(service, RED, logprobs=0)
        assert body["choices"][0]["logprobs"]["top_logprobs"] == [{" red": -RED / 1000}]
        assert (await answered(service, RED))["choices"][0]["logprobs"] is None


@on_event_loop
async def test_log_probabilities_of_chat_completions() -> None:
    async with served() as service:
        tokens = (RED, FIRST_BYTE)
        body = await answered(service, *tokens, path=CHAT, logprobs=True, top_logprobs=1)
        chunks = await answered(service, *tokens, path=CHAT, logprobs=True, top_logprobs=1, stream=True)
        [choice] = body["choices"]
        top = RED + 1
        expected = {
            "token": " red",
            "logprob": -RED / 1000,
            "bytes": list(b" red"),
            "top_logprobs": [{"token": name(top), "logprob": -0.1, "bytes": list(name(top).encode())}],
        }
        assert choice["logprobs"]["content"][0] == expected
        assert choice["logprobs"]["content"][1]["token"] == "\\xc3"
        assert choice["logprobs"]["content"][1]["bytes"] == [0xC3]
        assert choice["logprobs"]["refusal"] is None
        opening, *pieces = [chunk["choices"][0]["logprobs"] for chunk in chunks]
        assert opening is None
        assert [entry for piece in pieces for entry in piece["content"]] == choice["logprobs"]["content"]
        for extra in ({"logprobs": True}, {"logprobs": True, "top_logprobs": 0}):
            body = await answered(service, RED, path=CHAT, **extra)
            assert body["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []
        body = await answered(service, RED, path=CHAT, logprobs=False)
        assert body["choices"][0]["logprobs"] is None


def test_what_is_no_number_in_json_is_very_unlikely() -> None:
    told = chat_logprobs(TokenNames(TOKENIZER), [RED], [TokenLogprobs(-math.inf, 1, [(RED, math.nan)])])
    assert told.content[0].logprob == told.content[0].top_logprobs[0].logprob == -9999.0


# --------------------------------------------------------------------------------------------- echoes


@pytest.mark.parametrize("prompt", [TEXT, TOKENIZER.encode(TEXT)], ids=["text", "tokens"])
@on_event_loop
async def test_an_echo(prompt: Any) -> None:
    async with served() as service:
        body = await answered(service, RED, VIOLIN, prompt=prompt, echo=True, n=2)
        for choice in body["choices"]:
            assert choice["text"] == TEXT + " red violin"
            assert choice["logprobs"] is None
        chunks = await answered(service, RED, prompt=prompt, echo=True, stream=True, n=2)
        texts = [chunk["choices"][0]["text"] for chunk in chunks]
        assert texts == [TEXT, TEXT, " red", " red"]


@pytest.mark.parametrize("stream", [False, True])
@on_event_loop
async def test_an_echo_with_log_probabilities(stream: bool) -> None:
    """As evaluation harnesses ask for it; also with nothing but the prompt."""
    prompt_ids = TOKENIZER.encode(TEXT)
    async with served() as service:
        for max_tokens in (1, 0):
            answer = service.start(
                prompt=prompt_ids,
                echo=True,
                logprobs=1,
                max_tokens=max_tokens,
                stream=stream,
                stream_options={"include_usage": True} if stream else None,
            )
            work = await service.work()
            sampling = work.sampling
            assert (sampling.max_tokens, sampling.logprobs, sampling.prompt_logprobs) == (1, 1, 1)
            service.worker.send_scored(work)
            service.worker.send_tokens(work, RED, finish_reason="length")
            response = await answer
            if stream:
                *chunks, last, _ = events_of(response.text)
                choices, usage = [chunk["choices"][0] for chunk in chunks], last["usage"]
            else:
                choices, usage = response.json()["choices"], response.json()["usage"]
            pieces = [choice["logprobs"] for choice in choices]
            logprobs = {field: [e for piece in pieces for e in piece[field]] for field in pieces[0]}
            shown = [*prompt_ids, RED][: len(prompt_ids) + max_tokens]
            assert "".join(choice["text"] for choice in choices) == TEXT + " red" * max_tokens
            assert choices[-1]["finish_reason"] == "length"
            assert logprobs["tokens"] == [name(token_id) for token_id in shown]
            assert logprobs["token_logprobs"] == [None, *(-token_id / 1000 for token_id in shown[1:])]
            assert logprobs["top_logprobs"][0] is None
            assert logprobs["top_logprobs"][1] == scores(shown[1], 1)
            offsets = logprobs["text_offset"]
            assert offsets[:2] == [0, 0], "the first token is special, and has no text"
            whole = TEXT + " red"
            for token_id, offset in list(zip(shown, offsets, strict=True))[1:]:
                assert whole[offset:].startswith(name(token_id))
            assert usage["completion_tokens"] == max_tokens
            assert usage["prompt_tokens"] == len(prompt_ids)


@on_event_loop
async def test_echoes_of_several_prompts() -> None:
    """One token has no log probability at all, and none is sent of it."""
    async with served() as service:
        answer = service.start(prompt=[[RED], [VIOLIN, RED]], echo=True, logprobs=0, max_tokens=0)
        works = {len(work.prompt_ids): work for work in [await service.work(), await service.work()]}
        service.worker.send_scored(works[2])
        for work in works.values():
            service.worker.send_tokens(work, RED, finish_reason="stop")
        choices = (await answer).json()["choices"]
    assert [choice["text"] for choice in choices] == [" red", " violin red"]
    assert choices[0]["logprobs"]["token_logprobs"] == [None]
    assert choices[1]["logprobs"]["token_logprobs"] == [None, -RED / 1000]
    assert {choice["finish_reason"] for choice in choices} == {"length"}


@on_event_loop
async def test_every_request_is_one_line_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """With the router's ids of it, and its own."""
    caplog.set_level(logging.INFO, "pdengine.router.http")
    async with served(max_in_flight=2) as service:
        answer = service.start(prompt=[[RED], [VIOLIN]], max_tokens=1)
        works = [await service.work(), await service.work()]
        for work in works:
            service.worker.send_tokens(work, RED, finish_reason="length")
        body = (await answer).json()
        assert (await service.complete(n=3)).status_code == 400
    lines = [
        vars(record)
        for record in caplog.records
        if record.getMessage() == "request finished" and record.name.startswith("pdengine.router.http")
    ]
    assert [line["outcome"] for line in lines] == ["finished", "rejected"]
    assert lines[0]["http_id"] == body["id"]
    assert sorted(lines[0]["request_id"].split(",")) == sorted(work.request_id for work in works)
    assert (lines[0]["prompt_tokens"], lines[0]["output_tokens"]) == (2, 2)
