"""What HTTP requests are refused for: each with a status, and an error that names the field and the limit."""

import asyncio
import json
import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from fake_cluster import DEADLINE_SECONDS, on_event_loop
from http_service import TEXT, Served, error_of, served
from pydantic import ValidationError

from pdengine.router.admission import MAX_TEXT_CHARACTERS
from pdengine.router.http.fields import (
    IGNORED,
    NEUTRAL,
    NEUTRAL_IN_CHAT,
    NEUTRAL_IN_MESSAGE,
    UNSUPPORTED,
)
from pdengine.router.http.requests import Body, ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from pdengine.transport.messages import Abort
from pdengine.transport.sockets import raise_file_limit

MESSAGES = [{"role": "user", "content": "hi"}]
KEYS = ("first-key", "second-key")


async def refusal(service: Served, path: str, body: Any, status: int = 400) -> dict[str, Any]:
    content = body if isinstance(body, str) else json.dumps(body)
    response = await service.client.post(path, content=content, headers={"content-type": "application/json"})
    return error_of(response, status)


# Body, the field at fault, and what the message must say.
WRONG_COMPLETIONS: list[tuple[dict[str, Any], str, str]] = [
    ({}, "prompt", "required"),
    ({"prompt": 5}, "prompt", "a list of token ids"),
    ({"prompt": []}, "prompt", "not empty"),
    ({"prompt": ""}, "prompt", "at least one token"),
    ({"prompt": [True]}, "prompt", "integer"),
    ({"prompt": [[1], []]}, "prompt", "at least 1"),
    ({"prompt": ["a", 1]}, "prompt", "string"),
    ({"prompt": [-1]}, "prompt", "greater than or equal to 0"),
    ({"prompt": [10**6]}, "prompt", "vocabulary"),
    ({"prompt": "\ud800"}, "prompt", "surrogate"),
    ({"prompt": ["a"] * 129}, "prompt", "the limit is 128"),
    ({"prompt": "a", "max_tokens": -1}, "max_tokens", "greater than or equal to 0"),
    ({"prompt": "a", "max_tokens": 10**6}, "max_tokens", "2048"),
    ({"prompt": "a", "max_tokens": "5"}, "max_tokens", "integer"),
    ({"prompt": "a", "n": 129}, "n", "128"),
    ({"prompt": "a", "n": 128, "max_tokens": 2000, "logprobs": 20}, "logprobs", "the limit is 1048576"),
    ({"prompt": "a", "repetition_penalty": 1e-30}, "repetition_penalty", "0.01"),
    ({"prompt": "a", "echo": True, "max_tokens": 0, "min_tokens": 1}, "min_tokens", "max_tokens"),
    ({"prompt": "a", "temperature": -1}, "temperature", "greater than or equal to 0"),
    ({"prompt": "a", "temperature": float("nan")}, "temperature", "finite"),
    ({"prompt": "a", "top_p": 0}, "top_p", "greater than 0"),
    ({"prompt": "a", "min_p": 2}, "min_p", "less than or equal to 1"),
    ({"prompt": "a", "seed": 2**64}, "seed", "less than"),
    ({"prompt": "a", "stop_token_ids": [10**6]}, "stop_token_ids", "vocabulary"),
    ({"prompt": "a", "priority": 2**31}, "priority", "less than"),
    ({"prompt": "a", "cache_salt": ""}, "cache_salt", "at least 1"),
    ({"prompt": "a", "cache_salt": "\udfff"}, "cache_salt", "surrogate"),
    ({"prompt": "a", "stream": 1}, "stream", "boolean"),
    ({"prompt": "a", "stream_options": {"include_usage": True}}, "stream_options", "only with stream"),
    ({"prompt": "a", "messages": MESSAGES}, "messages", "no such field"),
    ({"prompt": "a", "tempreature": 1}, "tempreature", "no such field"),
    ({"prompt": "a", "max_tokens": 0, "echo": False}, "max_tokens", "0 only with echo"),
    ({"prompt": "a", "logprobs": 21}, "logprobs", "less than or equal to 20"),
    ({"prompt": "a", "logprobs": -1}, "logprobs", "greater than or equal to 0"),
    ({"prompt": "a", "logprobs": True}, "logprobs", "integer"),
    ({"prompt": "a", "top_logprobs": 2}, "top_logprobs", "not supported"),
    ({"prompt": "a", "prompt_logprobs": 2}, "prompt_logprobs", "not supported"),
    ({"prompt": "a", "stop": ["."] * 17}, "stop", "at most 16"),
    ({"prompt": "a", "stop": [""]}, "stop", "at least 1"),
    ({"prompt": "a", "stop": "x" * 1025}, "stop", "at most 1024"),
    ({"prompt": "a", "stop": ["x" * 600, "y" * 600]}, "stop", "1200 characters in all, the limit is 1024"),
    ({"prompt": "a", "stop": ["\ud800"]}, "stop", "surrogate"),
    ({"prompt": "a", "stop": 5}, "stop", "string"),
    ({"prompt": "a", "include_stop_str_in_output": 1}, "include_stop_str_in_output", "boolean"),
    ({"prompt": "a", "min_tokens": -1}, "min_tokens", "greater than or equal to 0"),
    ({"prompt": "a", "min_tokens": 17}, "min_tokens", "at most max_tokens, which is 16"),
    ({"prompt": "a", "presence_penalty": 2.5}, "presence_penalty", "less than or equal to 2"),
    ({"prompt": "a", "frequency_penalty": -2.5}, "frequency_penalty", "greater than or equal to -2"),
    ({"prompt": "a", "logit_bias": {"5": 101}}, "logit_bias", "less than or equal to 100"),
    ({"prompt": "a", "logit_bias": {"-5": 1}}, "logit_bias", "pattern"),
    ({"prompt": "a", "logit_bias": {"five": 1}}, "logit_bias", "pattern"),
    ({"prompt": "a", "logit_bias": {"999999": 1}}, "logit_bias", "vocabulary"),
    ({"prompt": "a", "logit_bias": {str(i): "x" for i in range(1025)}}, "logit_bias", "the limit is 1024"),
    ({"prompt": "a", "logit_bias": [5]}, "logit_bias", "dictionary"),
    ({"prompt": "a", "return_tokens_as_token_ids": True}, "return_tokens_as_token_ids", "not supported"),
    ({"prompt": "a", "suffix": "b"}, "suffix", "not supported"),
    ({"prompt": "a", "best_of": 2}, "best_of", "not supported"),
]
LONG_CALL = {"function": {"name": "f", "arguments": "[" * 300_000}}
WRONG_CHATS: list[tuple[dict[str, Any], str, str]] = [
    ({}, "messages", "required"),
    ({"messages": []}, "messages", "at least 1"),
    ({"messages": [{"role": "user"}]}, "messages", "required"),
    ({"messages": [{"role": "user", "content": None}]}, "messages", "content is required"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "'text'"),
    ({"messages": [{"role": "u", "content": "a", "nam": "b"}]}, "messages[0].nam", "no such field"),
    ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages", "required"),
    (
        {"messages": [{"role": "assistant", "tool_calls": [LONG_CALL, LONG_CALL]}]},
        "messages",
        "600000 characters in all, the limit is 524288",
    ),
    (
        {"messages": MESSAGES, "continue_final_message": True, "add_generation_prompt": True},
        "add_generation_prompt",
        "not with",
    ),
    (
        {"messages": MESSAGES, "chat_template_kwargs": {"messages": []}},
        "chat_template_kwargs",
        "'messages' is not for",
    ),
    (
        {"messages": MESSAGES, "chat_template_kwargs": {"_check_deadline": 1}},
        "chat_template_kwargs",
        "is not for",
    ),
    ({"messages": MESSAGES, "reasoning_effort": "much"}, "reasoning_effort", "'high'"),
    ({"messages": MESSAGES, "chat_template": "{{ 1 }}"}, "chat_template", "not supported"),
    (
        {"messages": MESSAGES, "tools": [{"type": "function"}], "tool_choice": "auto"},
        "tools",
        "only tells the model",
    ),
    ({"messages": MESSAGES, "tool_choice": "required"}, "tool_choice", "'none' or 'auto'"),
    ({"messages": MESSAGES, "max_completion_tokens": 10**6}, "max_tokens", "2048"),
    ({"messages": MESSAGES, "logprobs": 1}, "logprobs", "boolean"),
    ({"messages": MESSAGES, "top_logprobs": 2}, "top_logprobs", "only with logprobs"),
    ({"messages": MESSAGES, "logprobs": True, "top_logprobs": 21}, "top_logprobs", "or equal to 20"),
    ({"messages": MESSAGES, "echo": True}, "echo", "not supported"),
    ({"messages": MESSAGES, "tools": [{"type": "function"}]}, "tools", "not recognized"),
    ({"messages": MESSAGES, "response_format": {"type": "json_object"}}, "response_format", "not supported"),
    (
        {"messages": [{"role": "user", "content": "a" * 20_000}]},
        "messages",
        "maximum context length is 2048",
    ),
]


