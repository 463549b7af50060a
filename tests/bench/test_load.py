"""The load generator: what it sends, and what it makes of the answers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from itertools import islice, pairwise, repeat
from typing import Any, TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdengine.bench.load import (
    FIRST_ORDINARY_TOKEN,
    CompletionsTarget,
    LoadFailed,
    Request,
    RouterTarget,
    Spread,
    Timing,
    ask,
    closed_loop,
    open_loop,
    poisson_times,
    random_requests,
    server_sent_events,
    spread,
)
from pdengine.client import AsyncClient, Delta

T = TypeVar("T")
REQUEST = Request([20, 21, 22], output_tokens=3)


class Served:
    """A target that counts; `counts` are the tokens of each delta. It answers when `release` is set."""

    def __init__(self, counts: Sequence[int] = (1, 2), release: asyncio.Event | None = None) -> None:
        self.counts = counts
        self.release = release
        self.in_flight = 0
        self.most_in_flight = 0

    async def tokens(self, request: Request) -> AsyncGenerator[int, None]:
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        for count in self.counts:
            await asyncio.sleep(0)
            yield count
        if self.release is not None:
            await self.release.wait()
        self.in_flight -= 1


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(asyncio.wait_for(coroutine, 30))


def usage(completion_tokens: int) -> str:
    return f"data: {json.dumps({'choices': [], 'usage': {'completion_tokens': completion_tokens}})}\n\n"


def chunked(pieces: Sequence[bytes]) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces if piece) + b"0\r\n\r\n"


@asynccontextmanager
async def http_server(answer: bytes, heard: list[bytes] | None = None) -> AsyncIterator[int]:
    """It answers every request with these bytes and closes the connection: its port."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        body = await reader.readexactly(length)
        if heard is not None:
            heard.append(body)
        writer.write(answer)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


def ask_http(answer: bytes, heard: list[bytes] | None = None) -> Timing:
    async def exchange() -> Timing:
        async with http_server(answer, heard) as port:
            return await ask(CompletionsTarget(port, "model"), REQUEST)

    return run(exchange())


OK = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


def test_a_completion_is_asked_for_and_its_tokens_are_counted_as_they_come() -> None:
    heard: list[bytes] = []
    # Two tokens in one event, an event that repeats the total, the usage at the end.
    events = "".join(usage(total) for total in (1, 3, 3)) + "data: [DONE]\n\n"
    timing = ask_http(OK + chunked([events.encode()]), heard)
    assert len(timing.arrivals) == 3
    assert timing.sent_at < timing.arrivals[0] <= timing.arrivals[1] == timing.arrivals[2]
    body = json.loads(heard[0])
    assert (body["prompt"], body["max_tokens"], body["temperature"]) == ([20, 21, 22], 3, 0)
    assert body["ignore_eos"] is True
    assert body["stream"] is True


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (b"HTTP/1.1 404 Not Found\r\n\r\nno such model", "404 Not Found: no such model"),
        (OK + chunked([usage(2).encode()]), "2 tokens instead of 3"),
        (OK + chunked([usage(4).encode()]), "4 tokens instead of 3"),
        (OK + chunked([b'data: {"error": "out of memory"}\n\n']), "out of memory"),
        (OK + b"40\r\ndata: ", "closed the connection"),
    ],
)
def test_an_answer_that_is_not_what_was_asked_for_fails(answer: bytes, problem: str) -> None:
    with pytest.raises(LoadFailed, match=problem):
        ask_http(answer)


@given(st.lists(st.integers(0, 9), max_size=6), st.lists(st.integers(0, 400), max_size=6))
def test_events_do_not_depend_on_where_chunks_are_cut(totals: list[int], cuts: list[int]) -> None:
    body = ("".join(map(usage, totals)) + "data: [DONE]\n\n").encode()
    edges = [0, *sorted(min(cut, len(body)) for cut in cuts), len(body)]
    pieces = [body[begin:end] for begin, end in pairwise(edges)]

    async def read() -> list[bytes]:
        reader = asyncio.StreamReader()
        reader.feed_data(chunked(pieces))
        reader.feed_eof()
        return [event async for event in server_sent_events(reader)]

    events = [json.loads(event) for event in run(read())]
    assert [event["usage"]["completion_tokens"] for event in events] == totals


