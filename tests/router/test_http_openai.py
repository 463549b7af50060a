"""OpenAI's own client library against the server, with a worker that repeats the prompt."""

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from http_service import MODEL, http_config
from router_thread import HOLD, RouterThread

from pdengine.models.demo.facts import checkpoint_directory
from pdengine.models.tokenizer import Tokenizer
from pdengine.router.http.server import HttpServer

TOKENIZER = Tokenizer.load(checkpoint_directory())
WORDS = [300, 301, 302, 303, 304, 305]
TEXT = TOKENIZER.decode(WORDS)
KEY = "a-key"


@pytest.fixture(scope="module")
def router() -> Iterator[RouterThread]:
    with RouterThread() as router:
        yield router


@pytest.fixture(scope="module")
def client(router: RouterThread) -> Iterator[openai.OpenAI]:
    with (
        HttpServer(http_config(router.address, api_keys=(KEY,))) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client,
    ):
        yield client


def test_completions(client: openai.OpenAI, router: RouterThread) -> None:
    router.cached_tokens = 3
    completion = client.completions.create(model=MODEL, prompt=WORDS, max_tokens=6, n=2, seed=1)
    router.cached_tokens = 0
    assert [choice.text for choice in completion.choices] == [TEXT, TEXT]
    assert [choice.index for choice in completion.choices] == [0, 1]
    assert {choice.finish_reason for choice in completion.choices} == {"length"}
    assert completion.usage is not None
    assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (6, 12)
    assert completion.usage.prompt_tokens_details is not None
    assert completion.usage.prompt_tokens_details.cached_tokens == 3


def test_streamed_completions(client: openai.OpenAI) -> None:
    stream = client.completions.create(
        model=MODEL,
        prompt=[WORDS, WORDS[:2]],
        max_tokens=9,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    texts = {0: "", 1: ""}
    for chunk in chunks[:-1]:
        assert chunk.usage is None
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == {0: TOKENIZER.decode(WORDS[:5]), 1: TOKENIZER.decode(WORDS[:1])}, "a stop has no text"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 8


def test_chat(client: openai.OpenAI, router: RouterThread) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[
            {"role": "system", "content": "You are a clerk."},
            {"role": "user", "content": [{"type": "text", "text": "What is in the box?"}]},
        ],
        max_completion_tokens=500,
        extra_body={"top_k": 3, "ignore_eos": True},
    )
    prompt = TOKENIZER.encode_chat(
        [
            {"role": "system", "content": "You are a clerk."},
            {"role": "user", "content": "What is in the box?"},
        ]
    )
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == TOKENIZER.decode(prompt[:-1])
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.total_tokens == 2 * len(prompt)
    stream = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": TEXT}], max_tokens=4, stream=True
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [*[None] * 4, "length"]


def test_errors_are_those_of_the_library(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as not_found:
        client.completions.create(model="other", prompt="a")
    assert not_found.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "a"}], logprobs=True, top_logprobs=21
        )
    assert bad.value.param == "top_logprobs"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="other").models.list()
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "pdengine"


def test_a_stream_that_is_closed_cancels_its_request(client: openai.OpenAI, router: RouterThread) -> None:
    while not router.work.empty():
        router.next_work()
    with client.completions.create(model=MODEL, prompt=[300, HOLD, 301], max_tokens=9, stream=True) as stream:
        assert next(stream).choices[0].text == TOKENIZER.decode([300])
    assert router.next_aborted() == router.next_work().work.request_id


def test_log_probabilities_of_completions(client: openai.OpenAI) -> None:
    completion = client.completions.create(model=MODEL, prompt=WORDS, max_tokens=3, logprobs=2, echo=True)
    [choice] = completion.choices
    assert choice.text == TEXT + TOKENIZER.decode(WORDS[:3])
    assert choice.logprobs is not None
    assert choice.logprobs.tokens == [TOKENIZER.decode([word]) for word in WORDS + WORDS[:3]]
    assert choice.logprobs.token_logprobs is not None
    assert choice.logprobs.token_logprobs[1:] == [-word / 1000 for word in (WORDS + WORDS[:3])[1:]]
    assert choice.logprobs.top_logprobs is not None
    assert {len(top) for top in choice.logprobs.top_logprobs[1:]} == {3}
    chunks = client.completions.create(model=MODEL, prompt=WORDS, max_tokens=2, logprobs=0, stream=True)
    pieces = [chunk.choices[0].logprobs for chunk in chunks]
    assert [piece.token_logprobs for piece in pieces if piece] == [[-word / 1000] for word in WORDS[:2]]


def test_log_probabilities_of_chat(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {
        "model": MODEL,
        "messages": [{"role": "user", "content": TEXT}],
        "max_tokens": 2,
        "logprobs": True,
        "top_logprobs": 3,
    }
    [choice] = client.chat.completions.create(**options).choices
    assert choice.logprobs is not None
    content = choice.logprobs.content
    assert content is not None
    assert all(entry.bytes == list(entry.token.encode()) for entry in content)
    assert [len(entry.top_logprobs) for entry in content] == [3, 3]
    chunks = client.chat.completions.create(**options, stream=True)
    pieces = [chunk.choices[0].logprobs for chunk in chunks]
    assert [entry for piece in pieces if piece for entry in piece.content or []] == content


def test_a_stop_string(client: openai.OpenAI) -> None:
    stop = TOKENIZER.decode(WORDS[2:4])
    expected = TEXT[: TEXT.index(stop)]
    completion = client.completions.create(model=MODEL, prompt=WORDS, max_tokens=6, stop=[stop, "never"])
    assert (completion.choices[0].text, completion.choices[0].finish_reason) == (expected, "stop")
    chunks = list(client.completions.create(model=MODEL, prompt=WORDS, max_tokens=6, stop=stop, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_other_fields_reach_the_worker(client: openai.OpenAI, router: RouterThread) -> None:
    while not router.work.empty():
        router.next_work()
    client.completions.create(
        model=MODEL,
        prompt=WORDS,
        max_tokens=2,
        presence_penalty=1,
        frequency_penalty=-1,
        logit_bias={"300": -100},
        user="somebody",
        extra_body={"min_tokens": 1, "repetition_penalty": 1.5},
    )
    sampling = router.next_work().work.sampling
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.logit_bias) == (
        1,
        -1,
        {300: -100},
    )
    assert (sampling.min_tokens, sampling.repetition_penalty) == (1, 1.5)
