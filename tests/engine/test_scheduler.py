"""The scheduler, case by case: who is admitted, what a step holds, who is preempted, what is shared."""

from __future__ import annotations

import pytest
from sequences import make_sequence, make_work, names_of

from pdengine.engine.block_pool import BlockPool
from pdengine.engine.scheduler import Scheduler, SchedulerConfig
from pdengine.engine.sequence import Mode, Sequence, sequences_of
from pdengine.engine.step import BlockCopy
from pdengine.transport.messages import Choice

EOS = frozenset({0})


def make_scheduler(
    num_blocks: int = 16,
    *,
    max_batch_tokens: int = 64,
    max_requests: int = 4,
    max_pinned_blocks: int | None = None,
    max_waiting: int = 1024,
) -> Scheduler:
    """Blocks of 4 tokens."""
    pinned = num_blocks if max_pinned_blocks is None else max_pinned_blocks
    config = SchedulerConfig(4, max_batch_tokens, max_requests, pinned, max_waiting)
    return Scheduler(config, BlockPool(num_blocks))


def step(
    scheduler: Scheduler, token_id: int = 1, max_prompt_tokens: int | None = None
) -> list[tuple[str, int]]:
    """One turn in which every answer that gets a token gets `token_id`; what was computed."""
    scheduler.admit()
    current = scheduler.schedule(max_prompt_tokens)
    num_sampled = sum(chunk.sequence.num_slots for chunk in current.chunks if chunk.samples)
    scheduler.postprocess(current, [token_id] * num_sampled, EOS)
    return [(chunk.sequence.request_id, chunk.num_tokens) for chunk in current.chunks]


def whole(name: str, num_tokens: int, *, max_tokens: int = 8, priority: int = 0, n: int = 1) -> Sequence:
    """Without the prefix cache."""
    return make_sequence(
        name, Mode.WHOLE, range(1, num_tokens + 1), max_tokens=max_tokens, priority=priority, n=n
    )


def cached(
    name: str, num_tokens: int, mode: Mode = Mode.WHOLE, *, max_tokens: int = 4, n: int = 1
) -> Sequence:
    """With it: all prompts have as much in common as their lengths allow."""
    return make_sequence(name, mode, range(1, num_tokens + 1), max_tokens=max_tokens, salt="", n=n)


def names(sequences: list[Sequence]) -> list[str]:
    return [sequence.request_id for sequence in sequences]


# ------------------------------------------------------------------------------------------- budget


def test_a_long_prompt_runs_in_chunks_beside_decoding_sequences() -> None:
    scheduler = make_scheduler(max_batch_tokens=6)
    scheduler.add(whole("short", 3, max_tokens=5))
    assert step(scheduler) == [("short", 3)]
    scheduler.add(whole("long", 12, max_tokens=2))
    assert step(scheduler) == [("short", 1), ("long", 5)]
    assert step(scheduler) == [("short", 1), ("long", 5)]
    assert step(scheduler) == [("short", 1), ("long", 2)]
    assert step(scheduler) == [("short", 1), ("long", 1)]
    assert not list(scheduler)


def test_a_short_prompt_beside_a_long_one_gets_half_of_the_budget() -> None:
    scheduler = make_scheduler(32, max_batch_tokens=8)
    scheduler.add(whole("long", 40))
    assert step(scheduler) == [("long", 8)]
    scheduler.add(whole("short", 4))
    assert step(scheduler) == [("long", 4), ("short", 4)]
    assert step(scheduler) == [("short", 1), ("long", 7)]


def test_what_short_prompts_leave_goes_to_long_ones() -> None:
    scheduler = make_scheduler(64, max_batch_tokens=16)
    for name, num_tokens in (("first", 40), ("middle", 30), ("short", 2)):
        scheduler.add(whole(name, num_tokens))
    assert step(scheduler) == [("first", 8), ("middle", 6), ("short", 2)]


def test_a_long_prompt_comes_to_its_end_whatever_short_ones_arrive() -> None:
    scheduler = make_scheduler(64, max_batch_tokens=8)
    long = whole("long", 60)
    scheduler.add(long)
    for turn in range(15):
        scheduler.add(whole(f"short {turn}", 8, max_tokens=1))
        step(scheduler)
    assert long.num_output_tokens == 1


