"""How answers are read from the router: all that is there at once, and nothing lost before an error."""

import asyncio

import pytest
from fake_cluster import on_event_loop

from pdengine.client import Cancelled, Failed
from pdengine.client.connection import Reply
from pdengine.router.http.answers import Answer, Answers
from pdengine.router.http.metrics import HttpMetrics
from pdengine.transport import messages
from pdengine.transport.messages import Accepted, Delta, Finished, Generate, Message, TokenPrompt, Usage

REQUEST = Generate(0, TokenPrompt([1]))
USAGE = Usage(1, 2)


class ScriptedClient:
    """In place of an AsyncClient: what the router says is there from the beginning."""

    def __init__(self, *replies: Reply) -> None:
        self._replies = replies
        self.sent: list[Message] = []
        self.cancelled: list[int] = []
        self.forgotten: list[int] = []
        self.queue: asyncio.Queue[Reply] = asyncio.Queue()

    async def wait_connected(self) -> None:
        pass

    def open(self) -> tuple[int, asyncio.Queue[Reply]]:
        for reply in self._replies:
            self.queue.put_nowait(reply)
        return 7, self.queue

    def send(self, message: Message) -> None:
        self.sent.append(message)

    def cancel(self, tag: int) -> None:
        self.cancelled.append(tag)

    def forget(self, tag: int) -> None:
        self.forgotten.append(tag)


def answer_of(client: ScriptedClient) -> Answer:
    return Answer(client, REQUEST, HttpMetrics(), asked_at=0.0)  # type: ignore[arg-type]


def finished() -> Finished:
    return Finished(7, ["length"], USAGE, "p", "d", 1)


@on_event_loop
async def test_what_is_there_is_one_batch() -> None:
    deltas = [Delta(7, text, [index]) for index, text in enumerate("abc")]
    client = ScriptedClient(Accepted(7, "id", 1), *deltas, finished())
    answer = answer_of(client)
    assert await answer.next_batch() == deltas
    assert (answer.usage, client.forgotten) == (USAGE, [7])
    assert await answer.next_batch() == []
    answer.cancel()
    assert client.cancelled == [], "it has ended"


@on_event_loop
async def test_an_error_comes_after_what_was_written_before() -> None:
    client = ScriptedClient(Delta(7, "a", [1]), messages.Failed(7, "out of luck"))
    answer = answer_of(client)
    assert [delta.text for delta in await answer.next_batch()] == ["a"]
    with pytest.raises(Failed, match="out of luck"):
        await answer.next_batch()


@on_event_loop
async def test_cancelling_wakes_whoever_waits() -> None:
    client = ScriptedClient()
    answer = answer_of(client)
    waiting = asyncio.create_task(answer.next_batch())
    while not client.sent:
        await asyncio.sleep(0)
    answer.cancel()
    answer.cancel()
    with pytest.raises(Cancelled):
        await waiting
    assert (client.cancelled, client.forgotten) == ([7], [7])


@on_event_loop
async def test_one_failed_prompt_ends_the_others() -> None:
    waits, fails = ScriptedClient(Delta(7, "a", [1])), ScriptedClient(messages.Failed(7, "out of luck"))
    answers = Answers([answer_of(waits), answer_of(fails)])
    with pytest.raises(Failed):
        async for _ in answers.batches():
            pass
    answers.cancel()
    assert waits.cancelled == [7]


@on_event_loop
async def test_a_silent_router_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pdengine.router.http.answers.INQUIRE_SECONDS", 0.01)
    client = ScriptedClient()
    answer = answer_of(client)
    waiting = asyncio.create_task(answer.next_batch())
    while messages.Inquire(7) not in client.sent:
        await asyncio.sleep(0)
    client.queue.put_nowait(messages.Failed(7, "given up"))
    with pytest.raises(Failed, match="given up"):
        await waiting
