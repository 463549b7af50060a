"""ZeroMQ sockets that speak `messages`: a ROUTER that serves many peers and a DEALER that talks to one.

Both belong to one asyncio loop. Sending never waits: what cannot be handed to ZeroMQ at once raises, because
a ROUTER would otherwise drop it in silence. Frames that do not decode are counted, logged, dropped and
answered with `Malformed`; nothing is ever unpickled.
"""

import asyncio
import logging
from typing import Any, Generic, TypeVar

import msgspec
import zmq
import zmq.asyncio
from zmq.utils.monitor import parse_monitor_message

from pdengine.transport.messages import Malformed, Message

logger = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 64 * 2**20
HIGH_WATER_MARK = 10_000  # messages queued for one peer before sending to it raises
MAX_IN_A_ROW = 256  # messages that are there already, before the loop's other tasks have a turn
LINGER_MS = 1_000  # last words get this long to leave when a socket is closed
HEARTBEAT_INTERVAL_MS = 5_000  # a host that vanished without closing is noticed after the timeout
HEARTBEAT_TIMEOUT_MS = 20_000

Incoming = TypeVar("Incoming")


class AddressError(ValueError):
    """An address that cannot be used; the message says which and why."""


class SendFailed(ConnectionError):
    """The peer is gone, not connected, or does not read what it is sent."""


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


class ServerSocket(Generic[Incoming]):
    """A bound ROUTER socket. `incoming` is the union of messages that it accepts."""

    def __init__(self, context: zmq.asyncio.Context, incoming: Any) -> None:
        self._socket = _configure(context.socket(zmq.ROUTER))
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._decoder: msgspec.msgpack.Decoder[Incoming] = msgspec.msgpack.Decoder(incoming)
        self._encoder = msgspec.msgpack.Encoder()
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
            frames = await self._socket.recv_multipart()
            identity = frames[0]
            try:
                if len(frames) != 2:
                    raise msgspec.DecodeError(f"{len(frames) - 1} frames instead of 1")
                return identity, self._decoder.decode(frames[1])
            except (msgspec.DecodeError, ValueError, RecursionError) as error:
                self.num_malformed += 1
                logger.warning("dropped a malformed message from %s: %s", identity.hex(), error)
                self._answer_malformed(identity, str(error))

    def send(self, identity: bytes, message: Message) -> None:
        """Hand `message` to ZeroMQ. Raises SendFailed if the peer is gone or its queue is full."""
        _send_now(self._socket, [identity, self._encoder.encode(message)])

    def close(self) -> None:
        self._socket.close(linger=LINGER_MS)

    def _answer_malformed(self, identity: bytes, reason: str) -> None:
        try:
            self.send(identity, Malformed(reason))
        except SendFailed as error:
            logger.debug("no answer to a malformed message: %s", error)


class PeerSocket(Generic[Incoming]):
    """A DEALER socket connected to one server.

    only_when_connected: refuse to send while there is no connection, instead of queueing.
    watched: somebody awaits `connection_change`; events that nobody reads would block ZeroMQ in the end.
    """

    def __init__(
        self,
        context: zmq.asyncio.Context,
        address: str,
        incoming: Any,
        *,
        only_when_connected: bool = False,
        watched: bool = False,
    ) -> None:
        check_address(address)
        self._socket = _configure(context.socket(zmq.DEALER))
        self._socket.setsockopt(zmq.IMMEDIATE, int(only_when_connected))
        self._waiting: zmq.Socket[bytes] = zmq.Socket.shadow(self._socket.underlying)
        self._num_in_a_row = 0
        self._monitor: zmq.asyncio.Socket | None = None
        if watched:
            events = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED
            self._monitor = self._socket.get_monitor_socket(events)
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
            try:
                return self._decoder.decode(b"".join(frames))
            except (msgspec.DecodeError, ValueError, RecursionError) as error:
                logger.warning("dropped a malformed message: %s", error)

    def send(self, message: Message) -> None:
        """Hand `message` to ZeroMQ. Raises SendFailed if the queue is full (or there is no connection)."""
        _send_now(self._socket, [self._encoder.encode(message)])

    async def connection_change(self) -> bool:
        """Wait until the connection comes up (True) or goes down (False)."""
        assert self._monitor is not None, "the socket is not watched"
        event = parse_monitor_message(await self._monitor.recv_multipart())
        return bool(event["event"] == zmq.EVENT_HANDSHAKE_SUCCEEDED)

    def close(self) -> None:
        if self._monitor is not None:
            self._socket.disable_monitor()
            self._monitor.close(linger=0)
        self._socket.close(linger=LINGER_MS)


def _configure(socket: zmq.asyncio.Socket) -> zmq.asyncio.Socket:
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
    socket.setsockopt(zmq.SNDHWM, HIGH_WATER_MARK)
    socket.setsockopt(zmq.RCVHWM, HIGH_WATER_MARK)
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
