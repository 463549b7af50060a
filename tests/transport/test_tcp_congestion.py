"""Which congestion control the TCP sockets of a block get."""

from __future__ import annotations

import os
import queue
import socket
from pathlib import Path

import pytest

from pdengine.transport import tcp_congestion
from pdengine.transport.tcp_congestion import without_bbr
from pdengine.transport.ucx_transfer import UcxTransfer


def algorithm_of(opened: socket.socket) -> str:
    name = opened.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16)
    return name.rstrip(b"\0").decode()


@pytest.fixture
def default_algorithm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stands for the system's setting."""
    path = tmp_path / "tcp_congestion_control"
    monkeypatch.setattr(tcp_congestion, "DEFAULT_ALGORITHM", path)
    return path


def test_sockets_of_the_block_and_those_they_accept_are_changed(
    default_algorithm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    default_algorithm.write_text("bbr\n")
    monkeypatch.setattr(tcp_congestion, "PREFERRED", ("no such algorithm", "reno"))
    with socket.socket() as before:
        unchanged = algorithm_of(before)
        num_open = len(os.listdir("/proc/self/fd"))
        with without_bbr():
            server = socket.create_server(("127.0.0.1", 0))
            datagrams = socket.socket(type=socket.SOCK_DGRAM)
            pipe = os.pipe()
        assert len(os.listdir("/proc/self/fd")) == num_open + 4, "nothing is left open"
        with server, datagrams, socket.create_connection(server.getsockname()):
            accepted, _ = server.accept()
            with accepted:
                assert [algorithm_of(server), algorithm_of(accepted)] == ["reno", "reno"]
        assert algorithm_of(before) == unchanged
        for descriptor in pipe:
            os.close(descriptor)


def test_another_default_is_left_alone(default_algorithm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    default_algorithm.write_text("dctcp\n")
    monkeypatch.setattr(tcp_congestion, "PREFERRED", ("reno",))
    with socket.socket() as outside:
        with without_bbr():
            inside = socket.socket()
        with inside:
            assert algorithm_of(inside) == algorithm_of(outside)


def test_ucx_listens_without_bbr(default_algorithm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UCX_TLS", "tcp")
    monkeypatch.setattr(tcp_congestion, "PREFERRED", ("reno",))
    default_algorithm.write_text("bbr2\n")
    before = set(os.listdir("/proc/self/fd"))
    events: queue.SimpleQueue[object] = queue.SimpleQueue()
    transfer = UcxTransfer(deliver=events.put, on_fatal=events.put)
    listening = []
    for name in set(os.listdir("/proc/self/fd")) - before:
        try:
            opened = socket.socket(fileno=os.dup(int(name)))
        except OSError:  # not a socket, or closed since
            continue
        with opened:
            if opened.family == socket.AF_INET and opened.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                listening.append(algorithm_of(opened))
    transfer.close()
    assert listening
    assert set(listening) == {"reno"}
