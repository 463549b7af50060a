"""`python -m pdengine.bench.push_and_pull`: what it costs to push a KV cache instead of pulling it.

The same requests to a prefill and a decode worker on this machine, by each way of moving the KV cache and at
several numbers of requests in flight: what the client sees, and how long blocks are held on both sides. The
first three move it through UCX, so that only the protocol differs; the last one is the default on one host,
an early pull out of mapped memory. All clusters are up at once and take turns, so that whatever else the
machine does disturbs all of them alike. With 16 requests in flight a KV cache holds about half of them.
"""

import random
import re
import socket
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from threading import Event
from time import monotonic
from typing import Any
from urllib.request import urlopen

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from pdengine.bench.cluster import up
from pdengine.bench.machine import write_result
from pdengine.bench.random_checkpoint import write_random_checkpoint
from pdengine.client import Client
from pdengine.router.config import TransferMode
from pdengine.transport.transfer import SameHost

MODES: tuple[tuple[TransferMode, SameHost], ...] = (
    ("pull", "ucx"),
    ("early-pull", "ucx"),
    ("push", "ucx"),
    ("early-pull", "mapping"),
)
CONCURRENCY = (1, 4, 16)
NUM_ROUNDS = 3
NUM_REQUESTS = 24  # per round
PROMPT_LENGTHS = (128, 256, 512, 1024)
CHUNK_TOKENS = 128
ANSWER_TOKENS = 32
KV_MEMORY = "32MiB"  # 4096 tokens
POLL_SECONDS = 0.02
COLUMNS = {  # key of a result -> heading
    "ttft_p50_ms": "first token",
    "ttft_p99_ms": "p99",
    "second_token_p50_ms": "second token",
    "first_to_second_p50_ms": "between them",
    "first_to_second_p99_ms": "p99",
    "tpot_ms": "per token",
    "prefill_block_seconds": "prefill blocks x s",
    "decode_block_seconds": "decode blocks x s",
}


@dataclass(frozen=True)
class Times:
    """Of one request, in seconds since it was sent."""

    first: float
    second: float
    last: float


@dataclass(frozen=True)
class Setup:
    """A cluster that is up, and what was measured of it at the present number of requests in flight."""

    mode: TransferMode
    same_host: SameHost
    client: Client
    metrics: dict[str, str]  # role -> address
    times: list[Times] = field(default_factory=list)
    held: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))  # role -> blocks x s


def main() -> None:
    console = Console()
    results: list[dict[str, Any]] = []
    with ExitStack() as stack:
        model = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        write_random_checkpoint(
            model,
            hidden_size=256,
            num_layers=4,
            num_heads=8,
            num_kv_heads=8,
            head_dim=64,
            intermediate_size=512,
        )
        console.print(f"starting {len(MODES)} clusters ...")
        setups = [_start(stack, model, mode, same_host) for mode, same_host in MODES]
        progress = stack.enter_context(Progress(console=console))
        bar = progress.add_task("", total=len(MODES) * len(CONCURRENCY) * NUM_ROUNDS * NUM_REQUESTS)
        for concurrency in CONCURRENCY:
            progress.update(bar, description=f"{concurrency} in flight")
            for seed in range(NUM_ROUNDS):
                for setup in setups:
                    _measure(setup, concurrency, seed, lambda: progress.advance(bar))
            results += [_result(setup, concurrency) for setup in setups]
    console.print(_table(results))
    figures = {
        "requests": NUM_REQUESTS * NUM_ROUNDS,
        "prompt_tokens": PROMPT_LENGTHS,
        "chunk_tokens": CHUNK_TOKENS,
        "answer_tokens": ANSWER_TOKENS,
        "kv_memory": KV_MEMORY,
        "results": results,
    }
    console.print(f"written to {write_result('push_and_pull', figures)}")