@on_event_loop
async def test_a_body_that_is_wrong_is_refused() -> None:
    async with served() as service:
        for path, cases in (("/v1/completions", WRONG_COMPLETIONS), ("/v1/chat/completions", WRONG_CHATS)):
            for body, field, reason in cases:
                error = await refusal(service, path, body)
                assert error["param"] == field, error
                assert reason in error["message"], error
                assert error["type"] == "invalid_request_error"
            for content in (
                "",
                "{",
                "[]",
                "nul",
                '"a"',
                "[" * 60_000,
                '{"prompt": ' + "9" * 5000 + "}",
                r'{"\ud800": 1}',
            ):
                await refusal(service, path, content)
        response = await service.client.post("/v1/completions", content=b'{"prompt": "a"}')
        error_of(response, 400)  # JSON that does not say so


@on_event_loop
async def test_values_that_change_nothing_are_taken() -> None:
    """So is what is ignored, whatever its value, and null for any field."""
    async with served() as service:
        for path, neutral, prompt in (
            ("/v1/completions", NEUTRAL, {"prompt": TEXT}),
            ("/v1/chat/completions", NEUTRAL_IN_CHAT, {"messages": MESSAGES}),
        ):
            fields = {name: values[0] for name, values in neutral.items()}
            ignored = dict.fromkeys(IGNORED, "anything")
            nulls = {
                "max_tokens": None,
                "temperature": None,
                "n": None,
                "guided_json": None,
                **dict.fromkeys(("stop", "min_tokens", "logprobs", "logit_bias", "repetition_penalty")),
            }
            for extra in ({**fields, **ignored}, nulls):
                answer = service.start(path, **prompt, **extra)
                work = await service.work()
                service.worker.send_tokens(work, 400, finish_reason="stop")
                assert (await answer).status_code == 200, (await answer).text


