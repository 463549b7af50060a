"""The in-memory transfer: the same promises as the real one, and pulls that tests hold back."""

from __future__ import annotations

import queue

import msgspec
import numpy as np
import pytest

from pdengine.transport.memory_transfer import Fabric, MemoryTransfer
from pdengine.transport.regions import Run, describe_region
from pdengine.transport.transfer import (
    PeerConnected,
    PeerFailed,
    PullCompleted,
    PullFailed,
    Transfer,
    TransferError,
    TransferEvent,
)


class Worker:
    def __init__(self, fabric: Fabric, fill: int) -> None:
        self.blocks = np.full((8, 64), fill, np.uint8)
        self.blocks += np.arange(8, dtype=np.uint8)[:, None]
        self.events: queue.SimpleQueue[TransferEvent] = queue.SimpleQueue()
        self.transfer = MemoryTransfer(fabric, deliver=self.events.put)
        self.region = self.transfer.register(
            describe_region(
                ("block", "byte"),
                self.blocks.shape,
                item_size=1,
                dtype="uint8",
                base_address=self.blocks.ctypes.data,
            )
        )


@pytest.fixture
def pair() -> tuple[Worker, Worker]:
    fabric = Fabric()
    reader, target = Worker(fabric, 0), Worker(fabric, 100)
    reader.transfer.connect("target", target.transfer.worker_address, target.region)
    assert reader.events.get_nowait() == PeerConnected("target", "memory")
    return reader, target


def test_it_is_a_transfer() -> None:
    transfer: Transfer = MemoryTransfer(Fabric(), deliver=lambda event: None)
    assert transfer.version == "memory"


def test_a_pull_copies_at_once(pair: tuple[Worker, Worker]) -> None:
    reader, _ = pair
    reader.transfer.pull(5, "target", [Run(1, 4, 2), Run(7, 0, 1)])
    event = reader.events.get_nowait()
    assert isinstance(event, PullCompleted)
    assert (event.pull_id, event.num_bytes, event.num_gets) == (5, 192, 2)
    assert reader.blocks[:, 0].tolist() == [107, 1, 2, 3, 101, 102, 6, 7]


def test_held_pulls_wait_and_can_be_released_or_failed(pair: tuple[Worker, Worker]) -> None:
    reader, _ = pair
    reader.transfer.hold()
    for pull_id in range(4):
        reader.transfer.pull(pull_id, "target", [Run(pull_id, pull_id, 1)])
    assert reader.transfer.held == (0, 1, 2, 3)
    assert reader.events.empty()
    assert reader.blocks[:, 0].tolist() == list(range(8))
    reader.transfer.release(2)
    reader.transfer.fail(1, "the link broke")
    event = reader.events.get_nowait()
    assert isinstance(event, PullCompleted)
    assert event.pull_id == 2
    assert reader.events.get_nowait() == PullFailed(1, "the link broke")
    reader.transfer.release()
    assert [reader.events.get_nowait().pull_id for _ in range(2)] == [0, 3]
    assert reader.blocks[:4, 0].tolist() == [100, 1, 102, 103]
    reader.transfer.pull(9, "target", [])
    assert isinstance(reader.events.get_nowait(), PullCompleted)


def test_disconnect_fails_held_pulls_once(pair: tuple[Worker, Worker]) -> None:
    reader, _ = pair
    reader.transfer.hold()
    reader.transfer.pull(1, "target", [Run(0, 0, 1)])
    reader.transfer.disconnect("target")
    reader.transfer.disconnect("target")
    reader.transfer.release()
    event = reader.events.get_nowait()
    assert isinstance(event, PullFailed)
    assert reader.events.empty()
    assert reader.blocks[0, 0] == 0


def test_pulls_that_cannot_begin(pair: tuple[Worker, Worker]) -> None:
    reader, _ = pair
    reader.transfer.pull(1, "nobody", [Run(0, 0, 1)])
    assert reader.events.get_nowait() == PullFailed(1, "engine nobody is not connected")
    reader.transfer.pull(2, "target", [Run(7, 0, 2)])
    assert reader.events.get_nowait() == PullFailed(2, "remote blocks 7 to 8 are outside a pool of 8 blocks")
    reader.transfer.close()
    reader.transfer.close()
    reader.transfer.pull(3, "target", [])
    assert reader.events.get_nowait() == PullFailed(3, "the transfer is closed")


def test_a_closed_target_is_lost_to_its_readers(pair: tuple[Worker, Worker]) -> None:
    reader, target = pair
    reader.transfer.hold()
    reader.transfer.pull(1, "target", [Run(0, 0, 1)])
    target.transfer.close()
    assert isinstance(reader.events.get_nowait(), PullFailed)
    assert isinstance(reader.events.get_nowait(), PeerFailed)
    reader.transfer.connect("target", target.transfer.worker_address, target.region)
    assert isinstance(reader.events.get_nowait(), PeerFailed)


def test_connecting_is_refused_with_a_reason(pair: tuple[Worker, Worker]) -> None:
    reader, target = pair
    other = msgspec.structs.replace(target.region, dtype="float16")
    reader.transfer.connect("other", target.transfer.worker_address, other)
    event = reader.events.get_nowait()
    assert isinstance(event, PeerFailed)
    assert "dtype" in event.reason
    with pytest.raises(TransferError, match="already"):
        reader.transfer.register(reader.region)
