"""What a process tells the service manager that started it: sd_notify(3), by hand.

It is one datagram of NAME=VALUE lines to the Unix socket that NOTIFY_SOCKET names.
"""

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Callable, MutableMapping
from contextlib import asynccontextmanager
from time import monotonic

POLL_SECONDS = 0.25


class ServiceManager:
    """Where nobody listens, every call does nothing. May be used from any thread; never blocks, never raises.

    address: a path, or "@" and a name in the abstract namespace; None if there is no service manager.
    watchdog_seconds: how long it waits for `feed` before it kills this process; None if it does not.
    """

    def __init__(self, address: str | None = None, watchdog_seconds: float | None = None) -> None:
        self.watchdog_seconds = watchdog_seconds if address else None
        self._address = address
        self._status: str | None = None
        self._socket: socket.socket | None = None
        if address:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
            self._socket.setblocking(False)

    @property
    def listens(self) -> bool:
        """Whether there is one."""
        return self._socket is not None

    @classmethod
    def from_environment(cls, environ: MutableMapping[str, str]) -> "ServiceManager":
        """The one that `environ` names. Its variables are taken out: they are not meant for our children."""
        address = environ.pop("NOTIFY_SOCKET", "")
        watchdog, process_id = environ.pop("WATCHDOG_USEC", ""), environ.pop("WATCHDOG_PID", "")
        is_mine = process_id in ("", str(os.getpid()))
        seconds = int(watchdog) / 1e6 if watchdog.isdecimal() and is_mine else 0.0
        return cls(address if address[:1] in ("/", "@") else None, seconds or None)

    def ready(self, status: str) -> None:
        """This process serves. status: one line for people."""
        self._status = status
        self._notify(f"READY=1\nSTATUS={_one_line(status)}")

    def status(self, status: str) -> None:
        """What this process does now, in one line for people; sent if it has changed."""
        if status != self._status:
            self._status = status
            self._notify(f"STATUS={_one_line(status)}")

    def stopping(self) -> None:
        """This process is about to end: the watchdog does not hold from now on."""
        self._notify("STOPPING=1")

    def feed(self) -> None:
        """This process is alive: do not kill it for another `watchdog_seconds`."""
        self._notify("WATCHDOG=1")

    def _notify(self, message: str) -> None:
        if self._socket is None or self._address is None:
            return
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        # A manager that is gone, or has a full queue, is no reason to stop serving.
        with contextlib.suppress(OSError):
            self._socket.sendto(message.encode(), address)


class Watchdog:
    """Decides when to feed: twice in the time that is allowed, and only after progress.

    A loop that sleeps for want of work makes progress. One that does not turn is not fed for, however often
    it is asked, so the process is killed once that has lasted for `watchdog_seconds`.
    """

    def __init__(self, service: ServiceManager, clock: Callable[[], float] = monotonic) -> None:
        self._service = service
        self._clock = clock
        self._fed_at = clock()

    def look(self, loop_age: float) -> None:
        """Call this several times a second. loop_age: seconds since the loop last turned, 0 if it sleeps."""
        allowed, waited = self._service.watchdog_seconds, self._clock() - self._fed_at
        if allowed is not None and waited >= allowed / 2 and loop_age < waited:
            self._service.feed()
            self._fed_at += waited


@asynccontextmanager
async def serving(
    service: ServiceManager, *, status: Callable[[], str], loop_age: Callable[[], float] = lambda: 0.0
) -> AsyncIterator[None]:
    """This process serves while the block runs: the service manager is told, and its watchdog fed.

    It is fed from this event loop: if that hangs nothing is fed either. loop_age: of another loop that must
    turn; see `Watchdog.look`.
    """
    service.ready(status())
    alive = asyncio.create_task(_stay_alive(service, status, loop_age))
    try:
        yield
    finally:
        alive.cancel()


async def _stay_alive(
    service: ServiceManager, status: Callable[[], str], loop_age: Callable[[], float]
) -> None:
    watchdog = Watchdog(service)
    while service.listens:
        service.status(status())
        watchdog.look(loop_age())
        await asyncio.sleep(POLL_SECONDS)


def _one_line(text: str) -> str:
    return " ".join(text.split())
