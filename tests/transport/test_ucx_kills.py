"""Peers that are killed in the middle of a pull, again and again: the reader outlives all of them."""

from __future__ import annotations

import random

import pytest
from mortal_peer import NUM_BLOCKS, mortal_peer
from ucx_peer import Worker

from pdengine.transport.regions import Run
from pdengine.transport.transfer import PeerConnected, PeerFailed, PullCompleted, PullFailed

RUNS = [Run(block, block, 1) for block in range(NUM_BLOCKS)]  # many windows of reads
LATEST_DEATH = 16  # progress calls; the pull takes more


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
