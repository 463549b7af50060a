"""What runs in the next step: continuous batching with chunked prefill.

(Orca, OSDI 2022; Sarathi, arXiv 2308.16369.) A sequence is admitted when its whole need fits: blocks for the
prompt and the longest answer are allocated at once. So a sequence that runs can always finish, nothing is
ever preempted, and its blocks are mostly consecutive. There is no separate prefill phase: every running
sequence has tokens whose keys and values are not in the pool yet, one for a sequence that decodes, many for a
new prompt; a step takes as many as its token budget allows, decoding sequences first.

    waiting --admit--> running --finish--> freed
               |          ^  \\--prompt done, mode PREFILL--> leased --released or expired--> freed
               \\-> pulling-/
                      ^
    reserved ---------/    an early pull: its prompt is still computed elsewhere
"""

from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

from pdengine.engine.block_pool import BlockPool
from pdengine.engine.sequence import Mode, Sequence, blocks_for


@dataclass(frozen=True)
class SchedulerConfig:
    """max_batch_tokens: tokens computed per step. max_requests: sequences that hold blocks at once.
    max_pinned_blocks: blocks that prompts computed for others may hold, running or leased; a single larger
    prompt is admitted when nothing else is pinned. max_waiting: sequences in the queue.
    """

    block_size: int
    max_batch_tokens: int
    max_requests: int
    max_pinned_blocks: int
    max_waiting: int = 1024


class Chunk(NamedTuple):
    """The next `num_tokens` tokens of a sequence, from `sequence.num_computed` on."""

    sequence: Sequence
    num_tokens: int

    @property
    def samples(self) -> bool:
        """Whether the chunk reaches the end of the known tokens, so that the next one is sampled."""
        return self.sequence.num_computed + self.num_tokens == len(self.sequence.token_ids)

    @property
    def num_prompt_tokens(self) -> int:
        """Those of the tokens that belong to the prompt."""
        missing = self.sequence.num_prompt_tokens - self.sequence.num_computed
        return min(self.num_tokens, max(0, missing))


