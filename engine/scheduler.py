"""What runs in the next step: continuous batching with chunked prefill, a prefix cache and preemption.

(Orca, OSDI 2022; Sarathi, arXiv 2308.16369; PagedAttention, arXiv 2309.06180.) A sequence is admitted when
the tokens that are known fit; further blocks are allocated as its answer grows. If there are none left, the
youngest sequence of the lowest priority is preempted, unless it is the one that needs them: then it waits.
The blocks of a preempted one are freed, and it is computed anew when there is room. The oldest one of the
highest priority is never preempted, so some sequence always comes to its end.

There is no separate prefill phase: every running sequence has tokens whose keys and values are not in the
pool yet, one for a sequence that decodes, many for a new prompt; a step takes as many as its budget allows,
decoding sequences first.

    waiting --admit--> running --finish--> freed
     ^         |         |  ^  \\--prompt done, mode PREFILL--> leased --released or expired--> freed
     |         \\-> pulling -/
     \\----preempt-------/  ^
    reserved --------------/    an early pull: its prompt is still computed elsewhere
"""

from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from pdengine.engine.block_pool import BlockPool
from pdengine.engine.pinned_blocks import PinnedBlocks
from pdengine.engine.sequence import Mode, Sequence, blocks_for
from pdengine.engine.step import BlockCopy, Chunk, Step


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


class Admission(NamedTuple):
    """pulls: sequences whose KV cache must be pulled, or is pushed. runs: those that can be computed."""

    pulls: list[Sequence]
    runs: list[Sequence]


class Reservation(NamedTuple):
    """block_ids: the first `num_cached` of them hold what is looked for."""

    block_ids: list[int]
    num_cached: int


class _Room(NamedTuple):
    """What a sequence gets when it is admitted: blocks that it shares, and new ones."""

    cached: list[int]
    num_new: int


