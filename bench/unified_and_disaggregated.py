"""`python -m pdengine.bench.unified_and_disaggregated`: what prefill and decode apart are good for.

Two clusters with a core per worker: a prefill and a decode worker, or two unified workers that share the
requests. Each has the same to do: a base load of short prompts with long answers, always so many in flight,
and long prompts with short answers that arrive at random (Poisson). TTFT and TPOT are those of a request, the
longest gap is the longest time between two of its tokens, and its latency ends with its last token.

The higher the rate of long prompts, the more a unified worker interrupts its answers to compute them; a
decode worker is not interrupted, but half of the cores do nothing else, whatever there is to do. Both
clusters are up at once and take turns, so that whatever else the machine does disturbs both alike.
"""

import asyncio
import json
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import click
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from pdengine.bench.cluster import pin_workers, up
from pdengine.bench.load import (
    LoadFailed,
    RouterTarget,
    Timing,
    closed_loop,
    open_loop,
    poisson_times,
    random_requests,
    spread,
)
from pdengine.bench.machine import RESULTS, write_result
from pdengine.bench.random_checkpoint import write_small_checkpoint
from pdengine.bench.transfer_report import PlotUnavailable
from pdengine.client import AsyncClient, GenerateError

ClusterName = Literal["disaggregated", "unified"]
CLUSTERS: dict[ClusterName, tuple[str, ...]] = {
    "disaggregated": ("--prefill", "1", "--decode", "1"),
    "unified": ("--prefill", "0", "--decode", "0", "--unified", "2"),
}
SHORT = {"prompt_tokens": 64, "output_tokens": 128}
LONG = {"prompt_tokens": 1024, "output_tokens": 8}
EVEN = 0.05  # a difference that says nothing
FIGURES = {  # key -> heading
    "short_ttft_ms": "short: TTFT ms",
    "short_tpot_ms": "short: TPOT ms",
    "short_longest_gap_ms": "short: longest gap ms",
    "short_latency_ms": "short: latency ms",
    "long_ttft_ms": "long: TTFT ms",
    "long_tpot_ms": "long: TPOT ms",
    "long_latency_ms": "long: latency ms",
}
PLOTTED = [key for key in FIGURES if key != "long_tpot_ms"]  # of 8 tokens


@dataclass(frozen=True)
class Load:
    """short_in_flight: at any time. seconds: of each measurement; what was sent then is finished."""

    vocab_size: int
    short_in_flight: int
    seconds: float


@dataclass(frozen=True)
class Measured:
    """The answers to the short and to the long prompts of one or more measurements of one cluster."""

    short: list[Timing]
    long: list[Timing]


@click.command()
@click.option(
    "--model", type=click.Path(exists=True, file_okay=False, path_type=Path), help="A small Llama by default."
)
@click.option(
    "--rate", "rates", type=click.FloatRange(0), multiple=True, default=(0.5, 1.0, 2.0), show_default=True
)
@click.option("--short-in-flight", type=click.IntRange(1), default=4, show_default=True)
@click.option(
    "--seconds", type=click.FloatRange(1), default=20.0, show_default=True, help="Of each measurement."
)
@click.option("--rounds", type=click.IntRange(1), default=1, show_default=True)
@click.option("--output", type=click.Path(path_type=Path), help="JSON; the plot goes beside it as PNG.")
def main(
    model: Path | None,
    rates: tuple[float, ...],
    short_in_flight: int,
    seconds: float,
    rounds: int,
    output: Path | None,
) -> None:
    """Compare a disaggregated with a co-located cluster of as many cores."""
    console = Console()
    output = output or RESULTS / "unified_and_disaggregated.json"
    measured: dict[tuple[float, ClusterName], Measured] = defaultdict(lambda: Measured([], []))
    with ExitStack() as stack:
        model = model or write_small_checkpoint(Path(stack.enter_context(tempfile.TemporaryDirectory())))
        vocab_size = json.loads((model / "config.json").read_text())["vocab_size"]
        load = Load(vocab_size, short_in_flight, seconds)
        addresses = {name: _start(stack, model, name, console) for name in CLUSTERS}
        try:
            for number in range(rounds):
                for rate in rates:
                    for name in CLUSTERS:
                        answers = asyncio.run(_measure(addresses[name], load, rate, f"{number} {rate}"))
                        measured[rate, name].short.extend(answers.short)
                        measured[rate, name].long.extend(answers.long)
                        console.print(
                            f"round {number}, {rate:g} long/s, {name}: {_line(answers)}", highlight=False
                        )
        except (LoadFailed, GenerateError) as error:
            raise click.ClickException(str(error)) from error
    results = results_of(measured)
    console.print(table_of(results))
    figures = {"short": SHORT, "long": LONG, **asdict(load), "rounds": rounds, "results": results}
    console.print(f"written to {write_result('unified_and_disaggregated', figures, output)}", highlight=False)
    try:
        plot(results, output.with_suffix(".png"))
    except PlotUnavailable as error:
        console.print(str(error), highlight=False, markup=False)


