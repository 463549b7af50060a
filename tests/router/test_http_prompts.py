"""What requests are about, as their bodies say it: messages, templates, special tokens; and their names."""

import asyncio
import json
from pathlib import Path
from shutil import copytree
from typing import Any

import httpx
import pytest
from fake_cluster import on_event_loop
from http_service import TEXT, Served, error_of, events_of, served

from pdengine.models.checkpoint import CheckpointError
from pdengine.models.demo.facts import checkpoint_directory
from pdengine.models.generation_config import SamplingDefaults, load_sampling_defaults
from pdengine.models.tokenizer import Tokenizer
from pdengine.router.http.prompts import conversation_of
from pdengine.router.http.requests import TokenizeBody
from pdengine.transport.messages import SamplingParams

TOKENIZER = Tokenizer.load(checkpoint_directory())
RED, VIOLIN = 383, 512
USER = {"role": "user", "content": TEXT}
# Shows all that a template may be told.
TEMPLATE = """\
{%- for m in messages %}[{{ m.role }}{{ ' ' + m.name if m.name }}]{{ m.content }}
{%- for call in m.tool_calls %}<{{ call.function.name }} {{ call.function.arguments | tojson }}>{% endfor %}
{{- m.tool_call_id }}{{ m.reasoning_content }}{% endfor %}
{{- '[tools ' + tools | tojson + ']' if tools }}{{ '[documents]' if documents }}
{{- '[thinks]' if enable_thinking }}{{ reasoning_effort }}{{ colour }}
{{- '[assistant]' if add_generation_prompt }}"""


async def prompt_of(service: Served, path: str = "/v1/chat/completions", **fields: Any) -> list[int]:
    """Token ids of the prompt of an accepted request."""
    answer = service.start(path, max_tokens=1, **fields)
    work = await service.work()
    service.worker.send_tokens(work, RED, finish_reason="length")
    assert (await answer).status_code == 200
    return work.prompt_ids


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    directory = copytree(checkpoint_directory(), tmp_path / "checkpoint")
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    return directory


def call(arguments: str) -> dict[str, Any]:
    return {"id": "c1", "type": "function", "function": {"name": "f", "arguments": arguments}}


TOOL = {"type": "function", "function": {"name": "f"}}
# Fields of a request, and the prompt that its template makes of them.
SHOWN: list[tuple[dict[str, Any], str]] = [
    ({"messages": [{"role": "user", "content": "a", "name": "bob"}]}, "[user bob]a[assistant]"),
    ({"messages": [{"role": "developer", "content": "a"}]}, "[system]a[assistant]"),
    (
        {
            "messages": [
                {"role": "assistant", "content": None, "tool_calls": [call('{"x": 1}'), call("broken")]},
                {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "b"}]},
            ]
        },
        '[assistant]<f {"x": 1}><f "broken">[tool]bc1[assistant]',
    ),
    (
        {"messages": [{"role": "assistant", "content": "a", "reasoning_content": "hm", "tool_calls": []}]},
        "[assistant]ahm[assistant]",
    ),
    ({"messages": [{"role": "user", "content": "a"}], "add_generation_prompt": False}, "[user]a"),
    (
        {
            "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b "}],
            "continue_final_message": True,
        },
        "[user]a[assistant]b ",
    ),
    (
        {"messages": [{"role": "user", "content": "a"}], "tools": [TOOL], "tool_choice": "none"},
        f"[user]a[tools [{json.dumps(TOOL)}]][assistant]",
    ),
    (
        {"messages": [{"role": "user", "content": "a"}], "documents": [{"text": "b"}]},
        "[user]a[documents][assistant]",
    ),
    (
        {"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": {"colour": "red"}},
        "[user]ared[assistant]",
    ),
    (
        {"messages": [{"role": "user", "content": "a"}], "reasoning_effort": "low"},
        "[user]a[thinks]low[assistant]",
    ),
    ({"messages": [{"role": "user", "content": "a"}], "reasoning_effort": "none"}, "[user]anone[assistant]"),
    (
        {
            "messages": [{"role": "user", "content": "a"}],
            "reasoning_effort": "low",
            "chat_template_kwargs": {"enable_thinking": False},
        },
        "[user]alow[assistant]",
    ),
]


@on_event_loop
async def test_what_the_chat_template_is_told(checkpoint: Path) -> None:
    async with served(model_directory=checkpoint) as service:
        for fields, prompt in SHOWN:
            expected = TOKENIZER.encode(prompt, add_special_tokens=False)
            assert TOKENIZER.decode(await prompt_of(service, **fields)) == prompt
            fields = {name: value for name, value in fields.items() if name != "tool_choice"}
            response = await service.client.post("/tokenize", json=fields)
            assert response.json()["tokens"] == expected, response.text
        fields = {"messages": [{"role": "user", "content": "a"}], "add_special_tokens": True}
        expected = TOKENIZER.encode("[user]a[assistant]")
        assert await prompt_of(service, **fields) == expected
        assert (await service.client.post("/tokenize", json=fields)).json()["tokens"] == expected


def test_arguments_that_are_nested_too_deep_are_shown_as_they_are() -> None:
    arguments = "[" * 60_000
    messages = [{"role": "assistant", "tool_calls": [call(arguments)]}]
    body = TokenizeBody.model_validate({"messages": messages})
    assert body.messages is not None
    [message] = conversation_of(body.messages, body).messages
    assert message["tool_calls"][0]["function"]["arguments"] == arguments


@on_event_loop
async def test_special_tokens_of_a_prompt() -> None:
    async with served() as service:
        path = "/v1/completions"
        with_beginning = TOKENIZER.encode(TEXT)
        without = TOKENIZER.encode(TEXT, add_special_tokens=False)
        assert with_beginning != without
        for value, expected in ((None, with_beginning), (True, with_beginning), (False, without)):
            assert await prompt_of(service, path, prompt=TEXT, add_special_tokens=value) == expected


