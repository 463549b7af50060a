"""The figures of `pdengine bench transfer` as a table, as JSON and as a plot."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pdengine.bench.transfer import BUSY_BYTES, BUSY_GETS, Figure, TransferResult

GB = 1e9
PLOTTED_LONGEST_RUN = 8


class PlotUnavailable(RuntimeError):
    """The plot cannot be drawn; the message says how to install what is missing."""


def print_tables(result: TransferResult, console: Console) -> None:
    console.print(_pulls(result))
    if any(figure.pieces > 1 for figure in result.figures):
        console.print(_layouts(result))
    if result.busy:
        console.print(_busy(result))
    for note in result.notes:
        console.print(note, highlight=False)


def as_json(result: TransferResult) -> dict[str, Any]:
    figures = [
        {
            **asdict(figure),
            "gb_per_second": figure.bandwidth / GB,
            "share_of_ceiling": figure.share_of_ceiling,
        }
        for figure in result.figures
    ]
    return {**asdict(result), "figures": figures}


def plot(result: TransferResult, path: Path) -> None:
    """Bandwidth over the size of a pull, one line per path and size of block, to a PNG.

    Raises PlotUnavailable without matplotlib.
    """
    try:
        import matplotlib
    except ImportError:
        raise PlotUnavailable("the plot needs matplotlib: pip install 'pdengine[bench]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    paths = list(dict.fromkeys(figure.path for figure in result.figures))
    chart, panels = pyplot.subplots(1, len(paths), figsize=(5 * len(paths), 4), sharey=True, squeeze=False)
    for name, panel in zip(paths, panels[0], strict=True):
        figures = [figure for figure in result.figures if figure.path == name]
        for block_bytes in dict.fromkeys(figure.block_bytes for figure in figures):
            for pieces in dict.fromkeys(f.pieces for f in figures if f.block_bytes == block_bytes):
                line = [
                    figure
                    for figure in figures
                    if (figure.block_bytes, figure.pieces) == (block_bytes, pieces)
                    and (figure.num_blocks == 1 or figure.longest_run == PLOTTED_LONGEST_RUN)
                ]
                panel.plot(
                    [figure.num_bytes / 2**20 for figure in line],
                    [figure.bandwidth / GB for figure in line],
                    marker="o",
                    linestyle="-" if pieces == 1 else ":",
                    label=_block_name(block_bytes, pieces),
                )
        ceilings = [figure for figure in figures if figure.ceiling is not None]
        panel.scatter(
            [figure.num_bytes / 2**20 for figure in ceilings],
            [figure.ceiling / GB for figure in ceilings if figure.ceiling is not None],
            marker="_",
            color="grey",
            label="ceiling",
        )
        panel.set(title=f"{name} ({result.lanes[name]})", xscale="log", xlabel="MiB pulled")
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("GB/s")
    panels[0][0].set_ylim(bottom=0)
    panels[0][-1].legend(title="block", fontsize="small")
    chart.tight_layout()
    chart.savefig(path, dpi=120)
    pyplot.close(chart)


def _pulls(result: TransferResult) -> Table:
    lanes = ", ".join(f"{path}: {lanes}" for path, lanes in result.lanes.items())
    table = Table(
        title="Pulls of KV blocks between two processes",
        caption=f"{result.version}; {lanes}. Ceiling: a memmove over the same runs; over TCP ucx_perftest.",
    )
    table.add_column("path")
    for heading in ("block", "blocks", "runs of", "GETs", "post ms", "pull ms", "GB/s", "of ceiling"):
        table.add_column(heading, justify="right")
    previous = ""
    for figure in result.figures:
        if figure.pieces > 1:
            continue
        if previous not in ("", figure.path):
            table.add_section()
        table.add_row(
            figure.path if figure.path != previous else "",
            _size(figure.block_bytes),
            str(figure.num_blocks),
            f"1-{figure.longest_run}" if figure.longest_run else "all",
            str(figure.num_gets),
            f"{figure.post_seconds * 1e3:.3f}",
            f"{figure.seconds * 1e3:.3f}",
            f"{figure.bandwidth / GB:.2f}",
            _share(figure.share_of_ceiling),
        )
        previous = figure.path
    return table


def _layouts(result: TransferResult) -> Table:
    """Our layout against one region per layer and K/V, pull by pull."""
    table = Table(title="A contiguous block against one region per layer for K and for V")
    table.add_column("path")
    for heading in (
        "block",
        "blocks",
        "runs of",
        "GETs",
        "GETs per layer",
        "GB/s",
        "GB/s per layer",
        "factor",
    ):
        table.add_column(heading, justify="right")
    contiguous = {_pull(figure): figure for figure in result.figures if figure.pieces == 1}
    for figure in result.figures:
        if figure.pieces > 1:
            ours = contiguous[_pull(figure)]
            table.add_row(
                figure.path,
                _size(figure.block_bytes),
                str(figure.num_blocks),
                f"1-{figure.longest_run}" if figure.longest_run else "all",
                str(ours.num_gets),
                str(figure.num_gets),
                f"{ours.bandwidth / GB:.2f}",
                f"{figure.bandwidth / GB:.2f}",
                f"{ours.bandwidth / figure.bandwidth:.1f}",
            )
    return table


def _busy(result: TransferResult) -> Table:
    table = Table(
        title=f"{BUSY_BYTES // 2**20} MiB in {BUSY_GETS} GETs from a target whose main thread works"
    )
    table.add_column("path")
    table.add_column("target")
    for heading in ("median ms", "worst ms", "times idle", "p99 gap ms"):
        table.add_column(heading, justify="right")
    idle = {figure.path: figure.seconds for figure in result.busy if figure.work == "idle"}
    for figure in result.busy:
        gap = figure.p99_gap_seconds
        table.add_row(
            figure.path,
            figure.work,
            f"{figure.seconds * 1e3:.2f}",
            f"{figure.worst_seconds * 1e3:.2f}",
            f"{figure.seconds / idle[figure.path]:.2f}",
            "-" if gap is None else f"{gap * 1e3:.3f}",
        )
    return table


def _pull(figure: Figure) -> tuple[str, int, int, int]:
    return figure.path, figure.block_bytes, figure.num_blocks, figure.longest_run


def _size(num_bytes: int) -> str:
    return f"{num_bytes // 2**20} MiB" if num_bytes % 2**20 == 0 else f"{num_bytes // 2**10} KiB"


def _block_name(block_bytes: int, pieces: int) -> str:
    return _size(block_bytes) + ("" if pieces == 1 else f" in {pieces} pieces")


def _share(share: float | None) -> str:
    return "-" if share is None else f"{share:.2f}"