def test_among_long_prompts_the_one_that_came_first_gets_half() -> None:
    scheduler = make_scheduler(64, max_batch_tokens=8)
    scheduler.add(whole("first", 40))
    scheduler.add(whole("second", 20))
    assert step(scheduler) == [("first", 4), ("second", 4)]


def test_a_bound_on_prompt_tokens_spares_decoding_ones() -> None:
    scheduler = make_scheduler(32, max_batch_tokens=16)
    scheduler.add(whole("decoding", 3))
    assert step(scheduler, max_prompt_tokens=2) == [("decoding", 2)]
    assert step(scheduler, max_prompt_tokens=2) == [("decoding", 1)]
    scheduler.add(whole("prompt", 20))
    assert step(scheduler, max_prompt_tokens=6) == [("decoding", 1), ("prompt", 6)]
    assert step(scheduler, max_prompt_tokens=100) == [("decoding", 1), ("prompt", 14)]


def test_a_resumed_request_computes_its_answer_so_far_as_part_of_the_prompt() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_sequence("resumed", Mode.WHOLE, [1, 2, 3], output_ids=[4, 5], max_tokens=4))
    scheduler.admit()
    [chunk] = scheduler.schedule().chunks
    assert (chunk.num_tokens, chunk.num_prompt_tokens, chunk.samples) == (5, 3, True)
    assert step(scheduler) == [("resumed", 5)]
    assert step(scheduler) == [("resumed", 1)]
    assert not list(scheduler)


# -------------------------------------------------------------------------------------------- queue


def test_nobody_overtakes_the_head_of_the_queue() -> None:
    scheduler = make_scheduler(5)
    scheduler.add(whole("first", 8, max_tokens=1))
    scheduler.add(whole("large", 16, max_tokens=1))
    scheduler.add(whole("small", 1, max_tokens=1))
    assert names(scheduler.admit().runs) == ["first"]
    assert scheduler.pool.num_free == 3


def test_the_more_urgent_comes_first() -> None:
    scheduler = make_scheduler(max_requests=1)
    for name, priority in (("a", 1), ("b", 0), ("c", -1), ("d", 0)):
        scheduler.add(whole(name, 4, priority=priority))
    assert names(scheduler.waiting) == ["c", "b", "d", "a"]
    assert names(scheduler.admit().runs) == ["c"]


def test_the_last_token_of_an_answer_needs_no_room() -> None:
    scheduler = make_scheduler(2)
    assert scheduler.fits(make_sequence("exact", Mode.WHOLE, range(1, 6), max_tokens=4))
    assert not scheduler.fits(make_sequence("more", Mode.WHOLE, range(1, 6), max_tokens=5))
    scheduler.add(make_sequence("exact", Mode.WHOLE, range(1, 6), max_tokens=4))
    for _ in range(4):
        step(scheduler)
    assert not list(scheduler)


def test_all_answers_need_a_place() -> None:
    scheduler = make_scheduler(max_requests=3)
    assert not scheduler.fits(whole("four", 4, n=4))
    scheduler.add(whole("one", 4))
    scheduler.add(whole("three", 4, n=3))
    assert names(scheduler.admit().runs) == ["one"]


def test_a_sequence_that_never_fits_is_a_defect_of_the_caller() -> None:
    scheduler = make_scheduler(2)
    with pytest.raises(AssertionError):
        scheduler.add(make_sequence("huge", Mode.PREFILL, range(9)))


def test_a_block_is_left_for_each_sequence_that_grows() -> None:
    scheduler = make_scheduler(4)
    scheduler.add(whole("a", 4))
    scheduler.add(whole("b", 8))
    scheduler.admit()
    assert names(scheduler.running) == ["a", "b"]
    scheduler = make_scheduler(3)
    scheduler.add(whole("a", 4, max_tokens=4))
    scheduler.add(whole("b", 8, max_tokens=1))
    assert names(scheduler.admit().runs) == ["a"]


@pytest.mark.parametrize(
    ("num_tokens", "mode", "reason"),
    [
        (24, Mode.WHOLE, "it needs 6 KV blocks, 5 are free"),
        (12, Mode.PREFILL, "3 KV blocks are pinned by prompts that nobody has pulled yet"),
        (4, Mode.PREFILL, None),
        (16, Mode.WHOLE, None),
    ],
)
def test_why_work_that_cannot_wait_is_refused(num_tokens: int, mode: Mode, reason: str | None) -> None:
    scheduler = make_scheduler(8, max_pinned_blocks=4)
    scheduler.add(make_sequence("pinned", Mode.PREFILL, range(12)))
    scheduler.admit()
    sequence = make_sequence("new", mode, range(num_tokens), max_tokens=1, may_wait=False)
    assert scheduler.refusal(sequence) == reason


