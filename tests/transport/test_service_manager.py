"""What a service manager is told, and when its watchdog is fed."""

import asyncio
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdengine.transport.service_manager import ServiceManager, Watchdog, serving

DEADLINE_SECONDS = 30.0


@contextmanager
def manager(address: str) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.settimeout(DEADLINE_SECONDS)
        receiver.bind("\0" + address[1:] if address.startswith("@") else address)
        yield receiver


def next_message(receiver: socket.socket) -> str:
    return receiver.recv(4096).decode()


@pytest.fixture(params=["path", "abstract"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "notify") if request.param == "path" else f"@pdengine-{uuid4().hex}"


def test_what_is_said_arrives(address: str) -> None:
    with manager(address) as receiver:
        service = ServiceManager(address)
        service.ready("serving")
        service.status("serving")  # has not changed
        service.status("no router\nREADY=1")  # is one line, whatever it holds
        service.feed()
        service.stopping()
        messages = [next_message(receiver) for _ in range(4)]
    assert messages == ["READY=1\nSTATUS=serving", "STATUS=no router READY=1", "WATCHDOG=1", "STOPPING=1"]


@pytest.mark.parametrize(
    ("watchdog", "seconds"),
    [
        ({"WATCHDOG_USEC": "3000000"}, 3.0),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": str(os.getpid())}, 3.0),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": str(os.getppid())}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({}, None),
    ],
)
def test_the_environment_says_who_listens_and_children_do_not_hear_of_it(
    watchdog: dict[str, str], seconds: float | None
) -> None:
    environ = {"NOTIFY_SOCKET": "/run/notify", **watchdog, "PATH": "/bin"}
    service = ServiceManager.from_environment(environ)
    assert service.listens
    assert service.watchdog_seconds == seconds
    assert environ == {"PATH": "/bin"}


@pytest.mark.parametrize("environ", [{}, {"NOTIFY_SOCKET": ""}, {"NOTIFY_SOCKET": "vsock:2:1234"}])
def test_where_nobody_listens_nothing_happens(environ: dict[str, str]) -> None:
    service = ServiceManager.from_environment({**environ, "WATCHDOG_USEC": "1"})
    assert not service.listens
    assert service.watchdog_seconds is None
    service.ready("serving")
    service.feed()


def test_a_manager_that_does_not_read_or_is_gone_holds_nobody_up(tmp_path: Path) -> None:
    address = str(tmp_path / "notify")
    with manager(address):
        service = ServiceManager(address)
        for _ in range(10_000):  # more than any queue of datagrams
            service.feed()
    service.feed()
    Path(address).unlink()
    service.feed()


class Fed(ServiceManager):
    def __init__(self, watchdog_seconds: float) -> None:
        super().__init__("/nowhere", watchdog_seconds)
        self.count = 0

    def feed(self) -> None:
        self.count += 1


WATCHDOG_SECONDS = 8.0
POLLS = st.sampled_from([0.1, 0.25, 0.5])


@given(st.lists(st.tuples(POLLS, st.booleans()), min_size=60, max_size=60))
def test_a_loop_that_turns_or_sleeps_is_fed_for_in_time(polls: list[tuple[float, bool]]) -> None:
    now = turned_at = fed_at = 0.0
    service = Fed(WATCHDOG_SECONDS)
    watchdog = Watchdog(service, lambda: now)
    for wait, turned in polls:
        now += wait
        if turned or now - turned_at > WATCHDOG_SECONDS / 2 - 0.5:  # its longest step
            turned_at = now
        count = service.count
        watchdog.look(0.0 if turned else now - turned_at)
        if service.count > count:
            fed_at = now
        assert now - fed_at < WATCHDOG_SECONDS


@given(st.lists(POLLS, min_size=40, max_size=40))
def test_a_loop_that_hangs_is_fed_for_once_more_at_most(polls: list[float]) -> None:
    now = 0.0
    service = Fed(WATCHDOG_SECONDS)
    watchdog = Watchdog(service, lambda: now)
    for wait in polls:
        now += wait
        watchdog.look(now - 0.1)  # it turned last at 0.1
    assert service.count <= 1


def test_no_watchdog_is_never_fed() -> None:
    service = Fed(0.001)
    service.watchdog_seconds = None
    watchdog = Watchdog(service, iter(range(1000)).__next__)
    for _ in range(100):
        watchdog.look(0.0)
    assert service.count == 0


def test_what_serves_is_ready_says_what_it_does_and_feeds(address: str) -> None:
    """From its event loop; a change of what it does is told, too."""

    async def serve(service: ServiceManager) -> None:
        async with serving(service, status=lambda: status[0]):
            await asyncio.to_thread(done.wait)

    status, done = ["waiting"], threading.Event()
    with manager(address) as receiver:
        environ = {"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "1000"}
        thread = threading.Thread(target=lambda: asyncio.run(serve(ServiceManager.from_environment(environ))))
        thread.start()
        try:
            assert next_message(receiver) == "READY=1\nSTATUS=waiting"
            assert next_message(receiver) == "WATCHDOG=1"
            status[0] = "serving"
            while next_message(receiver) != "STATUS=serving":
                pass
            assert next_message(receiver) == "WATCHDOG=1"
        finally:
            done.set()
            thread.join()
