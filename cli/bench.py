"""`pdengine bench`: benchmarks of this installation on this machine."""

from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from pdengine.bench.child_process import ChildFailed
from pdengine.bench.machine import write_result
from pdengine.bench.transfer import PathName, Plan, PlanError, TransferResult, run_plan
from pdengine.bench.transfer_report import PlotUnavailable, as_json, plot, print_tables
from pdengine.cli.options import errors_in_one_line

UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
PATHS: dict[str, PathName] = {"mapping": "mapping", "shared-memory": "shared memory", "tcp": "tcp"}


class Size(click.ParamType):
    """Bytes, written like 256KiB or 2MiB."""

    name = "size"

    def convert(
        self, value: str | int, parameter: click.Parameter | None, context: click.Context | None
    ) -> int:
        if isinstance(value, int):
            return value
        number, unit = value[:-3], value[-3:]
        if unit not in UNITS or not number.isdigit():
            self.fail(f"{value!r} is not a size such as 256KiB or 2MiB", parameter, context)
        return int(number) * UNITS[unit]


@click.group()
def bench() -> None:
    """Measure this installation on this machine."""


@bench.command()
@click.option(
    "--path",
    "paths",
    type=click.Choice(list(PATHS)),
    multiple=True,
    default=tuple(PATHS),
    show_default=True,
    help="How the bytes move; may be repeated.",
)
@click.option("--network-namespaces", is_flag=True, help="Also between two network namespaces (needs root).")
@click.option("--busy", is_flag=True, help="Also from a target whose main thread computes.")
@click.option(
    "--pool", "pool_bytes", type=Size(), default="128MiB", show_default=True, help="Size of each pool."
)
@click.option(
    "--block-size",
    "block_sizes",
    type=Size(),
    multiple=True,
    default=("64KiB", "256KiB", "1MiB", "2MiB"),
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
