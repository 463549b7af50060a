"""`python -m pdengine.bench.http_streams`: what a token costs on its way through router and HTTP server.

Real processes, and a worker that computes nothing: it gives every running request a token per step, so many
steps per second that the wanted rate results. Clients read all streams at once from another process's side of
real sockets. What counts is the processor time of router and HTTP server per token; with both in one process,
and with a process for each.
"""

import argparse
import asyncio
import json
import re
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from os import sysconf
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import zmq.asyncio
from rich.console import Console
from rich.table import Table

from pdengine.bench.machine import write_result
from pdengine.models.demo.facts import checkpoint_directory
from pdengine.models.fingerprint import model_fingerprint
from pdengine.transport.messages import (
    PROTOCOL_VERSION,
    Compatibility,
    FinishReason,
    Hello,
    Load,
    PeerDescriptor,
    PrefillAndDecode,
    RouterToWorker,
    StepTokens,
    TokenUpdate,
    Welcome,
    Work,
)
from pdengine.transport.regions import RegionDescriptor
from pdengine.transport.sockets import PeerSocket

LISTENING = re.compile(r"listening for clients on (\S+), for workers on (\S+)")
SERVING = re.compile(r"over HTTP on http://\S+:(\d+)")
START_SECONDS = 60.0
NUM_BLOCKS = 2**20
PROMPT = "What is in the box of Joseph?"
FIRST_TOKEN, NUM_TOKENS = 300, 400  # ordinary ones of the demo's vocabulary
TICKS_PER_SECOND = sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Result:
    """One run. seconds: from the first token at a client to the last. router_us, http_us: processor time per
    token, in microseconds; of both together in `router_us` where they are one process. itl_p50, itl_p99:
    between two tokens of a stream at its client, in seconds."""

    processes: str
    chat: bool
    streams: int
    tokens: int
    seconds: float
    router_us: float
    http_us: float | None
    itl_p50: float
    itl_p99: float


class Process:
    """A child process and its log; ends with the block."""

    def __init__(self, arguments: Sequence[str], log: Path) -> None:
        self._log = log
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-u", "-m", "pdengine.cli", *arguments], stdout=output, stderr=output
            )

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def says(self, pattern: re.Pattern[str]) -> tuple[str, ...]:
        """The groups of the pattern, when the log matches it."""
        deadline = monotonic() + START_SECONDS
        while monotonic() < deadline and self._process.poll() is None:
            if match := pattern.search(self._log.read_text()):
                return match.groups()
        raise SystemExit(f"it did not start:\n{self._log.read_text()}")

    @property
    def cpu_seconds(self) -> float:
        """Processor time so far, of all threads, in user and kernel mode (proc(5), stat)."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS_PER_SECOND


class PacedWorker:
    """A worker that gives each of its requests a token per step, once all have come."""

    def __init__(self, context: zmq.asyncio.Context, address: str, num_requests: int, step: float) -> None:
        self._socket = PeerSocket[RouterToWorker](context, address, RouterToWorker)
        self._num_requests = num_requests
        self._step = step

    async def join(self) -> None:
        region = RegionDescriptor(("block", "dim"), (NUM_BLOCKS, 1), (1, 1), "uint8", base_address=0)
        self._socket.send(
            Hello(
                PeerDescriptor("paced", "unified", "tcp://127.0.0.1:1", b"", region),
                Compatibility(
                    protocol=PROTOCOL_VERSION,
                    model=model_fingerprint(checkpoint_directory()),
                    weights="none",
                    dtype="float32",
                    block_size=16,
                    layout="none",
                    ucx="none",
                ),
                Load(NUM_BLOCKS, NUM_BLOCKS),
                max_context=2**20,
            )
        )
        while not isinstance(await self._socket.receive(), Welcome):
            pass

    async def work(self) -> None:
        """One round of requests, all begun at once."""
        requests: list[Work] = []
        while len(requests) < self._num_requests:
            message = await self._socket.receive()
            if isinstance(message, PrefillAndDecode):
                requests.append(message.work)
        num_tokens = requests[0].sampling.max_tokens
        next_at = asyncio.get_running_loop().time()
        for position in range(num_tokens):
            token_id = FIRST_TOKEN + position % NUM_TOKENS
            reason: FinishReason | None = "length" if position == num_tokens - 1 else None
            updates = [
                TokenUpdate(work.request_id, work.attempt, 0, position, token_id, reason) for work in requests
            ]
            self._socket.send(StepTokens(updates))
            next_at += self._step
            await asyncio.sleep(max(0.0, next_at - asyncio.get_running_loop().time()))

    def close(self) -> None:
        self._socket.close()


class StreamReader(asyncio.Protocol):
    """Asks for one stream and notes when its events come. done: set at the last one."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self._tail = b""
        self.arrivals: list[float] = []
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        data = self._tail + data
        self.arrivals += [monotonic()] * data.count(b"data: {")
        ended = b"data: [DONE]" in data
        # What may be the beginning of a mark: no whole one, or it would count twice.
        self._tail = data[max(data.rfind(b"\n"), len(data) - 6) + 1 :]
        if ended and not self.done.done():
            self.done.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(ConnectionError(f"a stream ended early: {exc}"))


