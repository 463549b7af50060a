"""Engines that are stopped and checked after every test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from engine_worker import DEADLINE_SECONDS, EngineWorker, TokenRunner

from pdengine.transport.memory_transfer import Fabric


class Cluster:
    """Starts engines that share a fabric."""

    def __init__(self) -> None:
        self.fabric = Fabric()
        self.workers: list[EngineWorker] = []

    def add(self, worker: EngineWorker) -> EngineWorker:
        self.workers.append(worker)
        return worker

    def start(
        self,
        engine_id: str,
        *,
        num_blocks: int = 16,
        block_size: int = 4,
        max_batch_tokens: int = 8,
        max_requests: int = 8,
        pull_seconds: float = DEADLINE_SECONDS,
    ) -> tuple[EngineWorker, TokenRunner]:
        runner = TokenRunner(num_blocks, block_size)
        worker = EngineWorker(
            self.fabric,
            engine_id,
            runner=runner,
            region=runner.describe(),
            block_size=block_size,
            max_batch_tokens=max_batch_tokens,
            max_requests=max_requests,
            pull_seconds=pull_seconds,
        )
        return self.add(worker), runner


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """At the end every engine must be back at its baseline."""
    cluster = Cluster()
    yield cluster
    for worker in cluster.workers:
        worker.stop()