def test_what_is_ignored_and_what_is_refused_is_documented() -> None:
    document = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
    for name in (*IGNORED, *NEUTRAL_IN_CHAT, *NEUTRAL_IN_MESSAGE, *UNSUPPORTED):
        assert f"`{name}`" in document, name


@on_event_loop
async def test_another_model_is_not_found() -> None:
    async with served() as service:
        for path, body in (
            ("/v1/completions", {"prompt": "a"}),
            ("/v1/chat/completions", {"messages": MESSAGES}),
            ("/tokenize", {"prompt": "a"}),
            ("/detokenize", {"tokens": [1]}),
        ):
            error = await refusal(service, path, {**body, "model": "other"}, 404)
            assert (error["param"], error["code"]) == ("model", "model_not_found")
            assert "'demo' is" in error["message"]
        assert error_of(await service.client.get("/v1/models/a/b"), 404)["code"] == "model_not_found"
        assert (await service.client.get("/v1/models/demo")).json()["max_model_len"] == 2048
        [model] = (await service.client.get("/v1/models")).json()["data"]
        assert model["id"] == "demo"
        error_of(await service.client.get("/v2"), 404)
        error_of(await service.client.get("/v1/completions"), 405)


@on_event_loop
async def test_tokens_there_and_back() -> None:
    async with served() as service:

        async def ask(path: str, **body: Any) -> Any:
            response = await service.client.post(path, json=body)
            assert response.status_code == 200, response.text
            return response.json()

        answer = await ask("/tokenize", prompt=TEXT, return_token_strs=True)
        assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
        bare = await ask("/tokenize", prompt=TEXT, add_special_tokens=False)
        assert bare["tokens"] == answer["tokens"][1:]
        assert bare["token_strs"] is None
        assert (await ask("/detokenize", tokens=bare["tokens"]))["prompt"] == TEXT
        assert (await ask("/detokenize", tokens=[]))["prompt"] == ""
        chat = await ask("/tokenize", messages=MESSAGES)
        started = service.start("/v1/chat/completions", messages=MESSAGES)
        work = await service.work()
        assert work.prompt_ids == chat["tokens"]
        service.worker.send_tokens(work, 400, finish_reason="stop")
        await started
        for body in (
            {},
            {"prompt": "a", "messages": MESSAGES},
            {"prompt": "a" * (MAX_TEXT_CHARACTERS + 1)},
            {"messages": [{"role": "user", "content": "a" * MAX_TEXT_CHARACTERS}]},
        ):
            await refusal(service, "/tokenize", body)