def test_who_may_wait_is_refused_only_by_a_full_queue() -> None:
    scheduler = make_scheduler(4, max_requests=1, max_waiting=1)
    scheduler.add(whole("running", 4))
    scheduler.admit()
    assert scheduler.refusal(whole("new", 4)) is None
    hasty = make_sequence("hasty", Mode.WHOLE, [1], may_wait=False)
    assert scheduler.refusal(hasty) == "other requests are waiting or running"
    scheduler.add(whole("waiting", 4))
    assert scheduler.refusal(whole("new", 4)) == "1 requests are waiting, which is the limit"
    assert scheduler.refusal(make_sequence("leased", Mode.DECODE, [1, 2], output_ids=[1])) is None


# ------------------------------------------------------------------------------- prompts for others


def test_leases_and_prompts_for_others_share_the_pinned_bound() -> None:
    scheduler = make_scheduler(16, max_pinned_blocks=3)
    for name in ("a", "b", "c", "d"):
        scheduler.add(make_sequence(name, Mode.PREFILL, range(1, 5)))
    scheduler.admit()
    assert scheduler.num_pinned == len(scheduler.running) == 3
    step(scheduler)
    lease_id = scheduler.lease(scheduler.running[0])
    scheduler.admit()
    assert names(scheduler.waiting) == ["d"]
    scheduler.free_lease(lease_id)
    scheduler.admit()
    assert not scheduler.waiting
    assert scheduler.num_pinned == 3


def test_a_prompt_beyond_the_pinned_bound_runs_alone() -> None:
    scheduler = make_scheduler(16, max_pinned_blocks=3)
    scheduler.add(make_sequence("small", Mode.PREFILL, range(1, 5)))
    scheduler.add(make_sequence("large", Mode.PREFILL, range(1, 25)))
    assert names(scheduler.admit().runs) == ["small"]
    scheduler.remove(scheduler.running[0])
    scheduler.add(make_sequence("small again", Mode.PREFILL, range(1, 5)))
    assert names(scheduler.admit().runs) == ["large"]
    assert scheduler.num_pinned == 6


def test_shared_blocks_are_pinned_once() -> None:
    scheduler = make_scheduler(16, max_pinned_blocks=4)
    scheduler.add(cached("first", 10, Mode.PREFILL))
    step(scheduler)
    first = scheduler.lease(scheduler.running[0])
    scheduler.add(cached("second", 11, Mode.PREFILL))
    scheduler.add(cached("third", 12, Mode.PREFILL))
    assert names(scheduler.admit().runs) == ["second"]
    assert scheduler.num_pinned == 4
    scheduler.free_lease(first)
    assert scheduler.num_pinned == 3


def test_requests_that_run_whole_are_not_pinned() -> None:
    scheduler = make_scheduler(16, max_pinned_blocks=1)
    scheduler.add(make_sequence("whole", Mode.WHOLE, range(1, 17)))
    scheduler.add(make_sequence("decode", Mode.DECODE, range(1, 17), output_ids=[1]))
    assert names(scheduler.admit().pulls) == ["decode"]
    assert scheduler.num_pinned == 0


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("max_tokens", [1, 5])
def test_a_prompt_that_ends_with_its_first_token_gives_its_blocks_back(max_tokens: int, n: int) -> None:
    scheduler = make_scheduler()
    scheduler.add(make_sequence("prompt", Mode.PREFILL, range(1, 5), max_tokens=max_tokens, n=n))
    step(scheduler, token_id=0 if max_tokens > 1 else 1)
    assert not list(scheduler)
    assert scheduler.num_pinned == 0
    assert scheduler.pool.num_free == 16


