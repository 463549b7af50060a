"""One answer of several is given up, in whatever state it is: the others go on as if nothing had been."""

from __future__ import annotations

import random

import pytest
from engine_cluster import PROMPT, Cluster, StartPair
from engine_worker import EngineWorker, answer_to, unfinished
from sequences import make_sequence, make_work

from pdengine.engine.commands import FreeLease, Report
from pdengine.engine.open_answers import OpenAnswers
from pdengine.engine.pushes import StartPushed
from pdengine.engine.request_log import RequestRecord
from pdengine.engine.sequence import Mode, Push, Sequence, sequences_of
from pdengine.transport.messages import (
    Choice,
    Prefilled,
    Pulled,
    Pushed,
    PushTarget,
    Reserved,
    StepTokens,
    TokenUpdate,
    WorkFailed,
)
from pdengine.transport.transfer import PeerConnected

MAX_TOKENS = 6
ALL = {0, 1, 2, 3}
GIVEN_UP = [{0}, {2}, {0, 1}, {0, 1, 2}, {1, 2, 3}]


def rest_of(choices: set[int], num_known: int = 0) -> dict[tuple[str, int], list[int]]:
    return {("request", choice): answer_to(PROMPT, MAX_TOKENS, choice)[num_known:] for choice in choices}


def collect(worker: EngineWorker, choices: set[int]) -> dict[tuple[str, int], list[int]]:
    """All that is told until these answers have ended, of them."""
    tokens: dict[tuple[str, int], list[int]] = {}
    missing = set(choices)
    while missing:
        event = worker.expect(StepTokens)
        for update in event.updates:
            tokens.setdefault((update.request_id, update.choice), []).append(update.token_id)
            if update.finish_reason is not None:
                missing.discard(update.choice)
    return {answer: token_ids for answer, token_ids in tokens.items() if answer[1] in choices}


@pytest.mark.parametrize("free_steps", [0, 1, 2, 4])
@pytest.mark.parametrize("given_up", GIVEN_UP, ids=str)
def test_while_it_runs(cluster: Cluster, given_up: set[int], free_steps: int) -> None:
    """The prompt takes two steps: before that the others have no blocks of their own."""
    worker, runner = cluster.start("worker", num_blocks=40)
    runner.hold(free_steps=free_steps)
    worker.whole("request", PROMPT, n=4, max_tokens=MAX_TOKENS, salt="")
    runner.wait_until_held()
    worker.abort("request", *given_up)
    runner.release()
    assert collect(worker, ALL - given_up) == rest_of(ALL - given_up)


def test_its_blocks_are_free_at_once(cluster: Cluster) -> None:
    worker, runner = cluster.start("worker", num_blocks=40)
    runner.hold(free_steps=4)
    worker.whole("request", PROMPT, n=4, max_tokens=9)
    runner.wait_until_held()
    worker.abort("request", 1, 3)
    runner.release()
    runner.hold()
    runner.wait_until_held()
    running = worker.scheduler.running
    assert [sequence.choice for sequence in running] == [0, 2]
    held = {block_id for sequence in running for block_id in sequence.block_ids}
    assert worker.engine.load.free_blocks == 40 - len(held)
    runner.release()
    collect(worker, {0, 2})


def test_while_it_waits(cluster: Cluster) -> None:
    worker, runner = cluster.start("worker", num_blocks=40, max_requests=4)
    runner.hold()
    worker.whole("other", [1, 2], max_tokens=2)
    runner.wait_until_held()
    worker.whole("request", PROMPT, n=4, max_tokens=MAX_TOKENS)
    worker.abort("request", 0, 3)
    runner.release()
    found = worker.collect_answers(3)
    assert {answer: found[answer] for answer in rest_of({1, 2})} == rest_of({1, 2})


