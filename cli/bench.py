"""`pdengine bench`: benchmarks of this installation on this machine."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from pdengine.bench.child_process import ChildFailed
from pdengine.bench.machine import write_result
from pdengine.bench.transfer import PathName, Plan, PlanError, TransferResult, has_nixl, run_plan
from pdengine.bench.transfer_report import PlotUnavailable, as_json, plot, print_tables
from pdengine.cli.options import errors_in_one_line
from pdengine.engine.memory import format_bytes, memory_bytes
from pdengine.models.hub import resolve_model

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


def counts(text: str) -> tuple[int, ...]:
    """A type of click's for whole numbers with commas between them."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is not a list of whole numbers such as 1,4,16") from error


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
            result = _run(plan)
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


def _run(plan: Plan) -> TransferResult:
    with _progress(plan.num_steps) as (report, _):
        return run_plan(plan, report)


@bench.command()
@click.argument("model", metavar="NAME_OR_DIR")
@click.option("--revision", help="Branch, tag or commit of a model on the hub.")
@click.option(
    "--batch-sizes",
    type=counts,
    metavar="NUMBERS",
    default="1,4,16",
    show_default=True,
    help="Sequences in a decode step.",
)
@click.option(
    "--contexts",
    type=counts,
    metavar="NUMBERS",
    default="128,512,2048",
    show_default=True,
    help="Tokens of each sequence in a decode step.",
)
@click.option("--prompt-tokens", type=int, default=512, show_default=True, help="Tokens of a prompt.")
@click.option(
    "--output-tokens",
    type=int,
    default=64,
    show_default=True,
    help="Of whole requests, as many at a time as the batch sizes say; 0: none.",
)
@click.option("--steps", type=int, default=20, show_default=True, help="Timed for each figure.")
@click.option("--dtype", help="float32, bfloat16 or float16; by default the checkpoint's.")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda (the first GPU) or cuda:N.")
@click.option("--threads", type=int, help="That compute on a CPU; by default as many as torch takes.")
@click.option("--output", type=click.Path(path_type=Path), help="Write the figures here as JSON.")
@click.option("--plot", "picture", type=click.Path(path_type=Path), help="Draw them here as PNG.")
def engine(
    model: str,
    revision: str | None,
    batch_sizes: tuple[int, ...],
    contexts: tuple[int, ...],
    prompt_tokens: int,
    output_tokens: int,
    steps: int,
    dtype: str | None,
    device: str,
    threads: int | None,
    output: Path | None,
    picture: Path | None,
) -> None:
    """Measure prefill and decode steps of one engine against what the device can do."""
    console = Console()
    with errors_in_one_line():
        directory = resolve_model(model, revision=revision)
        # Here, because they load torch, which takes seconds.
        from pdengine.bench import engine as engine_benchmark
        from pdengine.bench import engine_report

        plan = engine_benchmark.EnginePlan(
            directory,
            batch_sizes=batch_sizes,
            contexts=contexts,
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            steps=steps,
            dtype=dtype,
            device=device,
            threads=threads,
        )
        with _progress(plan.num_figures) as (report, describe):
            result = engine_benchmark.measure_engine(
                plan,
                report=report,
                loading=lambda done, total: describe(
                    f"loading weights, {format_bytes(done)} of {format_bytes(total)}"
                ),
            )
    engine_report.print_tables(result, console)
    if output is not None:
        figures = {"model": Path(model).name, **engine_report.as_json(result)}
        console.print(f"written to {write_result('engine', figures, output)}", highlight=False)
    if picture is not None:
        try:
            engine_report.plot(result, picture)
        except PlotUnavailable as error:
            raise click.ClickException(str(error)) from error
        console.print(f"drawn to {picture}", highlight=False)


@contextmanager
def _progress(num_steps: int) -> Iterator[tuple[Callable[[str], None], Callable[[str], None]]]:
    """A progress bar on stderr. Gives two functions of a description: the first one is called before each
    step, the second one changes what is said of a step."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("starting", total=num_steps)
        steps = iter(range(num_steps))

        def report(description: str) -> None:
            progress.update(task, completed=next(steps), description=description)

        yield report, lambda description: progress.update(task, description=description)
