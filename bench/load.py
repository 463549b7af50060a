"""A light load generator: requests of random tokens to a server, and when each of their tokens came.

One asyncio loop with one connection per request (HTTP) or one for all (ZeroMQ), so that on the few cores
that it shares with the server it takes little. Servers of both kinds are asked for the same thing: prompts as
token ids, greedy, to the last token whatever the tokens are.
"""

import asyncio
import random
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from time import monotonic
from typing import Any, Protocol

import msgspec
import numpy as np

from pdengine.client import AsyncClient

FIRST_ORDINARY_TOKEN = 16  # what is below is special in most vocabularies


class LoadFailed(RuntimeError):
    """A request was not answered as asked, so there is nothing to measure."""


@dataclass(frozen=True)
class Request:
    """prompt: token ids. output_tokens: of the answer, exactly."""

    prompt: list[int]
    output_tokens: int


@dataclass(frozen=True)
class Timing:
    """One answered request. sent_at and arrivals, one per output token: seconds of the monotonic clock."""

    sent_at: float
    arrivals: tuple[float, ...]

    @property
    def ttft(self) -> float:
        """Time to first token, in seconds."""
        return self.arrivals[0] - self.sent_at

    @property
    def tpot(self) -> float:
        """Time per output token after the first, in seconds; nan where there is one token only."""
        steps = len(self.arrivals) - 1
        return (self.arrivals[-1] - self.arrivals[0]) / steps if steps else float("nan")

    @property
    def longest_gap(self) -> float:
        """The longest inter-token latency, in seconds; nan where there is one token only."""
        gaps = [after - before for before, after in pairwise(self.arrivals)]
        return max(gaps, default=float("nan"))

    @property
    def latency(self) -> float:
        """From sending to the last token, in seconds."""
        return self.arrivals[-1] - self.sent_at


@dataclass(frozen=True)
class Spread:
    """Mean and percentiles of some durations; they keep the unit they came in."""

    mean: float
    p50: float
    p99: float


class Target(Protocol):
    """A server that is asked."""

    def tokens(self, request: Request) -> AsyncGenerator[int, None]:
        """Send `request`; the number of new output tokens, each time that some arrive."""


class CompletionsTarget:
    """A server of OpenAI's `/v1/completions` on this host, as server-sent events over HTTP/1.1."""

    def __init__(self, port: int, model: str) -> None:
        self._port = port
        self._model = model

    async def tokens(self, request: Request) -> AsyncGenerator[int, None]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        try:
            writer.write(self._http(request))
            status = await reader.readline()
            while await reader.readline() not in (b"\r\n", b""):
                pass
            if b" 200 " not in status:
                reason = await reader.read(500)
                raise LoadFailed(f"{status.decode().strip()}: {reason.decode(errors='replace')}")
            before = 0
            async for event in server_sent_events(reader):
                total = _completion_tokens(event)
                if total > before:
                    yield total - before
                before = max(before, total)
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise LoadFailed(f"the server closed the connection: {error}") from error
        finally:
            writer.close()

    def _http(self, request: Request) -> bytes:
        body = msgspec.json.encode(
            {
                "model": self._model,
                "prompt": request.prompt,
                "max_tokens": request.output_tokens,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True, "continuous_usage_stats": True},
            }
        )
        head = (
            "POST /v1/completions HTTP/1.1\r\n"
            f"Host: 127.0.0.1:{self._port}\r\n"
            "Content-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n"
            "Connection: close\r\n\r\n"
        )
        return head.encode() + body


class RouterTarget:
    """A pdengine router, over ZeroMQ."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def tokens(self, request: Request) -> AsyncGenerator[int, None]:
        stream = self._client.stream(
            request.prompt, max_tokens=request.output_tokens, temperature=0, ignore_eos=True
        )
        async with stream:
            async for delta in stream:
                if delta.token_ids:
                    yield len(delta.token_ids)


async def server_sent_events(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """The data of each event in a chunked HTTP/1.1 body (RFC 9112, 7.1), without the `[DONE]` at its end."""
    buffer = b""
    while size := int((await reader.readline()).partition(b";")[0] or b"0", 16):
        buffer += (await reader.readexactly(size + 2))[:-2]
        *lines, buffer = buffer.split(b"\n")
        for line in lines:
            if line.startswith(b"data: ") and line.strip() != b"data: [DONE]":
                yield line.removeprefix(b"data: ")


def random_requests(
    seed: str, *, vocab_size: int, prompt_tokens: int, output_tokens: int
) -> Iterator[Request]:
    """Requests without end; those of another seed begin otherwise, so that no prefix cache helps."""
    rng = random.Random(seed)
    while True:
        prompt = rng.choices(range(FIRST_ORDINARY_TOKEN, vocab_size), k=prompt_tokens)
        yield Request(prompt, output_tokens)


async def closed_loop(
    target: Target, requests: Iterable[Request], concurrency: int, seconds: float = float("inf")
) -> list[Timing]:
    """Keep `concurrency` requests in flight until `requests` ends, or for `seconds`; those sent are finished.

    Raises LoadFailed, or what the target raises, as soon as one request fails.
    """
    queue, timings, end = iter(requests), list[Timing](), monotonic() + seconds

    async def one_after_the_other() -> None:
        while monotonic() < end and (request := next(queue, None)) is not None:
            timings.append(await ask(target, request))

    await _all_or_first_error(one_after_the_other() for _ in range(concurrency))
    return timings


async def open_loop(target: Target, arrivals: Iterable[tuple[float, Request]]) -> list[Timing]:
    """Send each request at its time, in seconds from now, however many are in flight.

    Raises as closed_loop does.
    """
    begin = monotonic()

    async def later(at: float, request: Request) -> Timing:
        await asyncio.sleep(begin + at - monotonic())
        return await ask(target, request)

    return await _all_or_first_error(later(at, request) for at, request in arrivals)


def poisson_times(seed: str, rate: float, seconds: float) -> list[float]:
    """Arrivals within `seconds` at `rate` per second, exponentially apart; the same for the same seed."""
    rng, times, at = random.Random(seed), list[float](), 0.0
    while rate > 0 and (at := at + rng.expovariate(rate)) < seconds:
        times.append(at)
    return times


async def ask(target: Target, request: Request) -> Timing:
    """One request, from sending to its last token. Raises LoadFailed if the answer has another length."""
    sent_at, arrivals = monotonic(), list[float]()
    async with aclosing(target.tokens(request)) as tokens:
        async for count in tokens:
            arrivals += [monotonic()] * count
    if len(arrivals) != request.output_tokens:
        raise LoadFailed(f"an answer has {len(arrivals)} tokens instead of {request.output_tokens}")
    return Timing(sent_at, tuple(arrivals))


def spread(values: Sequence[float]) -> Spread:
    """Of at least one value."""
    p50, p99 = np.percentile(values, [50, 99])
    return Spread(fmean(values), float(p50), float(p99))


async def _all_or_first_error(coroutines: Iterable[Any]) -> list[Any]:
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(coroutine) for coroutine in coroutines]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


def _completion_tokens(event: bytes) -> int:
    """Tokens so far. Raises LoadFailed for an event that is an error, or has no usage."""
    try:
        return msgspec.json.decode(event, type=_Event).usage.completion_tokens
    except msgspec.ValidationError:
        raise LoadFailed(f"the server sent {event[:500].decode(errors='replace')}") from None


class _Usage(msgspec.Struct):
    completion_tokens: int = 0


class _Event(msgspec.Struct):
    usage: _Usage
