"""`pdengine bench transfer` on small pools: the plumbing, not the times."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from time import monotonic

import psutil
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from pdengine.bench import transfer_report
from pdengine.bench.scatter import UNIT_BYTES, Scatter
from pdengine.bench.transfer import Plan, PlanError
from pdengine.cli.main import main

SMALL = ["bench", "transfer", "--pool", "4MiB", "--block-size", "2MiB", "--repetitions", "2"]
DEADLINE = 60


@given(
    st.integers(1, 64), st.integers(0, 8), st.sampled_from([1, 2]), st.integers(0, 2**32), st.integers(0, 10)
)
def test_runs_are_disjoint_and_cover_the_blocks(
    num_blocks: int, longest_run: int, pieces: int, seed: int, spare_blocks: int
) -> None:
    block_bytes = 2 * UNIT_BYTES
    pool_bytes = (num_blocks + spare_blocks) * block_bytes
    runs = Scatter(pool_bytes, block_bytes, num_blocks, longest_run, pieces).runs(seed)
    units_per_block = block_bytes // UNIT_BYTES
    for starts in ([run.remote_block for run in runs], [run.local_block for run in runs]):
        units = [start + step for start, run in zip(starts, runs, strict=True) for step in range(run.count)]
        assert len(set(units)) == len(units) == num_blocks * units_per_block
        assert 0 <= min(units) <= max(units) < pool_bytes // UNIT_BYTES
    longest = longest_run or num_blocks
    assert max(run.count for run in runs) <= longest * units_per_block // pieces
    assert len(runs) % pieces == 0


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"paths": ()}, "at least one path"),
        ({"repetitions": 0}, "repetitions must be at least 1, got 0"),
        ({"block_sizes": (1000,)}, "multiple of 32768, got 1000"),
        ({"pool_bytes": 3 * 2**20}, "does not divide into blocks of 2097152"),
        ({"pool_bytes": 2**20, "block_sizes": (2**16,), "busy": True}, "at least 16777216 bytes"),
    ],
)
def test_a_plan_that_cannot_be_measured_is_refused(changes: dict[str, object], problem: str) -> None:
    with pytest.raises(PlanError, match=problem):
        Plan(**changes)  # type: ignore[arg-type]


def test_a_small_run_prints_writes_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Path] = []
    monkeypatch.setattr("pdengine.cli.bench.plot", lambda result, path: drawn.append(path))
    output = tmp_path / "result.json"
    run = CliRunner().invoke(main, [*SMALL, "--path", "mapping", "--path", "tcp", "--output", str(output)])
    assert run.exit_code == 0, run.output
    result = json.loads(output.read_text())
    assert result["machine"]["cores"] >= 1
    assert result["lanes"] == {"mapping": "mapping", "tcp": "tcp/lo"}
    kinds = [(figure["num_blocks"], figure["longest_run"], figure["pieces"]) for figure in result["figures"]]
    assert kinds == 2 * [(1, 0, 1), (2, 0, 1), (2, 8, 1), (1, 0, 64), (2, 0, 64), (2, 8, 64)]
    gets = [figure["num_gets"] for figure in result["figures"] if figure["longest_run"] == 0]
    assert gets == 2 * [1, 1, 64, 64]
    for figure in result["figures"]:
        assert 0 < figure["best_seconds"] <= figure["seconds"]
        assert figure["gb_per_second"] > 0
    assert all(figure["share_of_ceiling"] > 0 for figure in result["figures"] if figure["path"] == "mapping")
    assert "mapping" in run.output
    assert drawn == [tmp_path / "result.png"]


def test_without_matplotlib_there_is_a_sentence_and_no_plot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = transfer_report.TransferResult()
    with pytest.raises(transfer_report.PlotUnavailable, match=r"pip install 'pdengine\[bench\]'"):
        transfer_report.plot(result, tmp_path / "plot.png")


def test_options_that_make_no_plan_end_with_one_sentence() -> None:
    run = CliRunner().invoke(main, [*SMALL, "--repetitions", "0"])
    assert (run.exit_code, run.output) == (1, "Error: repetitions must be at least 1, got 0\n")
    run = CliRunner().invoke(main, [*SMALL, "--pool", "much"])
    assert run.exit_code == 2
    assert "'much' is not a size" in run.output


def running_peers(parent: int) -> list[psutil.Process]:
    peers = []
    for child in psutil.Process(parent).children():
        with suppress(psutil.Error):  # it has just ended
            if "pdengine.bench.transfer_peers" in child.cmdline():
                peers.append(child)
    return peers


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_run_leaves_no_process(number: signal.Signals, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pdengine.cli",
        *SMALL,
        "--path",
        "shared-memory",
        "--repetitions",
        "100000",
    ]
    process = subprocess.Popen(
        [*command, "--output", str(tmp_path / "result.json")],
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # A shell that runs the tests in the background has them, and their children, ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        deadline = monotonic() + DEADLINE
        while len(children := running_peers(process.pid)) < 2:
            assert process.poll() is None
            assert monotonic() < deadline
        process.send_signal(number)
        _, error = process.communicate(timeout=DEADLINE)
        _, alive = psutil.wait_procs(children, timeout=DEADLINE)
        assert alive == []
        assert process.returncode != 0
        assert "Traceback" not in error
    finally:
        process.kill()
        process.wait()
