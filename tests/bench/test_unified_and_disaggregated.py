"""The arithmetic and the report of the comparison with co-located serving."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from rich.console import Console

from pdengine.bench.load import Timing
from pdengine.bench.transfer_report import PlotUnavailable
from pdengine.bench.unified_and_disaggregated import (
    ClusterName,
    Measured,
    better,
    figures_of,
    plot,
    results_of,
    table_of,
)


def answers(ttft: float, tpot: float, *, with_long: bool = True) -> Measured:
    timing = Timing(0.0, (ttft, ttft + tpot, ttft + 2 * tpot))
    return Measured([timing, timing], [timing] if with_long else [])


MEASURED: dict[tuple[float, ClusterName], Measured] = {
    (0.0, "disaggregated"): answers(0.2, 0.01, with_long=False),
    (0.0, "unified"): answers(0.1, 0.01, with_long=False),
    (2.0, "disaggregated"): answers(0.2, 0.01),
    (2.0, "unified"): answers(0.1, 0.04),
}


def test_figures_of_the_answers() -> None:
    figures = figures_of(answers(0.2, 0.01))
    assert (figures["short_requests"], figures["long_requests"]) == (2, 1)
    assert figures["short_ttft_ms"] == pytest.approx({"mean": 200, "p50": 200, "p99": 200})
    assert figures["long_tpot_ms"]["p50"] == pytest.approx(10)
    assert figures["long_latency_ms"]["p99"] == pytest.approx(220)


def test_nothing_is_said_of_long_prompts_where_there_were_none() -> None:
    assert not any(
        key.startswith("long_") and key.endswith("_ms") for key in figures_of(MEASURED[0.0, "unified"])
    )


def test_who_is_better() -> None:
    assert better(100.0, 104.9) == better(104.9, 100.0) == "even"
    assert better(100.0, 250.0) == "disaggregated 2.5x"
    assert better(30.0, 10.0) == "unified 3.0x"


def test_the_table_says_who_wins_where() -> None:
    console = Console(width=120, record=True, quiet=False)
    with console.capture() as captured:
        console.print(table_of(results_of(MEASURED)))
    text = captured.get()
    rows = [line.split() for line in text.splitlines() if "TTFT" in line or "TPOT" in line]
    assert len(rows) == 2 + 4  # no long prompts at rate 0
    assert "unified 2.0x" in text
    assert "disaggregated 4.0x" in text
    assert "even" in text


def test_without_matplotlib_there_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(PlotUnavailable, match=r"pip install 'pdengine\[bench\]'"):
        plot(results_of(MEASURED), tmp_path / "plot.png")
