"""How answers are read from the router: all that is there at once, and nothing lost before an error."""

import asyncio
from collections.abc import Sequence

import pytest
from fake_cluster import DEADLINE_SECONDS, on_event_loop

from pdengine.client import Cancelled, Failed
from pdengine.client.connection import ConnectionLost, Listener, Reply, RouterStalled
from pdengine.router.http.answers import RETRIES, Answers
from pdengine.router.http.metrics import HttpMetrics
from pdengine.transport import messages
from pdengine.transport.messages import Accepted, Delta, Finished, Generate, Message, TokenPrompt, Usage

REQUEST = Generate(0, TokenPrompt([1]))
USAGE = Usage(1, 2)


class ScriptedClient:
    """In place of an AsyncClient: says these replies when it is asked, and later what it is told to."""

    def __init__(self, *replies: Reply) -> None:
        self._replies: Sequence[Reply] = replies
        self.replies_elsewhere: Sequence[Reply] = ()
        self.num_lost = 0  # requests after the first that it cannot send
        self.sent: list[Message] = []
        self.cancelled: list[int] = []
        self.forgotten: list[int] = []
        self.say: Listener = lambda reply: None
        self.has_usable_router = False

    async def wait_connected(self) -> None:
        pass

    def open(self, listener: Listener) -> int:
        self.say = listener
        return 7

    def send(self, message: Message) -> None:
        if self.sent and self.num_lost:
            self.num_lost -= 1
            raise ConnectionLost("it went this moment")
        self.sent.append(message)
        if isinstance(message, Generate):
            replies, self._replies = self._replies, self.replies_elsewhere
            for reply in replies:
                self.say(reply)

    def cancel(self, tag: int) -> None:
        self.cancelled.append(tag)

    def forget(self, tag: int) -> None:
        self.forgotten.append(tag)


def answers_of(client: ScriptedClient, num_prompts: int = 1) -> Answers:
    return Answers(client, [REQUEST] * num_prompts, HttpMetrics(), asked_at=0.0)  # type: ignore[arg-type]


def deltas(texts: str) -> list[Delta]:
    return [Delta(7, text, [index]) for index, text in enumerate(texts)]


async def until_asked(client: ScriptedClient) -> None:
    """And until whoever asked waits for more."""
    while not client.sent:
        await asyncio.sleep(0)
    await asyncio.sleep(0)


FINISHED = Finished(7, ["length"], USAGE, "p", "d", 1)


@on_event_loop
async def test_what_is_there_is_one_batch() -> None:
    client = ScriptedClient(Accepted(7, "id", 1), *deltas("abc"), FINISHED)
    answers = answers_of(client)
    assert [batch async for batch in answers.batches()] == [(0, deltas("abc"))]
    assert (answers.usages, answers.request_ids, client.forgotten) == ([USAGE], ["id"], [7])
    answers.cancel()
    assert client.cancelled == [], "it has ended"


@on_event_loop
async def test_an_error_comes_after_what_was_written_before() -> None:
    batches = answers_of(ScriptedClient(*deltas("a"), messages.Failed(7, "out of luck"))).batches()
    assert await anext(batches) == (0, deltas("a"))
    with pytest.raises(Failed, match="out of luck"):
        await anext(batches)


@on_event_loop
async def test_cancelling_wakes_whoever_waits() -> None:
    client = ScriptedClient()
    answers = answers_of(client)
    waiting = asyncio.ensure_future(anext(answers.batches()))
    await until_asked(client)
    answers.cancel()
    answers.cancel()
    with pytest.raises(Cancelled):
        await waiting
    assert (client.cancelled, client.forgotten) == ([7], [7])


@on_event_loop
async def test_what_is_cancelled_before_it_was_asked_is_never_asked() -> None:
    client = ScriptedClient()
    answers = answers_of(client)
    answers.cancel()
    with pytest.raises(Cancelled):
        await anext(answers.batches())
    assert client.sent == []


@on_event_loop
async def test_one_failed_prompt_ends_the_others() -> None:
    client = ScriptedClient()
    answers = answers_of(client, 2)
    waiting = asyncio.ensure_future(anext(answers.batches()))
    await until_asked(client)
    client.say(messages.Failed(7, "out of luck"))  # to the second one
    with pytest.raises(Failed):
        await waiting
    answers.cancel()
    assert client.cancelled == [7, 7]


@on_event_loop
async def test_a_silent_router_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pdengine.router.http.answers.INQUIRE_SECONDS", 0.01)
    client = ScriptedClient()
    waiting = asyncio.ensure_future(anext(answers_of(client).batches()))
    while messages.Inquire(7) not in client.sent:
        await asyncio.sleep(0)
    client.say(messages.Failed(7, "given up"))
    with pytest.raises(Failed, match="given up"):
        await waiting


