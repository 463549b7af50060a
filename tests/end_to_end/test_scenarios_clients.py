"""Clients that vanish, collide or send nonsense."""

import asyncio
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import zmq
import zmq.asyncio
from checkpoints import VOCAB_SIZE
from deployment import DEADLINE_SECONDS, Deployment
from scenario import GREEDY, check_healthy, random_prompt, tokens

from pdengine.client import Client, Rejected
from pdengine.transport.messages import (
    Accepted,
    Deltas,
    Finished,
    Generate,
    Malformed,
    RouterToClient,
    SamplingParams,
    TextPrompt,
    TokenPrompt,
)
from pdengine.transport.sockets import PeerSocket

NUM_CLIENTS, ROUNDS = 300, 5
NUM_TOKENS = 40


@pytest.fixture
def deployment(calm_cluster: Deployment, undisturbed: Client) -> Iterator[Deployment]:
    yield calm_cluster
    check_healthy(calm_cluster, undisturbed)


def request(tag: int, prompt: list[int], *, max_tokens: int = NUM_TOKENS) -> Generate:
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)
    return Generate(tag, TokenPrompt(prompt), sampling)


async def receive(socket: PeerSocket[RouterToClient], kind: type[Any]) -> Any:
    """The next message of this kind."""
    while True:
        message = await socket.receive()
        if isinstance(message, kind):
            return message


def test_300_clients_vanish_in_the_middle_of_their_streams_five_times(deployment: Deployment) -> None:
    """A third of them at once, a third when the request is accepted, a third with the first token."""
    stages: tuple[type[Any] | None, ...] = (None, Accepted, Deltas)

    async def vanish(context: zmq.asyncio.Context, number: int) -> None:
        socket = PeerSocket[RouterToClient](context, deployment.client_address, RouterToClient)
        try:
            socket.send(request(1, random_prompt(30, number), max_tokens=4000))
            stage = stages[number % 3]
            if stage is not None:
                await receive(socket, stage)
        finally:
            socket.close()

    async def rounds() -> None:
        context = zmq.asyncio.Context()
        for _ in range(ROUNDS):
            async with asyncio.timeout(DEADLINE_SECONDS):
                await asyncio.gather(*(vanish(context, number) for number in range(NUM_CLIENTS)))
        context.destroy()

    asyncio.run(rounds())
    deployment.wait_baseline()
    assert "expired" not in deployment.log_of(deployment.processes[1])


def test_two_clients_give_their_requests_the_same_number_at_once(
    deployment: Deployment, undisturbed: Client
) -> None:
    prompts = [random_prompt(40, seed) for seed in range(2)]

    async def answer(context: zmq.asyncio.Context, prompt: list[int]) -> list[int]:
        socket = PeerSocket[RouterToClient](context, deployment.client_address, RouterToClient)
        received: list[int] = []
        try:
            socket.send(request(7, prompt))
            while True:
                message = await receive(socket, Deltas | Finished)  # type: ignore[arg-type]
                if isinstance(message, Finished):
                    assert message.tag == 7
                    return received
                assert {delta.tag for delta in message.deltas} == {7}
                received += [token_id for delta in message.deltas for token_id in delta.token_ids]
        finally:
            socket.close()

    async def both() -> list[list[int]]:
        context = zmq.asyncio.Context()
        async with asyncio.timeout(DEADLINE_SECONDS):
            answers = await asyncio.gather(*(answer(context, prompt) for prompt in prompts))
        context.destroy()
        return list(answers)

    assert asyncio.run(both()) == [tokens(undisturbed, p, max_tokens=NUM_TOKENS, **GREEDY) for p in prompts]


@pytest.mark.parametrize(
    ("prompt", "sentence"),
    [
        (random_prompt(8192), "this model's maximum context length is 8192"),
        ("", "prompt is empty"),
        ([5, VOCAB_SIZE], f"token id {VOCAB_SIZE}, the vocabulary is 0 to {VOCAB_SIZE - 1}"),
        ([5, -1], "token id -1"),
        ("0123456789" * 2**20, "characters, the limit is"),
    ],
    ids=["too-long", "empty", "token-id-too-large", "token-id-negative", "10-MB-of-text"],
)
def test_a_prompt_that_cannot_be_served_is_refused_with_the_reason(
    prompt: str | list[int], sentence: str, deployment: Deployment
) -> None:
    with Client(deployment.client_address) as client:
        with pytest.raises(Rejected, match=sentence) as caught:
            client.generate(prompt)
        assert caught.value.field == "prompt"


def test_text_that_is_not_utf8_is_malformed(deployment: Deployment) -> None:
    message = msgspec.msgpack.encode(Generate(1, TextPrompt("text")))
    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.connect(deployment.client_address)
    socket.send(message.removesuffix(b"text") + b"\xff\xfe\xff\xfe")
    assert socket.poll(1_000 * int(DEADLINE_SECONDS))
    answer = msgspec.msgpack.decode(socket.recv(), type=RouterToClient)
    socket.close()
    context.destroy()
    assert isinstance(answer, Malformed)
    assert "utf-8" in answer.reason.lower()