@on_event_loop
async def test_a_conversation_that_is_too_long_is_told_apart() -> None:
    """Clients look for the code, or for these words, and then shorten it."""
    async with served() as service:
        for fields in ({"messages": [{"role": "user", "content": "a" * 20_000}]}, {"messages": [USER]}):
            body = {**fields, "max_tokens": 2048}
            error = error_of(await service.client.post("/v1/chat/completions", json=body), 400)
            assert error["code"] == "context_length_exceeded"
            assert "this model's maximum context length is 2048 tokens" in error["message"]


@pytest.mark.parametrize("stream", [False, True])
@on_event_loop
async def test_token_ids_are_returned(stream: bool) -> None:
    async with served() as service:
        answer = service.start(max_tokens=2, n=2, echo=True, stream=stream, return_token_ids=True)
        work = await service.work()
        for choice in (0, 1):
            service.worker.send_tokens(work, RED, VIOLIN, choice=choice, finish_reason="length")
        for choices in _by_choice(await answer, stream):
            assert [c["prompt_token_ids"] for c in choices if "prompt_token_ids" in c] == [work.prompt_ids]
            assert "prompt_token_ids" in choices[0]
            assert [token_id for c in choices for token_id in c["token_ids"]] == [RED, VIOLIN]
        answer = service.start("/v1/chat/completions", messages=[USER], stream=stream, return_token_ids=True)
        work = await service.work()
        service.worker.send_tokens(work, RED, VIOLIN, finish_reason="length")
        response = await answer
        [choices] = _by_choice(response, stream)
        assert [token_id for c in choices for token_id in c.get("token_ids", [])] == [RED, VIOLIN]
        first = events_of(response.text)[0] if stream else response.json()
        assert first["prompt_token_ids"] == work.prompt_ids


def _by_choice(response: httpx.Response, stream: bool) -> list[list[dict[str, Any]]]:
    bodies = events_of(response.text)[:-1] if stream else [response.json()]
    choices = [choice for body in bodies for choice in body["choices"]]
    indices = sorted({choice["index"] for choice in choices})
    return [[choice for choice in choices if choice["index"] == index] for index in indices]


@pytest.mark.parametrize("stream", [False, True])
@on_event_loop
async def test_a_request_has_the_name_that_its_client_gave_it(stream: bool) -> None:
    async with served() as service:
        for given, is_taken in (("trace-1", True), ("a b", False), ("x" * 129, False)):
            request = service.client.build_request(
                "POST",
                "/v1/completions",
                json={"prompt": TEXT, "stream": stream},
                headers={"x-request-id": given},
            )
            response = await _answered(service, request)
            body = events_of(response.text)[0] if stream else response.json()
            assert (body["id"] == f"cmpl-{given}") == is_taken, body["id"]
            assert response.headers.get_list("x-request-id") == [given if is_taken else body["id"]]
        refused = await service.client.post("/v1/completions", json={}, headers={"x-request-id": "trace-2"})
        error_of(refused, 400)
        assert refused.headers["x-request-id"] == "trace-2"


@on_event_loop
async def test_a_request_with_two_names_has_one() -> None:
    async with served() as service:
        request = service.client.build_request(
            "POST",
            "/v1/completions",
            json={"prompt": TEXT},
            headers=[("x-request-id", "first"), ("x-request-id", "second")],
        )
        response = await _answered(service, request)
        [name] = response.headers.get_list("x-request-id")
        assert response.json()["id"] == f"cmpl-{name}"


async def _answered(service: Served, request: httpx.Request) -> httpx.Response:
    answer = asyncio.create_task(service.client.send(request))
    work = await service.work()
    service.worker.send_tokens(work, RED, finish_reason="length")
    return await answer


@on_event_loop
async def test_a_checkpoint_says_how_it_is_sampled(checkpoint: Path) -> None:
    values = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.1, "repetition_penalty": 1.1}
    (checkpoint / "generation_config.json").write_text(json.dumps({**values, "eos_token_id": 1}))
    async with served(model_directory=checkpoint) as service:

        async def asked(**fields: Any) -> SamplingParams:
            answer = service.start(seed=1, **fields)
            work = await service.work()
            service.worker.send_tokens(work, RED, finish_reason="length")
            assert (await answer).status_code == 200
            return work.sampling

        expected = SamplingParams(
            seed=1, temperature=0.6, top_p=0.95, top_k=20, min_p=0.1, repetition_penalty=1.1
        )
        assert await asked() == expected
        assert await asked(temperature=None, top_k=None) == expected
        plain = {"temperature": 1, "top_p": 1, "top_k": -1, "min_p": 0, "repetition_penalty": 1}
        assert await asked(**plain) == SamplingParams(seed=1)


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": -1}, {"top_p": 0}, {"top_k": "20"}, {"top_k": 2.5}, {"top_k": -2}, {"min_p": True}],
)
def test_a_checkpoint_that_asks_for_what_no_request_may_is_refused(
    tmp_path: Path, wrong: dict[str, Any]
) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(wrong))
    with pytest.raises(CheckpointError, match=next(iter(wrong))):
        load_sampling_defaults(tmp_path)


@pytest.mark.parametrize("top_k", [-1, 0, 20, 20.0])
def test_a_checkpoint_may_ask_for_what_a_request_may(tmp_path: Path, top_k: float) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"top_k": top_k}))
    assert load_sampling_defaults(tmp_path) == SamplingDefaults(top_k=int(top_k))


def test_a_checkpoint_may_say_nothing_about_sampling(tmp_path: Path) -> None:
    assert load_sampling_defaults(tmp_path) == SamplingDefaults()