@pytest.mark.parametrize("salt", [None, ""])
@pytest.mark.parametrize("length", [7, 8, 10])
@pytest.mark.parametrize("given_up", GIVEN_UP, ids=str)
def test_while_the_kv_cache_is_pulled(
    start_pair: StartPair, given_up: set[int], length: int, salt: str | None
) -> None:
    """With a prompt of 7 tokens the first token of the answer fills a block, whose name depends on it."""
    pair, prompt_ids = start_pair(num_blocks=60), list(range(70, 70 + length))
    if salt is not None:  # so that the last block of answer 0 is found in the cache
        known = prompt_ids + answer_to(prompt_ids, 1)
        pair.decode.whole("before", known, max_tokens=2, salt=salt)
        pair.decode.collect(1)
    pair.prefill.prefill("request", prompt_ids, n=4, max_tokens=MAX_TOKENS)
    prefilled = pair.prefill.expect(Prefilled)
    pair.decode_runner.hold()
    pair.decode.whole("other", [1, 2], max_tokens=2)
    pair.decode_runner.wait_until_held()
    pair.decode.decode("request", prompt_ids, prefilled, max_tokens=MAX_TOKENS, salt=salt)
    pair.decode.abort("request", *given_up)
    pair.decode_runner.release()
    found = pair.decode.collect_answers(4 - len(given_up) + 1)
    found.pop(("other", 0))
    assert found == {
        ("request", choice): answer_to(prompt_ids, MAX_TOKENS, choice)[1:] for choice in ALL - given_up
    }
    pair.free(prefilled)


@pytest.mark.parametrize("given_up", GIVEN_UP, ids=str)
def test_while_the_prompt_is_computed_for_another_worker(cluster: Cluster, given_up: set[int]) -> None:
    prefill, runner = cluster.start("prefill")
    decode, _ = cluster.start("decode", num_blocks=40)
    decode.connect(prefill)
    runner.hold()
    prefill.prefill("request", PROMPT, n=4, max_tokens=MAX_TOKENS)
    runner.wait_until_held()
    prefill.abort("request", *given_up)
    runner.release()
    prefilled = prefill.expect(Prefilled)
    assert [(token.choice, [token.token_id]) for token in prefilled.tokens] == [
        (choice, answer_to(PROMPT, 1, choice)) for choice in sorted(ALL - given_up)
    ]
    decode.decode("request", PROMPT, prefilled, max_tokens=MAX_TOKENS)
    decode.expect(Pulled)
    assert decode.collect_answers(4 - len(given_up)) == rest_of(ALL - given_up, 1)
    assert prefilled.lease is not None
    prefill.engine.post(FreeLease(prefilled.lease.lease_id))


@pytest.mark.parametrize("mode", [Mode.WHOLE, Mode.PREFILL])
def test_with_the_last_one_the_request_is_gone(cluster: Cluster, mode: Mode) -> None:
    worker, runner = cluster.start("worker", num_blocks=40)
    runner.hold()
    worker.add(make_sequence("request", mode, PROMPT, n=3))
    runner.wait_until_held()
    worker.abort("request", 0, 1)
    worker.abort("request", 2)
    runner.release()
    worker.settle()
    assert worker.engine.load.running == 0


def test_answers_that_differ_already(cluster: Cluster) -> None:
    """Each is a sequence of its own."""
    worker, runner = cluster.start("worker", num_blocks=40)
    runner.hold()
    choices = [Choice(choice, answer_to(PROMPT, 2, choice)) for choice in (0, 1, 2)]
    work = make_work("request", PROMPT, choices, max_tokens=MAX_TOKENS)
    worker.add(*sequences_of(work, Mode.WHOLE, block_size=4))
    runner.wait_until_held()
    worker.abort("request", 0, 2)
    runner.release()
    assert collect(worker, {1}) == rest_of({1}, 2)


def test_of_a_request_that_is_not_here_nothing_happens(cluster: Cluster) -> None:
    worker, _ = cluster.start("worker")
    worker.abort("request", 0)
    worker.whole("request", PROMPT, n=1, max_tokens=2)
    worker.abort("request", 5)
    assert worker.collect(1) == {"request": answer_to(PROMPT, 2)}


@pytest.mark.parametrize("given_up", GIVEN_UP, ids=str)
@pytest.mark.parametrize("at", ["waiting for blocks to be written", "begun"])
def test_while_the_kv_cache_is_pushed(cluster: Cluster, given_up: set[int], at: str) -> None:
    prefill, _ = cluster.start("prefill", num_blocks=64)
    decode, runner = cluster.start("decode", num_blocks=64)
    prefill.transfer.connect_to_push(decode.engine_id, decode.transfer.worker_address, decode.region)
    assert prefill.expect(PeerConnected).engine_id == decode.engine_id
    reserved = make_sequence("request", Mode.DECODE, PROMPT, n=4, max_tokens=MAX_TOKENS)
    reserved.writer = prefill.engine_id
    decode.add(reserved)
    prompt = make_sequence("request", Mode.PREFILL, PROMPT, n=4, max_tokens=MAX_TOKENS)
    prompt.push = Push("request", 1, PushTarget(decode.engine_id, decode.expect(Reserved).block_ids))
    prefill.add(prompt)
    prefilled = prefill.expect(Prefilled)
    prefill.expect(Pushed)
    going_on = unfinished(prefilled)
    if at != "begun":
        decode.abort("request", *given_up)
        going_on = [choice for choice in going_on if choice.index not in given_up]
    runner.hold()
    decode.engine.post(StartPushed(make_work("request", PROMPT, going_on, max_tokens=MAX_TOKENS)))
    runner.wait_until_held()
    if at == "begun":
        decode.abort("request", *given_up)
    runner.release()
    assert collect(decode, ALL - given_up) == rest_of(ALL - given_up, 1)