class Scheduler:
    """Belongs to the engine thread. Every sequence is in exactly one of waiting, pulling, running."""

    def __init__(self, config: SchedulerConfig, pool: BlockPool) -> None:
        self.config = config
        self.pool = pool
        self.waiting: deque[Sequence] = deque()
        self.pulling: list[Sequence] = []
        self.running: list[Sequence] = []
        self.leased: dict[int, list[int]] = {}  # lease id -> blocks
        self.num_reserved = 0  # requests that hold blocks for an early pull, and have no sequence yet
        self.num_pinned = 0  # blocks of running prompts in mode PREFILL and of leases
        self._next_lease_id = 0

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.pulling or self.running)

    def fits(self, sequence: Sequence) -> bool:
        """Whether the sequence could run in an empty pool."""
        return self._blocks_needed(sequence) <= self.pool.num_blocks

    def refusal(self, sequence: Sequence) -> str | None:
        """Why `sequence` cannot be added now, if it cannot. Leases bound what can come to be decoded."""
        if sequence.mode is Mode.DECODE and sequence.writer is None:
            return None
        if len(self.waiting) >= self.config.max_waiting:
            return f"{len(self.waiting)} requests are waiting, which is the limit"
        if sequence.may_wait:
            return None
        num_blocks = self._blocks_needed(sequence)
        if self.waiting or self._is_full:
            return "other requests are waiting or running"
        if sequence.mode is Mode.PREFILL and not self._may_pin(num_blocks):
            return f"{self.num_pinned} KV blocks are pinned by prompts that nobody has pulled yet"
        if num_blocks > self.pool.num_free:
            return f"it needs {num_blocks} KV blocks, {self.pool.num_free} are free"
        return None

    def add(self, sequence: Sequence) -> None:
        assert self.fits(sequence)
        self.waiting.append(sequence)

    def reserve(self, num_blocks: int) -> list[int] | None:
        """Blocks for a request whose prompt is still computed elsewhere, unless others wait for them."""
        if self.waiting or self._is_full:
            return None
        block_ids = self.pool.allocate(num_blocks)
        if block_ids is not None:
            self.num_reserved += 1
        return block_ids

    def drop_reserved(self) -> None:
        """One request with reserved blocks will not come; the blocks are freed by who holds them."""
        self.num_reserved -= 1

    def add_reserved(self, sequence: Sequence) -> None:
        """A request with reserved blocks is complete. It waits for its pull, and never for the queue: what
        is queued might wait for its blocks."""
        self.num_reserved -= 1
        self.pulling.append(sequence)

    def admit(self) -> list[Sequence]:
        """Give blocks to waiting sequences, first come, first served; returns those whose KV cache must be
        pulled, or is pushed."""
        pulls: list[Sequence] = []
        while self.waiting and not self._is_full:
            sequence = self.waiting[0]
            num_blocks = self._blocks_needed(sequence)
            if sequence.mode is Mode.PREFILL and not self._may_pin(num_blocks):
                break
            block_ids = self.pool.allocate(num_blocks)
            if block_ids is None:
                break
            self.waiting.popleft()
            sequence.block_ids = block_ids
            if sequence.mode is Mode.PREFILL:
                self.num_pinned += num_blocks
            if sequence.mode is Mode.DECODE:
                self.pulling.append(sequence)
                pulls.append(sequence)
            else:
                self.running.append(sequence)
        return pulls

    def schedule(self) -> list[Chunk]:
        """The chunks of the next step: decoding sequences first, then prompts, under the token budget."""
        budget = self.config.max_batch_tokens
        chunks: list[Chunk] = []
        pending = [(len(s.token_ids) - s.num_computed, s) for s in self.running]
        for missing, sequence in sorted(pending, key=lambda item: item[0] > 1):  # stable: oldest first
            num_tokens = min(missing, budget)
            if num_tokens == 0:
                break
            chunks.append(Chunk(sequence, num_tokens))
            budget -= num_tokens
        return chunks

    def postprocess(self, chunks: list[Chunk], token_ids: list[int], eos: frozenset[int]) -> list[Sequence]:
        """Record a step: `token_ids` are those sampled, in the order of the chunks that sample.

        Returns the sequences that got a token. Finished ones have given their blocks back; a prompt that
        was computed for another worker still holds them, for the caller to lease.
        """
        sampled = iter(token_ids)
        advanced: list[Sequence] = []
        for chunk in chunks:
            sequence, samples = chunk.sequence, chunk.samples
            sequence.num_computed += chunk.num_tokens
            if not samples:
                continue
            sequence.append(next(sampled), eos)
            advanced.append(sequence)
            if sequence.finish_reason is not None:
                self.remove(sequence)
        return advanced

    def start_decoding(self, sequence: Sequence, num_pulled: int) -> None:
        """The KV cache of the first `num_pulled` tokens has landed."""
        self.pulling.remove(sequence)
        sequence.num_computed = num_pulled
        self.running.append(sequence)

    def lease(self, sequence: Sequence) -> int:
        """Take a computed prompt out of the batch and keep its blocks under a new lease id."""
        self.running.remove(sequence)
        lease_id = self.lease_id(sequence)
        self.leased[lease_id] = sequence.block_ids
        sequence.block_ids = []
        return lease_id

    def lease_id(self, sequence: Sequence) -> int:
        """The id of the lease that this prompt has, or will have when it is computed. Never used again."""
        if sequence.lease_id is None:
            self._next_lease_id += 1
            sequence.lease_id = self._next_lease_id
        return sequence.lease_id

    def free_lease(self, lease_id: int) -> None:
        block_ids = self.leased.pop(lease_id)
        self.num_pinned -= len(block_ids)
        self.pool.free(block_ids)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is, and free its blocks."""
        self.pool.free(self.detach(sequence))

    def detach(self, sequence: Sequence) -> list[int]:
        """Take a sequence out, but leave its blocks allocated and return them."""
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        elif sequence in self.pulling:
            self.pulling.remove(sequence)
        else:
            self.running.remove(sequence)
            if sequence.mode is Mode.PREFILL:
                self.num_pinned -= len(sequence.block_ids)
        block_ids, sequence.block_ids = sequence.block_ids, []
        return block_ids

    def find(self, request_id: str) -> Sequence | None:
        for group in (self.running, self.pulling, self.waiting):
            for sequence in group:
                if sequence.request_id == request_id:
                    return sequence
        return None

    @property
    def _is_full(self) -> bool:
        return len(self.running) + len(self.pulling) + self.num_reserved >= self.config.max_requests

    def _blocks_needed(self, sequence: Sequence) -> int:
        return blocks_for(sequence.max_cached_tokens, self.config.block_size)

    def _may_pin(self, num_blocks: int) -> bool:
        return self.num_pinned == 0 or self.num_pinned + num_blocks <= self.config.max_pinned_blocks
