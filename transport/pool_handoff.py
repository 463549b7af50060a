"""Handing the file of a KV pool to other processes of this host, over an abstract Unix socket.

One packet each way (unix(7), SOCK_SEQPACKET): the reader shows the nonce that the owner published, the owner
answers with the file as SCM_RIGHTS, or without one and with the reason. Abstract names belong to a network
namespace, so who cannot reach the owner finds out by trying. Both sides check that the other belongs to the
same user.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import os
import secrets
import socket
import struct
import threading
from collections.abc import Callable
from typing import TypeAlias
from uuid import uuid4

import msgspec

from pdengine.transport.shared_memory import MappedMemory, SharedMemory
from pdengine.transport.transfer import TransferError

HANDOFF_SECONDS = 2.0  # for one exchange; an owner that is stopped is not waited for longer
RETRY_SECONDS = 0.05  # while the owner's backlog is full, or files have run out
MAX_CLIENTS = 64  # at once; more are refused
MAX_PACKET = 256
BACKLOG = 128
CLOSE_SECONDS = 5.0
GRANTED = b"granted"
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid

logger = logging.getLogger(__name__)


class HandoffAddress(msgspec.Struct, frozen=True, array_like=True):
    """Where a pool is handed over. name: of the abstract socket. nonce: known to whom it was published."""

    name: str
    nonce: bytes


Outcome: TypeAlias = MappedMemory | TransferError


class PoolHandoff:
    """Offers our pool and fetches those of peers, on the thread "handoff", which sleeps in between.

    `on_fatal` is called if that thread dies. Raises TransferError if there can be no socket.
    """

    def __init__(self, *, on_fatal: Callable[[BaseException], None]) -> None:
        self.address = HandoffAddress(f"pdengine-{uuid4().hex}", secrets.token_bytes(32))
        self._on_fatal = on_fatal
        self._offered: int | None = None  # file descriptor of the pool
        self._num_clients = 0
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._listener.setblocking(False)
            self._listener.bind(_abstract(self.address.name))
            self._listener.listen(BACKLOG)
        except OSError as error:
            self._listener.close()
            raise TransferError(f"no socket to hand the KV pool over: {error.strerror}") from None
        self._loop = asyncio.new_event_loop()
        self._main = self._loop.create_task(self._serve())
        self._thread = threading.Thread(target=self._run, name="handoff", daemon=True)
        self._thread.start()

    def offer(self, memory: SharedMemory) -> None:
        """From now on hand `memory` to peers that ask; it must stay until `close`."""
        self._offered = memory.file

    def fetch(self, address: HandoffAddress, nbytes: int, done: Callable[[Outcome], None]) -> None:
        """Map a peer's pool of `nbytes`; `done` gets it, or the reason, on the thread."""

        def start() -> None:
            self._group.create_task(_fetch(address, nbytes, done))

        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(start)

    def close(self) -> None:
        """Give up what is under way. Idempotent, waits."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._main.cancel)
        self._thread.join(CLOSE_SECONDS)

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._main)
        except asyncio.CancelledError:
            pass
        except BaseException as error:
            self._on_fatal(error)
        finally:
            self._listener.close()
            self._loop.close()

    async def _serve(self) -> None:
        """Answer clients, and be the parent of all tasks: an unexpected exception in one ends the thread."""
        async with asyncio.TaskGroup() as self._group:
            while True:
                await _readable(self._listener)
                try:
                    # Not asyncio's sock_accept, which loses a client when it is cancelled.
                    client, _ = self._listener.accept()
                except BlockingIOError:  # that client has left already
                    continue
                except OSError as error:  # files have run out, for instance
                    logger.warning("no peer can ask for the KV pool: %s", error.strerror)
                    await asyncio.sleep(RETRY_SECONDS)
                    continue
                client.setblocking(False)
                self._group.create_task(self._answer(client))

    async def _answer(self, client: socket.socket) -> None:
        self._num_clients += 1
        try:
            with client:
                async with asyncio.timeout(HANDOFF_SECONDS):
                    refusal = await self._refusal(client)
                if refusal is not None:
                    logger.warning("the KV pool was not handed over: %s", refusal)
                    client.send(refusal.encode())
                    with contextlib.suppress(BlockingIOError):  # unread bytes would take the answer back
                        client.recv(MAX_PACKET)
                else:
                    assert self._offered is not None
                    socket.send_fds(client, [GRANTED], [self._offered])
        except TimeoutError:
            logger.warning("the KV pool was not handed over: no nonce within %g s", HANDOFF_SECONDS)
        except OSError as error:
            logger.debug("a client of the KV pool has left: %s", error.strerror)
        finally:
            self._num_clients -= 1

    async def _refusal(self, client: socket.socket) -> str | None:
        """Why this client does not get the pool, if so; reads what it sends only if it is of our user."""
        if _user_of(client) != os.getuid():
            return "the peer runs as another user"
        if self._num_clients > MAX_CLIENTS:
            return f"more than {MAX_CLIENTS} peers ask at once"
        nonce = await self._loop.sock_recv(client, MAX_PACKET)
        if not hmac.compare_digest(nonce, self.address.nonce):
            return "the peer does not know the nonce"
        if self._offered is None:
            return "no pool in shared memory is registered"
        return None


async def _fetch(address: HandoffAddress, nbytes: int, done: Callable[[Outcome], None]) -> None:
    outcome: Outcome
    try:
        async with asyncio.timeout(HANDOFF_SECONDS):
            outcome = await _ask(address, nbytes)
    except TransferError as error:
        outcome = error
    except TimeoutError:
        outcome = TransferError(f"the peer did not hand over its pool within {HANDOFF_SECONDS:g} s")
    except OSError as error:
        outcome = TransferError(f"the peer's pool is not within reach: {error.strerror or error}")
    done(outcome)


async def _ask(address: HandoffAddress, nbytes: int) -> MappedMemory:
    """Raises TransferError or OSError."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.setblocking(False)
        await _connect(connection, address.name)
        if _user_of(connection) != os.getuid():
            raise TransferError("the peer runs as another user")
        connection.send(address.nonce)
        await _readable(connection)
        # Not asyncio's sock_recv, which knows no descriptors.
        answer, descriptors, _, _ = socket.recv_fds(connection, MAX_PACKET, 1, socket.MSG_CMSG_CLOEXEC)
    try:
        if not descriptors:
            reason = answer.decode(errors="replace") or "it closed the connection"
            raise TransferError(f"the peer did not hand over its pool: {reason}")
        return MappedMemory(descriptors[0], nbytes)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


async def _connect(connection: socket.socket, name: str) -> None:
    while True:
        try:
            connection.connect(_abstract(name))
            return
        except BlockingIOError:  # the backlog is full; a Unix socket cannot be waited for
            await asyncio.sleep(RETRY_SECONDS)


async def _readable(connection: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(connection, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(connection)


def _abstract(name: str) -> str:
    return f"\0{name}"


def _user_of(connection: socket.socket) -> int:
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, user, _ = _CREDENTIALS.unpack(credentials)
    return int(user)