def _start(stack: ExitStack, model: Path, mode: TransferMode, same_host: SameHost) -> Setup:
    """A cluster that is ready and has had a few requests, until `stack` ends."""
    metrics = {"prefill": _free_address(), "decode": _free_address()}
    config = model / f"{mode}-{same_host}.toml"
    config.write_text(
        f'[router]\ntransfer = "{mode}"\n'
        f'[worker]\nsame-host = "{same_host}"\nkv-memory = "{KV_MEMORY}"\nmax-batch-tokens = {CHUNK_TOKENS}\n'
        + "".join(f'[{role}]\nmetrics-address = "{address}"\n' for role, address in metrics.items())
    )
    _, _, address = stack.enter_context(up("--model", str(model), "--config", str(config)))
    setup = Setup(mode, same_host, stack.enter_context(Client(address)), metrics)
    _ask(setup.client, PROMPT_LENGTHS, concurrency=2)  # whatever the first requests set up
    return setup


def _measure(setup: Setup, concurrency: int, seed: int, advance: Callable[[], None]) -> None:
    lengths = random.Random(seed).choices(PROMPT_LENGTHS, k=NUM_REQUESTS)
    before = {role: _block_seconds(address) for role, address in setup.metrics.items()}
    setup.times.extend(_ask(setup.client, lengths, concurrency=concurrency, advance=advance))
    pause = Event()
    while any(w.load.free_blocks < w.load.num_blocks for w in setup.client.status().workers):
        pause.wait(POLL_SECONDS)
    for role, address in setup.metrics.items():
        setup.held[role] += _block_seconds(address) - before[role]


def _ask(
    client: Client, lengths: Sequence[int], *, concurrency: int, advance: Callable[[], None] = lambda: None
) -> list[Times]:
    def ask(numbered: tuple[int, int]) -> Times:
        number, length = numbered
        rng = random.Random(number)
        prompt = [rng.randrange(2, 500) for _ in range(length)]
        sent_at = monotonic()
        with client.stream(prompt, max_tokens=ANSWER_TOKENS, temperature=0, ignore_eos=True) as stream:
            arrivals = [monotonic() - sent_at for delta in stream for _ in delta.token_ids]
        assert stream.completion.transfer is not None
        advance()
        return Times(arrivals[0], arrivals[1], arrivals[-1])

    with ThreadPoolExecutor(concurrency) as threads:
        return list(threads.map(ask, enumerate(lengths)))


def _result(setup: Setup, concurrency: int) -> dict[str, Any]:
    """What was measured at this number of requests in flight; begins anew for the next one."""
    result = {"mode": setup.mode, "same_host": setup.same_host, "concurrency": concurrency}
    held = {f"{role}_block_seconds": seconds for role, seconds in setup.held.items()}
    figures = _figures(setup.times)
    setup.times.clear()
    setup.held.clear()
    return {**result, **figures, **held}


def _figures(times: list[Times]) -> dict[str, float]:
    first = quantiles([t.first for t in times], n=100, method="inclusive")
    gaps = quantiles([t.second - t.first for t in times], n=100, method="inclusive")
    return {
        "ttft_p50_ms": first[49] * 1e3,
        "ttft_p99_ms": first[98] * 1e3,
        "second_token_p50_ms": median(t.second for t in times) * 1e3,
        "first_to_second_p50_ms": gaps[49] * 1e3,
        "first_to_second_p99_ms": gaps[98] * 1e3,
        "tpot_ms": median((t.last - t.second) / (ANSWER_TOKENS - 2) for t in times) * 1e3,
    }


def _table(results: list[dict[str, Any]]) -> Table:
    title = "Times in ms, medians where not p99; blocks x seconds of all requests together"
    table = Table("in flight", "KV cache", title=title)
    for heading in COLUMNS.values():
        table.add_column(heading, justify="right")
    for result in results:
        cells = [f"{result[key]:,.1f}" if key.endswith("ms") else f"{result[key]:,.0f}" for key in COLUMNS]
        table.add_row(str(result["concurrency"]), f"{result['mode']}, {result['same_host']}", *cells)
    return table


def _block_seconds(address: str) -> float:
    with urlopen(f"http://{address}/metrics") as answer:
        match = re.search(r"^pdengine_kv_block_seconds_total (\S+)$", answer.read().decode(), re.MULTILINE)
    assert match is not None
    return float(match[1])


def _free_address() -> str:
    """An address on loopback that nobody uses now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


if __name__ == "__main__":
    main()
