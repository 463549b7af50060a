"""OpenAI's own client library against the server, with a worker that repeats the prompt."""

from collections.abc import Iterator

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
            model=MODEL, messages=[{"role": "user", "content": "a"}], logprobs=True
        )
    assert bad.value.param == "logprobs"
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
