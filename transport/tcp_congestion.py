"""The congestion control of UCX's TCP sockets, which UCX leaves to the system."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

DEFAULT_ALGORITHM = Path("/proc/sys/net/ipv4/tcp_congestion_control")
PREFERRED = ("cubic", "reno")  # Linux lets every user choose Reno


@contextmanager
def without_bbr() -> Iterator[None]:
    """TCP sockets that this process opens in the block use CUBIC or Reno where the system's default is BBR.

    BBR paces a connection by its model of the path. Between hosts that are microseconds apart, that model is
    often wrong by a factor of four: measured, pulls run at 1 or at 4 GB/s, by chance. Connections that a
    listening socket accepts inherit its choice.
    """
    if not _default_algorithm().startswith("bbr"):
        yield
        return
    before = _descriptors()
    yield
    for descriptor in _descriptors() - before:
        with suppress(OSError):  # another thread has closed it meanwhile
            if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                continue
            with socket.socket(fileno=os.dup(descriptor)) as opened:
                if opened.family in (socket.AF_INET, socket.AF_INET6) and opened.type == socket.SOCK_STREAM:
                    _choose(opened)


def _default_algorithm() -> str:
    """Empty where /proc does not say."""
    try:
        return DEFAULT_ALGORITHM.read_text()
    except OSError:
        return ""


def _choose(opened: socket.socket) -> None:
    for algorithm in PREFERRED:
        try:
            opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, algorithm.encode())
        except OSError:  # the kernel lacks it, or it is not for everybody
            continue
        return


def _descriptors() -> set[int]:
    """Those that are open, less the one by which the list is read."""
    listed = os.listdir("/proc/self/fd")
    return {int(name) for name in listed if os.path.lexists(f"/proc/self/fd/{name}")}
