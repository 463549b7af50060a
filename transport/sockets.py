"""ZeroMQ sockets that speak `messages`: a ROUTER that serves many peers and a DEALER that talks to one.

Both belong to one asyncio loop. Sending never waits: what cannot be handed to ZeroMQ at once raises, because
a ROUTER would otherwise drop it in silence. Frames that do not decode are counted, logged, dropped and
answered with `Malformed`; nothing is ever unpickled. With keys a socket speaks CURVE (docs/security.md) and
nothing else: a peer without a key, or with one that is not admitted, gets no further than the handshake.
"""

import asyncio
import contextlib
import ipaddress
import logging
import resource
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import msgspec
import zmq
import zmq.asyncio
from zmq.utils.monitor import parse_monitor_message

from pdengine.transport.bounded_log import BoundedLog
from pdengine.transport.keys import PeerKeys
from pdengine.transport.messages import Malformed, Message

logger = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 64 * 2**20
MAX_REQUEST_BYTES = 17 * 2**20  # what a client sends at once: a prompt of MAX_TEXT_CHARACTERS fits
CURVE_BYTES = 64  # at most, that are added to a message on its way
HIGH_WATER_MARK = 10_000  # messages queued for one peer before sending to it raises
HANDSHAKE_MS = 5_000  # a connection without a handshake is closed, and one that was denied tries again
BACKLOG = (
    2048  # connections that wait to be accepted; libzmq's 100 would hold up others when many come at once
)
HANDSHAKE_FAILURES = (
    zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)
MAX_IN_A_ROW = 256  # messages that are there already, before the loop's other tasks have a turn
REPORT_SECONDS = 5.0
LINGER_MS = 1_000  # last words get this long to leave when a socket is closed
HEARTBEAT_INTERVAL_MS = 5_000  # a host that vanished without closing is noticed after the timeout
HEARTBEAT_TIMEOUT_MS = 20_000

Incoming = TypeVar("Incoming")


class AddressError(ValueError):
    """An address that cannot be used; the message says which and why."""


class InsecureAddress(AddressError):
    """Other hosts could connect, and no key is asked for."""


class SendFailed(ConnectionError):
    """The peer is gone, not connected, or does not read what it is sent."""


@dataclass(frozen=True)
class ServerKeys:
    """domain: under which the keys of those who connect are looked up, the name of the port."""

    secret_key: str = field(repr=False)
    domain: str


class MessageTooLong(ValueError):
    """More than the other side takes: it would close the connection on all that is in flight there."""


def split_tcp_address(address: str) -> tuple[str, int]:
    """`tcp://HOST:PORT` -> (HOST, PORT). Port 0 stands for any free one. Raises AddressError."""
    host, separator, port = address.removeprefix("tcp://").rpartition(":")
    if not address.startswith("tcp://") or not separator or not host:
        raise AddressError(f"address {address!r} must be tcp://HOST:PORT")
    if not (port.isascii() and port.isdecimal()) or int(port) > 65535:
        raise AddressError(f"address {address!r}: port {port!r} must be a number from 0 to 65535")
    return host, int(port)