@pytest.mark.parametrize("seed", range(8))
def test_at_any_time_on_a_pool_that_is_too_small(cluster: Cluster, seed: int) -> None:
    """Preempted ones, too."""
    rng = random.Random(seed)
    worker, _ = cluster.start("worker", num_blocks=9, max_requests=12)
    names, given_up = [f"request-{number}" for number in range(8)], set()
    prompts = {name: rng.choices(range(900), k=rng.randint(1, 9)) for name in names}
    for name in names:
        worker.whole(name, prompts[name], n=3, max_tokens=12, salt="")
        victim = rng.choice(names)
        choices = rng.sample(range(3), k=rng.randint(1, 2))
        worker.abort(victim, *choices)
        given_up |= {(victim, choice) for choice in choices}
    expected = {(name, choice) for name in names for choice in range(3)} - given_up
    found: dict[tuple[str, int], list[int]] = {}
    while any(len(found.get(answer, [])) < 12 for answer in expected):
        for update in worker.expect(StepTokens).updates:
            found.setdefault((update.request_id, update.choice), []).append(update.token_id)
    for name, choice in expected:
        assert found[name, choice] == answer_to(prompts[name], 12, choice)
    for name, choice in set(found) & given_up:  # perhaps given up before it was there
        tokens = found[name, choice]
        assert tokens == answer_to(prompts[name], len(tokens), choice)
    for name in names:
        worker.abort(name)
    drain(worker)


def drain(worker: EngineWorker) -> None:
    worker.engine.post(PeerConnected("the end", ""))
    while not isinstance(worker.expect(object), PeerConnected):
        pass


# ------------------------------------------------------------------------- what the control thread knows


def ended(attempt: int, *choices: int) -> Report:
    return StepTokens([TokenUpdate("request", attempt, choice, 3, 5, "stop") for choice in choices])


def opened(attempt: int = 1) -> OpenAnswers:
    answers = OpenAnswers()
    answers.begin(record_of(attempt), [0, 1])
    return answers


def record_of(attempt: int) -> RequestRecord:
    return RequestRecord("request", attempt, Mode.WHOLE, 3)


def test_a_request_is_open_until_its_last_answer_has_ended_or_is_given_up() -> None:
    answers = opened()
    answers.give_up("request", [1, 7])
    assert len(answers) == 1
    answers.note(ended(1, 0))
    assert len(answers) == 0
    answers = opened()
    answers.give_up("request", None)
    answers.give_up("another", None)
    assert len(answers) == 0


@pytest.mark.parametrize(
    "event", [ended(1, 0, 1), Prefilled("request", 1, [], None), WorkFailed("request", 1, "", retry=True)]
)
def test_what_an_older_attempt_tells_ends_nothing_of_a_newer_one(event: Report) -> None:
    answers = opened(attempt=2)
    answers.begin(record_of(1), [0])  # comes late
    answers.note(event)
    assert len(answers) == 1
    answers.note(ended(2, 0, 1))
    assert len(answers) == 0


def leader(mode: Mode) -> Sequence:
    return make_sequence("request", mode, PROMPT, n=3)


def test_the_first_of_those_that_stay_takes_the_place() -> None:
    sequence = leader(Mode.DECODE)
    sequence.token_ids = [*PROMPT, 1]
    sequence.siblings[0].token_ids = [*PROMPT, 2]
    assert sequence.give_up({0})
    assert (sequence.choice, sequence.token_ids[-1], sequence.num_slots) == (1, 2, 2)
    assert sequence.give_up({2, 5})
    assert (sequence.choice, sequence.num_slots) == (1, 1)
    assert not sequence.give_up({1})
