"""Handshakes of ZeroMQ sockets that fail: how many, why, and a line about them now and then."""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping
from typing import Literal, Protocol, get_args

import zmq
import zmq.asyncio
from zmq.utils.monitor import parse_monitor_message

logger = logging.getLogger(__name__)

REPORT_SECONDS = 5.0
REFUSED = "refused %d connections to the port for %s: no key that is admitted, or not ZeroMQ"
IN_VAIN = "%d attempts to connect to %s have failed: its keys and those here do not go together"

HandshakeFailure = Literal["not_admitted", "protocol", "ended"]
"""not_admitted: the peer has a key, and it is not admitted. protocol: it has no key or goes by another key of
the server, or does not speak ZeroMQ. ended: it closed the connection, for that reason or for none, or said
nothing for too long."""

FAILURES: dict[int, HandshakeFailure] = {
    zmq.EVENT_HANDSHAKE_FAILED_AUTH: "not_admitted",
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL: "protocol",
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL: "ended",
}
HANDSHAKE_FAILURES = sum(FAILURES)  # each is a bit of its own


class HandshakeFailures:
    """Counts the failed handshakes of a socket. by_reason: as of the last `count`.

    The queue between has no bound, since a full one would block libzmq's thread: a stranger could do that.
    """

    def __init__(self, watched: zmq.asyncio.Socket) -> None:
        self.by_reason: dict[HandshakeFailure, int] = dict.fromkeys(get_args(HandshakeFailure), 0)
        self._watched = watched
        address = f"inproc://monitor-{watched.FD}"
        watched.monitor(address, HANDSHAKE_FAILURES)
        self._events = watched.context.socket(zmq.PAIR, socket_class=zmq.Socket)
        self._events.setsockopt(zmq.RCVHWM, 0)
        self._events.connect(address)

    def count(self) -> int:
        """All that there were until now; of whatever reason."""
        with contextlib.suppress(zmq.Again):
            while True:
                event = parse_monitor_message(self._events.recv_multipart(zmq.NOBLOCK))["event"]
                if event in FAILURES:  # the last one says that the monitor has stopped
                    self.by_reason[FAILURES[event]] += 1
        return sum(self.by_reason.values())

    def close(self) -> None:
        self._watched.disable_monitor()
        self._events.close(linger=0)


class Watched(Protocol):
    """A socket whose handshakes are counted, from the first one on or from some moment on."""

    @property
    def num_failed_handshakes(self) -> int: ...


async def watch_handshakes(look: Callable[[], Mapping[str, Watched]], warning: str) -> None:
    """Log now and then how many handshakes of the sockets that are there, by name, have failed; until
    cancelled. warning: takes the number and the name."""
    told: dict[str, int] = {}
    while True:
        await asyncio.sleep(REPORT_SECONDS)
        numbers = {name: socket.num_failed_handshakes for name, socket in look().items()}
        for name, number in numbers.items():
            new = number - told.get(name, 0)
            if new > 0:  # less: another socket of this name, or a connection that came up
                logger.warning(warning, new, name)
        told = numbers