OF_ROUTER = [
    messages.Failed(7, "no worker", retry=True),
    ConnectionLost("the connection was lost"),
    RouterStalled("it stands still"),
]


@pytest.mark.parametrize("error", OF_ROUTER, ids=lambda error: type(error).__name__)
@on_event_loop
async def test_another_router_is_asked_while_no_token_has_come(error: Reply) -> None:
    """Late words of the first one are not the second one's."""
    client = ScriptedClient(Accepted(7, "first", 1), error, *deltas("x"), FINISHED)
    client.replies_elsewhere = [Accepted(7, "second", 1), *deltas("a"), FINISHED]
    client.has_usable_router = True
    answers = answers_of(client)
    assert [batch async for batch in answers.batches()] == [(0, deltas("a"))]
    assert answers.request_ids == ["second"]
    assert len(client.sent) == 2
    assert (client.cancelled, client.forgotten) == ([7], [7, 7])


@pytest.mark.parametrize("num_lost", [1, RETRIES])
@pytest.mark.parametrize("error", OF_ROUTER, ids=lambda error: type(error).__name__)
@on_event_loop
async def test_a_request_that_cannot_be_sent_elsewhere_is_sent_again_or_fails(
    error: Reply, num_lost: int
) -> None:
    """Nobody has it any more: not even a router that stands still would go on."""
    client = ScriptedClient(error)
    client.replies_elsewhere = [*deltas("a"), FINISHED]
    client.has_usable_router = True
    client.num_lost = num_lost
    batches = answers_of(client).batches()
    async with asyncio.timeout(DEADLINE_SECONDS):
        if num_lost < RETRIES:
            assert [batch async for batch in batches] == [(0, deltas("a"))]
        else:
            with pytest.raises(ConnectionLost, match="it went this moment"):
                await anext(batches)


@pytest.mark.parametrize("error", OF_ROUTER[:2], ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("why_not", ["a token has come", "no router is there", "it was tried often enough"])
@on_event_loop
async def test_when_no_other_router_is_asked(error: Reply, why_not: str) -> None:
    replies = [*deltas("a"), error] if why_not == "a token has come" else [error]
    client = ScriptedClient(*replies)
    client.replies_elsewhere = [error]
    client.has_usable_router = why_not != "no router is there"
    batches = answers_of(client).batches()
    if why_not == "a token has come":
        assert await anext(batches) == (0, deltas("a"))
    with pytest.raises((Failed, ConnectionLost)):
        await anext(batches)
    assert len(client.sent) == (1 + RETRIES if why_not == "it was tried often enough" else 1)


@on_event_loop
async def test_a_router_that_stands_still_may_go_on() -> None:
    client = ScriptedClient(RouterStalled("it stands still"), *deltas("a"), FINISHED)
    answers = answers_of(client)
    assert [batch async for batch in answers.batches()] == [(0, deltas("a"))]
    assert len(client.sent) == 1


class Taker:
    """Takes deltas at once, while it is `ready`."""

    def __init__(self) -> None:
        self.ready = True
        self.texts = ""

    def __call__(self, index: int, delta: Delta) -> bool:
        if self.ready:
            self.texts += delta.text
        return self.ready


@on_event_loop
async def test_a_delta_is_taken_at_once_while_all_before_are_taken() -> None:
    client, taker = ScriptedClient(), Taker()
    answers = answers_of(client)
    answers.take_at_once = taker
    batches = answers.batches()
    waiting = asyncio.ensure_future(anext(batches))
    await until_asked(client)
    a, b, c, d, e = deltas("abcde")
    client.say(a)
    taker.ready = False
    client.say(b)
    taker.ready = True
    client.say(c)
    assert await waiting == (0, [b, c]), "none comes before an older one"
    client.say(d)
    assert taker.texts == "a", "what was given last may not be written yet"
    assert await anext(batches) == (0, [d])
    waiting = asyncio.ensure_future(anext(batches))
    await asyncio.sleep(0)
    client.say(e)
    client.say(FINISHED)
    with pytest.raises(StopAsyncIteration):
        await waiting
    assert taker.texts == "ae"


@on_event_loop
async def test_what_fails_to_be_taken_at_once_is_given() -> None:
    def fail(index: int, delta: Delta) -> bool:
        raise KeyError(index)

    client = ScriptedClient()
    answers = answers_of(client)
    answers.take_at_once = fail
    waiting = asyncio.ensure_future(anext(answers.batches()))
    await until_asked(client)
    client.say(deltas("a")[0])
    assert await waiting == (0, deltas("a"))
