"""Clients that are slow, silent or greedy, before a router in a process of its own: the others are served."""

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from time import monotonic
from urllib.parse import urlsplit

import psutil
import pytest
import zmq.asyncio
from deployment import DEADLINE_SECONDS, Deployment
from fake_cluster import FakeWorker, hello, on_event_loop
from test_http import PROMPT, url_of

from pdengine.bench.http_streams import http_request, read_streams
from pdengine.models.demo.facts import checkpoint_directory
from pdengine.transport.messages import Abort, PrefillAndDecode, StepTokens, TokenUpdate, Work

NUM_TOKENS = 1_500
LARGE = 100 * 10**6  # bytes
PIECE = b" " * 2**20
MAX_GROWTH = 200 * 2**20  # bytes of the router's memory, for all that is done to it here


@dataclass(frozen=True)
class Times:
    """Of one stream, in seconds; between: of two tokens, the median and the longest."""

    first: float
    between: float
    longest: float


class PacedWorker(FakeWorker):
    """Gives every request a token per step, whatever anybody reads."""

    async def work(self, step_seconds: float) -> None:
        requests: dict[str, tuple[Work, int]] = {}
        while True:
            while asked := self.pending(PrefillAndDecode):
                self.inbox.remove(asked[0])
                requests[asked[0].work.request_id] = asked[0].work, 0
            for aborted in self.pending(Abort):
                self.inbox.remove(aborted)
                requests.pop(aborted.request_id, None)
            updates = []
            for request_id, (work, position) in list(requests.items()):
                is_last = position == work.sampling.max_tokens - 1
                token = (400 + position % 50, "length" if is_last else None)
                updates.append(TokenUpdate(request_id, work.attempt, 0, position, *token))
                if is_last:
                    del requests[request_id]
                else:
                    requests[request_id] = work, position + 1
            if updates:
                self.send(StepTokens(updates))
            await asyncio.sleep(step_seconds)


@dataclass(frozen=True)
class Target:
    """A router process with HTTP, and a worker in this one."""

    url: str
    process: psutil.Process

    @property
    def address(self) -> tuple[str, int]:
        parts = urlsplit(self.url)
        assert parts.hostname is not None
        assert parts.port is not None
        return parts.hostname, parts.port

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(*self.address)

    async def stream(self, num_tokens: int) -> Times:
        """Ask for one stream, and read it as it comes; it must come whole."""
        asked_at = monotonic()
        reader, writer = await self.connect()
        writer.write(completion(num_tokens))
        arrivals = []
        async with asyncio.timeout(DEADLINE_SECONDS):
            assert b" 200 " in await reader.readline()
            while (line := await reader.readline()) != b"data: [DONE]\n":
                assert line, "the stream ended early"
                if line.startswith(b"data: "):
                    arrivals.append(monotonic())
        writer.close()
        assert len(arrivals) == num_tokens
        between = [later - earlier for earlier, later in pairwise(arrivals)]
        return Times(arrivals[0] - asked_at, median(between), max(between))


def completion(num_tokens: int) -> bytes:
    body = json.dumps({"prompt": PROMPT, "max_tokens": num_tokens, "stream": True, "ignore_eos": True})
    return head(f"Content-Length: {len(body)}") + body.encode()


def head(*headers: str) -> bytes:
    lines = ["POST /v1/completions HTTP/1.1", "Host: x", "Content-Type: application/json", *headers]
    return "".join(f"{line}\r\n" for line in [*lines, ""]).encode()


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with Deployment(checkpoint_directory(), tmp_path_factory.mktemp("faults")) as deployment:
        deployment.start_router(options=["--http", "127.0.0.1:0"])
        yield deployment


@asynccontextmanager
async def target(deployment: Deployment, step_seconds: float) -> AsyncIterator[Target]:
    router = deployment.processes[0]
    context = zmq.asyncio.Context()
    greeting = hello("paced", "unified", num_blocks=2**20, max_context=2**20)
    worker = PacedWorker(context, deployment.worker_address, greeting)
    await worker.join()
    working = asyncio.create_task(worker.work(step_seconds))
    try:
        yield Target(url_of(deployment, router), psutil.Process(router.pid))
        assert router.poll() is None
        assert "Traceback" not in deployment.log_of(router)
    finally:
        working.cancel()
        await worker.close()
        context.destroy(linger=0)


async def stay_silent(target: Target, stack: AsyncExitStack, number: int) -> None:
    """Connections that say nothing."""
    for _ in range(number):
        _, writer = await target.connect()
        stack.callback(writer.close)


async def read_nothing(target: Target, stack: AsyncExitStack, number: int) -> None:
    """Streams that nobody reads, of answers that are long enough to fill what is between."""
    for _ in range(number):
        stalled = stack.enter_context(socket.socket())
        stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        stalled.connect(target.address)
        stalled.sendall(completion(NUM_TOKENS))


async def dribble(target: Target, data: bytes) -> None:
    """A byte per second, until the server has had enough."""
    while True:
        _, writer = await target.connect()
        with contextlib.suppress(ConnectionError):
            for byte in data:
                writer.write(bytes([byte]))
                await writer.drain()
                await asyncio.sleep(1)
        writer.close()


