"""Writes into the pool of another process, layer by layer, and read back from there."""

from __future__ import annotations

import queue
from collections.abc import Iterator

import msgspec
import numpy as np
import pytest
from ucx_peer import BLOCK_BYTES, DEADLINE, Peer, Pool, block_content, peer_process

from pdengine.transport.regions import RegionDescriptor, Run, block_runs, describe_region
from pdengine.transport.shared_memory import SharedMemory
from pdengine.transport.transfer import (
    PeerConnected,
    PullCompleted,
    PushCompleted,
    PushFailed,
    TransferEvent,
)
from pdengine.transport.two_path_transfer import TwoPathTransfer
from pdengine.transport.ucx_transfer import UcxTransfer

NUM_HEADS, NUM_LAYERS = 4, 8
PIECE_BYTES = BLOCK_BYTES // (NUM_HEADS * NUM_LAYERS)
NUM_BLOCKS = 64


def layered(region: RegionDescriptor) -> RegionDescriptor:
    """The same bytes, seen as heads and layers."""
    strides = (BLOCK_BYTES, NUM_LAYERS * PIECE_BYTES, PIECE_BYTES, 1)
    sizes = (region.num_blocks, NUM_HEADS, NUM_LAYERS, PIECE_BYTES)
    names = ("block", "kv_head", "layer", "byte")
    return msgspec.structs.replace(region, names=names, sizes=sizes, strides=strides)


class Writer:
    """A transfer whose pool has layers, in this process."""

    def __init__(self) -> None:
        self.pool = Pool(NUM_BLOCKS)
        for block in range(NUM_BLOCKS):
            self.pool.blocks[block] = block_content(9, block)
        self.events: queue.SimpleQueue[TransferEvent | BaseException] = queue.SimpleQueue()
        self.transfer = UcxTransfer(deliver=self.events.put, on_fatal=self.events.put)
        self.transfer.register(layered(self.pool.describe()))

    def connect(self, engine_id: str, peer: Peer) -> None:
        self.transfer.connect_to_push(engine_id, peer.worker_address, layered(peer.region))
        assert isinstance(self.next_event(), PeerConnected)

    def next_event(self) -> TransferEvent | BaseException:
        return self.events.get(timeout=DEADLINE)

    def read_back(self, engine_id: str, block: int) -> np.ndarray[tuple[int, int, int], np.dtype[np.uint8]]:
        """A block of the peer as `[heads, layers, bytes]`."""
        self.transfer.pull(999, engine_id, [Run(block, 0, 1)])
        assert isinstance(self.next_event(), PullCompleted)
        return by_layer(self.pool.blocks[0])


def by_layer(
    block: np.ndarray[tuple[int], np.dtype[np.uint8]],
) -> np.ndarray[tuple[int, int, int], np.dtype[np.uint8]]:
    return block.reshape(NUM_HEADS, NUM_LAYERS, PIECE_BYTES).copy()


@pytest.fixture(params=["shared memory", "tcp"])
def writer(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Writer]:
    if request.param == "tcp":
        monkeypatch.setenv("UCX_TLS", "tcp")
    writer = Writer()
    yield writer
    writer.transfer.close()


@pytest.fixture
def peer(writer: Writer) -> Iterator[Peer]:
    """Started after the environment of the test is set."""
    with peer_process(seed=1, num_blocks=NUM_BLOCKS) as peer:
        writer.connect("peer", peer)
        yield peer


def test_one_layer_of_scattered_blocks_arrives_and_nothing_else(writer: Writer, peer: Peer) -> None:
    remote, local = [5, 6, 40], [11, 12, 3]
    writer.transfer.push(7, "peer", block_runs(remote, local), 2)
    event = writer.next_event()
    assert isinstance(event, PushCompleted), event
    assert (event.push_id, event.num_puts, event.num_bytes) == (7, 3 * NUM_HEADS, 3 * NUM_HEADS * PIECE_BYTES)
    for remote_block, local_block in zip(remote, local, strict=True):
        expected = by_layer(block_content(1, remote_block))
        expected[:, 2] = by_layer(block_content(9, local_block))[:, 2]
        assert np.array_equal(writer.read_back("peer", remote_block), expected)
    assert np.array_equal(writer.read_back("peer", 7), by_layer(block_content(1, 7)))


