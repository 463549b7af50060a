"""Which public keys may connect to the server sockets of a process (ZAP, https://rfc.zeromq.org/spec/27).

libzmq asks at each handshake, after the peer has proved that it holds the secret key. The file of keys is
looked at each time, and once a second besides, and read again when it has changed: who is added or removed
needs no restart. Messages carry the key of their sender, so that one who is removed is not heard any more on
the connections that he has.
"""

import asyncio
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import zmq
import zmq.asyncio
from zmq.utils import z85

from pdengine.transport.bounded_log import BoundedLog
from pdengine.transport.keys import KeyFile, KeyRole, KeysError, read_key_file
from pdengine.transport.sockets import ServerKeys

logger = logging.getLogger(__name__)

ZAP_ENDPOINT = "inproc://zeromq.zap.01"
ZAP_VERSION = b"1.0"
LOOK_SECONDS = 1.0
NUM_ZAP_FIELDS = 6  # before the credentials
ADMITTED = (b"200", b"OK")
# A temporary refusal: after a final one, 400, libzmq's client never tries again, even once it is admitted.
DENIED = (b"300", b"this key is not admitted here")


class Doorkeeper:
    """Answers for all server sockets of one context; `run` must be running for anybody to get in.

    path: of `keys`. ports: the roles that each port admits, by the name of the port; a key that none of them
    has is denied. A process's own key is admitted nowhere, but by the router on the port for clients, where
    its own HTTP server connects.
    """

    def __init__(
        self,
        context: zmq.asyncio.Context,
        path: Path,
        keys: KeyFile,
        ports: Mapping[str, tuple[KeyRole, ...]],
    ) -> None:
        self.num_denied = 0
        self._path = path
        self._keys = keys
        self._ports = ports
        self._admitted = self._by_port()
        self._version = self._look()
        self._log = BoundedLog(logger)
        self._socket = context.socket(zmq.REP)
        self._socket.bind(ZAP_ENDPOINT)

    def server_keys(self, port: str) -> ServerKeys:
        """What a server socket needs to ask here, as `port`."""
        assert port in self._ports
        return ServerKeys(self._keys.secret_key, port, lambda key: key in self._admitted[port])

    def admits(self, port: str, public_key: str) -> bool:
        """Whether `public_key` may connect to `port`, by the file as it is now."""
        self._read_again()
        return public_key in self._admitted.get(port, ())

    async def run(self, on_change: Callable[[], None]) -> None:
        """Answer until cancelled. on_change: called soon after other keys are admitted than before."""
        told = self._admitted
        while True:
            if await self._socket.poll(int(1000 * LOOK_SECONDS)):
                frames = await self._socket.recv_multipart()
                await self._socket.send_multipart(self._answer(frames))
            self._read_again()
            if told is not self._admitted:
                told = self._admitted
                on_change()
            await asyncio.sleep(0)  # many handshakes at once leave turns to other tasks

    def close(self) -> None:
        self._socket.close(linger=0)

    def _answer(self, frames: list[bytes]) -> list[bytes]:
        request_id, domain, address = (frames[1:4] + 3 * [b""])[:3]
        mechanism, credentials = frames[NUM_ZAP_FIELDS - 1 : NUM_ZAP_FIELDS], frames[NUM_ZAP_FIELDS:]
        port = domain.decode(errors="replace")
        public_key = ""
        if mechanism == [b"CURVE"] and len(credentials) == 1 and len(credentials[0]) == 32:
            public_key = z85.encode(credentials[0]).decode()
        admitted = bool(public_key) and self.admits(port, public_key)
        if not admitted:
            self.num_denied += 1
            self._log.warning(
                "denied a connection from %s to the port for %s: its key %s is not admitted",
                address.decode(errors="replace"),
                port,
                self._name_of(public_key),
            )
        code, text = ADMITTED if admitted else DENIED
        return [ZAP_VERSION, request_id, code, text, public_key.encode() if admitted else b"", b""]

    def _by_port(self) -> dict[str, frozenset[str]]:
        admitted = {}
        for port, roles in self._ports.items():
            own = {self._keys.public_key} if self._keys.role == "router" and "client" in roles else set()
            admitted[port] = frozenset(own.union(*(self._keys.admitted.get(r, {}).values() for r in roles)))
        return admitted

    def _name_of(self, public_key: str) -> str:
        for role, names in self._keys.admitted.items():
            for name, key in names.items():
                if key == public_key:
                    return f"{public_key} ({role} {name})"
        return public_key

    def _read_again(self) -> None:
        """After a change. A file that cannot be used leaves the keys as they were."""
        version = self._look()
        if version == self._version:
            return
        self._version = version
        try:
            keys = read_key_file(self._path, [self._keys.role])
        except KeysError as error:
            logger.error("the keys stay as they were: %s", error)
            return
        if keys.secret_key != self._keys.secret_key:
            logger.error("%s: the process keeps its own key until it is started again", self._path)
        self._keys = KeyFile(
            self._keys.role,
            self._keys.public_key,
            self._keys.secret_key,
            self._keys.router_key,
            keys.admitted,
        )
        self._admitted = self._by_port()
        logger.info("read %s again: %s", self._path, self._describe())

    def _describe(self) -> str:
        counts = [f"{len(names)} {role}" for role, names in self._keys.admitted.items()]
        return f"admits {', '.join(counts) or 'nobody'}"

    def _look(self) -> tuple[int, ...]:
        try:
            status = os.stat(self._path)
        except OSError:
            return ()
        return status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_size
