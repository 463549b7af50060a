"""Every order of events that an engine could give the scheduler, with a model that checks what it reads."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from random import Random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from paged_memory import PagedMemory, next_token, states
from sequences import make_work, names_of

from pdengine.engine.block_pool import BlockPool
from pdengine.engine.scheduler import Reservation, Scheduler, SchedulerConfig
from pdengine.engine.sequence import Mode, Sequence, blocks_for, sequences_of
from pdengine.models.prefix_hashes import PrefixHashes
from pdengine.transport.messages import Choice

EOS = frozenset({0})
SALTS = st.sampled_from([None, "", "", "", "tenant"])  # None: without the prefix cache


@dataclass(frozen=True)
class Reserved:
    """Blocks of an early pull, and for which prompt."""

    prompt_ids: list[int]
    salt: str | None
    reservation: Reservation


@dataclass(frozen=True)
class Lease:
    block_ids: list[int]
    token_ids: list[int]


class SchedulerLife(RuleBasedStateMachine):
    """Prompts come from two families, so that they have prefixes in common."""

    @initialize(data=st.data())
    def build(self, data: st.DataObject) -> None:
        num_blocks = data.draw(st.sampled_from([8, 8, 3, 16]))
        self.block_size = data.draw(st.sampled_from([4, 1, 2, 3]))
        config = SchedulerConfig(
            block_size=self.block_size,
            max_batch_tokens=data.draw(st.sampled_from([8, 64, 1, 3])),
            max_requests=data.draw(st.sampled_from([8, 4, 2, 1])),
            max_pinned_blocks=data.draw(st.sampled_from([num_blocks, num_blocks // 2, 1])),
        )
        self.scheduler = Scheduler(config, BlockPool(num_blocks))
        self.memory = PagedMemory(num_blocks, self.block_size)
        self.contents: dict[bytes, list[int]] = {}  # name -> what a block under it must hold
        self.expected: dict[Sequence, int] = {}  # every answer that is not over -> a bound on its tokens
        self.leases: dict[int, Lease] = {}
        self.reserved: list[Reserved] = []
        self.quarantined: list[tuple[list[int], list[int]]] = []  # blocks; those that may still be written
        self.num_added = 0

    # ------------------------------------------------------------------------------- commands

    @rule(
        mode=st.sampled_from([Mode.WHOLE, Mode.WHOLE, Mode.PREFILL, Mode.DECODE]),
        family=st.integers(1, 2),
        length=st.integers(1, 20),
        num_own=st.sampled_from([0, 0, 1, 3]),
        max_tokens=st.integers(1, 12),
        n=st.sampled_from([1, 1, 1, 2, 4]),
        num_output=st.sampled_from([0, 0, 0, 1, 5]),
        priority=st.sampled_from([0, 0, 1]),
        salt=SALTS,
        is_pushed=st.sampled_from([False, False, True]),
    )
    def add(
        self,
        mode: Mode,
        family: int,
        length: int,
        num_own: int,
        max_tokens: int,
        n: int,
        num_output: int,
        priority: int,
        salt: str | None,
        is_pushed: bool,
    ) -> None:
        prompt_ids = self.prompt(family, length, num_own)
        num_output = min(num_output, max_tokens - 1)
        if mode is Mode.PREFILL and n > 1:
            num_output = 0
        if mode is Mode.DECODE:
            max_tokens = max(max_tokens, 2)
            num_output = 0 if is_pushed else 1
        choices = [Choice(index, written(prompt_ids, index, num_output)) for index in range(n)]
        work = make_work(
            f"request-{self.num_added}",
            prompt_ids,
            choices,
            max_tokens=max_tokens,
            priority=priority,
            salt=salt,
            block_size=self.block_size,
        )
        sequences = sequences_of(work, mode, block_size=self.block_size)
        if mode is Mode.DECODE and is_pushed:
            sequences[0].writer = "peer"
        if not all(map(self.scheduler.fits, sequences)):
            return
        self.num_added += 1
        for sequence in sequences:
            self.scheduler.add(sequence)
            self.expect(sequence)

    @rule(noise=st.randoms(use_true_random=False), count=st.integers(2, 8))
    def add_many(self, noise: Random, count: int) -> None:
        """More than the pool has room for, so that some are preempted, and begin anew from their prefix."""
        for _ in range(count):
            self.add(
                mode=noise.choice([Mode.WHOLE, Mode.WHOLE, Mode.WHOLE, Mode.PREFILL, Mode.DECODE]),
                family=noise.randint(1, 2),
                length=noise.randint(1, 3 * self.block_size),
                num_own=noise.choice([0, 1]),
                max_tokens=noise.randint(4 * self.block_size, 8 * self.block_size),
                n=noise.choice([1, 1, 2, 4]),
                num_output=noise.choice([0, 0, 5]),
                priority=noise.randint(0, 1),
                salt=noise.choice([None, "", ""]),
                is_pushed=False,
            )
        self.turn(noise.randint(1, 20))

    @rule(may_be_refused=st.booleans())
    def admit(self, may_be_refused: bool) -> None:
        scheduler = self.scheduler
        waiting = list(scheduler.waiting)
        if may_be_refused and len(waiting) == 1:
            self.check_refusal(waiting[0])
            return
        admitted = scheduler.admit()
        num_admitted = len(waiting) - len(scheduler.waiting)
        assert waiting[num_admitted:] == scheduler.waiting, "by priority, then first come, first served"
        taken = waiting[:num_admitted]
        assert admitted.pulls == [sequence for sequence in taken if sequence.mode is Mode.DECODE]
        assert admitted.runs == [sequence for sequence in taken if sequence.mode is not Mode.DECODE]
        for sequence in taken:
            assert sequence in (scheduler.pulling if sequence.mode is Mode.DECODE else scheduler.running)
            assert sequence.num_computed == min(
                sequence.num_cached_blocks * self.block_size, len(sequence.token_ids) - 1
            )
            assert (
                self.memory.read(sequence.block_ids, sequence.num_computed)
                == (states(sequence.token_ids)[: sequence.num_computed])
            )

    def check_refusal(self, sequence: Sequence) -> None:
        """What cannot wait is refused exactly if it would not be admitted at once."""
        scheduler = self.scheduler
        if sequence.mode is Mode.DECODE and sequence.writer is None:
            return
        scheduler.waiting.remove(sequence)
        sequence.may_wait = False
        refusal = scheduler.refusal(sequence)
        sequence.may_wait = True
        scheduler.waiting.append(sequence)
        scheduler.admit()
        assert (refusal is None) == (not scheduler.waiting)

    @rule(max_prompt_tokens=st.sampled_from([None, None, 1, 4]), may_preempt=st.booleans())
    def step(self, max_prompt_tokens: int | None, may_preempt: bool) -> None:
        self.run_step(max_prompt_tokens, may_preempt)

    @rule(count=st.integers(1, 12))
    def turn(self, count: int) -> None:
        """As an engine turns while nothing goes wrong."""
        for _ in range(count):
            self.scheduler.admit()
            for sequence in list(self.scheduler.pulling):
                self.start_decoding(sequence)
            self.run_step(None, may_preempt=True)

    @precondition(lambda self: self.scheduler.pulling)
    @rule(data=st.data(), is_whole=st.booleans())
    def pull(self, data: st.DataObject, is_whole: bool) -> None:
        """A read, or a peer's write, lands: some of the blocks, or all of them and the sequence decodes."""
        sequence = data.draw(st.sampled_from(self.scheduler.pulling))
        if is_whole:
            self.start_decoding(sequence)
        else:
            self.land(sequence, data.draw(st.integers(0, sequence.num_prompt_tokens)))

    @precondition(lambda self: self.scheduler.pulling)
    @rule(data=st.data())
    def abandon_a_pull(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(self.scheduler.pulling))
        self.forget(sequence)
        num_cached = sequence.num_cached_blocks
        block_ids = self.scheduler.detach(sequence)
        self.quarantined.append((block_ids, block_ids[num_cached:]))

    @precondition(lambda self: self.quarantined)
    @rule(has_ended=st.booleans())
    def quarantine(self, has_ended: bool) -> None:
        """Blocks in quarantine are written, or are free again."""
        self.memory.spoil(self.quarantined[0][1])
        if has_ended:
            self.scheduler.pool.free(self.quarantined.pop(0)[0])

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def free_lease(self, data: st.DataObject) -> None:
        self.end_lease(data.draw(st.sampled_from(sorted(self.leases))))

    @precondition(lambda self: self.expected)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(sorted({s.request_id for s in self.expected})))
        here = self.scheduler.find(request_id)
        assert {s for sequence in here for s in (sequence, *sequence.siblings)} == {
            s for s in self.expected if s.request_id == request_id
        }
        for sequence in here:
            self.forget(sequence)
            self.scheduler.remove(sequence)
        assert self.scheduler.find(request_id) == []

    @precondition(lambda self: self.expected)
    @rule(data=st.data())
    def give_up(self, data: st.DataObject) -> None:
        """One answer of a request; the others go on, and one of them may take its place."""
        answer = data.draw(st.sampled_from(list(self.expected)))
        request_id, choice = answer.request_id, answer.choice  # of its own: another may take its place
        for sequence in self.scheduler.find(request_id):
            answers = sequence.answers
            if not sequence.give_up({choice}):
                self.forget(sequence)
                self.scheduler.remove(sequence)
                continue
            for gone in set(answers) - set(sequence.answers):
                del self.expected[gone]
        left = {other.choice for other in self.expected if other.request_id == request_id}
        assert choice not in left

    @rule(family=st.integers(1, 2), length=st.integers(1, 20), salt=SALTS)
    def reserve(self, family: int, length: int, salt: str | None) -> None:
        prompt_ids = self.prompt(family, length, 0)
        names = [] if salt is None else self.name(prompt_ids, salt)
        had_waiting = bool(self.scheduler.waiting)
        reservation = self.scheduler.reserve(names, blocks_for(length, self.block_size))
        if reservation is not None:
            assert not had_waiting
            self.reserved.append(Reserved(prompt_ids, salt, reservation))
            self.memory.spoil(reservation.block_ids[reservation.num_cached :])

    @precondition(lambda self: self.reserved)
    @rule()
    def drop_reserved(self) -> None:
        self.scheduler.drop_reserved()
        self.scheduler.pool.free(self.reserved.pop(0).reservation.block_ids)

    @precondition(lambda self: self.reserved)
    @rule(n=st.sampled_from([1, 1, 3]), max_tokens=st.integers(2, 8))
    def add_reserved(self, n: int, max_tokens: int) -> None:
        reserved = self.reserved[0]
        work = make_work(
            f"request-{self.num_added}",
            reserved.prompt_ids,
            [Choice(index, written(reserved.prompt_ids, index, 1)) for index in range(n)],
            max_tokens=max_tokens,
            salt=reserved.salt,
            block_size=self.block_size,
        )
        [sequence] = sequences_of(work, Mode.DECODE, block_size=self.block_size)
        if not self.scheduler.fits(sequence) or not self.scheduler.may_add_reserved(sequence):
            return
        self.reserved.pop(0)
        self.num_added += 1
        self.scheduler.add_reserved(sequence)
        sequence.block_ids = reserved.reservation.block_ids
        sequence.num_cached_blocks = sequence.num_named = reserved.reservation.num_cached
        self.expect(sequence)

    # --------------------------------------------------------------------------------- checks

    @invariant()
    def every_block_is_accounted_for(self) -> None:
        scheduler = self.scheduler
        scheduler.pool.check()
        holders = Counter(block for sequence in scheduler for block in sequence.block_ids)
        holders.update(block for block_ids in scheduler.leased.values() for block in block_ids)
        holders.update(block for block_ids, _ in self.quarantined for block in block_ids)
        holders.update(block for reserved in self.reserved for block in reserved.reservation.block_ids)
        for block_id in range(scheduler.pool.num_blocks):
            assert scheduler.pool.num_holders(block_id) == holders[block_id]

    @invariant()
    def only_prompts_for_others_are_pinned(self) -> None:
        scheduler = self.scheduler
        pinned = [set(s.block_ids) for s in scheduler.running if s.mode is Mode.PREFILL]
        pinned += [set(block_ids) for block_ids in scheduler.leased.values()]
        assert scheduler.num_pinned == len(set().union(*pinned))
        assert scheduler.num_pinned <= scheduler.config.max_pinned_blocks or len(pinned) == 1

    @invariant()
    def what_can_be_found_is_what_its_name_says(self) -> None:
        pool = self.scheduler.pool
        for name in pool.names():
            [block_id] = pool.find([name])
            assert self.memory.blocks[block_id] == self.contents[name]

    @invariant()
    def leases_hold_their_prompts(self) -> None:
        for lease in self.leases.values():
            num_tokens = len(lease.token_ids)
            assert self.memory.read(lease.block_ids, num_tokens) == states(lease.token_ids)
            assert len(lease.block_ids) == blocks_for(num_tokens, self.block_size)

    @invariant()
    def every_sequence_is_in_one_place(self) -> None:
        scheduler = self.scheduler
        places = Counter([*scheduler.waiting, *scheduler.pulling, *scheduler.running])
        assert set(places.values()) <= {1}
        assert {s for sequence in places for s in (sequence, *sequence.siblings)} == set(self.expected)
        for group in (scheduler.waiting, scheduler.running):
            assert [s.rank for s in group] == sorted(s.rank for s in group)
        assert not any(sequence.block_ids for sequence in scheduler.waiting)
        for sequence in scheduler.running:
            assert sequence.finish_reason is None
            assert sequence.num_computed < len(sequence.token_ids)
        slots = sum(s.num_slots for s in [*scheduler.running, *scheduler.pulling]) + len(self.reserved)
        assert slots <= scheduler.config.max_requests

    def teardown(self) -> None:
        """Without further commands, everything that was added comes to its end, and all blocks come back."""
        if not hasattr(self, "scheduler"):
            return
        scheduler = self.scheduler
        while self.quarantined:
            self.quarantine(True)
        turns_left = (1 + sum(self.expected.values())) * (1 + len(self.expected))
        while self.expected:
            turns_left -= 1
            assert turns_left >= 0, "no progress"
            self.turn(1)
            for lease_id in list(self.leases):
                self.end_lease(lease_id)
            if self.reserved:
                self.drop_reserved()
        while self.reserved:
            self.drop_reserved()
        for lease_id in list(self.leases):
            self.end_lease(lease_id)
        self.every_block_is_accounted_for()
        self.what_can_be_found_is_what_its_name_says()
        assert scheduler.pool.num_free == scheduler.pool.num_blocks
        assert scheduler.num_pinned == 0
        assert list(scheduler) == []

    # ---------------------------------------------------------------------------------- parts

    def prompt(self, family: int, length: int, num_own: int) -> list[int]:
        own = [100 + self.num_added] * min(num_own, length - 1)
        return [family] * (length - len(own)) + own

    def expect(self, sequence: Sequence) -> None:
        for answer in (sequence, *sequence.siblings):
            self.expected[answer] = answer.num_prompt_tokens + answer.sampling.max_tokens

    def forget(self, sequence: Sequence) -> None:
        for answer in (sequence, *sequence.siblings):
            del self.expected[answer]

    def name(self, token_ids: list[int], salt: str) -> list[bytes]:
        """Names of the full blocks of these tokens; from now on it is known what they must hold."""
        hashes = PrefixHashes(names_of([], salt=salt).root, self.block_size)
        hashes.extend(token_ids)
        slots = states(token_ids)
        for index, name in enumerate(hashes.blocks):
            self.contents[name] = slots[index * self.block_size : (index + 1) * self.block_size]
        return hashes.blocks

    def run_step(self, max_prompt_tokens: int | None, may_preempt: bool) -> None:
        scheduler = self.scheduler
        first = next((s for s in scheduler.running if s.mode is Mode.WHOLE), None)
        num_preemptions, num_running = scheduler.num_preemptions, len(scheduler.running)
        step = scheduler.schedule(max_prompt_tokens, may_preempt=may_preempt)
        assert first is None or first in scheduler.running, "the first one was preempted"
        assert scheduler.num_preemptions - num_preemptions == num_running - len(scheduler.running)
        if not may_preempt:
            assert scheduler.num_preemptions == num_preemptions
        num_tokens = [chunk.num_tokens for chunk in step.chunks]
        assert sum(num_tokens) <= scheduler.config.max_batch_tokens
        assert bool(step.chunks) or (not step.copies and (step.is_short or not scheduler.running))
        num_prompts = sum(len(c.sequence.token_ids) - c.sequence.num_computed > 1 for c in step.chunks)
        assert max_prompt_tokens is None or (
            sum(num_tokens[len(num_tokens) - num_prompts :]) <= max_prompt_tokens
        )
        assert num_tokens[: len(num_tokens) - num_prompts] == [1] * (len(num_tokens) - num_prompts)
        for chunk in step.chunks:
            self.check_chunk(chunk.sequence, chunk.num_tokens)
        token_ids = self.memory.run(step)
        for sequence in self.expected:
            if sequence.prefix is not None:
                salt = "" if sequence.prefix.root == names_of([], salt="").root else "tenant"
                self.name(sequence.token_ids, salt)
        lengths = {answer: len(answer.token_ids) for answer in self.expected}
        advanced = scheduler.postprocess(step, token_ids, EOS)
        assert [answer.token_ids[-1] for answer in advanced] == token_ids
        for answer in self.expected:
            assert len(answer.token_ids) == lengths[answer] + (answer in advanced)
        self.report(advanced)

    def check_chunk(self, sequence: Sequence, num_tokens: int) -> None:
        """It is written to blocks that nobody else holds or can find."""
        pool, start = self.scheduler.pool, sequence.num_computed
        assert 1 <= num_tokens <= len(sequence.token_ids) - start
        written_blocks = range(start // self.block_size, blocks_for(start + num_tokens, self.block_size))
        assert all(pool.is_writable(sequence.block_ids[index]) for index in written_blocks)

    def report(self, advanced: list[Sequence]) -> None:
        """What the engine does with the answers that got a token."""
        for sequence in advanced:
            if sequence.mode is Mode.PREFILL and sequence.block_ids:
                num_computed, block_ids = sequence.num_computed, sequence.block_ids
                assert num_computed == len(sequence.token_ids) - 1
                lease_id = self.scheduler.lease(sequence)
                assert self.scheduler.leased[lease_id] == block_ids
                self.leases[lease_id] = Lease(block_ids, sequence.token_ids[:num_computed])
            if sequence.mode is Mode.PREFILL or sequence.finish_reason is not None:
                assert sequence.block_ids == []
                del self.expected[sequence]

    def end_lease(self, lease_id: int) -> None:
        self.leases_hold_their_prompts()
        self.scheduler.free_lease(lease_id)
        del self.leases[lease_id]

    def land(self, sequence: Sequence, num_tokens: int) -> None:
        """Only blocks of its own are written. One that pushes writes all of them."""
        num_cached = 0 if sequence.writer is not None else sequence.num_cached_blocks
        first = num_cached * self.block_size
        for block_id in sequence.block_ids[num_cached:]:
            assert self.scheduler.pool.is_writable(block_id)
        self.memory.write(sequence.block_ids, sequence.token_ids, first, max(first, num_tokens))

    def start_decoding(self, sequence: Sequence) -> None:
        num_prompt = sequence.num_prompt_tokens
        if sequence.num_cached_blocks * self.block_size < num_prompt:
            self.land(sequence, num_prompt)
        if sequence.writer is not None:
            sequence.writer = None
            for answer in (sequence, *sequence.siblings):
                answer.token_ids += written(answer.token_ids, answer.choice, 1)
        if sequence.prefix is not None:
            salt = "" if sequence.prefix.root == names_of([], salt="").root else "tenant"
            self.name(sequence.token_ids, salt)
        self.scheduler.start_decoding(sequence, num_prompt)


def written(prompt_ids: list[int], choice: int, num_tokens: int) -> list[int]:
    """The first tokens of an answer, none of which ends it."""
    token_ids = list(prompt_ids)
    for _ in range(num_tokens):
        token_ids.append(next_token(token_ids, choice) or 8)
    return token_ids[len(prompt_ids) :]


TestSchedulerLife = SchedulerLife.TestCase
TestSchedulerLife.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@pytest.mark.long
def test_many_lives() -> None:
    run_state_machine_as_test(
        SchedulerLife, settings=settings(max_examples=1000, stateful_step_count=60, deadline=None)
    )