def test_a_prompt_for_several_answers_is_computed_and_leased_once() -> None:
    scheduler = make_scheduler()
    sequence = make_sequence("prompt", Mode.PREFILL, range(1, 6), n=3)
    scheduler.add(sequence)
    scheduler.admit()
    current = scheduler.schedule()
    advanced = scheduler.postprocess(current, [5, 0, 7], EOS)
    assert [(answer.choice, answer.token_ids[-1]) for answer in advanced] == [(0, 5), (1, 0), (2, 7)]
    assert [answer.finish_reason for answer in advanced] == [None, "stop", None]
    block_ids = sequence.block_ids
    lease_id = scheduler.lease(sequence)
    assert scheduler.leased == {lease_id: block_ids}
    assert not list(scheduler)
    assert scheduler.find("prompt") == []


# ------------------------------------------------------------------------------------- prefix cache


def test_what_is_cached_is_not_computed_again() -> None:
    scheduler = make_scheduler()
    scheduler.add(cached("first", 10))
    assert step(scheduler) == [("first", 10)]
    second = cached("second", 11)
    scheduler.add(second)
    assert step(scheduler) == [("first", 1), ("second", 3)]
    assert second.num_cached_blocks == 2
    assert second.block_ids[:2] == scheduler.running[0].block_ids[:2]


def test_the_answer_is_found_by_the_next_turn_of_a_conversation() -> None:
    scheduler = make_scheduler()
    scheduler.add(cached("first", 3, max_tokens=6))
    for _ in range(6):
        step(scheduler, token_id=9)
    assert not list(scheduler)
    follow_up = make_sequence("next", Mode.WHOLE, [1, 2, 3, 9, 9, 9, 9, 9, 9, 5], salt="")
    scheduler.add(follow_up)
    assert step(scheduler) == [("next", 2)]


def test_the_last_token_of_a_prompt_that_is_all_cached_is_computed_in_a_copy() -> None:
    scheduler = make_scheduler()
    scheduler.add(cached("first", 8, max_tokens=1))
    step(scheduler)
    again = cached("again", 8)
    scheduler.add(again)
    scheduler.admit()
    [shared, source, _] = again.block_ids
    current = scheduler.schedule()
    assert [(chunk.num_tokens, chunk.samples) for chunk in current.chunks] == [(1, True)]
    assert current.copies == [BlockCopy(source, again.block_ids[1])]
    assert again.block_ids[0] == shared
    assert len(again.block_ids) == 2
    assert scheduler.pool.num_idle == 1, "the source can still be found, and is nobody's"


@pytest.mark.parametrize("mode", [Mode.WHOLE, Mode.PREFILL])
def test_where_a_copy_has_no_room_the_last_block_is_computed_anew(mode: Mode) -> None:
    """A prompt as large as the pool would wait for ever otherwise."""
    scheduler = make_scheduler(2)
    scheduler.add(cached("first", 8, max_tokens=1))
    step(scheduler)
    scheduler.add(cached("again", 8, mode, max_tokens=1))
    assert step(scheduler) == [("again", 4)]
    assert not list(scheduler)


def test_salts_keep_prefixes_apart() -> None:
    scheduler = make_scheduler()
    for name, salt in (("a", "x"), ("b", "y"), ("c", None), ("d", None)):
        scheduler.add(make_sequence(name, Mode.WHOLE, range(8), max_tokens=2, salt=salt))
        assert step(scheduler)[-1] == (name, 8)


def test_what_is_pushed_here_is_written_whole() -> None:
    scheduler = make_scheduler()
    scheduler.add(cached("first", 9))
    step(scheduler)
    pushed = cached("pushed", 9, Mode.DECODE)
    pushed.writer = "peer"
    scheduler.add(pushed)
    assert scheduler.admit().pulls == [pushed]
    assert pushed.num_cached_blocks == 0
    assert not set(pushed.block_ids) & set(scheduler.running[0].block_ids)


def test_more_names_than_the_prompt_has_blocks_are_not_used() -> None:
    scheduler = make_scheduler()
    scheduler.add(cached("first", 12, max_tokens=1))
    step(scheduler)
    short = cached("short", 6)
    assert short.prefix is not None
    short.prefix.blocks = names_blocks(12)
    scheduler.add(short)
    assert step(scheduler) == [("short", 2)]


def names_blocks(num_tokens: int) -> list[bytes]:
    packed = names_of(range(1, num_tokens + 1)).blocks
    return [packed[start : start + 16] for start in range(0, len(packed), 16)]


# --------------------------------------------------------------------------------- several answers


