"""Pools in shared memory, in this process and in another, for the tests of the mapping path."""

from __future__ import annotations

import argparse
import base64
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from pdengine.transport.mapping_transfer import MappingTransfer
from pdengine.transport.regions import RegionDescriptor, Run, describe_region
from pdengine.transport.shared_memory import SharedMemory
from pdengine.transport.transfer import PeerConnected, PullCompleted, SameHost, TransferEvent
from pdengine.transport.two_path_transfer import TwoPathTransfer

DEADLINE = 30.0  # seconds; generous, because two cores are shared with other work
BLOCK_BYTES = 64 * 1024
UNTOUCHED = 0xAA
T = TypeVar("T", MappingTransfer, TwoPathTransfer)


class Offer(msgspec.Struct):
    """What a peer process says first. lanes: of its own connection, if it was to make one."""

    worker_address: bytes
    region: RegionDescriptor
    lanes: str = ""


class Worker(Generic[T]):
    """A transfer with its pool and its events, in this process."""

    def __init__(
        self,
        make: Callable[..., T],
        *,
        num_blocks: int = 64,
        block_bytes: int = BLOCK_BYTES,
        offered: bool = True,
    ) -> None:
        """offered: whether the transfer may hand its memory over."""
        self.memory = SharedMemory(num_blocks * block_bytes)
        self.blocks: npt.NDArray[np.uint8] = np.frombuffer(self.memory.buffer, np.uint8)
        self.blocks = self.blocks.reshape(num_blocks, block_bytes)
        self.events: queue.SimpleQueue[TransferEvent | BaseException] = queue.SimpleQueue()
        self.transfer = make(deliver=self.events.put, on_fatal=self.events.put)
        region = describe(self.memory, num_blocks, block_bytes)
        self.region = self.transfer.register(region, self.memory if offered else None)

    def next_event(self) -> TransferEvent | BaseException:
        return self.events.get(timeout=DEADLINE)

    def connect(self, engine_id: str, peer: Peer | Worker[T]) -> str:
        """The lanes of the connection."""
        address = peer.worker_address if isinstance(peer, Peer) else peer.transfer.worker_address
        self.transfer.connect(engine_id, address, peer.region)
        event = self.next_event()
        assert isinstance(event, PeerConnected), event
        assert event.engine_id == engine_id
        return event.lanes


def describe(memory: SharedMemory, num_blocks: int, block_bytes: int) -> RegionDescriptor:
    return describe_region(
        ("block", "byte"),
        (num_blocks, block_bytes),
        item_size=1,
        dtype="uint8",
        base_address=memory.address,
    )


def fill(blocks: npt.NDArray[np.uint8]) -> None:
    """Contents that tell every block, and every place in it, from the others."""
    num_blocks, block_bytes = blocks.shape
    for block in range(num_blocks):
        blocks[block] = block_content(block, block_bytes)


def block_content(block: int, block_bytes: int = BLOCK_BYTES) -> npt.NDArray[np.uint8]:
    return (np.arange(block_bytes) * 7 + block * 13 + block // 256 + np.arange(block_bytes) // 256).astype(
        np.uint8
    )


@dataclass(frozen=True)
class Peer:
    """Another process with a filled pool, as this one sees it."""

    process: subprocess.Popen[bytes]
    worker_address: bytes
    region: RegionDescriptor
    lanes: str

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(DEADLINE)

    def pause(self) -> None:
        os.kill(self.process.pid, signal.SIGSTOP)

    def compute(self) -> None:
        """From now on its main thread runs Python and never gives up the GIL."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(b"compute\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == b"computing\n"


@contextmanager
def peer_process(
    *,
    num_blocks: int = 64,
    block_bytes: int = BLOCK_BYTES,
    same_host: SameHost | None = None,
    advertise_host: str = "127.0.0.1",
    enter: Callable[[Sequence[str]], list[str]] = list,
    reads: Peer | None = None,
) -> Iterator[Peer]:
    """A process with a `MappingTransfer`, or with a `TwoPathTransfer` if `same_host` is given.

    enter: turns the command into one that runs it elsewhere. reads: a peer whose whole pool it pulls, and
    compares, before it says anything.
    """
    command = [sys.executable, __file__, str(num_blocks), str(block_bytes), same_host or "", advertise_host]
    if reads is not None:
        command.append(pack(Offer(reads.worker_address, reads.region)))
    process = subprocess.Popen(enter(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    watchdog = threading.Timer(DEADLINE, process.kill)
    watchdog.start()
    try:
        assert process.stdout is not None
        offer = unpack(process.stdout.readline())
        watchdog.cancel()
        yield Peer(process, offer.worker_address, offer.region, offer.lanes)
    finally:
        watchdog.cancel()
        process.kill()
        with process:
            process.wait(DEADLINE)


def wait_until(condition: Callable[[], object]) -> None:
    """Look again and again, without a pause: for what happens within milliseconds."""
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"


def pack(offer: Offer) -> str:
    return base64.b64encode(msgspec.msgpack.encode(offer)).decode()


def unpack(text: bytes | str) -> Offer:
    return msgspec.msgpack.decode(base64.b64decode(text), type=Offer)


def read_all(worker: Worker[TwoPathTransfer], owner: Offer) -> str:
    """Pull the whole pool of `owner` and compare it with ours, which is filled alike; the lanes."""
    expected = worker.blocks.copy()
    worker.blocks[:] = UNTOUCHED
    worker.transfer.connect("owner", owner.worker_address, owner.region)
    connected = worker.next_event()
    assert isinstance(connected, PeerConnected), connected
    worker.transfer.pull(1, "owner", [Run(0, 0, len(expected))])
    pulled = worker.next_event()
    assert isinstance(pulled, PullCompleted), pulled
    assert np.array_equal(worker.blocks, expected)
    return connected.lanes


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, kind in (("num_blocks", int), ("block_bytes", int), ("same_host", str), ("host", str)):
        parser.add_argument(name, type=kind)
    parser.add_argument("reads", nargs="?", type=unpack)
    arguments = parser.parse_args()

    def make(**callbacks: object) -> MappingTransfer | TwoPathTransfer:
        if not arguments.same_host:
            return MappingTransfer(**callbacks)  # type: ignore[arg-type]
        return TwoPathTransfer(
            **callbacks,  # type: ignore[arg-type]
            advertise_host=arguments.host,
            same_host=arguments.same_host,
        )

    worker = Worker(make, num_blocks=arguments.num_blocks, block_bytes=arguments.block_bytes)
    fill(worker.blocks)
    lanes = read_all(worker, arguments.reads) if arguments.reads else ""
    print(pack(Offer(worker.transfer.worker_address, worker.region, lanes)), flush=True)
    for _ in sys.stdin:
        sys.setswitchinterval(10_000.0)  # no other thread of this process gets the GIL any more
        print("computing", flush=True)
        while True:
            pass


if __name__ == "__main__":
    main()