def test_a_router_is_asked_for_the_same() -> None:
    asked: dict[str, Any] = {}

    class Stream:
        async def __aenter__(self) -> None:
            return None

        async def __aexit__(self, *_: object) -> None:
            return None

        async def __aiter__(self) -> AsyncIterator[Delta]:
            for token_ids in ([5], [], [6, 7]):
                yield Delta("", token_ids)

    class Client(AsyncClient):
        def __init__(self) -> None:
            pass

        def stream(self, prompt: Any, **options: Any) -> Any:
            asked.update(options, prompt=prompt)
            return Stream()

    assert len(run(ask(RouterTarget(Client()), REQUEST)).arrivals) == 3
    assert asked == {"prompt": REQUEST.prompt, "max_tokens": 3, "temperature": 0, "ignore_eos": True}


@pytest.mark.parametrize("concurrency", [1, 3, 20])
def test_a_closed_loop_keeps_so_many_in_flight(concurrency: int) -> None:
    target = Served()
    timings = run(closed_loop(target, list(repeat(REQUEST, 10)), concurrency))
    assert len(timings) == 10
    assert target.most_in_flight == min(concurrency, 10)
    assert target.in_flight == 0


def test_a_closed_loop_without_time_sends_nothing() -> None:
    assert run(closed_loop(Served(), repeat(REQUEST), 2, seconds=0)) == []


def test_a_request_that_fails_ends_the_load() -> None:
    with pytest.raises(LoadFailed, match="1 tokens instead of 3"):
        run(closed_loop(Served(counts=(1,)), repeat(REQUEST), 2))


def test_an_open_loop_does_not_wait_for_answers() -> None:
    async def load() -> tuple[Served, list[Timing]]:
        target = Served(release=asyncio.Event())
        assert target.release is not None
        sending = asyncio.create_task(open_loop(target, [(0.0, REQUEST)] * 5))
        while target.in_flight < 5:
            await asyncio.sleep(0)
        target.release.set()
        return target, await sending

    target, timings = run(load())
    assert (target.most_in_flight, len(timings)) == (5, 5)


def test_times_of_a_request() -> None:
    timing = Timing(10.0, (10.5, 10.75, 11.5))
    assert (timing.ttft, timing.tpot, timing.longest_gap, timing.latency) == (0.5, 0.5, 0.75, 1.5)
    assert Timing(0.0, (1.0,)).tpot != Timing(0.0, (1.0,)).tpot  # nan


def test_spread() -> None:
    assert spread([3.0]) == Spread(3.0, 3.0, 3.0)
    values = spread([float(value) for value in range(101)])
    assert values == Spread(50.0, 50.0, 99.0)


def test_prompts_are_random_and_repeatable() -> None:
    def prompts(seed: str) -> list[list[int]]:
        requests = random_requests(seed, vocab_size=4096, prompt_tokens=64, output_tokens=8)
        return [request.prompt for request in islice(requests, 20)]

    first = prompts("0 1")
    assert first == prompts("0 1")
    beginnings = {tuple(prompt[:16]) for seed in ("0 1", "0 4", "1 1", "1 4") for prompt in prompts(seed)}
    assert len(beginnings) == 80  # no two share a block
    assert all(FIRST_ORDINARY_TOKEN <= token < 4096 for prompt in first for token in prompt)


@given(st.text(max_size=5), st.floats(0, 50), st.floats(0, 20))
def test_poisson_arrivals_lie_within_the_time(seed: str, rate: float, seconds: float) -> None:
    times = poisson_times(seed, rate, seconds)
    assert times == sorted(times) == poisson_times(seed, rate, seconds)
    assert all(0 <= at < seconds for at in times)
    assert times == [] or rate > 0


def test_poisson_arrivals_come_at_their_rate() -> None:
    times = poisson_times("", rate=5.0, seconds=2000)
    assert len(times) == pytest.approx(10000, rel=0.05)
    above_mean = sum(after - before > 0.2 for before, after in pairwise(times))
    assert above_mean / len(times) == pytest.approx(0.368, rel=0.05)  # 1 / e: exponential
