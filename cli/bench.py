"""`pdengine bench`: benchmarks of this installation on this machine."""

from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from pdengine.bench.child_process import ChildFailed
from pdengine.bench.machine import write_result
from pdengine.bench.transfer import PathName, Plan, PlanError, TransferResult, has_nixl, run_plan
from pdengine.bench.transfer_report import PlotUnavailable, as_json, plot, print_tables
from pdengine.cli.options import errors_in_one_line
from pdengine.engine.memory import memory_bytes

PATHS: dict[str, PathName] = {
    "mapping": "mapping",
    "shared-memory": "shm",
    "tcp": "tcp",
    "nixl": "nixl",
}


def size(text: str) -> int:
    """A type of click's for numbers of bytes."""
    try:
        return memory_bytes(text, available=0)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


@click.group()
def bench() -> None:
    """Measure this installation on this machine."""


@bench.command()
@click.option(
    "--path",
    "paths",
    type=click.Choice(list(PATHS)),
    multiple=True,
    help="How the bytes move; may be repeated. Default: all, nixl only where the package is installed.",
)
@click.option("--network-namespaces", is_flag=True, help="Also between two network namespaces (needs root).")
@click.option("--busy", is_flag=True, help="Also from a target whose main thread computes.")
@click.option(
    "--pool",
    "pool_bytes",
    type=size,
    metavar="SIZE",
    default="128MiB",
    show_default=True,
    help="Size of each pool.",
)
@click.option(
    "--block-size",
    "block_sizes",
    type=size,
    metavar="SIZE",
    multiple=True,
    default=("64KiB", "256KiB", "2MiB"),
    show_default=True,
    help="Bytes of a block; may be repeated.",
)
@click.option("--repetitions", type=int, default=5, show_default=True, help="Pulls of each kind.")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path("transfer.json"),
    show_default=True,
    help="Where the figures go as JSON; the plot goes beside it as PNG.",
)
def transfer(
    paths: tuple[str, ...],
    network_namespaces: bool,
    busy: bool,
    pool_bytes: int,
    block_sizes: tuple[int, ...],
    repetitions: int,
    output: Path,
) -> None:
    """Measure pulls of KV blocks between two processes against the ceiling of each path."""
    if not paths:
        paths = tuple(path for path in PATHS if path != "nixl" or has_nixl())
    names = tuple(PATHS[path] for path in paths) + (("network",) if network_namespaces else ())
    console = Console()
    with errors_in_one_line():
        try:
            plan = Plan(names, pool_bytes, block_sizes, repetitions, busy)
            result = _run(plan, console)
        except (PlanError, ChildFailed) as error:
            raise click.ClickException(str(error)) from error
    print_tables(result, console)
    console.print(f"written to {write_result('transfer', as_json(result), output)}", highlight=False)
    picture = output.with_suffix(".png")
    try:
        plot(result, picture)
    except PlotUnavailable as error:
        console.print(str(error), highlight=False, markup=False)
    else:
        console.print(f"drawn to {picture}", highlight=False)


def _run(plan: Plan, console: Console) -> TransferResult:
    """The result, with a progress bar on stderr while it is taken."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("starting", total=plan.num_steps)
        steps = iter(range(plan.num_steps))

        def report(description: str) -> None:
            progress.update(task, completed=next(steps), description=description)

        return run_plan(plan, report)
