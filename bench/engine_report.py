"""The figures of `pdengine bench engine` as tables, as JSON and as a plot."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pdengine.bench.engine import DecodeFigure, EngineResult, PrefillFigure
from pdengine.bench.engine_requests import RequestsFigure
from pdengine.bench.machine import describe_gpu
from pdengine.bench.transfer_report import PlotUnavailable, narrow_table

GIGA = 1e9


def print_tables(result: EngineResult, console: Console) -> None:
    console.print(
        f"{result.architecture}, {result.num_layers} layers of {result.hidden_size}, {result.dtype}, "
        f"on {result.device} with {result.threads} threads",
        highlight=False,
    )
    console.print(_prefill_table(result.prefill))
    console.print(_decode_table(result))
    if result.requests:
        console.print(_requests_table(result.requests))


def as_json(result: EngineResult) -> dict[str, Any]:
    """All figures, with what follows from them; and the GPU, if it ran on one."""
    gpu = describe_gpu() if result.device != "cpu" else {}
    prefill, decode = _prefill_json(result.prefill), [_decode_json(figure) for figure in result.decode]
    requests = [
        {**asdict(figure), "output_tokens_per_second": figure.output_tokens_per_second}
        for figure in result.requests
    ]
    return {**asdict(result), **gpu, "prefill": prefill, "decode": decode, "requests": requests}


def _prefill_json(figure: PrefillFigure) -> dict[str, Any]:
    return {
        **asdict(figure),
        "tokens_per_second": figure.tokens_per_second,
        "gflop_per_second": figure.flop_per_second / GIGA,
        "share_of_matmul_rate": figure.share_of_matmul_rate,
    }


def _decode_json(figure: DecodeFigure) -> dict[str, Any]:
    return {
        **asdict(figure),
        "tokens_per_second": figure.tokens_per_second,
        "gb_per_second": figure.bytes_per_second / GIGA,
        "share_of_read_rate": figure.share_of_read_rate,
        "floor_seconds": figure.floor_seconds,
        "share_of_floor": figure.share_of_floor,
    }


def _prefill_table(figure: PrefillFigure) -> Table:
    table = narrow_table(
        "Prefill of one prompt", [], ["tokens", "ms\np50", "\np99", "tokens/s", "GFlop/s", "of\nmatmul"]
    )
    table.caption = f"A matmul of the same shapes: {figure.matmul_rate / GIGA:,.0f} GFlop/s."
    table.add_row(
        str(figure.num_tokens),
        *_milliseconds(figure),
        f"{figure.tokens_per_second:,.0f}",
        f"{figure.flop_per_second / GIGA:,.0f}",
        f"{figure.share_of_matmul_rate:.2f}",
    )
    return table


def _decode_table(result: EngineResult) -> Table:
    headings = [
        "context",
        "batch",
        "ms\np50",
        "\np99",
        "tokens/s",
        "MB\nread",
        "GB/s",
        "of\nreading",
        "of\nfloor",
    ]
    table = narrow_table(f"Decode, {result.steps} steps each", [], headings)
    rates = [figure.read_rate / GIGA for figure in result.decode]
    table.caption = (
        f"Reading memory: {min(rates):,.0f} to {max(rates):,.0f} GB/s. The floor of a step is the time to "
        "read its weights and KV cache or to do its operations, whichever is longer."
    )
    previous = 0
    for figure in result.decode:
        if previous not in (0, figure.context):
            table.add_section()
        table.add_row(
            str(figure.context) if figure.context != previous else "",
            str(figure.batch_size),
            *_milliseconds(figure),
            f"{figure.tokens_per_second:,.1f}",
            f"{(figure.weight_bytes + figure.kv_bytes) / 1e6:,.1f}",
            f"{figure.bytes_per_second / GIGA:,.1f}",
            f"{figure.share_of_read_rate:.2f}",
            f"{figure.share_of_floor:.2f}",
        )
        previous = figure.context
    return table


def _requests_table(figures: list[RequestsFigure]) -> Table:
    table = narrow_table(
        f"Requests: {figures[0].prompt_tokens} tokens in, {figures[0].output_tokens} out, without sockets",
        [],
        ["at a\ntime", "requests", "TTFT\nms p50", "\np99", "TPOT\nms p50", "\np99", "output\ntokens/s"],
    )
    for figure in figures:
        times = (figure.ttft.p50, figure.ttft.p99, figure.tpot.p50, figure.tpot.p99)
        table.add_row(
            str(figure.concurrency),
            str(figure.num_requests),
            *(f"{seconds * 1e3:,.1f}" for seconds in times),
            f"{figure.output_tokens_per_second:,.1f}",
        )
    return table


def _milliseconds(figure: DecodeFigure | PrefillFigure) -> tuple[str, str]:
    return f"{figure.seconds.p50 * 1e3:,.2f}", f"{figure.seconds.p99 * 1e3:,.2f}"


def plot(result: EngineResult, path: Path) -> None:
    """Time of a step beside its floor, throughput and share of the floor, to a PNG.

    Raises PlotUnavailable without matplotlib.
    """
    try:
        import matplotlib
    except ImportError:
        raise PlotUnavailable("the plot needs matplotlib: pip install 'pdengine[bench]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    chart, (times, rates, shares) = pyplot.subplots(1, 3, figsize=(14, 4))
    for number, context in enumerate(dict.fromkeys(figure.context for figure in result.decode)):
        line = [figure for figure in result.decode if figure.context == context]
        batch_sizes = [figure.batch_size for figure in line]
        style: dict[str, Any] = {"marker": "o", "color": f"C{number}", "label": str(context)}
        times.plot(batch_sizes, [figure.seconds.p50 * 1e3 for figure in line], **style)
        floors = [figure.floor_seconds * 1e3 for figure in line]
        times.plot(batch_sizes, floors, color=f"C{number}", linestyle=":")
        rates.plot(batch_sizes, [figure.tokens_per_second for figure in line], **style)
        shares.plot(batch_sizes, [figure.share_of_floor for figure in line], **style)
    times.set(title="decode step (dotted: its floor)", ylabel="ms")
    rates.set(title="throughput of decode", ylabel="tokens/s")
    shares.set(title="share of the floor", ylim=(0, 1.05))
    for panel in (times, rates, shares):
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter(lambda batch_size, _: f"{batch_size:g}")
        panel.set_xlabel("batch size")
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
    times.legend(title="context", fontsize="small")
    chart.suptitle(
        f"{result.architecture}, {result.num_layers} layers of {result.hidden_size}, {result.dtype}, "
        f"{result.device}, {result.threads} threads"
    )
    chart.tight_layout()
    chart.savefig(path, dpi=120)
    pyplot.close(chart)