class Scheduler:
    """Belongs to the engine thread. Every sequence is in exactly one of waiting, pulling, running."""

    def __init__(self, config: SchedulerConfig, pool: BlockPool) -> None:
        self.config = config
        self.pool = pool
        self.waiting: list[Sequence] = []  # by rank
        self.pulling: list[Sequence] = []
        self.running: list[Sequence] = []  # by rank
        self.leased: dict[int, list[int]] = {}  # lease id -> blocks
        self.num_reserved = 0  # requests that hold blocks for an early pull, and have no sequence yet
        self.num_preemptions = 0  # so far
        self._requests: dict[str, list[Sequence]] = {}
        self._pinned = PinnedBlocks()
        self._next_order = 0
        self._next_lease_id = 0

    @property
    def num_pinned(self) -> int:
        """Blocks of prompts computed for others, running or leased."""
        return len(self._pinned)

    # ------------------------------------------------------------------------------------ queue

    def fits(self, sequence: Sequence) -> bool:
        """Whether the sequence, with its siblings, could run alone; they need not all run at once."""
        num_blocks = blocks_for(sequence.max_cached_tokens, self.config.block_size)
        return num_blocks <= self.pool.num_blocks and sequence.num_slots <= self.config.max_requests

    def refusal(self, sequence: Sequence) -> str | None:
        """Why `sequence` cannot be added now, if it cannot. Leases bound what can come to be decoded."""
        if sequence.mode is Mode.DECODE and sequence.writer is None:
            return None
        if len(self.waiting) >= self.config.max_waiting:
            return f"{len(self.waiting)} requests are waiting, which is the limit"
        if sequence.may_wait:
            return None
        if self.waiting or sequence.num_slots > self._slots_left:
            return "other requests are waiting or running"
        room = self._find_room(sequence, self._num_growing)
        return room if isinstance(room, str) else None

    def add(self, sequence: Sequence) -> None:
        assert self.fits(sequence)
        self._take_up(sequence, self._new_order())
        insort(self.waiting, sequence, key=_rank)

    def reserve(self, names: list[bytes], num_blocks: int) -> Reservation | None:
        """Blocks for a prompt that is still computed elsewhere, unless others wait for them. Those of the
        prefix `names` that are here already are shared."""
        if self.waiting or self._slots_left < 1:
            return None
        cached = self.pool.find(names[:num_blocks])
        room = _Room(cached, num_blocks - len(cached))
        if self.pool.num_free_without(cached) < room.num_new + self._num_growing:
            return None
        self.num_reserved += 1
        return Reservation(self._allocate(room), len(cached))

    def drop_reserved(self) -> None:
        """One request with reserved blocks will not come; the blocks are freed by who holds them."""
        self.num_reserved -= 1

    def may_add_reserved(self, sequence: Sequence) -> bool:
        """Whether there is a place for each of its answers; a reservation has kept only one."""
        return sequence.num_slots - 1 <= self._slots_left

    def add_reserved(self, sequence: Sequence) -> None:
        """A request with reserved blocks is complete. It waits for its pull, and never for the queue: what
        is queued might wait for its blocks."""
        self.num_reserved -= 1
        self._take_up(sequence, self._new_order())
        self.pulling.append(sequence)

    def admit(self) -> Admission:
        """Give blocks to waiting sequences, by priority, then first come, first served."""
        admitted = Admission([], [])
        if not self.waiting:
            return admitted
        slots_left, num_growing = self._slots_left, self._num_growing
        while self.waiting and self.waiting[0].num_slots <= slots_left:
            sequence = self.waiting[0]
            room = self._find_room(sequence, num_growing)
            if isinstance(room, str):
                break
            del self.waiting[0]
            self._give_blocks(sequence, room)
            slots_left -= sequence.num_slots
            if sequence.mode is Mode.DECODE:
                self.pulling.append(sequence)
                admitted.pulls.append(sequence)
            else:
                insort(self.running, sequence, key=_rank)
                admitted.runs.append(sequence)
            num_growing += _num_growing(sequence)
        return admitted

    def _find_room(self, sequence: Sequence, num_growing: int) -> _Room | str:
        """What to admit `sequence` with, or why it cannot be admitted now. A block is left for each sequence
        that grows, so that hardly any is preempted at once."""
        num_blocks = blocks_for(len(sequence.token_ids), self.config.block_size)
        too_few = f"it needs {num_blocks} KV blocks, {self.pool.num_free} are free"
        if self.pool.num_free <= num_growing:
            return too_few  # without looking for a prefix at every turn
        cached = self._find_prefix(sequence)
        num_free = self.pool.num_free_without(cached)
        if len(cached) == num_blocks and num_free <= num_growing:
            # There is no room for a copy of the last block (see _give_blocks): compute that one anew.
            cached.pop()
            num_free = self.pool.num_free_without(cached)
        num_new = max(1, num_blocks - len(cached))
        if num_free < num_new + num_growing:
            return too_few
        if sequence.mode is Mode.PREFILL and self._pinned:
            num_pinned = self.num_pinned + self._pinned.num_unpinned(cached) + num_new
            if num_pinned > self.config.max_pinned_blocks:
                return f"{self.num_pinned} KV blocks are pinned by prompts that nobody has pulled yet"
        return _Room(cached, num_new)

    def _find_prefix(self, sequence: Sequence) -> list[int]:
        """The blocks here that hold the KV cache of the sequence's first tokens."""
        if sequence.prefix is None or sequence.writer is not None or sequence.push is not None:
            return []  # what is pushed is written whole
        if sequence.num_scored < sequence.num_prompt_tokens:
            return []  # every token of the prompt is computed, because the next one is scored by it
        sequence.prefix.extend(sequence.token_ids)
        num_full = len(sequence.token_ids) // self.config.block_size
        return self.pool.find(sequence.prefix.blocks[:num_full])

    def _give_blocks(self, sequence: Sequence, room: _Room) -> None:
        """Where all tokens are cached, the last one is computed nevertheless, because the next one is sampled
        from its hidden state: then the new block is for a copy of the last cached one (_make_writable)."""
        num_cached = len(room.cached)
        sequence.block_ids = self._allocate(room)
        sequence.num_named = sequence.num_cached_blocks = num_cached
        sequence.num_writable = 0
        sequence.num_computed = min(num_cached * self.config.block_size, len(sequence.token_ids) - 1)
        if sequence.mode is Mode.PREFILL:
            self._pinned.pin(sequence.block_ids)

    def _allocate(self, room: _Room) -> list[int]:
        self.pool.share(room.cached)
        block_ids = self.pool.allocate(room.num_new)
        assert block_ids is not None
        return room.cached + block_ids

    # ------------------------------------------------------------------------------------- step

    def schedule(self, max_prompt_tokens: int | None = None, *, may_preempt: bool = True) -> Step:
        """The next step: a token of every decoding sequence, then prompts, under the budget of tokens.

        It must run: its blocks and copies are taken. It is empty if nothing can run until a pull or a lease
        has ended. max_prompt_tokens: a further bound on the tokens of prompts. may_preempt: False if the
        caller would rather give other blocks back, when the step is short of them.
        """
        step = Step()
        chunks, budget = step.chunks, self.config.max_batch_tokens
        prompts: list[Sequence] = []
        # Only sequences after the current one are preempted, so what is in the step stays in it.
        for sequence in self.running:
            if len(chunks) == budget:
                break
            num_tokens = len(sequence.token_ids)
            if num_tokens > sequence.num_writable and not self._make_writable(sequence, step, may_preempt):
                continue
            if num_tokens - sequence.num_computed == 1:
                chunks.append(Chunk(sequence, 1))
            else:
                prompts.append(sequence)
        if prompts:
            budget -= len(chunks)
            chunks += _share_budget(
                prompts, budget if max_prompt_tokens is None else min(budget, max_prompt_tokens)
            )
        return step

    def postprocess(self, step: Step, token_ids: list[int], eos: frozenset[int]) -> list[Sequence]:
        """Record a step: `token_ids` are those sampled, in the order of the chunks that sample; of a sequence
        with siblings, one for each of them follows its own.

        Returns the sequences that got a token. Finished ones have given their blocks back; a prompt that
        was computed for another worker still holds them, for the caller to lease.
        """
        block_size = self.config.block_size
        sampled = iter(token_ids)
        advanced: list[Sequence] = []
        for sequence, num_tokens in step.chunks:
            sequence.num_computed += num_tokens
            if sequence.num_computed // block_size > sequence.num_named:
                self._name_blocks(sequence)
            if sequence.num_computed < len(sequence.token_ids):
                continue
            answers = sequence.answers
            for answer in answers:
                answer.append(next(sampled), eos)
            advanced += answers
            if sequence.mode is Mode.PREFILL:
                if all(answer.finish_reason is not None for answer in answers):
                    self.remove(sequence)
                continue
            if sequence.siblings:
                self._fork(sequence)
            for answer in answers:
                if answer.finish_reason is not None:
                    self.remove(answer)
        return advanced

    def start_decoding(self, sequence: Sequence, num_pulled: int) -> None:
        """The KV cache of the first `num_pulled` tokens has landed."""
        self.pulling.remove(sequence)
        sequence.num_computed = num_pulled
        # From now on it is like any other: if it is preempted, it is computed here.
        sequence.mode = Mode.WHOLE
        insort(self.running, sequence, key=_rank)
        self._name_blocks(sequence)
        self._fork(sequence)

    def _fork(self, sequence: Sequence) -> None:
        """Let the siblings run: they share the blocks, and copy those that they write."""
        siblings, sequence.siblings = sequence.siblings, []
        num_shared = blocks_for(sequence.num_computed, self.config.block_size)
        sequence.num_writable = 0
        for sibling in siblings:
            sibling.mode = sequence.mode
            sibling.block_ids = sequence.block_ids[:num_shared]
            sibling.num_computed = sequence.num_computed
            sibling.num_named = min(sequence.num_named, sequence.num_computed // self.config.block_size)
            self.pool.share(sibling.block_ids)
            self._take_up(sibling, sequence.order)
            insort(self.running, sibling, key=_rank)

    def _make_writable(self, sequence: Sequence, step: Step, may_preempt: bool) -> bool:
        """Let the sequence hold blocks of its own for its tokens that are not computed yet; False if it must
        wait for them."""
        block_size, block_ids = self.config.block_size, sequence.block_ids
        num_blocks = blocks_for(len(sequence.token_ids), block_size)
        if num_blocks > len(block_ids):
            new = self._grow(sequence, num_blocks - len(block_ids), step, may_preempt)
            if new is None:
                return False
            block_ids += new
        index = sequence.num_computed // block_size  # those after it are never shared
        source = block_ids[index]
        if not self.pool.is_writable(source):
            # One more than it needs was allocated for this copy when it was admitted, or it was forked.
            has_spare = len(block_ids) > num_blocks
            new = [block_ids.pop()] if has_spare else self._grow(sequence, 1, step, may_preempt)
            if new is not None:
                [block_ids[index]] = new
                step.copies.append(BlockCopy(source, block_ids[index]))
                sequence.num_named = min(sequence.num_named, index)
                if sequence.mode is Mode.PREFILL:
                    self._pinned.unpin([source])
                self.pool.free([source])
            elif not self.pool.is_writable(source):  # else those who shared it were preempted for the copy
                return False
        sequence.num_writable = num_blocks * block_size
        return True

    def _grow(self, sequence: Sequence, count: int, step: Step, may_preempt: bool) -> list[int] | None:
        """Allocate, if need be at the cost of sequences that come later."""
        while (block_ids := self.pool.allocate(count)) is None:
            step.is_short = True
            victim = self._last_after(sequence) if may_preempt else None
            if victim is None:
                return None
            self._preempt(victim)
        return block_ids

    def _last_after(self, sequence: Sequence) -> Sequence | None:
        """The last one after `sequence` that can be computed anew."""
        for victim in reversed(self.running):
            if victim is sequence:
                break
            if victim.mode is Mode.WHOLE:
                return victim
        return None

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.pool.free(sequence.block_ids)
        sequence.block_ids = []
        sequence.num_computed = sequence.num_named = 0
        sequence.was_preempted = True
        insort(self.waiting, sequence, key=_rank)
        self.num_preemptions += 1

    def _name_blocks(self, sequence: Sequence) -> None:
        """Let others find the blocks that are full now."""
        num_full = sequence.num_computed // self.config.block_size
        if sequence.prefix is not None and num_full > sequence.num_named:
            sequence.prefix.extend(sequence.token_ids)
            for index in range(sequence.num_named, num_full):
                self.pool.name(sequence.block_ids[index], sequence.prefix.blocks[index])
        sequence.num_named = max(sequence.num_named, num_full)

    # ----------------------------------------------------------------------------------- leases

    def lease(self, sequence: Sequence) -> int:
        """Take a computed prompt out of the batch and keep its blocks under a new lease id."""
        self.running.remove(sequence)
        self._leave(sequence)
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
        self._pinned.unpin(block_ids)
        self.pool.free(block_ids)

    # -------------------------------------------------------------------------------------- end

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
                self._pinned.unpin(sequence.block_ids)
        self._leave(sequence)
        block_ids, sequence.block_ids = sequence.block_ids, []
        return block_ids

    def find(self, request_id: str) -> list[Sequence]:
        """The answers to this request that are here, except siblings that were not forked yet."""
        return list(self._requests.get(request_id, ()))

    def __iter__(self) -> Iterator[Sequence]:
        return iter([*self.waiting, *self.pulling, *self.running])

    def _new_order(self) -> int:
        self._next_order += 1
        return self._next_order

    def _take_up(self, sequence: Sequence, order: int) -> None:
        sequence.order = order
        self._requests.setdefault(sequence.request_id, []).append(sequence)

    def _leave(self, sequence: Sequence) -> None:
        sequences = self._requests[sequence.request_id]
        sequences.remove(sequence)
        if not sequences:
            del self._requests[sequence.request_id]

    # -------------------------------------------------------------------------------------- room

    @property
    def _slots_left(self) -> int:
        used = sum([1 + len(s.siblings) for s in (*self.running, *self.pulling)])
        return self.config.max_requests - used - self.num_reserved

    @property
    def _num_growing(self) -> int:
        return sum([_num_growing(s) for s in (*self.running, *self.pulling)])


def _num_growing(sequence: Sequence) -> int:
    """Sequences that will need further blocks: a prompt for another worker needs none."""
    return 0 if sequence.mode is Mode.PREFILL else sequence.num_slots


def _rank(sequence: Sequence) -> tuple[int, int, int]:
    return sequence.rank


def _share_budget(prompts: list[Sequence], budget: int) -> list[Chunk]:
    """How many tokens of each prompt to compute: half of the budget for the one that comes first, so that it
    goes on whatever else arrives; the rest for the shortest ones, so that none waits behind a long one."""
    missing = [len(s.token_ids) - s.num_computed for s in prompts]
    shares = [0] * len(prompts)
    shares[0] = min(missing[0], -(-budget // 2))
    budget -= shares[0]
    for index in sorted(range(len(prompts)), key=missing.__getitem__):
        num_tokens = min(missing[index] - shares[index], budget)
        shares[index] += num_tokens
        budget -= num_tokens
    return [Chunk(s, count) for s, count in zip(prompts, shares, strict=True) if count]
