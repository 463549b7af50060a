"""Peers that are killed in the middle of a pull, again and again: the reader outlives all of them."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from ucx_peer import BLOCK_BYTES, Worker

from pdengine.transport.regions import RegionDescriptor, Run, describe_region
from pdengine.transport.transfer import PeerConnected, PeerFailed, PullCompleted, PullFailed

NUM_BLOCKS = 1024  # 64 MiB
RUNS = [Run(block, block, 16) for block in range(0, NUM_BLOCKS, 16)]
LATEST_DEATH = 40  # progress calls; the pull takes more


@contextmanager
def mortal_peer() -> Iterator[tuple[subprocess.Popen[str], bytes, RegionDescriptor]]:
    """The process, its worker address and its region."""
    program = Path(__file__).with_name("mortal_peer.py")
    with subprocess.Popen(
        [sys.executable, str(program), str(NUM_BLOCKS * BLOCK_BYTES)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            offer = json.loads(process.stdout.readline())
            region = describe_region(
                ("block", "byte"),
                (NUM_BLOCKS, BLOCK_BYTES),
                item_size=1,
                dtype="uint8",
                base_address=offer["base_address"],
                remote_key=bytes.fromhex(offer["remote_key"]),
            )
            yield process, bytes.fromhex(offer["worker_address"]), region
        finally:
            process.kill()


def kill_in_the_middle(worker: Worker, turn: int, num_calls: int) -> None:
    """One peer: connect, pull a little, begin a large pull during which it dies, disconnect."""
    with mortal_peer() as (process, worker_address, region):
        assert process.stdin is not None
        assert process.stdout is not None
        worker.transfer.connect("victim", worker_address, region)
        connected = worker.next_event()
        assert isinstance(connected, PeerConnected), connected
        worker.pool.blocks[0] = 0xAA
        worker.transfer.pull(2 * turn, "victim", [Run(5, 0, 1)])
        completed = worker.next_event()
        assert isinstance(completed, PullCompleted), completed
        assert not worker.pool.blocks[0].any()  # the peer's memory is zero

        process.stdin.write(f"{num_calls}\n")
        process.stdin.flush()
        assert int(process.stdout.readline()) == num_calls
        worker.transfer.pull(2 * turn + 1, "victim", RUNS)
        assert process.wait(30) == -9
        worker.transfer.disconnect("victim")
        failed = worker.next_event()
        assert isinstance(failed, PullFailed), failed
        assert failed.pull_id == 2 * turn + 1
    # Over TCP the system may have reported the death before we disconnected; nothing else comes.
    worker.transfer.pull(-turn - 1, "victim", [])
    last = worker.next_event()
    if isinstance(last, PeerFailed):
        last = worker.next_event()
    assert last == PullFailed(-turn - 1, "engine victim is not connected")


def survive(num_kills: int) -> None:
    """The deaths come at random points of the pull, but at the same ones in every run."""
    points = random.Random(num_kills)
    worker = Worker(NUM_BLOCKS)
    try:
        for turn in range(num_kills):
            kill_in_the_middle(worker, turn, points.randint(1, LATEST_DEATH))
    finally:
        worker.transfer.close()
    assert worker.events.empty()


@pytest.mark.parametrize("transports", ["", "tcp"])
def test_a_reader_outlives_peers_killed_in_the_middle_of_a_pull(
    transports: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if transports:
        monkeypatch.setenv("UCX_TLS", transports)
    survive(3)


@pytest.mark.long
@pytest.mark.parametrize("transports", ["", "tcp"])
def test_a_reader_outlives_a_hundred_killed_peers(transports: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if transports:
        monkeypatch.setenv("UCX_TLS", transports)
    survive(50)