def test_all_layers_at_once_make_whole_blocks(writer: Writer, peer: Peer) -> None:
    """8 pushes of 128 writes each: more than the window, and more than one flush in flight."""
    for layer in range(NUM_LAYERS):
        writer.transfer.push(layer, "peer", [Run(8, 20, 32)], layer)
    ended = [writer.next_event() for _ in range(NUM_LAYERS)]
    assert {event.push_id for event in ended if isinstance(event, PushCompleted)} == set(range(NUM_LAYERS))
    for step in range(32):
        assert np.array_equal(writer.read_back("peer", 8 + step), by_layer(block_content(9, 20 + step)))


def test_a_dead_peer_fails_its_pushes(writer: Writer, peer: Peer) -> None:
    peer.pause()
    for push_id in range(3):
        writer.transfer.push(push_id, "peer", [Run(0, 0, NUM_BLOCKS)], push_id)
    peer.kill()
    writer.transfer.disconnect("peer")
    failed = [event for event in (writer.next_event() for _ in range(3)) if isinstance(event, PushFailed)]
    assert {event.push_id for event in failed} == {0, 1, 2}


def test_pushes_that_cannot_begin(writer: Writer, peer: Peer) -> None:
    writer.transfer.push(1, "nobody", [Run(0, 0, 1)], 0)
    assert writer.next_event() == PushFailed(1, "engine nobody is not connected")
    writer.transfer.push(2, "peer", [Run(NUM_BLOCKS - 1, 0, 2)], 0)
    assert writer.next_event() == PushFailed(2, "remote blocks 64 to 64 are outside a pool of 64 blocks")
    writer.transfer.push(3, "peer", [Run(0, 0, 1)], NUM_LAYERS)
    assert writer.next_event() == PushFailed(3, "layer 8 is outside of 8 layers")
    writer.transfer.close()
    writer.transfer.push(4, "peer", [Run(0, 0, 1)], 0)
    assert writer.next_event() == PushFailed(4, "the transfer is closed")


class TwoPathWorker:
    """A transfer that maps its peers' memory, and offers its own."""

    def __init__(self) -> None:
        self.memory = SharedMemory(NUM_BLOCKS * BLOCK_BYTES)
        self.blocks = np.frombuffer(self.memory.buffer, np.uint8).reshape(NUM_BLOCKS, BLOCK_BYTES)
        self.events: queue.SimpleQueue[TransferEvent | BaseException] = queue.SimpleQueue()
        self.transfer = TwoPathTransfer(deliver=self.events.put, on_fatal=self.events.put)
        region = describe_region(
            ("block", "byte"),
            self.blocks.shape,
            item_size=1,
            dtype="uint8",
            base_address=self.memory.address,
        )
        self.region = self.transfer.register(layered(region), self.memory)


def test_a_worker_that_maps_its_peers_pushes_to_them_through_ucx() -> None:
    writer, target = TwoPathWorker(), TwoPathWorker()
    writer.blocks[:] = 7
    writer.transfer.connect_to_push("target", target.transfer.worker_address, target.region)
    event = writer.events.get(timeout=DEADLINE)
    assert isinstance(event, PeerConnected)
    assert event.lanes != "mapping"
    writer.transfer.push(1, "target", [Run(3, 0, 1)], 0)
    assert isinstance(writer.events.get(timeout=DEADLINE), PushCompleted)
    assert by_layer(target.blocks[3])[:, 0].min() == 7
    assert int(target.blocks.sum()) == 7 * NUM_HEADS * PIECE_BYTES
    writer.transfer.connect("target", target.transfer.worker_address, target.region)
    assert writer.events.get(timeout=DEADLINE) == PeerConnected("target", "mapping")
    writer.transfer.push(2, "target", [Run(3, 0, 1)], 0)
    assert writer.events.get(timeout=DEADLINE) == PushFailed(2, "engine target is not connected to push")
    writer.transfer.close()
    target.transfer.close()