@on_event_loop
async def test_limits_of_a_request_and_of_all_together() -> None:
    async with served(max_body_bytes=1000, max_in_flight=2) as service:
        for content in (b"x" * 1001, _in_pieces(b"x" * 600, b"x" * 600)):
            response = await service.client.post("/v1/completions", content=content)
            assert "1000 bytes" in error_of(response, 413)["message"]
            assert response.headers["connection"] == "close"
        running = [service.start(), service.start()]
        works = [await service.work(), await service.work()]
        response = await service.complete()
        assert "the limit is 2" in error_of(response, 429)["message"]
        assert response.headers["retry-after"] == "1"
        for work in works:
            service.worker.send_tokens(work, 400, finish_reason="stop")
        assert [response.status_code for response in await asyncio.gather(*running)] == [200, 200]
        # What can never be served is no matter of coming back.
        error = error_of(await service.complete(prompt=["a"] * 3), 400)
        assert error["param"] == "prompt"
        error = error_of(await service.complete(n=3), 400)
        assert (error["param"], "is 2" in error["message"]) == ("n", True)
        answer = service.start()
        service.worker.send_tokens(await service.work(), 400, finish_reason="stop")
        assert (await answer).status_code == 200


async def _in_pieces(*pieces: bytes) -> Any:
    """A body of unknown length."""
    for piece in pieces:
        yield piece


@on_event_loop
async def test_a_key_is_asked_for() -> None:
    async with served(api_keys=KEYS) as service:
        for path in ("/live", "/ready"):
            assert (await service.client.get(path)).status_code == 200
        for path in ("/health", "/version", "/metrics", "/openapi.json", "/v1/models", "/nowhere"):
            for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {KEYS[0]}"}):
                response = await service.client.get(path, headers=headers)
                assert error_of(response, 401)["code"] == "invalid_api_key"
                assert response.headers["www-authenticate"] == "Bearer"
            for key in KEYS:
                response = await service.client.get(path, headers={"Authorization": f"Bearer {key}"})
                assert response.status_code == (404 if path == "/nowhere" else 200)
        error_of(await service.complete(), 401)
        document = (
            await service.client.get("/openapi.json", headers={"Authorization": f"Bearer {KEYS[0]}"})
        ).json()
        assert "401" in document["paths"]["/v1/completions"]["post"]["responses"]
        assert "401" not in document["paths"]["/live"]["get"]["responses"]


@on_event_loop
async def test_what_is_counted() -> None:
    async with served() as service:
        answer = service.start(max_tokens=3)
        service.worker.send_tokens(await service.work(), 400, 401, 402, finish_reason="length")
        await answer
        error_of(await service.complete(n=0), 400)
        error_of(await service.client.get("/some/where"), 404)
        text = (await service.client.get("/metrics")).text
    for line in (
        'pdengine_http_requests_total{endpoint="/v1/completions",status="200"} 1.0',
        'pdengine_http_requests_total{endpoint="/v1/completions",status="400"} 1.0',
        'pdengine_http_requests_total{endpoint="other",status="404"} 1.0',
        "pdengine_http_requests_in_flight 1.0",  # the one that asks
        "pdengine_time_to_first_token_seconds_count 1.0",
        "pdengine_inter_token_latency_seconds_count 2.0",
    ):
        assert line in text.splitlines()


class Caller:
    """A connection on which a test says what no client library would."""

    def __init__(self, url: str) -> None:
        self._address = (urlsplit(url).hostname, urlsplit(url).port)

    async def say(self, *pieces: bytes) -> bytes:
        """Send pieces; what the server answers until it closes the connection."""
        reader, writer = await asyncio.open_connection(*self._address)
        async with asyncio.timeout(DEADLINE_SECONDS):
            for piece in pieces:
                writer.write(piece)
            try:
                return await reader.read()
            except ConnectionResetError:
                return b""
            finally:
                writer.close()


@on_event_loop
async def test_a_client_that_dawdles_is_disconnected() -> None:
    post = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    async with served(head_seconds=0.2, body_seconds=0.2, rest_seconds=0.2) as service:
        caller = Caller(service.url)
        assert await caller.say() == b""
        assert await caller.say(b"GET /live HTT") == b""
        assert b" 408 " in await caller.say(post + b'Content-Length: 50\r\n\r\n{"prompt"')
        head = b"GET /live HTTP/1.1\r\nX: " + b"y" * 70_000
        assert b" 400 " in (await caller.say(head)).splitlines()[0]
        assert b" 400 " in (await caller.say(b"\x16\x03\x01 not HTTP\r\n\r\n")).splitlines()[0]
        # The time for a head ends with it: what is answered later than that is answered.
        answer = service.start()
        work = await service.work()
        assert await caller.say() == b""
        service.worker.send_tokens(work, 400, finish_reason="stop")
        assert (await answer).status_code == 200


