"""HTTP in front of real workers, from the router's process and from processes of their own."""

import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import openai
import pytest
from deployment import DEADLINE_SECONDS, Deployment, wait_for
from fork_server import ForkedProcess

from pdengine.client import Client
from pdengine.models.demo.facts import checkpoint_directory

SERVING = re.compile(r"serving (\S+) over HTTP on (\S+)")
PROMPT = "The red violin is in the box of Joseph. What is in the box of Joseph?"
MESSAGES = [{"role": "user", "content": PROMPT}]


def url_of(deployment: Deployment, process: ForkedProcess) -> str:
    match = wait_for(lambda: SERVING.search(deployment.log_of(process)), process)
    return match[2]


def openai_client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=DEADLINE_SECONDS)


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with Deployment(checkpoint_directory(), tmp_path_factory.mktemp("http")) as deployment:
        deployment.start_router(options=["--http", "127.0.0.1:0"])
        deployment.start_worker("prefill")
        deployment.start_worker("decode")
        deployment.wait_workers("prefill", "decode")
        yield deployment
        deployment.wait_baseline()


@pytest.fixture(scope="module", params=["in the router", "on its own"])
def url(deployment: Deployment, request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "in the router":
        yield url_of(deployment, deployment.processes[0])
    else:
        http = deployment.start_http()
        yield url_of(deployment, http)
        assert deployment.stop(http) == 0


def test_answers_are_those_of_the_client_library(deployment: Deployment, url: str) -> None:
    with Client(deployment.client_address) as client, openai_client(url) as http:
        assert [model.id for model in http.models.list()] == [checkpoint_directory().name]
        expected = client.generate(PROMPT, max_tokens=8, temperature=0)
        options = {"model": checkpoint_directory().name, "temperature": 0}
        completion = http.completions.create(**options, prompt=PROMPT, max_tokens=8)
        assert completion.choices[0].text == expected.text
        assert completion.choices[0].finish_reason == expected.finish_reason
        assert completion.usage is not None
        assert completion.usage.completion_tokens == expected.usage.completion_tokens
        stream = http.completions.create(**options, prompt=PROMPT, max_tokens=8, stream=True)
        assert "".join(chunk.choices[0].text for chunk in stream) == expected.text
        answers = client.generate(MESSAGES, max_tokens=8, n=2, seed=3)
        chat = http.chat.completions.create(
            model=options["model"], messages=MESSAGES, max_completion_tokens=8, n=2, seed=3
        )
        assert [choice.message.content for choice in chat.choices] == [c.text for c in answers.choices]


def test_log_probabilities_are_those_of_the_client_library(deployment: Deployment, url: str) -> None:
    """Of the answer and, echoed, of the prompt."""
    model = checkpoint_directory().name
    with Client(deployment.client_address) as client, openai_client(url) as http:
        expected = client.generate(PROMPT, max_tokens=4, temperature=0, logprobs=2, prompt_logprobs=2)
        assert expected.logprobs is not None
        assert expected.prompt_logprobs is not None
        logprobs = [entry.logprob for entry in expected.logprobs]
        of_prompt = [entry.logprob for entry in expected.prompt_logprobs]
        for stream in (False, True):
            answer = http.completions.create(
                model=model, prompt=PROMPT, max_tokens=4, temperature=0, logprobs=2, echo=True, stream=stream
            )
            choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
            assert "".join(choice.text for choice in choices) == PROMPT + expected.text
            pieces = [choice.logprobs for choice in choices]
            told = [entry for piece in pieces if piece for entry in piece.token_logprobs or []]
            assert told[0] is None
            assert told[1:] == pytest.approx([*of_prompt, *logprobs], abs=1e-3)
        scored = http.completions.create(model=model, prompt=PROMPT, max_tokens=0, logprobs=0, echo=True)
        assert scored.choices[0].text == PROMPT
        assert scored.usage is not None
        assert (scored.usage.completion_tokens, scored.usage.prompt_tokens) == (0, len(of_prompt) + 1)
        told = client.generate(MESSAGES, max_tokens=4, temperature=0, logprobs=2)
        chat = http.chat.completions.create(
            model=model,
            messages=MESSAGES,
            max_completion_tokens=4,
            temperature=0,
            logprobs=True,
            top_logprobs=2,
        )
        assert chat.choices[0].logprobs is not None
        content = chat.choices[0].logprobs.content
        assert [entry.logprob for entry in content] == pytest.approx(
            [entry.logprob for entry in told.logprobs], abs=1e-3
        )
        assert all(entry.top_logprobs[0].logprob >= entry.logprob for entry in content)


def test_stop_strings_penalties_and_several_answers(deployment: Deployment, url: str) -> None:
    options: dict[str, Any] = {
        "prompt": PROMPT,
        "max_tokens": 20,
        "n": 2,
        "seed": 5,
        "presence_penalty": 1.5,
        "frequency_penalty": 0.5,
    }
    extra = {"repetition_penalty": 1.2, "min_tokens": 8}
    with Client(deployment.client_address) as client, openai_client(url) as http:
        expected = client.generate(**options, **extra, logit_bias={300: -100.0})
        written = expected.choices[0].text
        stop = written[-4:]
        assert len(written) > 8
        for stops in (None, [stop, "\n\n\n"]):
            expected = client.generate(**options, **extra, logit_bias={300: -100.0}, stop=stops or ())
            http_options = {**options, "model": checkpoint_directory().name, "stop": stops}
            answer = http.completions.create(**http_options, logit_bias={"300": -100}, extra_body=extra)
            assert [choice.text for choice in answer.choices] == [c.text for c in expected.choices]
            reasons = [choice.finish_reason for choice in answer.choices]
            assert reasons == [choice.finish_reason for choice in expected.choices]
            assert answer.usage is not None
            assert answer.usage.completion_tokens == expected.usage.completion_tokens
        assert reasons[0] == "stop"


def test_errors(url: str) -> None:
    with openai_client(url) as http:
        model = checkpoint_directory().name
        with pytest.raises(openai.BadRequestError, match="logit_bias has token id 99999, the vocabulary is"):
            http.completions.create(model=model, prompt="a", logit_bias={"99999": 1})
        with pytest.raises(openai.BadRequestError, match="stop has 1200 characters"):
            http.completions.create(model=model, prompt="a", stop=["x" * 600, "y" * 600])
        with pytest.raises(openai.NotFoundError):
            http.completions.create(model="another", prompt="a")


def test_a_stream_that_is_closed_frees_its_blocks(deployment: Deployment, url: str) -> None:
    with (
        openai_client(url) as http,
        http.completions.create(
            model=checkpoint_directory().name,
            prompt=PROMPT,
            max_tokens=1500,
            stream=True,
            extra_body={"ignore_eos": True},
        ) as stream,
    ):
        next(stream)
    deployment.wait_baseline()


def test_probes(url: str) -> None:
    for path, status in (("/live", "live"), ("/ready", "ready"), ("/health", "healthy")):
        with urlopen(f"{url}{path}", timeout=DEADLINE_SECONDS) as answer:
            assert json.load(answer)["status"] == status


def test_a_router_that_stops_ends_its_streams(tmp_path: Path) -> None:
    """With a word to its clients, in time, and without a trace of an error in its log."""
    with Deployment(checkpoint_directory(), tmp_path) as deployment:
        router = deployment.start_router(options=["--http", "127.0.0.1:0"])
        deployment.start_worker("unified")
        deployment.wait_workers("unified")
        with (
            openai_client(url_of(deployment, router)) as http,
            http.completions.create(
                model=checkpoint_directory().name,
                prompt=PROMPT,
                max_tokens=1900,
                stream=True,
                extra_body={"ignore_eos": True},
            ) as stream,
        ):
            next(stream)
            assert deployment.stop(router, signal.SIGTERM) == 0
            with pytest.raises(openai.APIError, match="shutting down"):
                list(stream)
        assert "Traceback" not in deployment.log_of(router)