def check_address(address: str) -> None:
    """Raise AddressError unless `address` is one that can be connected to."""
    _, port = split_tcp_address(address)
    if port == 0:
        raise AddressError(f"address {address!r} needs a port to connect to")


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect to `host`; a name that is not known to be such is not."""
    try:
        return ipaddress.ip_address(host.removeprefix("[").removesuffix("]")).is_loopback
    except ValueError:
        return host == "localhost"


def check_exposure(option: str, address: str, *, has_keys: bool, insecure: bool) -> None:
    """Raise InsecureAddress if other hosts could connect to `address` and no key is asked for.

    option: the one that `address` was given by, for the message.
    """
    host, _ = split_tcp_address(address)
    if has_keys or insecure or is_loopback(host):
        return
    raise InsecureAddress(
        f"{option} {address} can be reached from other hosts, and no key is asked for: give --keys (pdengine "
        f"keygen makes them), or --insecure (PDENGINE_INSECURE=1) if everyone on the network is trusted"
    )


def raise_file_limit() -> None:
    """Every connection is a file; the usual soft limit of 1024 is there for select(), which is not used."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class ServerSocket(Generic[Incoming]):
    """A bound ROUTER socket. `incoming` is the union of messages that it accepts.

    keys: who connects must have one that a Doorkeeper of this context admits; without one running, nobody
    gets in. None: whoever can reach the address. max_message_bytes: a connection that sends a larger message
    is closed. receive_queue: messages of one peer that are held here until they are received; TCP holds up
    the rest.
    """

    def __init__(
        self,
        context: zmq.asyncio.Context,
        incoming: Any,
        *,
        keys: ServerKeys | None = None,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        receive_queue: int = HIGH_WATER_MARK,
        send_queue: int = HIGH_WATER_MARK,
    ) -> None:
        self._socket = _configure(context.socket(zmq.ROUTER))
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(zmq.MAXMSGSIZE, max_message_bytes + CURVE_BYTES)
        self._socket.setsockopt(zmq.RCVHWM, receive_queue)
        self._socket.setsockopt(zmq.SNDHWM, send_queue)
        self._socket.setsockopt(zmq.BACKLOG, BACKLOG)
        if keys is not None:
            self._socket.setsockopt(zmq.CURVE_SERVER, 1)
            self._socket.setsockopt(zmq.CURVE_SECRETKEY, keys.secret_key.encode())
            self._socket.setsockopt_string(zmq.ZAP_DOMAIN, keys.domain)
            self._socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)  # else all are let in while nobody answers
        self._failures = _HandshakeFailures(self._socket)
        self._decoder: msgspec.msgpack.Decoder[Incoming] = msgspec.msgpack.Decoder(incoming)
        self._encoder = msgspec.msgpack.Encoder()
        self._log = BoundedLog(logger)
        self._num_in_a_row = 0
        self.num_malformed = 0

    def bind(self, address: str) -> str:
        """Bind `tcp://HOST:PORT` and return the address with the port that was taken. Raises AddressError."""
        host, port = split_tcp_address(address)
        try:
            self._socket.bind(f"tcp://{host}:{port or '*'}")
        except zmq.ZMQError as error:
            raise AddressError(f"cannot listen on {address}: {error.strerror or error}") from error
        return self._socket.getsockopt_string(zmq.LAST_ENDPOINT)

    async def receive(self) -> tuple[bytes, Incoming]:
        """The next message that decodes, and the identity of its sender."""
        while True:
            if self._num_in_a_row >= MAX_IN_A_ROW:
                self._num_in_a_row = 0
                await asyncio.sleep(0)  # before a message is taken: cancelled here, none is lost
            received = asyncio.ensure_future(self._socket.recv_multipart())  # a future already: no task
            self._num_in_a_row = self._num_in_a_row + 1 if received.done() else 0
            frames = await received
            identity = frames[0]
            try:
                if len(frames) != 2:
                    raise msgspec.DecodeError(f"{len(frames) - 1} frames instead of 1")
                return identity, self._decoder.decode(frames[1])
            except (msgspec.DecodeError, ValueError, RecursionError) as error:
                self.num_malformed += 1
                self._log.warning("dropped a malformed message from %s: %s", identity.hex(), error)
                self._answer_malformed(identity, str(error))

    def send(self, identity: bytes, message: Message) -> None:
        """Hand `message` to ZeroMQ. Raises SendFailed if the peer is gone or its queue is full."""
        _send_now(self._socket, [identity, self._encoder.encode(message)])

    @property
    def num_failed_handshakes(self) -> int:
        """Connections that were refused: without a key, with one that is not admitted, or not ZeroMQ's.

        Look now and then: they are queued until then.
        """
        return self._failures.count()

    def close(self) -> None:
        self._failures.close()
        self._socket.close(linger=LINGER_MS)

    def _answer_malformed(self, identity: bytes, reason: str) -> None:
        try:
            self.send(identity, Malformed(reason))
        except SendFailed as error:
            logger.debug("no answer to a malformed message: %s", error)