def http_request(port: int, num_tokens: int, *, chat: bool) -> bytes:
    body: dict[str, Any] = {"max_tokens": num_tokens, "ignore_eos": True, "stream": True}
    body |= {"messages": [{"role": "user", "content": PROMPT}]} if chat else {"prompt": PROMPT}
    content = json.dumps(body).encode()
    path = "/v1/chat/completions" if chat else "/v1/completions"
    head = (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + content


async def read_streams(port: int, request: bytes, num_streams: int) -> list[list[float]]:
    """The arrivals of the events of every stream."""
    loop = asyncio.get_running_loop()
    readers = []
    for _ in range(num_streams):
        _, reader = await loop.create_connection(lambda: StreamReader(request), "127.0.0.1", port)
        readers.append(reader)
    await asyncio.gather(*(reader.done for reader in readers))
    return [reader.arrivals for reader in readers]


async def run(arguments: argparse.Namespace, *, apart: bool, chat: bool) -> Result:
    with ExitStack() as stack:
        router, http, worker_address, port = _start(stack, apart=apart)
        context = zmq.asyncio.Context()
        step = arguments.streams / arguments.rate
        worker = PacedWorker(context, worker_address, arguments.streams, step)
        await worker.join()
        request = http_request(port, arguments.tokens, chat=chat)
        processes = [router] if http is None else [router, http]
        before = [process.cpu_seconds for process in processes]
        arrivals, _ = await asyncio.gather(read_streams(port, request, arguments.streams), worker.work())
        used = [process.cpu_seconds - cpu for process, cpu in zip(processes, before, strict=True)]
        worker.close()
        context.destroy(linger=0)
    skipped = 1 if chat else 0  # the event that opens an answer
    assert {len(times) for times in arrivals} == {arguments.tokens + skipped}, "events are missing"
    total = arguments.streams * arguments.tokens
    intervals = np.concatenate([np.diff(times[skipped:]) for times in arrivals])
    router_us, *http_us = (seconds / total * 1e6 for seconds in used)
    return Result(
        processes="one each" if apart else "one for both",
        chat=chat,
        streams=arguments.streams,
        tokens=arguments.tokens,
        seconds=max(times[-1] for times in arrivals) - min(times[0] for times in arrivals),
        router_us=router_us,
        http_us=http_us[0] if http_us else None,
        itl_p50=float(np.percentile(intervals, 50)),
        itl_p99=float(np.percentile(intervals, 99)),
    )


def _start(stack: ExitStack, *, apart: bool) -> tuple[Process, Process | None, str, int]:
    """A router, an HTTP server of its own if `apart`, where the router's workers connect, and HTTP's port."""
    logs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    model = ["--model", str(checkpoint_directory())]
    addresses = ["--client-address", "tcp://127.0.0.1:0", "--worker-address", "tcp://127.0.0.1:0"]
    own_http = [] if apart else ["--http", "127.0.0.1:0"]
    options = ["--silence-seconds", "3600", *own_http]
    router = stack.enter_context(Process(["router", *model, *addresses, *options], logs / "router.log"))
    client_address, worker_address = router.says(LISTENING)
    http = None
    if apart:
        options = ["--router", client_address, "--http", "127.0.0.1:0"]
        http = stack.enter_context(Process(["http", *model, *options], logs / "http.log"))
    (port,) = (http or router).says(SERVING)
    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=START_SECONDS).close()
    return router, http, worker_address, int(port)


def show(results: Sequence[Result]) -> None:
    table = Table(title="microseconds of processor time per streamed token")
    columns = ("processes", "API", "streams", "tokens/s", "router", "HTTP", "ITL p50", "ITL p99")
    for column in columns:
        table.add_column(column, justify="left" if column in columns[:2] else "right")
    for result in results:
        table.add_row(
            result.processes,
            "chat" if result.chat else "completions",
            str(result.streams),
            f"{result.streams * result.tokens / result.seconds:.0f}",
            f"{result.router_us:.1f}",
            "-" if result.http_us is None else f"{result.http_us:.1f}",
            f"{result.itl_p50 * 1e3:.1f} ms",
            f"{result.itl_p99 * 1e3:.1f} ms",
        )
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=500)
    parser.add_argument("--tokens", type=int, default=100, help="per stream")
    parser.add_argument("--rate", type=float, default=8000, help="tokens per second of all streams")
    parser.add_argument("--output", type=Path, help="JSON; by default bench/results/http_streams.json")
    parser.add_argument("--only", choices=("one", "apart"), help="one process for both, or one each")
    arguments = parser.parse_args()
    modes = {None: (True, False), "one": (False,), "apart": (True,)}[arguments.only]
    results = [
        asyncio.run(run(arguments, apart=apart, chat=chat)) for apart in modes for chat in (False, True)
    ]
    show(results)
    figures = {"rate": arguments.rate, "results": [asdict(result) for result in results]}
    print(write_result("http_streams", figures, arguments.output))


if __name__ == "__main__":
    main()
