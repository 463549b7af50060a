"""The hand-over of a pool's file, with clients and owners that do not keep to it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import queue
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from uuid import uuid4

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pdengine.transport import pool_handoff
from pdengine.transport.pool_handoff import MAX_CLIENTS, HandoffAddress, Outcome, PoolHandoff
from pdengine.transport.shared_memory import MappedMemory, SharedMemory
from pdengine.transport.transfer import TransferError

NBYTES = 3 * 4096
DEADLINE = 30.0
SIZE_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


@pytest.fixture(scope="module")
def memory() -> SharedMemory:
    memory = SharedMemory(NBYTES)
    memory.buffer[:5] = b"hello"
    return memory


@pytest.fixture
def owner(memory: SharedMemory) -> Iterator[PoolHandoff]:
    fatal: queue.SimpleQueue[BaseException] = queue.SimpleQueue()
    owner = PoolHandoff(on_fatal=fatal.put)
    owner.offer(memory)
    yield owner
    owner.close()
    assert fatal.empty(), fatal.get()


def fetch(reader: PoolHandoff, address: HandoffAddress, nbytes: int = NBYTES) -> Outcome:
    outcomes: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
    reader.fetch(address, nbytes, outcomes.put)
    return outcomes.get(timeout=DEADLINE)


def connect(address: HandoffAddress) -> socket.socket:
    client = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    client.settimeout(DEADLINE)
    client.connect(f"\0{address.name}")
    return client


def answer_to(address: HandoffAddress, packet: bytes) -> tuple[bytes, list[int]]:
    with connect(address) as client:
        client.send(packet)
        answer, descriptors, _, _ = socket.recv_fds(client, 4096, 4)
    return answer, descriptors


def assert_works(owner: PoolHandoff) -> None:
    outcome = fetch(owner, owner.address)
    assert isinstance(outcome, MappedMemory)
    outcome.close()


def test_the_pool_arrives_and_cannot_be_written(owner: PoolHandoff) -> None:
    answer, (descriptor,) = answer_to(owner.address, owner.address.nonce)
    assert answer == b"granted"
    assert os.pread(descriptor, 5, 0) == b"hello"
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.pwrite(descriptor, b"x", 0)
    os.close(descriptor)


# ---------------------------------------------------------------------------------------- clients


def test_other_bytes_than_the_nonce_are_refused(owner: PoolHandoff) -> None:
    @given(st.binary(max_size=2000))
    @example(b"")
    @example(owner.address.nonce + b"x")
    @example(owner.address.nonce[:-1])
    def check(packet: bytes) -> None:
        assert answer_to(owner.address, packet) == (b"the peer does not know the nonce", [])

    check()
    assert_works(owner)


def test_silent_clients_are_dropped_and_too_many_refused(owner: PoolHandoff) -> None:
    with ExitStack() as stack:
        silent = [stack.enter_context(connect(owner.address)) for _ in range(MAX_CLIENTS)]
        with connect(owner.address) as one_more:
            assert one_more.recv(100) == f"more than {MAX_CLIENTS} peers ask at once".encode()
        assert all(client.recv(100) == b"" for client in silent)  # after the deadline, without an answer
    assert_works(owner)


def test_clients_that_leave_do_no_harm(owner: PoolHandoff) -> None:
    for _ in range(2 * MAX_CLIENTS):
        connect(owner.address).close()
    with connect(owner.address) as client, tempfile.TemporaryFile() as file:
        socket.send_fds(client, [owner.address.nonce], [file.fileno()])  # what it sends is not kept
        num_open = len(os.listdir("/proc/self/fd"))
    assert_works(owner)
    assert len(os.listdir("/proc/self/fd")) < num_open


def test_another_user_is_refused(owner: PoolHandoff, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_handoff.os, "getuid", lambda: 12345)
    with connect(owner.address) as client:
        assert client.recv(100) == b"the peer runs as another user"
    outcome = fetch(owner, owner.address)
    assert str(outcome) == "the peer runs as another user"


# ----------------------------------------------------------------------------------------- owners


def memfd(size: int, seals: int) -> int:
    descriptor = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, size)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    return descriptor


def regular_file() -> int:
    descriptor, path = tempfile.mkstemp()
    os.unlink(path)
    os.ftruncate(descriptor, NBYTES)
    return descriptor


OWNERS: dict[str, tuple[Callable[[], list[int]], bytes, str]] = {
    "says no": (lambda: [], b"not today", "the peer did not hand over its pool: not today"),
    "says rubbish": (lambda: [], b"\xff\xfe", "did not hand over"),
    "hangs up": (lambda: [], b"", "it closed the connection"),
    "gives a file": (lambda: [regular_file()], b"granted", "not a memfd"),
    "gives a pipe": (lambda: [os.pipe()[0]], b"granted", "not a memfd"),
    "may shrink it": (lambda: [memfd(NBYTES, fcntl.F_SEAL_GROW)], b"granted", "not sealed"),
    "may grow it": (lambda: [memfd(NBYTES, fcntl.F_SEAL_SHRINK)], b"granted", "not sealed"),
    "gives less": (lambda: [memfd(NBYTES - 1, SIZE_SEALS)], b"granted", "has 12287 bytes, its region 12288"),
    "gives more": (lambda: [memfd(NBYTES + 1, SIZE_SEALS)], b"granted", "has 12289 bytes"),
    "gives nothing": (lambda: [memfd(0, SIZE_SEALS)], b"granted", "has 0 bytes"),
}


@pytest.mark.parametrize("kind", OWNERS)
def test_owners_that_hand_over_something_else(owner: PoolHandoff, kind: str) -> None:
    make, answer, reason = OWNERS[kind]
    address = HandoffAddress(uuid4().hex, b"nonce")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(f"\0{address.name}")
        listener.listen()

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(100)
                descriptors = make()
                if answer:
                    socket.send_fds(connection, [answer], descriptors)
                for descriptor in descriptors:
                    os.close(descriptor)

        thread = threading.Thread(target=serve)
        thread.start()
        outcome = fetch(owner, address)
        thread.join()
    assert isinstance(outcome, TransferError)
    assert reason in str(outcome)


def test_of_several_files_only_one_is_taken_and_none_is_left_open(owner: PoolHandoff) -> None:
    address = HandoffAddress(uuid4().hex, b"nonce")
    before = len(os.listdir("/proc/self/fd"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(f"\0{address.name}")
        listener.listen()
        given_away = [memfd(NBYTES, SIZE_SEALS) for _ in range(3)]

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(100)
                socket.send_fds(connection, [b"granted"], given_away)

        thread = threading.Thread(target=serve)
        thread.start()
        outcome = fetch(owner, address)
        thread.join()
        for descriptor in given_away:
            os.close(descriptor)
    if isinstance(outcome, MappedMemory):
        outcome.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_an_owner_that_does_not_answer_is_not_waited_for_long(
    owner: PoolHandoff, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_handoff, "HANDOFF_SECONDS", 0.2)
    address = HandoffAddress(uuid4().hex, b"nonce")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(f"\0{address.name}")
        listener.listen(0)
        silent = fetch(owner, address)
        assert str(silent) == "the peer did not hand over its pool within 0.2 s"
        with pytest.raises(BlockingIOError):  # the first, which nobody accepted, fills the backlog
            connect(address)
        assert str(fetch(owner, address)) == str(silent)


def test_close_ends_what_is_under_way(memory: SharedMemory) -> None:
    fatal: queue.SimpleQueue[BaseException] = queue.SimpleQueue()
    owner = PoolHandoff(on_fatal=fatal.put)
    owner.offer(memory)
    with connect(owner.address) as client:
        owner.fetch(owner.address, NBYTES, lambda outcome: None)
        owner.close()
        owner.close()
        with contextlib.suppress(ConnectionResetError):  # it was not accepted before
            assert client.recv(100) == b""
    outcomes: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
    owner.fetch(owner.address, NBYTES, outcomes.put)
    with pytest.raises(ConnectionRefusedError):
        connect(owner.address)
    assert outcomes.empty()
    assert fatal.empty()
