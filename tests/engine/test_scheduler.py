"""The scheduler: fair, within its bounds, and without losing a block, whatever the order of events."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from sequences import make_sequence

from pdengine.engine.block_pool import BlockPool
from pdengine.engine.scheduler import Chunk, Scheduler, SchedulerConfig
from pdengine.engine.sequence import Mode, Sequence, blocks_for

EOS = frozenset({0})
TOKEN_IDS = st.integers(0, 7)  # one in eight ends the answer


def make_scheduler(
    num_blocks: int = 16,
    *,
    block_size: int = 4,
    max_batch_tokens: int = 8,
    max_requests: int = 4,
    max_pinned_blocks: int | None = None,
) -> Scheduler:
    pinned = num_blocks if max_pinned_blocks is None else max_pinned_blocks
    config = SchedulerConfig(block_size, max_batch_tokens, max_requests, pinned)
    return Scheduler(config, BlockPool(num_blocks))


class SchedulerLife(RuleBasedStateMachine):
    """Every command that an engine gives, in any order that an engine could give it."""

    @initialize(data=st.data())
    def build(self, data: st.DataObject) -> None:
        num_blocks = data.draw(st.integers(4, 24))
        self.scheduler = make_scheduler(
            num_blocks,
            block_size=data.draw(st.integers(1, 5)),
            max_batch_tokens=data.draw(st.integers(1, 12)),
            max_requests=data.draw(st.integers(1, 5)),
            max_pinned_blocks=data.draw(st.integers(1, num_blocks)),
        )
        self.alive: list[Sequence] = []  # added, and neither finished, leased nor aborted
        self.computed: dict[Sequence, int] = {}
        self.quarantined: list[list[int]] = []
        self.num_added = 0

    # ------------------------------------------------------------------------------- commands

    @rule(
        mode=st.sampled_from(Mode),
        num_prompt=st.integers(1, 20),
        max_tokens=st.integers(1, 10),
        num_output=st.integers(0, 9),
    )
    def add(self, mode: Mode, num_prompt: int, max_tokens: int, num_output: int) -> None:
        num_output = min(num_output, max_tokens - 1)
        if mode is Mode.DECODE:
            num_output, max_tokens = max(num_output, 1), max(max_tokens, 2)
        sequence = make_sequence(
            f"request-{self.num_added}",
            mode,
            range(1, num_prompt + 1),
            output_ids=range(1, num_output + 1),
            max_tokens=max_tokens,
        )
        if not self.scheduler.fits(sequence):
            return
        self.num_added += 1
        self.scheduler.add(sequence)
        self.alive.append(sequence)
        self.computed[sequence] = 0

    @rule()
    def admit(self) -> None:
        scheduler = self.scheduler
        waiting = list(scheduler.waiting)
        pulls = scheduler.admit()
        num_admitted = len(waiting) - len(scheduler.waiting)
        assert waiting[num_admitted:] == list(scheduler.waiting), "first come, first served"
        admitted = waiting[:num_admitted]
        assert pulls == [sequence for sequence in admitted if sequence.mode is Mode.DECODE]
        for sequence in admitted:
            group = scheduler.pulling if sequence.mode is Mode.DECODE else scheduler.running
            assert sequence in group
            assert len(sequence.block_ids) == self.blocks_needed(sequence)
        if scheduler.waiting:
            assert self.must_wait(scheduler.waiting[0])

    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        chunks = self.scheduler.schedule()
        self.check_chunks(chunks)
        sampled = [chunk.sequence for chunk in chunks if chunk.samples]
        token_ids = [data.draw(TOKEN_IDS) for _ in sampled]
        self.run(chunks, token_ids)

    @precondition(lambda self: self.scheduler.pulling)
    @rule(data=st.data())
    def land_a_pull(self, data: st.DataObject) -> None:
        self.start_decoding(data.draw(st.sampled_from(self.scheduler.pulling)))

    @precondition(lambda self: self.scheduler.pulling)
    @rule(data=st.data())
    def abandon_a_pull(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(self.scheduler.pulling))
        self.quarantined.append(self.scheduler.detach(sequence))
        self.alive.remove(sequence)

    @precondition(lambda self: self.quarantined)
    @rule()
    def end_of_quarantine(self) -> None:
        self.scheduler.pool.free(self.quarantined.pop())

    @precondition(lambda self: self.scheduler.leased)
    @rule(data=st.data())
    def free_lease(self, data: st.DataObject) -> None:
        self.scheduler.free_lease(data.draw(st.sampled_from(sorted(self.scheduler.leased))))

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(self.alive))
        assert self.scheduler.find(sequence.request_id) is sequence
        self.scheduler.remove(sequence)
        assert self.scheduler.find(sequence.request_id) is None
        self.alive.remove(sequence)

    # --------------------------------------------------------------------------------- checks

    @invariant()
    def every_block_has_one_owner(self) -> None:
        scheduler = self.scheduler
        scheduler.pool.check()
        owned = [block for sequence in self.alive for block in sequence.block_ids]
        owned += [block for block_ids in scheduler.leased.values() for block in block_ids]
        owned += [block for block_ids in self.quarantined for block in block_ids]
        assert len(owned) == len(set(owned)) == scheduler.pool.num_blocks - scheduler.pool.num_free

    @invariant()
    def every_sequence_is_in_one_place(self) -> None:
        scheduler = self.scheduler
        places = Counter([*scheduler.waiting, *scheduler.pulling, *scheduler.running])
        assert places == Counter(self.alive)
        assert scheduler.has_work == bool(self.alive)
        assert not any(sequence.block_ids for sequence in scheduler.waiting)
        assert all(sequence.mode is Mode.DECODE for sequence in scheduler.pulling)
        for sequence in scheduler.running:
            assert sequence.finish_reason is None
            assert sequence.num_computed < len(sequence.token_ids)
            assert len(sequence.token_ids) <= len(sequence.block_ids) * scheduler.config.block_size
        for sequence in self.alive:
            assert sequence.num_computed == self.computed[sequence]

    @invariant()
    def bounds_are_kept(self) -> None:
        scheduler = self.scheduler
        assert len(scheduler.running) + len(scheduler.pulling) <= scheduler.config.max_requests
        pinned = [len(s.block_ids) for s in scheduler.running if s.mode is Mode.PREFILL]
        pinned += [len(block_ids) for block_ids in scheduler.leased.values()]
        assert scheduler.num_pinned == sum(pinned)
        assert sum(pinned) <= scheduler.config.max_pinned_blocks or len(pinned) == 1

    def teardown(self) -> None:
        """Without further commands, everything that was added comes to its end."""
        if not hasattr(self, "scheduler"):
            return
        scheduler = self.scheduler
        while self.quarantined:
            self.end_of_quarantine()
        turns_left = 1 + sum(self.turns_needed(sequence) for sequence in self.alive)
        while scheduler.has_work:
            turns_left -= 1
            assert turns_left >= 0, "no progress"
            self.admit()
            for sequence in list(scheduler.pulling):
                self.start_decoding(sequence)
            chunks = scheduler.schedule()
            self.check_chunks(chunks)
            self.run(chunks, [1 for chunk in chunks if chunk.samples])
            for lease_id in list(scheduler.leased):
                scheduler.free_lease(lease_id)
        for lease_id in list(scheduler.leased):
            scheduler.free_lease(lease_id)
        assert not self.alive
        assert scheduler.pool.num_free == scheduler.pool.num_blocks
        assert scheduler.num_pinned == 0
        scheduler.pool.check()

    # ---------------------------------------------------------------------------------- parts

    def blocks_needed(self, sequence: Sequence) -> int:
        num_tokens = len(sequence.token_ids)
        if sequence.mode is not Mode.PREFILL:
            num_tokens = sequence.num_prompt_tokens + sequence.sampling.max_tokens - 1
        return blocks_for(num_tokens, self.scheduler.config.block_size)

    def must_wait(self, sequence: Sequence) -> bool:
        scheduler, needed = self.scheduler, self.blocks_needed(sequence)
        if len(scheduler.running) + len(scheduler.pulling) == scheduler.config.max_requests:
            return True
        if needed > scheduler.pool.num_free:
            return True
        pinned_too_many = scheduler.num_pinned + needed > scheduler.config.max_pinned_blocks
        return sequence.mode is Mode.PREFILL and scheduler.num_pinned > 0 and pinned_too_many

    def turns_needed(self, sequence: Sequence) -> int:
        """At most, if every turn computes only one token of one sequence."""
        return sequence.num_prompt_tokens + sequence.sampling.max_tokens + 1

    def check_chunks(self, chunks: list[Chunk]) -> None:
        running, budget = self.scheduler.running, self.scheduler.config.max_batch_tokens
        missing = {s: len(s.token_ids) - s.num_computed for s in running}
        expected_order = [s for s in running if missing[s] == 1] + [s for s in running if missing[s] > 1]
        scheduled = [chunk.sequence for chunk in chunks]
        assert scheduled == expected_order[: len(chunks)], "decode tokens first, then prompts, oldest first"
        assert all(1 <= chunk.num_tokens <= missing[chunk.sequence] for chunk in chunks)
        assert sum(chunk.num_tokens for chunk in chunks) == min(budget, sum(missing.values()))

    def run(self, chunks: list[Chunk], token_ids: list[int]) -> None:
        sampling = [chunk.sequence for chunk in chunks if chunk.samples]
        known = {sequence: list(sequence.token_ids) for sequence in sampling}
        for chunk in chunks:
            self.computed[chunk.sequence] += chunk.num_tokens
        assert self.scheduler.postprocess(chunks, token_ids, EOS) == sampling
        for sequence, token_id in zip(sampling, token_ids, strict=True):
            assert sequence.token_ids == [*known[sequence], token_id]
            assert sequence.num_computed == len(sequence.token_ids) - 1
            full = sequence.num_output_tokens == sequence.sampling.max_tokens
            assert sequence.finish_reason == ("stop" if token_id in EOS else "length" if full else None)
            if sequence.finish_reason is None and sequence.mode is Mode.PREFILL:
                block_ids = sequence.block_ids
                assert self.scheduler.leased[self.scheduler.lease(sequence)] == block_ids
            if sequence.finish_reason is not None or sequence.mode is Mode.PREFILL:
                assert sequence.block_ids == []
                self.alive.remove(sequence)

    def start_decoding(self, sequence: Sequence) -> None:
        self.computed[sequence] = len(sequence.token_ids) - 1
        self.scheduler.start_decoding(sequence, len(sequence.token_ids) - 1)


TestSchedulerLife = SchedulerLife.TestCase
TestSchedulerLife.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)


def step(scheduler: Scheduler, token_id: int = 1) -> list[tuple[str, int]]:
    """One step in which every sequence that gets a token gets `token_id`; what was computed."""
    scheduler.admit()
    chunks = scheduler.schedule()
    scheduler.postprocess(chunks, [token_id for chunk in chunks if chunk.samples], EOS)
    return [(chunk.sequence.request_id, chunk.num_tokens) for chunk in chunks]


def test_a_long_prompt_runs_in_chunks_beside_decoding_sequences() -> None:
    scheduler = make_scheduler(max_batch_tokens=6)
    scheduler.add(make_sequence("short", Mode.WHOLE, range(1, 4), max_tokens=5))
    assert step(scheduler) == [("short", 3)]
    scheduler.add(make_sequence("long", Mode.WHOLE, range(1, 13), max_tokens=2))
    assert step(scheduler) == [("short", 1), ("long", 5)]
    assert step(scheduler) == [("short", 1), ("long", 5)]
    assert step(scheduler) == [("short", 1), ("long", 2)]
    assert step(scheduler) == [("short", 1), ("long", 1)]
    assert not scheduler.has_work


def test_nobody_overtakes_the_head_of_the_queue() -> None:
    scheduler = make_scheduler(4)
    scheduler.add(make_sequence("first", Mode.WHOLE, range(8), max_tokens=1))
    scheduler.add(make_sequence("large", Mode.WHOLE, range(16), max_tokens=1))
    scheduler.add(make_sequence("small", Mode.WHOLE, range(1), max_tokens=1))
    scheduler.admit()
    assert [sequence.request_id for sequence in scheduler.running] == ["first"]
    assert scheduler.pool.num_free == 2


def test_the_last_token_of_an_answer_needs_no_room() -> None:
    scheduler = make_scheduler(2)
    scheduler.add(make_sequence("exact", Mode.WHOLE, range(1, 6), max_tokens=4))
    scheduler.admit()
    assert len(scheduler.running[0].block_ids) == 2
    assert not scheduler.fits(make_sequence("more", Mode.WHOLE, range(1, 6), max_tokens=5))


def test_leases_and_prompts_for_others_share_the_pinned_bound() -> None:
    scheduler = make_scheduler(16, max_pinned_blocks=3)
    for name in ("a", "b", "c"):
        scheduler.add(make_sequence(name, Mode.PREFILL, range(1, 5)))
    scheduler.add(make_sequence("d", Mode.PREFILL, range(1, 5)))
    scheduler.admit()
    assert scheduler.num_pinned == len(scheduler.running) == 3
    step(scheduler)
    lease_id = scheduler.lease(scheduler.running[0])
    scheduler.admit()
    assert [sequence.request_id for sequence in scheduler.waiting] == ["d"]
    scheduler.free_lease(lease_id)
    scheduler.admit()
    assert not scheduler.waiting
    assert scheduler.num_pinned == 3


def test_a_prompt_beyond_the_pinned_bound_runs_alone() -> None:
    scheduler = make_scheduler(16, max_pinned_blocks=3)
    scheduler.add(make_sequence("small", Mode.PREFILL, range(1, 5)))
    scheduler.add(make_sequence("large", Mode.PREFILL, range(1, 25)))
    scheduler.admit()
    assert [sequence.request_id for sequence in scheduler.running] == ["small"]
    scheduler.remove(scheduler.running[0])
    scheduler.add(make_sequence("small again", Mode.PREFILL, range(1, 5)))
    scheduler.admit()
    assert [sequence.request_id for sequence in scheduler.running] == ["large"]
    assert scheduler.num_pinned == 6


def test_requests_that_run_whole_are_not_pinned() -> None:
    scheduler = make_scheduler(16, max_pinned_blocks=1)
    scheduler.add(make_sequence("whole", Mode.WHOLE, range(1, 17)))
    scheduler.add(make_sequence("decode", Mode.DECODE, range(1, 17), output_ids=[1]))
    assert [sequence.request_id for sequence in scheduler.admit()] == ["decode"]
    assert scheduler.num_pinned == 0


@pytest.mark.parametrize("max_tokens", [1, 5])
def test_a_prompt_that_ends_with_its_first_token_gives_its_blocks_back(max_tokens: int) -> None:
    scheduler = make_scheduler()
    scheduler.add(make_sequence("prompt", Mode.PREFILL, range(1, 5), max_tokens=max_tokens))
    step(scheduler, token_id=0 if max_tokens > 1 else 1)
    assert not scheduler.has_work
    assert scheduler.num_pinned == 0
    assert scheduler.pool.num_free == 16


def test_a_resumed_request_computes_its_answer_so_far_as_part_of_the_prompt() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_sequence("resumed", Mode.WHOLE, [1, 2, 3], output_ids=[4, 5], max_tokens=4))
    assert step(scheduler) == [("resumed", 5)]
    assert step(scheduler) == [("resumed", 1)]
    assert not scheduler.has_work


def test_a_sequence_that_never_fits_is_a_defect_of_the_caller() -> None:
    scheduler = make_scheduler(2)
    with pytest.raises(AssertionError):
        scheduler.add(make_sequence("huge", Mode.PREFILL, range(9)))


@pytest.mark.parametrize(
    ("token_id", "ignore_eos", "reason"),
    [(0, False, "stop"), (0, True, None), (9, True, "stop"), (5, False, None)],
)
def test_what_ends_an_answer(token_id: int, ignore_eos: bool, reason: str | None) -> None:
    sequence = make_sequence("request", Mode.WHOLE, [1], stop_token_ids=(9,), ignore_eos=ignore_eos)
    sequence.append(token_id, EOS)
    assert sequence.finish_reason == reason
