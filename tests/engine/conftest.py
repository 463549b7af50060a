"""Engines that are stopped and checked after every test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from engine_worker import Cluster


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """At the end every engine must be back at its baseline."""
    cluster = Cluster()
    yield cluster
    for worker in cluster.workers:
        worker.stop()