def _start(stack: ExitStack, model: Path, name: ClusterName, console: Console) -> str:
    """The address of a cluster that is ready and warm, until `stack` ends."""
    options = ("--model", str(model), "--kv-memory", "1GiB", *CLUSTERS[name])
    process, seconds, address = stack.enter_context(up(*options))
    pin_workers(process.pid)
    console.print(f"{name}: ready after {seconds:.0f} s", highlight=False)
    vocab_size = json.loads((model / "config.json").read_text())["vocab_size"]
    asyncio.run(_measure(address, Load(vocab_size, short_in_flight=4, seconds=1), 4.0, "warm-up"))
    return address


async def _measure(address: str, load: Load, rate: float, seed: str) -> Measured:
    """The base load for `load.seconds`, and long prompts meanwhile."""
    short = random_requests(f"short {seed}", vocab_size=load.vocab_size, **SHORT)
    long = random_requests(f"long {seed}", vocab_size=load.vocab_size, **LONG)
    arrivals = zip(poisson_times(seed, rate, load.seconds), long, strict=False)
    async with AsyncClient(address) as client:
        target = RouterTarget(client)
        return Measured(
            *await asyncio.gather(
                closed_loop(target, short, load.short_in_flight, load.seconds),
                open_loop(target, arrivals),
            )
        )


def _line(answers: Measured) -> str:
    figures = figures_of(answers)
    return ", ".join(
        f"{FIGURES[key]} {figures[key]['p50']:,.1f}"
        for key in ("short_ttft_ms", "short_tpot_ms", "long_ttft_ms")
        if key in figures
    )


def figures_of(answers: Measured) -> dict[str, Any]:
    """Mean, p50 and p99 of everything in FIGURES; nothing of long prompts where there were none."""
    figures: dict[str, Any] = {"short_requests": len(answers.short), "long_requests": len(answers.long)}
    for kind, timings in (("short", answers.short), ("long", answers.long)):
        for figure in ("ttft", "tpot", "longest_gap", "latency"):
            if timings and f"{kind}_{figure}_ms" in FIGURES:
                values = [getattr(timing, figure) * 1e3 for timing in timings]
                figures[f"{kind}_{figure}_ms"] = asdict(spread(values))
    return figures


def results_of(measured: dict[tuple[float, ClusterName], Measured]) -> list[dict[str, Any]]:
    return [
        {"long_per_second": rate, "cluster": name, **figures_of(answers)}
        for (rate, name), answers in measured.items()
    ]


def better(disaggregated: float, unified: float) -> str:
    """Which of two times is the shorter one, and how many times."""
    if max(disaggregated, unified) <= (1 + EVEN) * min(disaggregated, unified):
        return "even"
    if disaggregated < unified:
        return f"disaggregated {unified / disaggregated:.1f}x"
    return f"unified {disaggregated / unified:.1f}x"


def table_of(results: Sequence[dict[str, Any]]) -> Table:
    table = Table(title="p50 / p99 by long prompts per second", box=SIMPLE_HEAD)
    table.add_column("long/s")
    table.add_column("")
    for heading in ("disaggregated", "unified", "better p50", "better p99"):
        table.add_column(heading, justify="right", no_wrap=True)
    for rate, pair in _pairs(results):
        for number, (key, heading) in enumerate(FIGURES.items()):
            if key not in pair["unified"]:
                continue
            ours, theirs = pair["disaggregated"][key], pair["unified"][key]
            cells = [f"{spread['p50']:,.1f} / {spread['p99']:,.1f}" for spread in (ours, theirs)]
            verdicts = [better(ours[name], theirs[name]) for name in ("p50", "p99")]
            table.add_row("" if number else f"{rate:g}", heading, *cells, *verdicts)
        table.add_section()
    return table


def plot(results: Sequence[dict[str, Any]], path: Path) -> None:
    """p50 and p99 over the rate of long prompts, a line per cluster. Raises PlotUnavailable."""
    try:
        import matplotlib
    except ImportError:
        raise PlotUnavailable("the plot needs matplotlib: pip install 'pdengine[bench]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    chart, panels = pyplot.subplots(2, 3, figsize=(12, 6.5), sharex=True)
    for panel, key in zip(panels.flat, PLOTTED, strict=True):
        for name, color in zip(CLUSTERS, ("tab:blue", "tab:orange"), strict=True):
            line = [result for result in results if result["cluster"] == name and key in result]
            rates = [result["long_per_second"] for result in line]
            for percentile, style in (("p50", "-"), ("p99", ":")):
                values = [result[key][percentile] for result in line]
                panel.plot(rates, values, style, color=color, marker="o", label=f"{name}, {percentile}")
        panel.set(title=FIGURES[key], xlabel="long prompts per second")
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
    panels[0][0].legend(fontsize="small")
    chart.tight_layout()
    chart.savefig(path, dpi=120)
    pyplot.close(chart)


def _pairs(results: Sequence[dict[str, Any]]) -> Iterator[tuple[float, dict[str, dict[str, Any]]]]:
    """The results of the clusters by name, for each rate."""
    for rate in dict.fromkeys(result["long_per_second"] for result in results):
        yield rate, {r["cluster"]: r for r in results if r["long_per_second"] == rate}


if __name__ == "__main__":
    main()
