"""Single checks of the doctor, on machines that are made up."""

import resource
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pdengine.engine import doctor
from pdengine.engine.doctor import Finding, rdma_finding
from pdengine.transport import ucx_library


@pytest.fixture
def devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """/sys/class/infiniband of a machine whose loopback interface has no part in RDMA."""
    devices = tmp_path / "infiniband"
    (devices / "mlx5_0" / "device" / "net" / "ib0").mkdir(parents=True)
    monkeypatch.setattr(ucx_library, "INFINIBAND_DEVICES", devices)
    return devices


@pytest.fixture
def libucp(tmp_path: Path) -> Path:
    """A libucp with the module for RDMA."""
    (tmp_path / "lib" / "ucx").mkdir(parents=True)
    (tmp_path / "lib" / "ucx" / "libuct_ib.so.0").touch()
    (tmp_path / "lib" / "libucp.so.0").touch()
    return tmp_path / "lib" / "libucp.so.0"


def test_a_check_that_crashes_is_a_failed_finding() -> None:
    def check() -> Iterator[Finding]:
        yield Finding("a", "ok", "first")
        raise ZeroDivisionError("two\nlines")

    first, second = doctor.run_check("a", check)
    assert first.verdict == "ok"
    assert (second.name, second.verdict) == ("a", "fail")
    assert second.detail == "the check itself failed: ZeroDivisionError: two lines"


def test_rdma_devices_that_libucp_cannot_drive_are_slow(devices: Path, tmp_path: Path) -> None:
    finding = rdma_finding(tmp_path / "libucp.so.0", ["tcp/lo"], "127.0.0.1", devices)
    assert (finding.verdict, finding.is_slow) == ("warn", True)
    assert "mlx5_0 on ib0" in finding.detail
    assert "PDENGINE_UCX_LIB" in finding.advice


def test_rdma_devices_matter_only_where_they_would_be_used(
    devices: Path, libucp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not rdma_finding(libucp, ["tcp/lo"], "127.0.0.1", devices).is_slow
    used = rdma_finding(libucp, ["rc_mlx5/mlx5_0:1", "tcp/ib0"], "127.0.0.1", devices)
    assert (used.verdict, used.is_slow) == ("ok", False)
    assert "rc_mlx5/mlx5_0:1" in used.detail
    monkeypatch.setattr(doctor, "interface_of", lambda host: "eth0")
    by_tcp = rdma_finding(libucp, ["tcp/eth0"], "10.0.0.1", devices)
    assert (by_tcp.verdict, by_tcp.is_slow) == ("warn", True)
    assert rdma_finding(libucp, ["tcp/eth0"], "10.0.0.1", devices / "none").verdict == "ok"


def test_a_limit_of_locked_memory_fails_only_with_rdma(
    devices: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (8 * 2**20, 8 * 2**20))
    monkeypatch.setattr(doctor, "_has_capability", lambda number: False)
    [with_rdma] = doctor.check_locked_memory(devices)
    [without] = doctor.check_locked_memory(devices / "none")
    assert (with_rdma.verdict, without.verdict) == ("fail", "ok")
    assert "8.0 MiB" in with_rdma.detail
    monkeypatch.setattr(resource, "getrlimit", lambda which: (resource.RLIM_INFINITY,) * 2)
    [unlimited] = doctor.check_locked_memory(devices)
    assert unlimited.verdict == "ok"


def test_a_taken_port_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        [finding] = doctor.check_ports({port: "clients"})
        assert finding.verdict == "warn"
        assert f"{port} (clients)" in finding.detail
    [finding] = doctor.check_ports({port: "clients"})
    assert finding.verdict == "ok"


def test_a_libucp_that_takes_its_process_down_is_a_failed_finding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'UCX  WARN  a log line'\nkill -SEGV $$\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setenv("PDENGINE_UCX_LIB", str(python))
    [finding] = doctor.check_transfer("127.0.0.1")
    assert (finding.name, finding.verdict) == ("libucp", "fail")
    assert "SIGSEGV" in finding.detail


def test_an_old_ucx_is_warned_about(monkeypatch: pytest.MonkeyPatch, libucp: Path) -> None:
    report = doctor.TransferReport(version="1.13.1", transports=["tcp/lo"], lanes="sysv")
    monkeypatch.setattr(doctor, "_try_transfer", lambda host: report)
    monkeypatch.setenv("PDENGINE_UCX_LIB", str(libucp))
    findings = {finding.name: finding for finding in doctor.check_transfer("127.0.0.1")}
    assert findings["libucp"].verdict == "warn"
    assert "PDENGINE_UCX_LIB names it" in findings["libucp"].detail
    assert "1.16" in findings["libucp"].advice


def test_a_cache_that_cannot_be_written_is_warned_about(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**options: object) -> None:
        raise RuntimeError("cannot cache function: no locator available")

    [finding] = doctor.check_numba_cache()
    assert finding.verdict == "ok"
    monkeypatch.setattr("numba.njit", refuse)
    [finding] = doctor.check_numba_cache()
    assert finding.verdict == "warn"
    assert "NUMBA_CACHE_DIR" in finding.advice


def test_settings_of_ucx_that_leave_nothing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UCX_TLS", "nothing_of_that_name")
    [finding] = doctor.check_transfer("127.0.0.1")
    assert finding.verdict == "fail"
    assert "unset UCX_TLS" in finding.advice
