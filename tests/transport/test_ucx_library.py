"""Which libucp is taken, how it is set up, and what it reports."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import pytest

from pdengine.transport import ucx_library, ucx_settings
from pdengine.transport.transfer import TransferError
from pdengine.transport.ucx_library import UcxError, UcxLibrary, UcxNotFound, find_ucx, load_ucx
from pdengine.transport.ucx_settings import interface_of, rdma_ports
from pdengine.transport.ucx_worker import UcxWorker, parse_lanes


def fake_library(version: tuple[int, int, int]) -> UcxLibrary:
    return UcxLibrary(Path("/nowhere/libucp.so.0"), None, None, None, version)


@pytest.fixture
def candidates(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[Path, Path]:
    """A system's libucp and a wheel's, on a machine without RDMA devices."""
    system, wheel = tmp_path / "system" / "libucp.so.0", tmp_path / "wheel" / "libucp.so.0"
    for path in (system, wheel):
        path.parent.mkdir()
        path.touch()
    (tmp_path / "infiniband").mkdir()
    monkeypatch.setattr(ucx_library, "INFINIBAND_DEVICES", tmp_path / "infiniband")
    monkeypatch.setattr(ucx_library, "_system_libraries", lambda environ: iter([system]))
    monkeypatch.setattr(ucx_library, "_wheel_library", lambda: wheel)
    return system, wheel


def add_module(library: Path, name: str) -> None:
    """Let UCX's module of this name lie beside `library`."""
    (library.parent / "ucx").mkdir(exist_ok=True)
    (library.parent / "ucx" / name).touch()


def test_the_wheel_is_taken_where_there_is_no_rdma(candidates: tuple[Path, Path]) -> None:
    system, wheel = candidates
    assert find_ucx({}) == wheel
    add_module(system, "libuct_ib.so.0")
    assert find_ucx({}) == wheel  # the module alone is not a device


def test_the_system_library_is_taken_if_it_drives_rdma_devices(candidates: tuple[Path, Path]) -> None:
    system, wheel = candidates
    (ucx_library.INFINIBAND_DEVICES / "mlx5_0").mkdir()
    assert find_ucx({}) == wheel  # built without the module
    add_module(system, "libuct_ib.so.0")
    assert find_ucx({}) == system


def test_for_gpu_memory_only_a_library_with_cuda_will_do(
    candidates: tuple[Path, Path], tmp_path: Path
) -> None:
    system, wheel = candidates
    with pytest.raises(UcxNotFound, match=r"no libucp with CUDA support .*pdengine\[cu13\]"):
        find_ucx({}, cuda=True)
    add_module(system, "libuct_cuda.so.0")
    assert find_ucx({}, cuda=True) == system
    assert find_ucx({}) == wheel
    add_module(wheel, "libuct_cuda.so.0")
    assert find_ucx({}, cuda=True) == wheel
    mine = tmp_path / "libucp.so"
    mine.touch()
    with pytest.raises(UcxNotFound, match=r"PDENGINE_UCX_LIB is .* built without CUDA"):
        find_ucx({"PDENGINE_UCX_LIB": str(mine)}, cuda=True)


def test_rdma_without_cuda_does_not_help_a_gpu(candidates: tuple[Path, Path]) -> None:
    system, wheel = candidates
    (ucx_library.INFINIBAND_DEVICES / "mlx5_0").mkdir()
    add_module(system, "libuct_ib.so.0")
    add_module(wheel, "libuct_cuda.so.0")
    assert find_ucx({}) == system
    assert find_ucx({}, cuda=True) == wheel
    add_module(system, "libuct_cuda.so.0")
    assert find_ucx({}, cuda=True) == system


def has_cuda_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


@pytest.mark.skipif(has_cuda_driver(), reason="there is a CUDA driver")
def test_a_cuda_module_that_cannot_be_loaded_is_no_secret() -> None:
    if not ucx_library.has_cuda(find_ucx(os.environ)):
        pytest.skip("this libucp comes without CUDA support")
    with pytest.raises(UcxNotFound, match=r"libuct_cuda\S*: libcuda\.so\.1: cannot open shared object file"):
        load_ucx(cuda=True)


def test_the_configured_path_comes_first(candidates: tuple[Path, Path], tmp_path: Path) -> None:
    mine = tmp_path / "libucp.so"
    with pytest.raises(UcxNotFound, match="PDENGINE_UCX_LIB"):
        find_ucx({"PDENGINE_UCX_LIB": str(mine)})
    mine.touch()
    assert find_ucx({"PDENGINE_UCX_LIB": str(mine)}) == mine


def test_without_any_libucp_the_error_says_how_to_install(
    candidates: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ucx_library, "_wheel_library", lambda: None)
    assert find_ucx({}) == candidates[0]
    monkeypatch.setattr(ucx_library, "_system_libraries", lambda environ: iter(()))
    with pytest.raises(UcxNotFound, match=r"pip install 'pdengine\[cu12\]'"):
        find_ucx({})


def test_a_file_that_is_no_library_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "libucp.so"
    path.write_text("not a library")
    with pytest.raises(UcxNotFound, match="cannot be loaded"):
        load_ucx(path)


