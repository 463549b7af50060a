"""HTTP in front of real workers, from the router's process and from processes of their own."""

import json
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

import openai
import pytest
from deployment import DEADLINE_SECONDS, Deployment, wait_for

from pdengine.client import Client
from pdengine.models.demo.facts import checkpoint_directory

SERVING = re.compile(r"serving (\S+) over HTTP on (\S+)")
PROMPT = "The red violin is in the box of Joseph. What is in the box of Joseph?"
MESSAGES = [{"role": "user", "content": PROMPT}]


def url_of(deployment: Deployment, process: subprocess.Popen[bytes]) -> str:
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
