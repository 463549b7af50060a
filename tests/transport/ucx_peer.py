"""A second process with a KV pool, for the tests of the UCX transfer."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import queue
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import numpy.typing as npt

from pdengine.transport.regions import RegionDescriptor, describe_region
from pdengine.transport.transfer import TransferEvent
from pdengine.transport.ucx_transfer import UcxTransfer

DEADLINE = 30.0  # seconds; generous, because two cores are shared with other work
BLOCK_BYTES = 64 * 1024


class Pool:
    """Blocks of zeroed host memory, which takes space only where it is written."""

    def __init__(self, num_blocks: int, block_bytes: int = BLOCK_BYTES) -> None:
        self.blocks: npt.NDArray[np.uint8] = np.zeros((num_blocks, block_bytes), np.uint8)

    def describe(self) -> RegionDescriptor:
        return describe_region(
            ("block", "byte"),
            self.blocks.shape,
            item_size=1,
            dtype="uint8",
            base_address=self.blocks.ctypes.data,
        )


def block_content(seed: int, block: int, block_bytes: int = BLOCK_BYTES) -> npt.NDArray[np.uint8]:
    """What block `block` of the peer with this seed holds."""
    return np.random.default_rng([seed, block]).integers(0, 256, block_bytes, np.uint8)


class Worker:
    """A transfer with its pool and its events, in this process."""

    def __init__(self, num_blocks: int = 64, **options: Any) -> None:
        self.pool = Pool(num_blocks)
        self.events: queue.SimpleQueue[TransferEvent | BaseException] = queue.SimpleQueue()
        self.transfer = UcxTransfer(deliver=self.events.put, on_fatal=self.events.put, **options)
        self.region = self.transfer.register(self.pool.describe())

    def next_event(self) -> TransferEvent | BaseException:
        return self.events.get(timeout=DEADLINE)


@dataclass(frozen=True)
class Peer:
    """The other process, as this one sees it."""

    process: Any
    connection: Connection
    worker_address: bytes
    region: RegionDescriptor
    stop_computing: Any

    def kill(self) -> None:
        self.process.kill()
        self.process.join(DEADLINE)

    def pause(self) -> None:
        os.kill(self.process.pid, signal.SIGSTOP)

    def compute(self) -> None:
        """From now on its main thread never gives up the GIL. Connect before: that shows that its UCX thread
        has left Python, where it would wait for the GIL forever."""
        self.connection.send("compute")
        assert self.connection.poll(DEADLINE), "the peer process did not begin to compute"
        self.connection.recv()


@contextmanager
def peer_process(*, seed: int = 1, num_blocks: int = 64, blocks: range | None = None) -> Iterator[Peer]:
    """Start a process that offers a pool."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    stop_computing = context.RawValue(ctypes.c_int, 0)
    written = blocks if blocks is not None else range(num_blocks)
    process = context.Process(target=_serve, args=(there, seed, num_blocks, written, stop_computing))
    process.start()
    there.close()
    try:
        assert here.poll(DEADLINE), "the peer process did not start"
        worker_address, region = here.recv()
        yield Peer(process, here, worker_address, region, stop_computing)
    finally:
        stop_computing.value = 1
        here.close()  # ends the peer
        if process.is_alive():
            os.kill(process.pid, signal.SIGCONT)
        process.join(DEADLINE)
        if process.is_alive():
            process.kill()


def _serve(connection: Connection, seed: int, num_blocks: int, blocks: range, stop_computing: Any) -> None:
    worker = Worker(num_blocks)
    for block in blocks:
        worker.pool.blocks[block] = block_content(seed, block)
    connection.send((worker.transfer.worker_address, worker.region))
    try:
        connection.recv()  # "compute"
        sys.setswitchinterval(10_000.0)  # from now on no other thread of this process gets the GIL
        connection.send("computing")
        turns = 0
        while not stop_computing.value:
            turns += 1
        connection.recv()
    except EOFError:
        worker.transfer.close()