def test_answers_share_the_prompt_and_copy_what_they_write() -> None:
    scheduler = make_scheduler()
    scheduler.add(whole("request", 6, n=3))
    assert step(scheduler) == [("request", 6)]
    assert [answer.choice for answer in scheduler.running] == [0, 1, 2]
    tables = [list(answer.block_ids) for answer in scheduler.running]
    assert tables[0] == tables[1] == tables[2]
    current = scheduler.schedule()
    first, partial = tables[0]
    copies = [answer.block_ids[1] for answer in scheduler.running]
    assert copies[2] == partial, "the last one is alone with it, so it needs no copy"
    assert current.copies == [BlockCopy(partial, copies[0]), BlockCopy(partial, copies[1])]
    assert len(set(copies)) == 3
    assert all(answer.block_ids[0] == first for answer in scheduler.running)


def test_an_answer_that_ends_at_once_leaves_the_others_running() -> None:
    scheduler = make_scheduler()
    sequence = whole("request", 6, n=3)
    scheduler.add(sequence)
    scheduler.admit()
    scheduler.postprocess(scheduler.schedule(), [0, 4, 0], EOS)
    assert [answer.choice for answer in scheduler.find("request")] == [1]
    assert scheduler.schedule().copies == [], "nobody else holds its blocks"


def test_pulled_answers_fork_once_the_prompt_is_here() -> None:
    scheduler = make_scheduler()
    sequence = make_sequence("request", Mode.DECODE, range(1, 7), output_ids=[1], n=2)
    scheduler.add(sequence)
    scheduler.admit()
    assert step(scheduler) == []
    scheduler.start_decoding(sequence, 6)
    assert step(scheduler) == [("request", 1), ("request", 1)]


def test_answers_that_were_begun_elsewhere_are_taken_up_one_by_one() -> None:
    work = make_work("request", range(1, 9), [Choice(0, [5, 6]), Choice(2, [7])], max_tokens=4, salt="")
    sequences = sequences_of(work, Mode.WHOLE, block_size=4)
    scheduler = make_scheduler()
    for sequence in sequences:
        scheduler.add(sequence)
    assert [s.choice for s in scheduler.find("request")] == [0, 2]
    assert step(scheduler) == [("request", 10), ("request", 9)]
    assert not any(sequence.siblings for sequence in sequences)


# --------------------------------------------------------------------------------------- preemption


def test_the_youngest_is_preempted_and_computed_anew_later() -> None:
    scheduler = make_scheduler(4)
    scheduler.add(whole("old", 3, max_tokens=10))
    scheduler.add(whole("young", 7, max_tokens=6))
    while not scheduler.num_preemptions:
        step(scheduler)
    [young] = scheduler.waiting
    assert (young.request_id, young.block_ids, young.num_computed) == ("young", [], 0)
    assert young.was_preempted
    known = len(young.token_ids)
    while young in scheduler.waiting:
        computed = step(scheduler)
    assert computed == [("young", known)]
    while list(scheduler):
        step(scheduler)
    assert scheduler.num_preemptions == 1


def test_the_less_urgent_is_preempted_even_if_it_is_older() -> None:
    scheduler = make_scheduler(4)
    scheduler.add(whole("old", 7, max_tokens=6, priority=1))
    step(scheduler)
    scheduler.add(whole("urgent", 3, max_tokens=10))
    while not scheduler.num_preemptions:
        step(scheduler)
    assert names(scheduler.waiting) == ["old"]


def test_the_one_that_needs_a_block_waits_if_it_comes_last() -> None:
    scheduler = make_scheduler(4)
    scheduler.add(whole("old", 4, max_tokens=13))
    scheduler.add(whole("young", 5, max_tokens=10))
    while not (current := scheduler.schedule()).is_short:
        scheduler.admit()
        scheduler.postprocess(current, [1] * len(current.chunks), EOS)
    assert names([chunk.sequence for chunk in current.chunks]) == ["old"]
    assert names(scheduler.running) == ["old", "young"]
    assert not scheduler.num_preemptions


