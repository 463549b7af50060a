"""What the GPU benchmarks share: options, timing by CUDA events, ceilings, tables and results."""

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table

from pdengine.bench.machine import RESULTS, describe_gpu, write_result

GPU_RESULTS = RESULTS / "gpu"
FLUSH_BYTES = 2**30  # many times the L2; long enough to write that launches are queued before it is done
WARM_UP = 3
REPEATS = 20

Row = dict[str, Any]


@dataclass(frozen=True)
class Setup:
    """is_dry: everything small and on the CPU, to see that the program runs; its figures mean nothing."""

    output: Path
    is_dry: bool

    @property
    def device(self) -> torch.device:
        return torch.device("cpu") if self.is_dry else torch.device("cuda", 0)

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.is_dry else torch.bfloat16

    def ceiling(self, name: str) -> float | None:
        """One of the results of `gpu_ceilings`, None if it did not run."""
        try:
            value: float = json.loads((self.output / "ceilings.json").read_text())[name]
        except (OSError, KeyError):
            return None
        return value


def bench_command(run: Callable[[Setup], None]) -> click.Command:
    """A command with the options that all GPU benchmarks take."""

    @click.command(help=run.__doc__)
    @click.option("--output", type=click.Path(path_type=Path), default=GPU_RESULTS, show_default=True)
    @click.option("--dry-run", is_flag=True, help="Small, on the CPU, only to see that it runs.")
    @functools.wraps(run)
    def command(output: Path, dry_run: bool) -> None:
        torch.manual_seed(0)
        if dry_run:
            torch.set_num_threads(1)
        with torch.inference_mode():
            run(Setup(output, dry_run))

    return command


def median_seconds(setup: Setup, run: Callable[[int], object], *, repeats: int = REPEATS) -> float:
    """The median time of `run(index)` on the device, after a warm-up; the L2 holds nothing of use.

    The time between two CUDA events, so launches count only where the GPU waits for them.
    """
    for index in range(WARM_UP):
        run(index)
    if setup.device.type == "cpu":
        seconds = []
        for index in range(repeats):
            started_at = perf_counter()
            run(index)
            seconds.append(perf_counter() - started_at)
        return median(seconds)
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=setup.device)
    starts, ends = _events(repeats), _events(repeats)
    for index in range(repeats):
        flush.max()  # by reading: what is written would be written back while the clock runs
        starts[index].record()
        run(index)
        ends[index].record()
    torch.cuda.synchronize(setup.device)
    milliseconds = [start.elapsed_time(end) for start, end in zip(starts, ends, strict=True)]
    return float(median(milliseconds)) / 1e3


def _events(count: int) -> list[torch.cuda.Event]:
    return [torch.cuda.Event(enable_timing=True) for _ in range(count)]  # type: ignore[no-untyped-call]


def share(rate: float, ceiling: float | None) -> float | None:
    """`rate` as a share of `ceiling`, None where that is not known."""
    return None if ceiling is None else rate / ceiling


def report(setup: Setup, name: str, title: str, figures: dict[str, Any]) -> None:
    """Print the rows of `figures["rows"]` as a table and write everything to `<output>/<name>.json`."""
    console = Console(width=150)
    rows: list[Row] = figures["rows"]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*(_shown(row.get(column)) for column in columns))
    console.print(table)
    result = {"dry_run": setup.is_dry, "gpu": describe_gpu(), **figures}
    console.print(f"written to {write_result(name, result, setup.output / f'{name}.json')}")


def _shown(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
