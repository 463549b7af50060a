"""The figures of `pdengine bench transfer` as a table, as JSON and as a plot."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from pdengine.bench.transfer import BUSY_BYTES, BUSY_GETS, Figure, TransferResult

GB = 1e9


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
    """Bandwidth over the size of a pull of scattered blocks, one line per size of block, to a PNG.

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
        figures = [figure for figure in result.figures if figure.path == name and _is_plotted(figure)]
        for block_bytes, pieces in dict.fromkeys((figure.block_bytes, figure.pieces) for figure in figures):
            line = [f for f in figures if (f.block_bytes, f.pieces) == (block_bytes, pieces)]
            panel.plot(
                [figure.num_bytes / 2**20 for figure in line],
                [figure.bandwidth / GB for figure in line],
                marker="o",
                linestyle="-" if pieces == 1 else ":",
                label=_size(block_bytes) + ("" if pieces == 1 else f" in {pieces} pieces"),
            )
        ceilings = [(f.num_bytes / 2**20, f.ceiling / GB) for f in figures if f.ceiling is not None]
        if ceilings:
            panel.scatter(*zip(*ceilings, strict=True), marker="_", color="grey", label="ceiling")
        panel.set_xscale("log", base=4)
        panel.xaxis.set_major_formatter(lambda mebibytes, _: f"{mebibytes:g}")
        panel.set(title=f"{name} ({result.lanes[name]})", xlabel="MiB pulled")
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("GB/s")
    panels[0][0].set_ylim(bottom=0)
    panels[0][-1].legend(title="block", fontsize="small")
    chart.tight_layout()
    chart.savefig(path, dpi=120)
    pyplot.close(chart)


def _is_plotted(figure: Figure) -> bool:
    return figure.num_blocks == 1 or figure.longest_run > 0


def _pulls(result: TransferResult) -> Table:
    about = dict.fromkeys(result.versions.values())
    lanes = [f"{path} is {lanes}" for path, lanes in result.lanes.items() if path != lanes]
    table = narrow_table(
        "Pulls of KV blocks between two processes",
        ["path"],
        ["block", "blocks", "in runs\nof", "GETs", "post\nms", "pull\nms", "GB/s", "of\nceiling"],
    )
    table.caption = (
        f"{', '.join([*about, *lanes])}. The ceiling within a host is a memmove over the same runs; "
        "over TCP it is ucx_perftest."
    )
    previous = ""
    for figure in result.figures:
        if figure.pieces > 1:
            continue
        if previous not in ("", figure.path):
            table.add_section()
        table.add_row(
            figure.path if figure.path != previous else "",
            *_what(figure),
            str(figure.num_gets),
            f"{figure.post_seconds * 1e3:.2f}",
            f"{figure.seconds * 1e3:.2f}",
            f"{figure.bandwidth / GB:.2f}",
            "-" if figure.share_of_ceiling is None else f"{figure.share_of_ceiling:.2f}",
        )
        previous = figure.path
    return table


def _layouts(result: TransferResult) -> Table:
    """Our layout against one region per layer and K/V, pull by pull."""
    table = narrow_table(
        "A contiguous block against one region per layer for K and for V",
        ["path"],
        ["block", "blocks", "in runs\nof", "GETs", "GETs,\nlayers", "GB/s", "GB/s,\nlayers", "factor"],
    )
    contiguous = {_pull(figure): figure for figure in result.figures if figure.pieces == 1}
    for figure in result.figures:
        if figure.pieces > 1:
            ours = contiguous[_pull(figure)]
            table.add_row(
                figure.path,
                *_what(figure),
                str(ours.num_gets),
                str(figure.num_gets),
                f"{ours.bandwidth / GB:.2f}",
                f"{figure.bandwidth / GB:.2f}",
                f"{ours.bandwidth / figure.bandwidth:.1f}",
            )
    return table


def _busy(result: TransferResult) -> Table:
    table = narrow_table(
        f"{BUSY_BYTES // 2**20} MiB in {BUSY_GETS} GETs from a target whose main thread works",
        ["path", "target"],
        ["median\nms", "worst\nms", "times\nidle", "p99 gap\nms"],
    )
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


def narrow_table(title: str, texts: list[str], numbers: list[str]) -> Table:
    """Narrow enough for 80 columns. texts, numbers: headings of the columns on the left and on the right."""
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in texts:
        table.add_column(heading, no_wrap=True)
    for heading in numbers:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _what(figure: Figure) -> tuple[str, str, str]:
    runs = f"1-{figure.longest_run}" if figure.longest_run else "all"
    return _size(figure.block_bytes), str(figure.num_blocks), runs


def _pull(figure: Figure) -> tuple[str, int, int, int]:
    return figure.path, figure.block_bytes, figure.num_blocks, figure.longest_run


def _size(num_bytes: int) -> str:
    return f"{num_bytes // 2**20} MiB" if num_bytes % 2**20 == 0 else f"{num_bytes // 2**10} KiB"
