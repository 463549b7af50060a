"""`python -m pdengine.bench.cluster`: what a small disaggregated cluster costs while it does little.

Measured with the demo model on this machine: the time until `pdengine up` is ready, the share of a core that
each idle process uses, and TTFT, TPOT and pull time of requests that come one by one.
"""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from threading import Event
from time import monotonic
from typing import Any
from uuid import uuid4

from rich.console import Console
from rich.table import Table

from pdengine.bench.machine import write_result
from pdengine.cli.parent_death import stop_with_parent
from pdengine.client import Client
from pdengine.models.demo.facts import checkpoint_directory, demo_questions

IDLE_SECONDS = 20.0
NUM_QUESTIONS = 100
CLOCK_TICKS = os.sysconf("SC_CLK_TCK")


def main() -> None:
    console = Console()
    with up("--model", str(checkpoint_directory())) as (process, ready_seconds, address):
        console.print(f"ready after {ready_seconds:.1f} s; measuring {IDLE_SECONDS:g} s of idling ...")
        with Client(address) as client:
            _ask(client, 5)  # whatever the first requests set up is not idling
            before = _cpu_seconds(process.pid)
            Event().wait(IDLE_SECONDS)
            after = _cpu_seconds(process.pid)
            idle = {name: (after[name] - before[name]) / IDLE_SECONDS for name in after}
            figures = {"ready_seconds": ready_seconds, "idle_share_of_a_core": idle}
            figures |= _ask(client, NUM_QUESTIONS)
    table = Table("figure", "value", title="A disaggregated cluster with the demo model")
    table.add_row("ready", f"{ready_seconds:.1f} s")
    for name, share in idle.items():
        table.add_row(f"idle {name}", f"{share:.2%} of a core")
    for name in ("ttft_ms", "tpot_ms", "pull_ms"):
        table.add_row(f"{name.removesuffix('_ms')}, median", f"{figures[name]:.2f} ms")
    console.print(table)
    console.print(f"written to {write_result('cluster', figures)}")


@contextmanager
def up(*options: str) -> Iterator[tuple[subprocess.Popen[str], float, str]]:
    """`pdengine up` with these options: its process, the seconds until it was ready, its address."""
    command = [sys.executable, "-u", "-m", "pdengine.cli", "up", "--client-address", "tcp://127.0.0.1:0"]
    started_at = monotonic()
    process = subprocess.Popen(
        [*command, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        preexec_fn=stop_with_parent,
    )
    try:
        assert process.stdout is not None
        address = ""
        for line in process.stdout:
            match = re.match(r"ready: .* behind (\S+)", line)
            if match is not None:
                address = match[1]
                break
        else:
            raise SystemExit("pdengine up did not become ready; run it by hand to see why")
        yield process, monotonic() - started_at, address
    finally:
        process.send_signal(signal.SIGINT)
        process.wait()


def processes_of(parent: int) -> Iterator[tuple[str, int]]:
    """Role and process id of `pdengine up` and of each of its children."""
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            fields = (directory / "stat").read_text().rpartition(")")[2].split()
            command = (directory / "cmdline").read_text().split("\0")
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has just ended
        if parent in (int(directory.name), int(fields[1])):
            yield command[command.index("pdengine.cli") + 1], int(directory.name)


def pin_workers(parent: int) -> None:
    """Give each worker of `pdengine up` a core of its own; there must be no more of them than cores."""
    workers = sorted((role, pid) for role, pid in processes_of(parent) if role not in ("up", "router"))
    for core, (_, pid) in zip(sorted(os.sched_getaffinity(0)), workers, strict=False):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            os.sched_setaffinity(int(thread.name), {core})


def _cpu_seconds(parent: int) -> dict[str, float]:
    """User and system seconds of `pdengine up` and of each of its children, by role."""
    seconds: dict[str, float] = {}
    for role, pid in processes_of(parent):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        seconds[role] = (int(fields[11]) + int(fields[12])) / CLOCK_TICKS
    return seconds


def _ask(client: Client, count: int) -> dict[str, Any]:
    """Medians, in ms, over `count` questions that are asked one by one, each with a salt of its own: what the
    prompts share is computed and pulled again."""
    ttft, tpot, pull = [], [], []
    for question in demo_questions(seed=1, num_facts=count):
        sent_at = monotonic()
        salt = uuid4().hex
        # Not to the model's own end: an answer that ends with its first token is not pulled.
        with client.stream(
            question.prompt, max_tokens=8, temperature=0, ignore_eos=True, cache_salt=salt
        ) as stream:
            arrivals = [monotonic() - sent_at for _ in stream]
        if stream.completion.transfer is None:
            raise SystemExit("a prompt was not pulled: the prefill worker has answered alone")
        ttft.append(arrivals[0])
        tpot.append((arrivals[-1] - arrivals[0]) / (len(arrivals) - 1))
        pull.append(stream.completion.transfer.seconds)
    prompt_tokens = stream.completion.usage.prompt_tokens
    figures = {"ttft_ms": median(ttft), "tpot_ms": median(tpot), "pull_ms": median(pull)}
    return {"prompt_tokens": prompt_tokens, **{name: value * 1e3 for name, value in figures.items()}}


if __name__ == "__main__":
    main()