def test_nobody_is_preempted_where_the_caller_has_other_blocks_to_give() -> None:
    scheduler = make_scheduler(5)
    reservation = scheduler.reserve([], 2)
    assert reservation is not None
    scheduler.add(whole("old", 4, max_tokens=9))
    scheduler.add(whole("young", 4, max_tokens=9))
    scheduler.admit()
    step(scheduler)
    current = scheduler.schedule(may_preempt=False)
    assert current.is_short
    assert names([chunk.sequence for chunk in current.chunks]) == ["old"]
    scheduler.postprocess(current, [1], EOS)
    scheduler.drop_reserved()
    scheduler.pool.free(reservation.block_ids)
    assert step(scheduler) == [("old", 1), ("young", 1)]


def test_prompts_for_others_are_never_preempted() -> None:
    scheduler = make_scheduler(4, max_batch_tokens=2)
    scheduler.add(whole("whole", 1, max_tokens=12))
    step(scheduler)
    scheduler.add(make_sequence("prompt", Mode.PREFILL, range(8)))
    for _ in range(4):
        step(scheduler)
    lease_id = None
    for _ in range(12):
        step(scheduler)
        for sequence in scheduler.running:
            if sequence.mode is Mode.PREFILL and sequence.num_output_tokens:
                lease_id = scheduler.lease(sequence)
    assert lease_id is not None
    assert not scheduler.num_preemptions
    assert scheduler.schedule().is_short, "it waits for the lease"
    scheduler.free_lease(lease_id)
    assert step(scheduler) == [("whole", 1)]


# -------------------------------------------------------------------------------------- early pulls


def test_an_early_pull_shares_what_is_cached() -> None:
    scheduler = make_scheduler()
    scheduler.add(cached("first", 9))
    step(scheduler)
    reservation = scheduler.reserve(names_blocks(9), 3)
    assert reservation is not None
    assert reservation.num_cached == 2
    assert reservation.block_ids[:2] == scheduler.running[0].block_ids[:2]


def test_an_early_pull_gets_nothing_that_others_wait_for() -> None:
    scheduler = make_scheduler(4, max_requests=1)
    scheduler.add(whole("first", 4))
    scheduler.add(whole("second", 4))
    assert scheduler.reserve([], 1) is None, "somebody waits"
    scheduler.admit()
    scheduler.remove(scheduler.waiting[0])
    assert scheduler.reserve([], 1) is None, "no place in the batch"
    scheduler = make_scheduler(4)
    scheduler.add(whole("first", 4))
    scheduler.admit()
    assert scheduler.reserve([], 3) is None, "the first one needs a block more"
    assert scheduler.reserve([], 2) is not None


def test_a_reservation_has_one_place() -> None:
    scheduler = make_scheduler(max_requests=2)
    assert scheduler.reserve([], 1) is not None
    assert scheduler.may_add_reserved(whole("two", 4, n=2))
    assert not scheduler.may_add_reserved(whole("three", 4, n=3))


# -------------------------------------------------------------------------------------------- ends


@pytest.mark.parametrize(
    ("token_id", "ignore_eos", "reason"),
    [(0, False, "stop"), (0, True, None), (9, True, "stop"), (5, False, None)],
)
def test_what_ends_an_answer(token_id: int, ignore_eos: bool, reason: str | None) -> None:
    sequence = make_sequence("request", Mode.WHOLE, [1], stop_token_ids=(9,), ignore_eos=ignore_eos)
    sequence.append(token_id, EOS)
    assert sequence.finish_reason == reason


@pytest.mark.parametrize(("num_prompt_tokens", "num_answers"), [(13, 2), (15, 4)])
def test_answers_that_were_preempted_for_a_copy_leave_the_block_to_the_first(
    num_prompt_tokens: int, num_answers: int
) -> None:
    """The pool holds one answer. To preempt the others, which share its last block, frees none."""
    scheduler = make_scheduler(num_blocks=4)
    prompt = range(100, 100 + num_prompt_tokens)
    scheduler.add(make_sequence("a", Mode.WHOLE, prompt, n=num_answers, max_tokens=2))
    num_finished = 0
    while num_finished < num_answers:
        scheduler.admit()
        step = scheduler.schedule()
        assert step.chunks, "nothing runs, and nobody will wake the engine"
        num_sampled = sum(chunk.sequence.num_slots for chunk in step.chunks if chunk.samples)
        advanced = scheduler.postprocess(step, [7] * num_sampled, frozenset())
        num_finished += sum(sequence.finish_reason is not None for sequence in advanced)
    assert scheduler.pool.num_free == 4
