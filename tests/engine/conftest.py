"""Engines that are stopped and checked after every test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from engine_cluster import Cluster, Pair, StartPair
from engine_worker import DEADLINE_SECONDS


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """At the end every engine must be back at its baseline."""
    cluster = Cluster()
    yield cluster
    for worker in cluster.workers:
        worker.stop()


@pytest.fixture
def start_pair(cluster: Cluster) -> StartPair:
    def start(*, num_blocks: int = 16, max_requests: int = 8, pull_seconds: float = DEADLINE_SECONDS) -> Pair:
        prefill, _ = cluster.start("prefill", num_blocks=256)
        decode, runner = cluster.start(
            "decode", num_blocks=num_blocks, max_requests=max_requests, pull_seconds=pull_seconds
        )
        decode.connect(prefill)
        return Pair(prefill, decode, runner)

    return start


@pytest.fixture
def pair(start_pair: StartPair) -> Pair:
    return start_pair()