def test_a_failed_call_names_itself_and_its_meaning() -> None:
    library = load_ucx()
    library.check(0, "ucp_init_version")
    library.check(1, "ucp_get_nbx")
    with pytest.raises(UcxError, match=r"ucp_ep_create failed: .*\(-6\)") as caught:
        library.check(-6, "ucp_ep_create")
    assert (caught.value.status, caught.value.call) == (-6, "ucp_ep_create")
    assert library.version >= (1, 13, 0)


def test_a_wrong_setting_is_an_error() -> None:
    with pytest.raises(UcxError, match="ucp_config_modify of RNDV_THRESH"):
        UcxWorker(load_ucx(), {"RNDV_THRESH": "a lot"})


def test_settings_and_the_users_own() -> None:
    library = fake_library((1, 22, 0))
    expected = {
        "SYSV_ERROR_HANDLING": "y",
        "POSIX_ERROR_HANDLING": "y",
        "TCP_TX_SEG_SIZE": "64k",
        "TCP_RX_SEG_SIZE": "64k",
        "NET_DEVICES": "lo",
    }
    assert ucx_settings.ucx_settings(library, "127.0.0.1", {}) == expected
    environ = {"UCX_TCP_TX_SEG_SIZE": "8k", "UCX_NET_DEVICES": "eth7", "UCX_MM_ERROR_HANDLING": "n"}
    assert ucx_settings.ucx_settings(library, "127.0.0.1", environ) == {"TCP_RX_SEG_SIZE": "64k"}


def test_reads_by_cuda_ipc_are_switched_on_for_gpu_memory() -> None:
    settings = ucx_settings.ucx_settings(fake_library((1, 22, 0)), "127.0.0.1", {}, cuda=True)
    assert settings["CUDA_IPC_ENABLE_GET_ZCOPY"] == "on"
    settings = ucx_settings.ucx_settings(fake_library((1, 16, 0)), "127.0.0.1", {}, cuda=True)
    assert settings["ENABLE_GET_ZCOPY"] == "on"
    environ = {"UCX_CUDA_IPC_ENABLE_GET_ZCOPY": "n"}
    settings = ucx_settings.ucx_settings(fake_library((1, 22, 0)), "127.0.0.1", environ, cuda=True)
    assert "CUDA_IPC_ENABLE_GET_ZCOPY" not in settings


def test_old_ucx_knows_the_settings_without_transport_prefix() -> None:
    settings = ucx_settings.ucx_settings(fake_library((1, 16, 0)), "127.0.0.1", {})
    assert settings == {
        "MM_ERROR_HANDLING": "y",
        "TX_SEG_SIZE": "64k",
        "RX_SEG_SIZE": "64k",
        "NET_DEVICES": "lo",
    }


def test_rdma_ports_of_the_interface_join_the_network_devices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for device, interface in (("mlx5_0", "eth0"), ("mlx5_1", "lo"), ("mlx5_2", "lo")):
        (tmp_path / device / "device" / "net" / interface).mkdir(parents=True)
        (tmp_path / device / "ports" / "1").mkdir(parents=True)
    assert rdma_ports("lo", tmp_path) == ["mlx5_1:1", "mlx5_2:1"]
    assert rdma_ports("eth0", tmp_path) == ["mlx5_0:1"]
    assert rdma_ports("eth1", tmp_path) == []
    assert rdma_ports("lo", tmp_path / "absent") == []
    monkeypatch.setattr(ucx_settings, "has_rdma", lambda path: True)
    monkeypatch.setattr(ucx_settings, "rdma_ports", lambda interface: ["mlx5_1:1"])
    settings = ucx_settings.ucx_settings(fake_library((1, 22, 0)), "127.0.0.1", {})
    assert settings["NET_DEVICES"] == "lo,mlx5_1:1"


def test_interfaces_are_found_by_address() -> None:
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("localhost") == "lo"
    with pytest.raises(TransferError, match=r"'0\.0\.0\.0'"):
        interface_of("0.0.0.0")
    with pytest.raises(TransferError, match="cannot be resolved"):
        interface_of("no-such-host.invalid")


REPORT_1_22 = """#
# UCP endpoint
#
#               peer: <no debug data>
#                 lane[0]:  2:sysv/memory.0 md[2]      -> md[2]/sysv/sysdev[255] seg 4294967295 am keepalive
#                 lane[1]:  3:posix/memory.0 md[3]     -> md[3]/posix/sysdev[255] seg 4294967295
#
"""
REPORT_1_13 = """#
# UCP endpoint
#
#               peer: <no debug data>
#                 lane[0]:  1:tcp/eth0.100.0 md[1]    -> md[1]/tcp/sysdev[255] am am_bw#0 keepalive wireup
#                 lane[1]: 12:rc_mlx5/mlx5_0:1.0 md[4]   -> md[4]/ib/sysdev[0] rma_bw#0
#                 lane[2]: 12:rc_mlx5/mlx5_0:1.0 md[4]   -> md[4]/ib/sysdev[0] rma_bw#1
#
#                  rma_bw: mds #
"""


@pytest.mark.parametrize(
    ("report", "lanes"),
    [
        (REPORT_1_22, "sysv, posix"),
        (REPORT_1_13, "tcp/eth0.100, rc_mlx5/mlx5_0:1"),
        ("something else entirely", "unknown"),
    ],
)
def test_lanes_are_read_from_the_report(report: str, lanes: str) -> None:
    assert parse_lanes(report) == lanes
