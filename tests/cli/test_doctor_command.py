"""`pdengine doctor`, as a person runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from fork_server import fork_server

from pdengine.cli.main import main
from pdengine.engine.doctor import Finding

DEADLINE_SECONDS = 120.0


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pdengine.cli", "doctor", *arguments],
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
        env={**os.environ, **environment},
        check=False,
    )


def run_copy(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Like `run`, without the seconds of imports."""
    return fork_server().run("pdengine.cli", ["doctor", *arguments], environment, DEADLINE_SECONDS)


def verdicts(output: str) -> dict[str, str]:
    """name -> verdict, from lines that are aligned."""
    return {line[:13].strip(): line[15:19].strip() for line in output.splitlines()}


def test_this_machine_can_serve() -> None:
    result = run("--json")
    assert result.returncode == 0, result.stdout + result.stderr
    report = json.loads(result.stdout)
    assert report["serves"]
    findings = {finding["name"]: finding for finding in report["findings"]}
    assert "because" in findings["libucp"]["detail"]
    assert "tcp/lo" in findings["transports"]["detail"]
    assert findings["lanes"]["verdict"] == "ok"
    assert {"python", "torch", "triton", "cuda", "rdma", "address", "memory"} <= findings.keys()


def test_a_libucp_that_is_not_there_is_a_failed_line_and_status_1() -> None:
    result = run_copy(PDENGINE_UCX_LIB="/nowhere/libucp.so.0")
    assert result.returncode == 1
    assert "Traceback" not in result.stdout + result.stderr
    assert verdicts(result.stdout)["libucp"] == "fail"
    [line] = [line for line in result.stdout.splitlines() if line.startswith("libucp ")]
    assert "PDENGINE_UCX_LIB is '/nowhere/libucp.so.0', which is not a file" in line
    assert verdicts(result.stdout)["memory"] in ("ok", "warn")
    assert set(verdicts(result.stdout).values()) <= {"ok", "warn", "fail"}


def test_without_torch_it_says_so_and_goes_on(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('hidden from this test')")
    paths = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    result = run(PYTHONPATH=paths)
    assert result.returncode == 1
    assert result.stderr == ""
    found = verdicts(result.stdout)
    assert found["torch"] == "fail"
    assert found["lanes"] == "ok"  # libucp needs no torch
    assert "pip install 'torch>=2.11'" in result.stdout


def test_a_library_that_is_none_is_a_failed_line(tmp_path: Path) -> None:
    path = tmp_path / "libucp.so.0"
    path.write_text("not a library")
    result = run_copy(PDENGINE_UCX_LIB=str(path))
    assert result.returncode == 1
    assert result.stderr == ""
    assert verdicts(result.stdout)["libucp"] == "fail"
    assert "cannot be loaded as libucp" in result.stdout


def test_an_address_of_another_machine_is_a_failed_line() -> None:
    result = run_copy("--advertise", "tcp://192.0.2.1:0")
    assert result.returncode == 1
    assert verdicts(result.stdout)["address"] == "fail"
    assert verdicts(result.stdout)["lanes"] == "ok"  # tried by loopback
    assert "no network interface of this machine owns the advertised host '192.0.2.1'" in result.stdout


@pytest.mark.parametrize(
    ("finding", "status", "strict_status"),
    [
        (Finding("rdma", "ok", "fine"), 0, 0),
        (Finding("ports", "warn", "taken"), 0, 0),
        (Finding("rdma", "warn", "by TCP", is_slow=True), 0, 1),
        (Finding("torch", "fail", "missing"), 1, 1),
    ],
)
def test_status(finding: Finding, status: int, strict_status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pdengine.cli.doctor.examine", lambda host: [finding])
    assert CliRunner().invoke(main, ["doctor"]).exit_code == status
    assert CliRunner().invoke(main, ["doctor", "--strict"]).exit_code == strict_status


def test_verdicts_have_colours_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "pdengine.cli.doctor.examine", lambda host: [Finding("torch", "fail", "gone", "install it")]
    )
    plain = CliRunner().invoke(main, ["doctor"]).output
    assert plain == "torch          fail  gone; install it\n"
    assert "\x1b[31mfail\x1b[0m" in CliRunner().invoke(main, ["doctor"], color=True).output
