"""ZeroMQ sockets that speak `messages`: a ROUTER that serves many peers and a DEALER that talks to one.

Both belong to one asyncio loop. Sending never waits: what cannot be handed to ZeroMQ at once raises, because
a ROUTER would otherwise drop it in silence. Frames that do not decode are counted, logged, dropped and
answered with `Malformed`; nothing is ever unpickled. With keys a socket speaks CURVE (docs/security.md) and
nothing else: a peer without a key, or with one that is not admitted, gets no further than the handshake, and
what comes over a connection whose key is not admitted any more is dropped.
"""

import asyncio
import contextlib
import logging
import re
import resource
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar, get_args

import msgspec
import zmq
import zmq.asyncio
from zmq.utils.monitor import parse_monitor_message

from pdengine.transport.addresses import AddressError, check_address, split_tcp_address
from pdengine.transport.bounded_log import BoundedLog
from pdengine.transport.handshakes import (
    HANDSHAKE_FAILURES,
    HandshakeFailure,
    HandshakeFailures,
)
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
MAX_IN_A_ROW = 256  # messages that are there already, before the loop's other tasks have a turn
LINGER_MS = 1_000  # last words get this long to leave when a socket is closed
HEARTBEAT_INTERVAL_MS = 5_000  # a host that vanished without closing is noticed after the timeout
HEARTBEAT_TIMEOUT_MS = 20_000

MAX_KNOWN_PEERS = 65_536  # whose keys are remembered, those of connections that are gone included
OTHER_TYPE = re.compile(r"Invalid value '(\w+)' - at `\$\.type`")  # as msgspec says it
KEY_REVOKED = "the key of this connection is not admitted any more"
OTHERS_IDENTITY = "the identity of this connection is that of another key"

Incoming = TypeVar("Incoming")

MessageRefusal = Literal["malformed", "disallowed", "revoked"]
"""malformed: it does not decode. disallowed: it is one that others may send, and not to this socket, or
comes under the name of somebody else.
revoked: the key of its sender was admitted when he connected and is not any more."""


class SendFailed(ConnectionError):
    """The peer is gone, not connected, or does not read what it is sent."""


@dataclass(frozen=True)
class ServerKeys:
    """domain: under which the keys of those who connect are looked up, the name of the port. admits: whether
    who has this public key may still say something there; asked for each message."""

    secret_key: str = field(repr=False)
    domain: str
    admits: Callable[[str], bool]


class MessageTooLong(ValueError):
    """More than the other side takes: it would close the connection on all that is in flight there."""


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
        self._admits = keys.admits if keys is not None else None
        self._keys_of: dict[bytes, str] = {}  # of the 65 536 who have spoken last
        self._waiting: zmq.Socket[bytes] = zmq.Socket.shadow(self._socket.underlying)
        self._failures = HandshakeFailures(self._socket)
        self._decoder: msgspec.msgpack.Decoder[Incoming] = msgspec.msgpack.Decoder(incoming)
        self._encoder = msgspec.msgpack.Encoder()
        self._log = BoundedLog(logger)
        self._num_in_a_row = 0
        self.refused_messages: dict[MessageRefusal, int] = dict.fromkeys(get_args(MessageRefusal), 0)

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
            try:
                identity, frames = self._receive_waiting()  # a tenth of the cost of a future
                self._num_in_a_row += 1
            except zmq.Again:
                self._num_in_a_row = 0
                first, *frames = await self._socket.recv_multipart(copy=False)
                identity = first.bytes
            if self._admits is not None:
                refusal = self._refusal_of_key(identity, frames[0])
                if refusal is not None:
                    self._refuse(identity, *refusal)
                    continue
            try:
                if len(frames) != 1:
                    raise msgspec.DecodeError(f"{len(frames)} frames instead of 1")
                return identity, self._decoder.decode(frames[0].bytes)
            except (msgspec.DecodeError, ValueError, RecursionError) as error:
                self._refuse(identity, _refusal(error), str(error))

    def _receive_waiting(self) -> tuple[bytes, list[zmq.Frame]]:
        """Raises zmq.Again if there is no message. Its frames come all at once or not at all."""
        identity = self._waiting.recv(zmq.NOBLOCK)
        frames = [self._waiting.recv(zmq.NOBLOCK, copy=False)]
        while frames[-1].more:
            frames.append(self._waiting.recv(zmq.NOBLOCK, copy=False))
        return identity, frames

    def _refusal_of_key(self, identity: bytes, frame: zmq.Frame) -> tuple[MessageRefusal, str] | None:
        """What is wrong with the key that the sender has proved at the handshake, if anything.

        Who connects may choose an identity that is free: not to be heard as its last owner.
        """
        assert self._admits is not None
        public_key = str(frame.get("User-Id"))  # the Doorkeeper's word; part of the message, hence exact
        if not self._admits(public_key):
            return "revoked", KEY_REVOKED
        owner = self._keys_of.pop(identity, public_key)
        self._keys_of[identity] = owner  # as the last one who has spoken
        if len(self._keys_of) > MAX_KNOWN_PEERS:
            del self._keys_of[next(iter(self._keys_of))]
        return None if owner == public_key else ("disallowed", OTHERS_IDENTITY)

    def forget_revoked(self) -> list[bytes]:
        """Those who have said something and whose keys are not admitted any more, each once."""
        if self._admits is None:
            return []
        revoked = [identity for identity, key in self._keys_of.items() if not self._admits(key)]
        for identity in revoked:
            del self._keys_of[identity]
        return revoked

    def _refuse(self, identity: bytes, kind: MessageRefusal, reason: str) -> None:
        self.refused_messages[kind] += 1
        self._log.warning("dropped a %s message from %s: %s", kind, identity.hex(), reason)
        try:
            self.send(identity, Malformed(reason))
        except SendFailed as error:
            logger.debug("no answer to a message that was dropped: %s", error)

    def send(self, identity: bytes, message: Message) -> None:
        """Hand `message` to ZeroMQ. Raises SendFailed if the peer is gone or its queue is full."""
        _send_now(self._socket, [identity, self._encoder.encode(message)])

    @property
    def num_failed_handshakes(self) -> int:
        """Connections that were refused: without a key, with one that is not admitted, or not ZeroMQ's.

        Look now and then: they are queued until then.
        """
        return self._failures.count()

    @property
    def failed_handshakes(self) -> dict[HandshakeFailure, int]:
        """By reason, as of the last look at `num_failed_handshakes`. May be read on any thread."""
        return self._failures.by_reason

    def close(self) -> None:
        self._failures.close()
        self._socket.close(linger=LINGER_MS)


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
        self._failures: HandshakeFailures | None = None
        self._monitor: zmq.asyncio.Socket | None = None
        if watched:
            events = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED | HANDSHAKE_FAILURES
            self._monitor = self._socket.get_monitor_socket(events)
        else:
            self._failures = HandshakeFailures(self._socket)
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


def _refusal(error: Exception) -> MessageRefusal:
    """Why a message does not decode: its type is known, but not here; or else it is broken."""
    other = OTHER_TYPE.match(str(error))
    known = {message.__name__ for message in Message.__subclasses__()}
    return "disallowed" if other is not None and other[1] in known else "malformed"


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
