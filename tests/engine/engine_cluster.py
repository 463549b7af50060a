"""Several engines that share a fabric, as the workers of one cluster."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from engine_worker import DEADLINE_SECONDS, EngineWorker, TokenRunner

from pdengine.engine.commands import FreeLease
from pdengine.transport.memory_transfer import Fabric
from pdengine.transport.messages import Prefilled

PROMPT = list(range(40, 50))  # three blocks of four tokens, the last one half full


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
            max_requests=max_requests,
            pull_seconds=pull_seconds,
        )
        return self.add(worker), runner


@dataclass
class Pair:
    """One engine that prefills and one that pulls from it."""

    prefill: EngineWorker
    decode: EngineWorker
    decode_runner: TokenRunner

    def prefilled(self, request_id: str, prompt_ids: list[int], *, attempt: int = 1) -> Prefilled:
        self.prefill.prefill(request_id, prompt_ids, attempt=attempt)
        return self.prefill.expect(Prefilled)

    def free(self, *prefilled: Prefilled) -> None:
        """What the control thread does when a lease was released or has expired."""
        for event in prefilled:
            assert event.lease is not None
            self.prefill.engine.post(FreeLease(event.lease.lease_id))


StartPair = Callable[..., Pair]
