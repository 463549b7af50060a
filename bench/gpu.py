"""`bash bench/gpu.sh`, or `python -m pdengine.bench.gpu`: the GPU tests and benchmarks, one process each.

A part that fails, crashes its CUDA context or takes too long is recorded, and the next one runs.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import click

from pdengine.bench.machine import RESULTS, write_result

GPU_RESULTS = RESULTS / "gpu"
LAST_LINES = 40  # of a part that failed, kept in its result


@dataclass(frozen=True)
class Part:
    """arguments: of Python. seconds: after that it is given up."""

    name: str
    arguments: tuple[str, ...]
    seconds: float
    takes_options: bool = False  # --output and --dry-run
    writes_result: bool = False  # as <output>/<name>.json
    on_gpu_only: bool = False


@dataclass(frozen=True)
class Outcome:
    status: str  # "ok", or what went wrong
    seconds: float
    last_lines: list[str]


def parts(output: Path) -> list[Part]:
    """In the order of their worth: what runs late may find no time left."""
    pytest = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "--continue-on-collection-errors")
    report = (
        "-m",
        "pdengine.triton_kernels.compile_report",
        "--output",
        str(output / "kernel_resources.json"),
    )
    return [
        _benchmark("ceilings", 60),
        _benchmark("attention", 120),
        _benchmark("transfer", 90),
        Part("tests_gpu", (*pytest, "-m", "gpu", "tests"), 150, on_gpu_only=True),
        _benchmark("model", 150),
        Part("tests_kernels", (*pytest, *_in_parallel(), "tests/triton_kernels"), 240, on_gpu_only=True),
        Part("kernel_resources", report, 120, writes_result=True, on_gpu_only=True),
    ]


def _benchmark(name: str, seconds: float) -> Part:
    return Part(name, ("-m", f"pdengine.bench.gpu_{name}"), seconds, takes_options=True, writes_result=True)


@click.command()
@click.option("--output", type=click.Path(path_type=Path), default=GPU_RESULTS, show_default=True)
@click.option("--only", multiple=True, metavar="PART", help="Only this part; may be given several times.")
@click.option("--seconds", type=float, default=570.0, show_default=True, help="For everything together.")
@click.option("--dry-run", is_flag=True, help="Small and on the CPU, only to see that it runs.")
def main(output: Path, only: tuple[str, ...], seconds: float, dry_run: bool) -> None:
    """Measure what there is to measure on the first GPU, and run the tests that need one."""
    output = output.absolute()
    output.mkdir(parents=True, exist_ok=True)
    names = [part.name for part in parts(output)]
    if unknown := set(only) - set(names):
        raise click.UsageError(
            f"there is no part {', '.join(sorted(unknown))}; these are: {', '.join(names)}"
        )
    chosen = [p for p in parts(output) if (p.name in only or not only) and not (dry_run and p.on_gpu_only)]
    deadline = monotonic() + seconds
    outcomes = {}
    for part in chosen:
        (output / f"{part.name}.json").unlink(missing_ok=True)  # of an earlier run
        outcomes[part.name] = _run(part, output, dry_run=dry_run, deadline=deadline)
        _record(part, outcomes[part.name], output)
    click.echo("\npart              seconds  status")
    for name, outcome in outcomes.items():
        click.echo(f"{name:<18}{outcome.seconds:>7.1f}  {outcome.status}")
    if any(outcome.status != "ok" for outcome in outcomes.values()):
        raise SystemExit(1)


def _run(part: Part, output: Path, *, dry_run: bool, deadline: float) -> Outcome:
    """Run a part in a process group of its own and show what it prints."""
    started_at = monotonic()
    limit = min(part.seconds, deadline - started_at)
    if limit <= 0:
        return Outcome("not run: no time left", 0.0, [])
    click.echo(f"\n== {part.name}, at most {limit:.0f} s")
    command = [sys.executable, *part.arguments]
    if part.takes_options:
        command += ["--output", str(output), *(["--dry-run"] if dry_run else [])]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    expired = threading.Event()

    def give_up() -> None:
        expired.set()
        os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(limit, give_up)
    timer.start()
    last_lines: deque[str] = deque(maxlen=LAST_LINES)
    assert process.stdout is not None
    for line in process.stdout:
        click.echo(line, nl=False)
        last_lines.append(line.rstrip())
    status = process.wait()
    timer.cancel()
    if expired.is_set():
        outcome = f"given up after {limit:.0f} s"
    elif status < 0:
        outcome = f"ended by {signal.Signals(-status).name}"
    else:
        outcome = "ok" if status == 0 else f"exit status {status}"
    return Outcome(outcome, monotonic() - started_at, list(last_lines))


def _record(part: Part, outcome: Outcome, output: Path) -> None:
    """Add how it went to the result of a part; it may have written one, whole or not."""
    figures: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):
        written = json.loads((output / f"{part.name}.json").read_text())
        figures = written if isinstance(written, dict) else {"result": written}
    figures |= {"status": outcome.status, "seconds": outcome.seconds}
    if outcome.status != "ok" or not part.writes_result:
        figures["last_lines"] = outcome.last_lines
    write_result(part.name, figures, output / f"{part.name}.json")


def _in_parallel() -> tuple[str, ...]:
    """Kernels compile for seconds each; with pytest-xdist, where it is installed, on several cores."""
    try:
        import xdist  # type: ignore[import-not-found]  # noqa: F401
    except ImportError:
        return ()
    return ("-n", str(min(8, len(os.sched_getaffinity(0)))))


if __name__ == "__main__":
    main()
