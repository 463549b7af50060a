"""The transfer of a worker: mapped memory where it can be had, UCX where not, and one event per request."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from functools import partial

import msgspec
import numpy as np
import pytest
from mapping_peer import UNTOUCHED, Peer, Worker, block_content, fill, peer_process
from network_namespaces import two_hosts

from pdengine.transport import pool_handoff
from pdengine.transport.pool_handoff import HandoffAddress
from pdengine.transport.regions import Run
from pdengine.transport.transfer import (
    PeerConnected,
    PeerFailed,
    PullCompleted,
    PullFailed,
    SameHost,
    Transfer,
    TransferError,
)
from pdengine.transport.two_path_transfer import TwoPathTransfer, WorkerAddress

SHARED_MEMORY_LANES = {"sysv", "posix", "cma", "xpmem", "knem"}
TwoPathWorker = Worker[TwoPathTransfer]


@pytest.fixture
def worker() -> Iterator[TwoPathWorker]:
    worker = Worker(TwoPathTransfer)
    yield worker
    worker.transfer.close()


@pytest.fixture(scope="module")
def peer() -> Iterator[Peer]:
    with peer_process(same_host="mapping") as peer:
        yield peer


def pull(worker: TwoPathWorker, pull_id: int, engine_id: str, remote_block: int) -> None:
    """Pull two blocks into the first ones of the pool, and compare."""
    worker.blocks[:] = UNTOUCHED
    worker.transfer.pull(pull_id, engine_id, [Run(remote_block, 0, 2)])
    event = worker.next_event()
    assert isinstance(event, PullCompleted), event
    assert event.pull_id == pull_id
    for step in range(2):
        assert np.array_equal(worker.blocks[step], block_content(remote_block + step))
    assert (worker.blocks[2:] == UNTOUCHED).all()


def over_ucx(lanes: str) -> bool:
    return set(lanes.split(", ")) <= SHARED_MEMORY_LANES


def with_handoff(worker_address: bytes, handoff: HandoffAddress) -> bytes:
    """`worker_address` with another address for the mapping."""
    address = msgspec.msgpack.decode(worker_address, type=WorkerAddress)
    return msgspec.msgpack.encode(WorkerAddress(address.ucx, msgspec.msgpack.encode(handoff)))


@pytest.fixture
def silent_owner() -> Iterator[HandoffAddress]:
    """Where nobody answers."""
    address = HandoffAddress(f"silent-{os.getpid()}", b"nonce")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(f"\0{address.name}")
        listener.listen()
        yield address


@pytest.mark.parametrize("ours", ["mapping", "ucx"])
@pytest.mark.parametrize("theirs", ["mapping", "ucx"])
def test_memory_is_mapped_if_both_sides_want_it(ours: SameHost, theirs: SameHost) -> None:
    reader, owner = (Worker(partial(TwoPathTransfer, same_host=choice)) for choice in (ours, theirs))
    fill(owner.blocks)
    transfer: Transfer = reader.transfer
    assert transfer.version.startswith("ucx ")
    lanes = reader.connect("owner", owner)
    assert lanes == "mapping" if ours == theirs == "mapping" else over_ucx(lanes)
    pull(reader, 1, "owner", 17)
    reader.transfer.close()
    owner.transfer.close()


def test_a_pool_outside_of_shared_memory_goes_over_ucx(worker: TwoPathWorker) -> None:
    owner = Worker(partial(TwoPathTransfer, same_host="mapping"), offered=False)
    fill(owner.blocks)
    assert over_ucx(worker.connect("owner", owner))
    pull(worker, 1, "owner", 3)
    owner.transfer.close()


def test_what_cannot_be_mapped_goes_over_ucx(worker: TwoPathWorker, peer: Peer) -> None:
    for turn, handoff in enumerate((HandoffAddress("pdengine-nobody", b""), HandoffAddress("", b""))):
        worker.transfer.connect("peer", with_handoff(peer.worker_address, handoff), peer.region)
        event = worker.next_event()
        assert isinstance(event, PeerConnected), event
        assert over_ucx(event.lanes)
        pull(worker, turn, "peer", 5)
    assert worker.connect("peer", peer) == "mapping"
    pull(worker, 9, "peer", 7)


def test_pulls_wait_for_the_path_whichever_it_is(
    worker: TwoPathWorker, peer: Peer, silent_owner: HandoffAddress, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_handoff, "HANDOFF_SECONDS", 0.1)
    for address in (peer.worker_address, with_handoff(peer.worker_address, silent_owner)):
        worker.transfer.connect("peer", address, peer.region)
        worker.transfer.pull(1, "peer", [Run(1, 0, 1)])
        worker.transfer.pull(2, "peer", [Run(2, 1, 1)])
        events = {type(event): event for event in (worker.next_event() for _ in range(3))}
        assert set(events) == {PeerConnected, PullCompleted}
        assert [bytes(worker.blocks[b]) for b in (0, 1)] == [bytes(block_content(b)) for b in (1, 2)]
        worker.blocks[:] = UNTOUCHED


def test_disconnect_and_connect_while_the_mapping_is_tried(
    worker: TwoPathWorker, peer: Peer, silent_owner: HandoffAddress
) -> None:
    nowhere = with_handoff(peer.worker_address, silent_owner)
    worker.transfer.connect("peer", nowhere, peer.region)
    worker.transfer.pull(1, "peer", [Run(0, 0, 1)])
    worker.transfer.disconnect("peer")
    worker.transfer.disconnect("peer")
    disconnected = "the peer was disconnected"
    assert [worker.next_event() for _ in range(2)] == [
        PullFailed(1, disconnected),
        PeerFailed("peer", disconnected),
    ]
    worker.transfer.connect("peer", nowhere, peer.region)
    worker.transfer.connect("peer", peer.worker_address, peer.region)
    assert [worker.next_event() for _ in range(2)] == [
        PeerFailed("peer", disconnected),
        PeerConnected("peer", "mapping"),
    ]
    pull(worker, 2, "peer", 9)
    assert worker.events.empty()


def test_a_dead_owner(worker: TwoPathWorker) -> None:
    """What it left can be read; connecting anew fails by the deadline of whichever path, or by disconnect."""
    with peer_process(same_host="mapping") as owner:
        assert worker.connect("owner", owner) == "mapping"
        owner.kill()
        pull(worker, 1, "owner", 11)
        worker.transfer.connect("owner", owner.worker_address, owner.region)
        worker.transfer.disconnect("owner")
        event = worker.next_event()
        assert isinstance(event, PeerFailed), event
        assert event.engine_id == "owner"


def test_refusals(worker: TwoPathWorker, peer: Peer) -> None:
    worker.transfer.pull(1, "nobody", [Run(0, 0, 1)])
    assert worker.next_event() == PullFailed(1, "engine nobody is not connected")
    for worker_address in (b"", b"\xc1", os.urandom(100), peer.worker_address[:-1]):
        worker.transfer.connect("peer", worker_address, peer.region)
        event = worker.next_event()
        assert isinstance(event, PeerFailed)
        assert event.reason.startswith("the peer's worker address is not valid: ")
    worker.transfer.connect(
        "peer", peer.worker_address, msgspec.structs.replace(peer.region, dtype="float16")
    )
    event = worker.next_event()
    assert isinstance(event, PeerFailed)
    assert "dtype" in event.reason
    with pytest.raises(TransferError, match="already"):
        worker.transfer.register(worker.region, worker.memory)


def test_close_fails_what_is_there_and_what_comes_later(peer: Peer, silent_owner: HandoffAddress) -> None:
    worker = Worker(TwoPathTransfer)
    worker.connect("peer", peer)
    worker.transfer.connect("silent", with_handoff(peer.worker_address, silent_owner), peer.region)
    worker.transfer.pull(1, "silent", [Run(0, 0, 1)])
    worker.transfer.close()
    worker.transfer.close()
    worker.transfer.pull(2, "peer", [])
    worker.transfer.connect("peer", peer.worker_address, peer.region)
    worker.transfer.disconnect("peer")
    closed = "the transfer is closed"
    assert [worker.next_event() for _ in range(4)] == [
        PullFailed(1, closed),
        PeerFailed("silent", closed),
        PullFailed(2, closed),
        PeerFailed("peer", closed),
    ]
    assert worker.events.empty()


def test_a_peer_in_another_network_namespace_is_reached_over_tcp() -> None:
    with (
        two_hosts() as (here, there),
        peer_process(same_host="mapping", advertise_host=there.address, enter=there.command) as owner,
        peer_process(
            same_host="mapping", advertise_host=here.address, enter=here.command, reads=owner
        ) as reader,
    ):
        assert reader.lanes == f"tcp/{here.interface}"
