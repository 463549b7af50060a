"""`python -m pdengine.bench.early_pull`: what pulling a prompt while it is computed saves on a slow link.

A prefill and a decode worker on two hosts (network namespaces, which need root) whose link is shaped to
1 Gb/s, and prompts of 16 chunks, one at a time: the time from the first token, which the prefill worker
writes, to the second one, which needs the whole KV cache on the other host; with early pulls and without.
"""

import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from time import monotonic
from typing import Any

from rich.console import Console
from rich.table import Table

from pdengine.bench.machine import write_result
from pdengine.bench.network_namespaces import NamespacesUnavailable, NetworkNamespace, network_namespaces
from pdengine.bench.random_checkpoint import write_random_checkpoint
from pdengine.client import Client
from pdengine.router.config import TransferMode

RATE = "1gbit"
CHUNK_TOKENS = 128
NUM_CHUNKS = 16
NUM_REQUESTS = 5
ROUTER_PORTS = (5555, 5556)
START_SECONDS = 120.0


def main() -> None:
    if len(sys.argv) == 3 and sys.argv[1] == "--client":
        print(json.dumps(_ask(sys.argv[2])))
        return
    console = Console()
    figures: dict[str, Any] = {
        "link": RATE,
        "prompt_tokens": CHUNK_TOKENS * NUM_CHUNKS,
        "chunks": NUM_CHUNKS,
        "requests": NUM_REQUESTS,
    }
    modes: tuple[TransferMode, ...] = ("pull", "early-pull")
    try:
        with tempfile.TemporaryDirectory() as directory, network_namespaces(rate=RATE) as hosts:
            model = Path(directory)
            write_random_checkpoint(
                model,
                hidden_size=512,
                num_layers=8,
                num_heads=8,
                num_kv_heads=8,
                head_dim=64,
                intermediate_size=2048,
            )
            for mode in modes:
                console.print(f"{NUM_REQUESTS} prompts of {NUM_CHUNKS} chunks over {RATE}, {mode} ...")
                figures[mode] = _measure(model, hosts, mode)
    except NamespacesUnavailable as error:
        raise SystemExit(str(error)) from None
    figures["share"] = figures["early-pull"]["second_token_ms"] / figures["pull"]["second_token_ms"]
    table = Table("", *modes, title="Medians")
    for name in figures["pull"]:
        table.add_row(name.replace("_", " "), *(f"{figures[mode][name]:,.1f}" for mode in modes))
    console.print(table)
    console.print(f"first to second token: {figures['share']:.0%} of the time without early pulls")
    console.print(f"written to {write_result('early_pull', figures)}")


def _measure(model: Path, hosts: tuple[NetworkNamespace, NetworkNamespace], mode: str) -> dict[str, float]:
    first, second = hosts
    clients, workers = (f"tcp://{first.address}:{port}" for port in ROUTER_PORTS)
    with ExitStack() as stack:
        options = ["--client-address", clients, "--worker-address", workers, "--transfer", mode, "--insecure"]
        stack.enter_context(_process(first, "router", model, *options))
        for host, role in ((first, "prefill"), (second, "decode")):
            options = [
                "--router",
                workers,
                "--bind",
                f"tcp://{host.address}:0",
                "--insecure",
                "--kv-memory",
                "256MiB",
            ]
            stack.enter_context(
                _process(host, role, model, *options, "--max-batch-tokens", str(CHUNK_TOKENS))
            )
        command = first.command([sys.executable, "-m", "pdengine.bench.early_pull", "--client", clients])
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, timeout=2 * START_SECONDS).stdout
    figures: dict[str, float] = json.loads(output)
    return figures


@contextmanager
def _process(host: NetworkNamespace, role: str, model: Path, *options: str) -> Iterator[None]:
    command = [sys.executable, "-m", "pdengine.cli", role, "--model", str(model), *options]
    process = subprocess.Popen(host.command(command), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.kill()
        process.wait()


def _ask(address: str) -> dict[str, float]:
    """Medians over the requests, once both workers are there and connected."""
    rng = random.Random(0)
    prefill_ms, second_ms, pulled, early = [], [], [], []
    with Client(address) as client:
        deadline = monotonic() + START_SECONDS
        while not any(worker.links for worker in client.status().workers):
            if monotonic() > deadline:
                raise SystemExit("the workers did not find each other; run them by hand to see why")
        for _ in range(NUM_REQUESTS):
            prompt_ids = [rng.randrange(2, 500) for _ in range(CHUNK_TOKENS * NUM_CHUNKS)]
            sent_at = monotonic()
            with client.stream(prompt_ids, max_tokens=3, temperature=0, ignore_eos=True) as stream:
                arrivals = [monotonic() - sent_at for _ in stream]
            transfer = stream.completion.transfer
            assert transfer is not None, "it was not pulled"
            prefill_ms.append(arrivals[0] * 1e3)
            second_ms.append((arrivals[1] - arrivals[0]) * 1e3)
            pulled.append(transfer.num_bytes / 2**20)
            early.append(transfer.num_early_blocks / transfer.num_blocks * 100)
    return {
        "first_token_ms": median(prefill_ms),
        "second_token_ms": median(second_ms),
        "pulled_MiB": median(pulled),
        "pulled_early_percent": median(early),
    }


if __name__ == "__main__":
    main()
