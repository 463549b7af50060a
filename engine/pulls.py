"""Pulls: which request waits for which blocks of a peer, until when, and which blocks must not be touched.

A pull brings the KV cache of one prompt here. It may begin while the prompt is still being computed: then it
reads the blocks that are done, and takes its sequence when the prompt is complete. One read is in flight per
pull at a time; it covers all blocks that are ready by then.

A one-sided read cannot be called back. When nobody wants a pull any more (deadline, abort, lease lost), its
destination blocks stay in quarantine, owned by nobody, until the transfer reports that the read has ended.
"""

from dataclasses import dataclass, field
from time import monotonic

from pdengine.engine.block_pool import BlockPool
from pdengine.engine.sequence import Sequence, blocks_for
from pdengine.transport.messages import KVLease
from pdengine.transport.regions import block_runs
from pdengine.transport.transfer import PullCompleted, PullFailed, Transfer


@dataclass(eq=False)
class Pull:
    """Written by Pulls.

    sequence: who waits for it; None while the prompt is still computed elsewhere, and once it is abandoned.
    block_ids: all blocks of the request; the leading ones, as many as the lease holds, are the destinations,
    except the first `num_cached`, which have been here before and belong to others, too. num_ready,
    num_posted, num_landed: leading blocks that the peer has finished, that were asked for, that are here, all
    of them with the cached ones. deadline: of the read in flight, or for news of an early pull;
    time.monotonic().
    """

    request_id: str
    attempt: int
    lease: KVLease
    block_ids: list[int]
    deadline: float
    sequence: Sequence | None = None
    abandoned: bool = False
    num_cached: int = 0
    num_ready: int = 0
    num_posted: int = 0
    num_landed: int = 0
    num_early: int = 0  # asked for before the prompt was complete
    reads: list[PullCompleted] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.num_ready = self.num_posted = self.num_landed = self.num_cached

    @property
    def is_early(self) -> bool:
        return self.sequence is None and not self.abandoned

    @property
    def is_complete(self) -> bool:
        """Whether the whole prompt is here, and somebody wants it."""
        return self.sequence is not None and self.num_landed == self.num_ready

    @property
    def is_reading(self) -> bool:
        return self.num_landed < self.num_posted

    @property
    def completed_at(self) -> float:
        """When the last read ended, if there was any; time.monotonic()."""
        return max((read.completed_at for read in self.reads), default=float("-inf"))


class Pulls:
    """Belongs to the engine thread."""

    def __init__(self, transfer: Transfer, pool: BlockPool, *, block_size: int, timeout: float) -> None:
        self._transfer = transfer
        self._pool = pool
        self._block_size = block_size
        self._timeout = timeout
        self._pulls: list[Pull] = []
        self._reads: dict[int, Pull] = {}  # pull id of the transfer -> whose read it is
        self._next_read_id = 0

    def __len__(self) -> int:
        return len(self._pulls)

    @property
    def num_quarantined(self) -> int:
        return sum(len(pull.block_ids) for pull in self._pulls if pull.abandoned)

    def start(self, sequence: Sequence) -> Pull:
        """Pull what the lease of `sequence` covers into its blocks, but for those that were cached."""
        assert sequence.lease is not None
        lease = sequence.lease.lease
        num_cached = min(sequence.num_cached_blocks, blocks_for(lease.num_tokens, self._block_size))
        pull = self._add(sequence.request_id, sequence.attempt, lease, sequence.block_ids, num_cached)
        self.complete(pull, sequence)
        return pull

    def start_early(
        self, request_id: str, attempt: int, lease: KVLease, block_ids: list[int], num_cached: int
    ) -> Pull:
        """Prepare to pull a prompt into `block_ids` while it is computed; `advance` says what is done."""
        return self._add(request_id, attempt, lease, block_ids, num_cached)

    def advance(self, pull: Pull, num_tokens: int) -> None:
        """The peer has computed the prompt's first `num_tokens` tokens; only full blocks are read yet."""
        pull.num_ready = max(pull.num_ready, num_tokens // self._block_size)
        pull.deadline = monotonic() + self._timeout
        self._read_on(pull)

    def complete(self, pull: Pull, sequence: Sequence) -> None:
        """The prompt is complete, and `sequence` waits for all of it in the blocks of the pull."""
        pull.sequence = sequence
        sequence.block_ids = pull.block_ids
        pull.num_early = pull.num_posted - pull.num_cached
        pull.num_ready = blocks_for(pull.lease.num_tokens, self._block_size)
        pull.deadline = monotonic() + self._timeout
        self._read_on(pull)

    def finish_read(self, event: PullCompleted | PullFailed) -> Pull:
        """A read has ended: the next one begins, if more is ready, or quarantined blocks are free again."""
        pull = self._reads.pop(event.pull_id)
        if pull.abandoned:
            self._free(pull)
        elif isinstance(event, PullCompleted):
            pull.reads.append(event)
            pull.num_landed = pull.num_posted
            self._read_on(pull)
        else:
            pull.num_posted = pull.num_landed
        return pull

    def remove(self, pull: Pull) -> None:
        """The pull has done its work; the blocks are the sequence's."""
        assert not pull.is_reading
        self._pulls.remove(pull)

    def abandon(self, pull: Pull) -> None:
        """Nobody wants `pull` any more: its blocks are freed, once no read may write to them."""
        pull.sequence = None
        pull.abandoned = True
        if not pull.is_reading:
            self._free(pull)
            return
        self._pool.free(pull.block_ids[: pull.num_cached])
        pull.block_ids = pull.block_ids[pull.num_cached :]

    def of_sequence(self, sequence: Sequence) -> Pull | None:
        """The pull that `sequence` waits for."""
        return next((pull for pull in self._pulls if pull.sequence is sequence), None)

    def early(self, request_id: str) -> Pull | None:
        """The early pull of this request, whose prompt is still computed elsewhere."""
        return next((pull for pull in self._pulls if pull.is_early and pull.request_id == request_id), None)

    def all_early(self) -> list[Pull]:
        return [pull for pull in self._pulls if pull.is_early]

    def overdue(self, now: float) -> list[Pull]:
        """Pulls that somebody still wants and whose deadline has passed."""
        return [pull for pull in self._pulls if not pull.abandoned and pull.deadline <= now]

    def next_deadline(self) -> float | None:
        return min((pull.deadline for pull in self._pulls if not pull.abandoned), default=None)

    def _add(
        self, request_id: str, attempt: int, lease: KVLease, block_ids: list[int], num_cached: int
    ) -> Pull:
        deadline = monotonic() + self._timeout
        pull = Pull(request_id, attempt, lease, block_ids, deadline, num_cached=num_cached)
        self._pulls.append(pull)
        return pull

    def _read_on(self, pull: Pull) -> None:
        """Read what is ready, unless a read is under way: its end comes back here."""
        if pull.is_reading or pull.num_posted == pull.num_ready:
            return
        blocks = slice(pull.num_posted, pull.num_ready)
        pull.num_posted = pull.num_ready
        pull.deadline = monotonic() + self._timeout
        self._next_read_id += 1
        self._reads[self._next_read_id] = pull
        runs = block_runs(pull.lease.block_ids[blocks], pull.block_ids[blocks])
        self._transfer.pull(self._next_read_id, pull.lease.engine_id, runs)

    def _free(self, pull: Pull) -> None:
        self._pulls.remove(pull)
        self._pool.free(pull.block_ids)
