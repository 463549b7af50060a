"""The GPU benchmarks run, if only small and on the CPU, and one that fails does not end the others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from time import monotonic

import click
import pytest
from click.testing import CliRunner

from pdengine.bench import gpu_attention, gpu_ceilings, gpu_model, gpu_transfer
from pdengine.bench.gpu import Outcome, Part, _record, _run

ROOT = Path(__file__).parent.parent.parent


def dry_run(command: click.Command, output: Path) -> None:
    result = CliRunner().invoke(command, ["--dry-run", "--output", str(output)])
    assert result.exit_code == 0, (result.output, result.exception)


def test_shares_of_the_ceilings(tmp_path: Path) -> None:
    for command in (gpu_ceilings.main, gpu_attention.main, gpu_model.main):
        dry_run(command, tmp_path)
    attention = json.loads((tmp_path / "attention.json").read_text())
    ours = [row for row in attention["rows"] if row["by"] == "pdengine"]
    assert [row["what"] for row in ours] == ["decode 2 x 40", "prefill 2 x 24"]
    assert all(row["share of ceiling"] > 0 for row in ours)
    assert [error for error in attention["errors"] if "FlashInfer" not in error] == []
    model = json.loads((tmp_path / "model.json").read_text())
    assert [row["step"] for row in model["rows"]] == ["decode 1 x 33", "decode 2 x 33", "prefill 40"]
    assert all(row["share of floor"] > 0 for row in model["rows"])


def test_pulls_between_two_processes(tmp_path: Path) -> None:
    dry_run(gpu_transfer.main, tmp_path)
    transfer = json.loads((tmp_path / "transfer.json").read_text())
    assert [row["GETs"] for row in transfer["rows"]] == [1, 2, 32]


def test_the_script_needs_no_installation(tmp_path: Path) -> None:
    script = [
        "bash",
        str(ROOT / "bench" / "gpu.sh"),
        "--dry-run",
        "--only",
        "ceilings",
        "--output",
        str(tmp_path),
    ]
    environment = {**os.environ, "PYTHON": sys.executable}
    result = subprocess.run(script, capture_output=True, text=True, timeout=120, env=environment, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    ceilings = json.loads((tmp_path / "ceilings.json").read_text())
    assert ceilings["dry_run"] is True
    assert ceilings["status"] == "ok"
    assert ceilings["copy_bytes_per_second"] > 0


@pytest.mark.parametrize(
    ("program", "seconds", "status"),
    [
        ("raise SystemExit('the reason')", 60.0, "exit status 1"),
        ("import os; print('the reason', flush=True); os.abort()", 60.0, "ended by SIGABRT"),
        ("print('the reason', flush=True); import signal; signal.pause()", 2.0, "given up after 2 s"),
    ],
)
def test_a_part_that_fails_is_recorded(program: str, seconds: float, status: str, tmp_path: Path) -> None:
    part = Part("failing", ("-c", program), seconds, takes_options=True)
    outcome = _run(part, tmp_path, dry_run=True, deadline=monotonic() + 60)
    assert outcome.status == status
    _record(part, outcome, tmp_path)
    result = json.loads((tmp_path / "failing.json").read_text())
    assert result["status"] == status
    if seconds > 2:
        assert result["last_lines"] == ["the reason"]


def test_what_a_part_has_written_before_it_failed_is_kept(tmp_path: Path) -> None:
    (tmp_path / "failing.json").write_text('{"rows": [1, 2]}')
    _record(Part("failing", (), 1.0, writes_result=True), Outcome("exit status 1", 0.5, ["why"]), tmp_path)
    result = json.loads((tmp_path / "failing.json").read_text())
    assert (result["rows"], result["status"], result["last_lines"]) == ([1, 2], "exit status 1", ["why"])


def test_what_comes_after_the_deadline_is_not_run(tmp_path: Path) -> None:
    part = Part("late", ("-c", "raise SystemExit(1)"), 60.0)
    assert _run(part, tmp_path, dry_run=True, deadline=monotonic()) == Outcome(
        "not run: no time left", 0.0, []
    )