@on_event_loop
async def test_trailers_are_neither_read_nor_kept() -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n"
    body = b"f\r\n" + b'{"prompt": "a"}' + b"\r\n0\r\n"
    async with served() as service:
        caller = Caller(service.url)
        trailer = b"Content-Type: application/json\r\n\r\n"
        ends = b"GET /live HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        first, *_ = (await caller.say(head + b"\r\n" + body + trailer + ends)).splitlines()
        assert b" 400 " in first, "the trailer is no header"
        for endless in (b"X: y\r\n" * 100_000, b"X: " + b"y" * 700_000, b"1;" + b"y" * 700_000):
            start = b"" if endless.startswith(b"1") else body
            assert await caller.say(head + b"\r\n" + start + endless) == b""


@on_event_loop
async def test_a_body_that_does_not_end_after_its_response_closes_the_connection() -> None:
    async with served(rest_seconds=0.2) as service:
        caller = Caller(service.url)
        start = b"POST /nowhere HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\n"
        assert b" 404 " in (await caller.say(start, b"a")).splitlines()[0]
        ends = b"GET /live HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        answers = await caller.say(start + b"aaaa" + start + b"aaaa" + ends)
        assert answers.count(b"HTTP/1.1 404") == 2, "one that does end leaves it open"
        assert b"HTTP/1.1 200" in answers


@pytest.mark.parametrize(
    ("body", "fields"),
    [
        (CompletionBody, {"prompt": [-1] * 1000}),
        (CompletionBody, {"prompt": [[-1] * 1000] * 1000}),
        (CompletionBody, {"prompt": ["a", *[1] * 1000]}),
        (CompletionBody, {"prompt": "a", "stop_token_ids": [-1] * 1000}),
        (ChatBody, {"messages": [{}] * 1000}),
        (ChatBody, {"messages": [{"role": "u", "content": [{}] * 1000}] * 1000}),
        (TokenizeBody, {"messages": [{}] * 1000}),
        (DetokenizeBody, {"tokens": [-1] * 1000}),
    ],
)
def test_a_list_costs_the_errors_of_one_entry(body: type[Body], fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as error:
        body.model_validate(fields)
    assert error.value.error_count() <= 3


@on_event_loop
async def test_a_prompt_of_far_too_many_tokens_is_refused_and_ends_nobody_elses_request() -> None:
    async with served() as service:
        response, work = await service.open_stream(1, max_tokens=2)
        error = await refusal(service, "/v1/completions", {"prompt": [0] * 2**19})
        assert error["param"] == "prompt"
        assert "524288 tokens" in error["message"]
        for body, limit in (
            ({"prompt": [0] * (2**19 + 2)}, "524288 commas"),
            ({"prompt": [[1]] * 2**16}, "65536 brackets"),
            ({"prompt": "a", "x": [{}] * 2**16}, "65536 brackets"),
            ({"prompt": "a", **{f"x{number}": 1 for number in range(2**16)}}, "65536 brackets"),
        ):
            refused = await service.client.post("/v1/completions", json=body)
            assert limit in error_of(refused, 413)["message"]
        service.worker.send_tokens(work, 2, skip=1, finish_reason="length")
        content = await response.aread()
        assert b"data: [DONE]" in content


@on_event_loop
async def test_silent_connections_are_in_nobodys_way() -> None:
    raise_file_limit()
    async with served() as service:
        address = (urlsplit(service.url).hostname, urlsplit(service.url).port)
        silent = [socket.create_connection(address) for _ in range(1_000)]
        try:
            answer = service.start()
            service.worker.send_tokens(await service.work(), 400, finish_reason="stop")
            assert (await answer).status_code == 200
        finally:
            for connection in silent:
                connection.close()


@on_event_loop
async def test_the_other_requests_of_a_client_are_left_alone() -> None:
    """Cancelling one of several on one server ends no other."""
    async with served() as service:
        first, second = service.start(max_tokens=2), service.start(max_tokens=2)
        works = [await service.work(), await service.work()]
        first.cancel()
        aborted = await service.worker.expect(Abort)
        assert aborted.request_id in {work.request_id for work in works}
        left = [work for work in works if work.request_id != aborted.request_id]
        service.worker.send_tokens(left[0], 400, 401, finish_reason="length")
        assert (await second).status_code == 200