class PeerSocket(Generic[Incoming]):
    """A DEALER socket connected to one server.

    keys: this side's, and the public key that the server must prove to be its own; None for a server without
    keys. only_when_connected: refuse to send while there is no connection, instead of queueing. watched:
    somebody awaits `connection_change`. max_message_bytes: that the server takes.
    """

    def __init__(
        self,
        context: zmq.asyncio.Context,
        address: str,
        incoming: Any,
        *,
        keys: PeerKeys | None = None,
        only_when_connected: bool = False,
        watched: bool = False,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
    ) -> None:
        check_address(address)
        self._max_message_bytes = max_message_bytes
        self._socket = _configure(context.socket(zmq.DEALER))
        self._socket.setsockopt(zmq.IMMEDIATE, int(only_when_connected))
        if keys is not None:
            self._socket.setsockopt(zmq.CURVE_SERVERKEY, keys.server_key.encode())
            self._socket.setsockopt(zmq.CURVE_PUBLICKEY, keys.public_key.encode())
            self._socket.setsockopt(zmq.CURVE_SECRETKEY, keys.secret_key.encode())
        self._waiting: zmq.Socket[bytes] = zmq.Socket.shadow(self._socket.underlying)
        self._num_in_a_row = 0
        self._log = BoundedLog(logger)
        self._num_failed_handshakes = 0
        self._failures: _HandshakeFailures | None = None
        self._monitor: zmq.asyncio.Socket | None = None
        if watched:
            events = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED | HANDSHAKE_FAILURES
            self._monitor = self._socket.get_monitor_socket(events)
        else:
            self._failures = _HandshakeFailures(self._socket)
        self._decoder: msgspec.msgpack.Decoder[Incoming] = msgspec.msgpack.Decoder(incoming)
        self._encoder = msgspec.msgpack.Encoder()
        try:
            self._socket.connect(address)
        except zmq.ZMQError as error:
            self.close()
            raise AddressError(f"cannot connect to {address}: {error.strerror or error}") from error

    async def receive(self) -> Incoming:
        """The next message that decodes."""
        while True:
            if self._num_in_a_row >= MAX_IN_A_ROW:
                self._num_in_a_row = 0
                await asyncio.sleep(0)  # before a message is taken: cancelled here, none is lost
            try:
                frames = self._waiting.recv_multipart(zmq.NOBLOCK)  # a tenth of the cost of a future
                self._num_in_a_row += 1
            except zmq.Again:
                self._num_in_a_row = 0
                frames = await self._socket.recv_multipart()
            if (message := self._decode(frames)) is not None:
                return message

    def receive_waiting(self) -> list[Incoming]:
        """All that is here already; after a connection went down, all that it brought."""
        messages = []
        with contextlib.suppress(zmq.Again):
            while True:
                message = self._decode(self._waiting.recv_multipart(zmq.NOBLOCK))
                if message is not None:
                    messages.append(message)
        return messages

    def _decode(self, frames: list[bytes]) -> Incoming | None:
        try:
            return self._decoder.decode(b"".join(frames))
        except (msgspec.DecodeError, ValueError, RecursionError) as error:
            self._log.warning("dropped a malformed message: %s", error)
            return None

    def send(self, message: Message) -> None:
        """Hand `message` to ZeroMQ. Raises SendFailed if the queue is full (or there is no connection), or
        MessageTooLong."""
        data = self._encoder.encode(message)
        if len(data) > self._max_message_bytes:
            raise MessageTooLong(
                f"a message of {len(data)} bytes is too long: the limit is {self._max_message_bytes}"
            )
        _send_now(self._socket, [data])

    async def connection_change(self) -> bool:
        """Wait until the connection comes up (True) or goes down (False)."""
        assert self._monitor is not None, "the socket is not watched"
        while True:
            event = parse_monitor_message(await self._monitor.recv_multipart())["event"]
            if event & HANDSHAKE_FAILURES:
                self._num_failed_handshakes += 1
                continue
            is_up = bool(event == zmq.EVENT_HANDSHAKE_SUCCEEDED)
            if is_up:
                self._num_failed_handshakes = 0  # the keys do go together: what comes later is an outage
            return is_up

    @property
    def num_failed_handshakes(self) -> int:
        """Attempts to connect that ended in the handshake, most likely because the keys do not go together.

        Look now and then: they are queued until then, or until somebody awaits `connection_change`; then
        those before the last connection that came up do not count.
        """
        if self._failures is not None:
            return self._failures.count()
        return self._num_failed_handshakes

    def close(self, linger_ms: int = LINGER_MS) -> None:
        if self._failures is not None:
            self._failures.close()
        if self._monitor is not None:
            self._socket.disable_monitor()
            self._monitor.close(linger=0)
        self._socket.close(linger=linger_ms)


REFUSED = "refused %d connections to the port for %s: no key that is admitted, or not ZeroMQ"
IN_VAIN = "%d attempts to connect to %s have failed: its keys and those here do not go together"


async def watch_handshakes(
    look: Callable[[], Mapping[str, ServerSocket[Any] | PeerSocket[Any]]], warning: str
) -> None:
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


class _HandshakeFailures:
    """Counts the failed handshakes of a socket.

    The queue between has no bound, since a full one would block libzmq's thread: a stranger could do that.
    """

    def __init__(self, watched: zmq.asyncio.Socket) -> None:
        self._watched = watched
        self._num_failures = 0
        address = f"inproc://monitor-{watched.FD}"
        watched.monitor(address, HANDSHAKE_FAILURES)
        self._events = watched.context.socket(zmq.PAIR, socket_class=zmq.Socket)
        self._events.setsockopt(zmq.RCVHWM, 0)
        self._events.connect(address)

    def count(self) -> int:
        with contextlib.suppress(zmq.Again):
            while True:
                self._events.recv_multipart(zmq.NOBLOCK)
                self._num_failures += 1
        return self._num_failures

    def close(self) -> None:
        self._watched.disable_monitor()
        self._events.close(linger=0)


def _configure(socket: zmq.asyncio.Socket) -> zmq.asyncio.Socket:
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES + CURVE_BYTES)
    socket.setsockopt(zmq.SNDHWM, HIGH_WATER_MARK)
    socket.setsockopt(zmq.RCVHWM, HIGH_WATER_MARK)
    socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
    socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_INTERVAL_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
    socket.setsockopt(zmq.RECONNECT_IVL, 100)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, 2_000)
    return socket


def _send_now(socket: zmq.asyncio.Socket, frames: list[bytes]) -> None:
    # With NOBLOCK the future of zmq.asyncio is done when it is returned: result() raises or returns at once.
    try:
        asyncio.ensure_future(socket.send_multipart(frames, flags=zmq.NOBLOCK)).result()
    except zmq.Again as error:
        raise SendFailed("the peer does not read its messages or is not connected") from error
    except zmq.ZMQError as error:
        raise SendFailed(f"the peer is gone: {error.strerror or error}") from error
