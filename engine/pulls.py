"""Pulls in flight: which sequence waits for which read, until when, and which blocks must not be touched.

A one-sided read cannot be called back. When a sequence no longer wants its pull (deadline, abort, lease
lost), its destination blocks stay in quarantine, owned by nobody, until the transfer reports that the pull
has ended.
"""

from dataclasses import dataclass
from time import monotonic

from pdengine.engine.block_pool import BlockPool
from pdengine.engine.sequence import Sequence, blocks_for
from pdengine.transport.regions import block_runs
from pdengine.transport.transfer import PullCompleted, PullFailed, Transfer


@dataclass(eq=False)
class PullInFlight:
    """sequence: None once nobody waits for it; then `quarantined` are the blocks it may still write."""

    sequence: Sequence | None
    deadline: float
    num_blocks: int
    quarantined: list[int]


class Pulls:
    """Belongs to the engine thread."""

    def __init__(self, transfer: Transfer, pool: BlockPool, *, block_size: int, timeout: float) -> None:
        self._transfer = transfer
        self._pool = pool
        self._block_size = block_size
        self._timeout = timeout
        self._in_flight: dict[int, PullInFlight] = {}
        self._next_pull_id = 0

    def __len__(self) -> int:
        return len(self._in_flight)

    @property
    def num_quarantined(self) -> int:
        return sum(len(pull.quarantined) for pull in self._in_flight.values())

    def start(self, sequence: Sequence) -> None:
        """Pull the leased KV cache into the first blocks of `sequence`, one read per run."""
        assert sequence.lease is not None
        lease = sequence.lease.lease
        num_blocks = blocks_for(lease.num_tokens, self._block_size)
        self._next_pull_id += 1
        deadline = monotonic() + self._timeout
        self._in_flight[self._next_pull_id] = PullInFlight(sequence, deadline, num_blocks, [])
        runs = block_runs(lease.block_ids[:num_blocks], sequence.block_ids[:num_blocks])
        self._transfer.pull(self._next_pull_id, lease.engine_id, runs)

    def finish(self, event: PullCompleted | PullFailed) -> PullInFlight:
        """The pull has ended: its quarantined blocks, if any, are free again."""
        pull = self._in_flight.pop(event.pull_id)
        self._pool.free(pull.quarantined)
        pull.quarantined = []
        return pull

    def pull_of(self, sequence: Sequence) -> PullInFlight | None:
        """The pull that `sequence` waits for."""
        return next((pull for pull in self._in_flight.values() if pull.sequence is sequence), None)

    def abandon(self, pull: PullInFlight, block_ids: list[int]) -> None:
        """Nobody waits for `pull` any more; `block_ids`, which it may still write, go into quarantine."""
        pull.sequence = None
        pull.quarantined = block_ids

    def overdue(self, now: float) -> list[Sequence]:
        """Sequences whose pull has passed its deadline."""
        return [
            pull.sequence
            for pull in self._in_flight.values()
            if pull.sequence is not None and pull.deadline <= now
        ]

    def next_deadline(self) -> float | None:
        return min((p.deadline for p in self._in_flight.values() if p.sequence is not None), default=None)
