"""What `pdengine generate` asks for and prints."""

from collections.abc import Iterator
from functools import partial

import pytest
from click.testing import CliRunner, Result
from router_thread import RouterThread

from pdengine.cli.main import main
from pdengine.client import Client
from pdengine.transport.messages import Choice


@pytest.fixture
def router() -> Iterator[RouterThread]:
    with RouterThread() as running:
        yield running


def generate(router: RouterThread, *arguments: str) -> Result:
    """The result for a prompt that is answered with its own first tokens."""
    return CliRunner().invoke(
        main, ["generate", "The red violin", "--router", router.address, "--max-tokens", "3", *arguments]
    )


@pytest.mark.parametrize("how", ["--stream", "--no-stream"])
def test_one_answer(router: RouterThread, how: str) -> None:
    result = generate(router, how)
    assert result.stdout == "The red\n"
    assert result.stderr == "4 prompt tokens, 3 answer tokens\n"


def test_several_answers_are_printed_whole_and_apart(router: RouterThread) -> None:
    result = generate(router, "-n", "2")
    assert result.stdout == "--- answer 1 of 2\nThe red\n--- answer 2 of 2\nThe red\n"
    assert result.stderr == "4 prompt tokens, 6 answer tokens\n"


def test_what_is_asked_for(router: RouterThread) -> None:
    generate(router, "-n", "2", "--priority", "-7", "--cache-salt", "tenant")
    generate(router)
    salted, plain = (router.next_work().work for _ in range(2))
    assert (salted.choices, salted.priority) == ([Choice(0, []), Choice(1, [])], -7)
    assert (plain.choices, plain.priority) == ([Choice(0, [])], 0)
    assert salted.prefix is not None
    assert plain.prefix is not None
    assert salted.prefix.root != plain.prefix.root


def test_a_stop_text_and_logprobs(router: RouterThread) -> None:
    result = generate(router, "--stop", " red", "--stop", "blue", "--logprobs", "1")
    text, *lines = result.stdout.splitlines()
    assert text == "The"
    assert lines
    assert all("rank" in line and "top" in line for line in lines)
    assert router.next_work().work.sampling.logprobs == 1


def test_cached_tokens_are_shown(router: RouterThread) -> None:
    router.cached_tokens = 2
    assert generate(router).stderr == "4 prompt tokens (2 of them cached), 3 answer tokens\n"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["-n", "0"], "n is 0, it must be at least 1 and at most 128"),
        (["--priority", "4294967296"], "priority is 4294967296, it must fit in 32 bits"),
        (["-n", str(2**64)], "a number does not fit in 64 bits"),
        (["--cache-salt", "\udcff"], "surrogates not allowed"),
    ],
)
def test_what_the_router_refuses_is_one_line(
    router: RouterThread, arguments: list[str], sentence: str
) -> None:
    result = generate(router, *arguments)
    assert result.exit_code == 1
    [line] = result.stderr.splitlines()
    assert line.startswith("Error: ")
    assert sentence in line


def test_without_a_router_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pdengine.cli.generate.Client", partial(Client, connect_timeout=0.2))
    result = CliRunner().invoke(main, ["generate", "hello", "--router", "tcp://127.0.0.1:9"])
    assert result.exit_code == 1
    [line] = result.stderr.splitlines()
    assert line.startswith("Error: ")
    assert "tcp://127.0.0.1:9" in line