async def send_much(target: Target, framing: str) -> None:
    """A body of 100 MB again and again; it must be refused, each time, and the sender must see that."""
    is_chunked = "chunked" in framing

    async def send(writer: asyncio.StreamWriter) -> None:
        writer.write(head(framing))
        with contextlib.suppress(ConnectionError):
            for _ in range(LARGE // len(PIECE)):
                writer.write(b"%x\r\n%b\r\n" % (len(PIECE), PIECE) if is_chunked else PIECE)
                await writer.drain()

    while True:
        reader, writer = await target.connect()
        sending = asyncio.create_task(send(writer))
        assert b" 413 " in await reader.readline()
        await sending
        writer.close()


async def send_intricate(target: Target) -> None:
    """As much JSON as is accepted, again and again, of the kinds that take longest."""
    bodies = (
        b'{"prompt": [' + b"[1,1,1]," * (2**16 - 8) + b"[1]]}",
        b'{"messages": [' + b'{"role":"a","content":"b"},' * 21_000 + b'{"role":"a","content":"b"}]}',
        b'{"prompt": "a", "x": [' + b"1.5e3," * (2**19 - 2) + b"1]}",
    )
    while True:
        for body in bodies:
            reader, writer = await target.connect()
            writer.write(head(f"Content-Length: {len(body)}") + body)
            assert b" 400 " in await reader.readline()
            writer.close()


@asynccontextmanager
async def nuisances(target: Target, num_silent: int, num_stalled: int) -> AsyncIterator[None]:
    async with AsyncExitStack() as stack:
        await stay_silent(target, stack, num_silent)
        await read_nothing(target, stack, num_stalled)
        tasks = [
            asyncio.create_task(act)
            for act in (
                *(dribble(target, b"GET /live HTTP/1.1\r\nHost: x\r\n\r\n") for _ in range(5)),
                *(dribble(target, head("Content-Length: 1000") + b" ") for _ in range(5)),
                send_much(target, f"Content-Length: {LARGE}"),
                send_much(target, "Transfer-Encoding: chunked"),
            )
        ]
        try:
            yield
            assert not any(task.done() for task in tasks), "the server treated none as it should not"
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


@on_event_loop
async def test_slow_and_greedy_clients_disturb_nobody(deployment: Deployment) -> None:
    async with target(deployment, step_seconds=0.001) as served:
        await served.stream(100)
        before = served.process.memory_info().rss
        async with nuisances(served, num_silent=1_000, num_stalled=20):
            await served.stream(1_000)
            growth = served.process.memory_info().rss - before
            assert growth < MAX_GROWTH
            print(f"the router grew by {growth / 2**20:.0f} MiB")
    deployment.wait_status(lambda status: status.requests == 0)


@pytest.mark.long
@on_event_loop
async def test_what_slow_and_greedy_clients_cost_the_others(deployment: Deployment) -> None:
    """Times are printed, not asserted: the machine has few cores, and the greedy clients run on them, too."""

    async def bystander(name: str) -> None:
        times = [await served.stream(200) for _ in range(3)]
        print(
            f"{name}: TTFT {median(t.first for t in times) * 1e3:.1f} ms, "
            f"TPOT {median(t.between for t in times) * 1e3:.2f} ms, "
            f"longest gap {max(t.longest for t in times) * 1e3:.1f} ms, "
            f"router {served.process.memory_info().rss / 2**20:.0f} MiB"
        )

    async with target(deployment, step_seconds=0.01) as served:
        await bystander("alone")
        async with AsyncExitStack() as stack:
            await stay_silent(served, stack, 1_000)
            await bystander("beside 1000 silent connections")
        async with AsyncExitStack() as stack:
            await read_nothing(served, stack, 20)
            await bystander("beside 20 streams that nobody reads")
        async with nuisances(served, num_silent=0, num_stalled=0):
            await bystander("beside 10 that send a byte per second and 2 that send 100 MB")
        async with nuisances(served, num_silent=1_000, num_stalled=20):
            await bystander("beside all of them")
        intricate = asyncio.create_task(send_intricate(served))
        await bystander("beside one that sends intricate JSON")
        assert not intricate.done()
        intricate.cancel()
        await bystander("alone again")


@pytest.mark.long
def test_500_streams_at_once(tmp_path: Path) -> None:
    """From real workers: all come whole, and nothing is left of them."""
    num_streams, num_tokens = 500, 64
    with Deployment(checkpoint_directory(), tmp_path) as deployment:
        router = deployment.start_router(options=["--http", "127.0.0.1:0"])
        deployment.start_worker("prefill")
        deployment.start_worker("decode")
        deployment.wait_workers("prefill", "decode")
        port = urlsplit(url_of(deployment, router)).port
        assert port is not None
        begun_at = monotonic()
        for chat in (False, True):
            request = http_request(port, num_tokens, chat=chat)
            arrivals = asyncio.run(read_streams(port, request, num_streams))
            assert [len(times) for times in arrivals] == [num_tokens + chat] * num_streams
            seconds = max(times[-1] for times in arrivals) - begun_at
            print(f"{num_streams} streams of {num_tokens} tokens have ended {seconds:.1f} s after the start")
        deployment.wait_baseline()
        assert "Traceback" not in deployment.log_of(router)
