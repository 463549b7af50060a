"""The units of `pdengine install-units`: what they hold, where they go, and what systemd says of them."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest
from click.testing import CliRunner, Result

from pdengine.cli.config_file import check_environment, option_tables, read_config_file
from pdengine.cli.install_units import packaged_files, running_program
from pdengine.cli.main import main

TRUE = "/bin/true"
TABLES = option_tables(main)
UNITS = {
    name: text
    for name, text in packaged_files().items()
    if name.startswith("pdengine") and "toml" not in name
}


def install(tmp_path: Path, *options: str) -> Result:
    places = ["--prefix", str(tmp_path / "units"), "--config-directory", str(tmp_path / "etc")]
    return CliRunner().invoke(main, ["install-units", *places, *options])


def setting(unit: str, name: str) -> list[str]:
    return re.findall(rf"^{name}=(.*)$", unit, re.MULTILINE)


def test_units_start_the_program_as_the_user(tmp_path: Path) -> None:
    result = install(tmp_path, "--exec", TRUE, "--user", "inference")
    assert result.exit_code == 0, result.output
    written = {path.name: path.read_text() for path in (tmp_path / "units").iterdir()}
    assert sorted(written) == sorted(UNITS)
    for name, unit in written.items():
        if name != "pdengine.target":
            [command] = setting(unit, "ExecStart")
            assert command.split()[0] == TRUE
            assert command.split()[1] in main.commands  # type: ignore[attr-defined]
            assert setting(unit, "User") == ["inference"]
            assert f"PDENGINE_CONFIG={tmp_path}/etc/pdengine.toml" in unit
            assert "/etc/pdengine" not in unit.replace(f"{tmp_path}/etc", "")
    assert "useradd" in result.output
    assert "systemctl daemon-reload" in result.output


def one_file(tmp_path: Path) -> Path:
    program = tmp_path / "pdengine"
    with ZipFile(program, "w") as archive:
        archive.writestr("__main__.py", "")
    program.chmod(0o755)
    return program


def test_one_file_is_started_by_the_python_that_runs_it_now(tmp_path: Path) -> None:
    program = one_file(tmp_path)
    assert install(tmp_path, "--exec", str(program)).exit_code == 0
    unit = (tmp_path / "units" / "pdengine-prefill@.service").read_text()
    assert setting(unit, "ExecStart") == [f"{sys.executable} {program} prefill"]


def test_the_python_of_one_file_must_be_one_that_the_services_see(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "prefix", "/home/me/venv")
    assert "will not find /home/me/venv" in install(tmp_path, "--exec", str(one_file(tmp_path))).output
    assert "will not find" not in install(tmp_path, "--exec", TRUE).output


def test_a_python_that_no_unit_could_hold_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/opt/my python/bin/python")
    result = install(tmp_path, "--exec", str(one_file(tmp_path)))
    assert result.exit_code == 2
    assert "'/opt/my python/bin/python', the Python that would run" in result.output
    assert not (tmp_path / "units").exists()


def test_configuration_that_is_there_is_left_alone_and_units_are_not(tmp_path: Path) -> None:
    assert install(tmp_path, "--exec", TRUE).exit_code == 0
    unit, toml = tmp_path / "units" / "pdengine-router.service", tmp_path / "etc" / "pdengine.toml"
    before = unit.read_text()
    unit.write_text("old")
    toml.write_text("mine")
    assert install(tmp_path, "--exec", TRUE).exit_code == 0
    assert unit.read_text() == before
    assert toml.read_text() == "mine"
    assert not list(tmp_path.rglob("*.new"))


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    result = install(tmp_path, "--exec", TRUE, "--dry-run")
    assert not list(tmp_path.iterdir())
    assert f"# --- {tmp_path}/units/pdengine-decode@.service\n[Unit]\n" in result.output


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--exec", "pdengine"], "must be an absolute path"),
        (["--exec", "/nowhere/pdengine"], "of a program"),
        (["--exec", "/bin/true\nUser=root"], "without blanks"),
        (["--user", "root\nExecStartPre=/bin/sh"], "is not the name of a user"),
        (["--exec", TRUE, "--prefix", "units"], "--prefix 'units' must be an absolute path"),
    ],
)
def test_what_no_unit_could_hold_is_refused(options: list[str], reason: str, tmp_path: Path) -> None:
    result = install(tmp_path, *options)
    assert result.exit_code == 2
    assert reason in result.output
    assert not list(tmp_path.iterdir())


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "units").write_text("a file")
    result = install(tmp_path, "--exec", TRUE)
    assert result.exit_code == 1
    assert f"{tmp_path}/units" in result.output


def test_a_program_that_the_services_cannot_see_is_warned_of(tmp_path: Path) -> None:
    program = Path("/tmp") / f"pdengine-{os.getpid()}"
    program.symlink_to(TRUE)
    try:
        assert f"will not find {program}" in install(tmp_path, "--exec", str(program)).output
    finally:
        program.unlink()
    assert "will not find" not in install(tmp_path, "--exec", TRUE).output


def test_the_running_program_is_found() -> None:
    command = [sys.executable, "-m", "pdengine.cli", "install-units", "--dry-run"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    [program] = set(re.findall(r"^ExecStart=(\S+) ", output, re.MULTILINE))
    assert os.access(program, os.X_OK)
    assert Path(program).name == "pdengine"
    assert Path(running_program()).is_file()


def test_the_examples_are_accepted(tmp_path: Path) -> None:
    files = packaged_files()
    toml = tmp_path / "pdengine.toml"
    toml.write_text(files["pdengine.toml"])
    assert read_config_file(toml, TABLES)["router"]
    variables = re.findall(r"^#?([A-Z_]+)=", files["worker.env"], re.MULTILINE)
    check_environment(variables, TABLES)
    assert variables


def test_workers_differ_in_their_role_only() -> None:
    workers = [
        UNITS[f"pdengine-{role}@.service"].replace(role, "ROLE") for role in ("prefill", "decode", "unified")
    ]
    assert workers[0] == workers[1] == workers[2]


@pytest.mark.parametrize("name", sorted(name for name in UNITS if "@" in name))
def test_a_service_has_longer_to_stop_than_it_drains(name: str) -> None:
    options = {
        parameter.name: parameter for parameter in main.commands[name.split("-")[1].split("@")[0]].params
    }  # type: ignore[attr-defined]
    [seconds] = setting(UNITS[name], "TimeoutStopSec")
    assert int(seconds) > options["drain_seconds"].default
    if "lease_seconds" in options:
        assert int(seconds) > options["drain_seconds"].default + options["lease_seconds"].default
        assert setting(UNITS[name], "LimitMEMLOCK") == ["infinity"]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd here")
def test_systemd_finds_no_fault(tmp_path: Path) -> None:
    assert install(tmp_path, "--exec", TRUE).exit_code == 0
    units = sorted(str(path) for path in (tmp_path / "units").iterdir())
    command = ["systemd-analyze", "verify", "--man=no", *units]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
