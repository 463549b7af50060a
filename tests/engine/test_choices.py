"""Several answers to one prompt: its KV cache is there once, and each answer is what it would be alone."""

from __future__ import annotations

import pytest
from engine_cluster import PROMPT, Cluster, Pair, StartPair
from engine_worker import EngineWorker, TokenRunner, answer_to, unfinished
from sequences import make_sequence, make_work

from pdengine.engine.pushes import StartPushed
from pdengine.engine.sequence import Mode, Push, sequences_of
from pdengine.transport.messages import (
    Choice,
    Prefilled,
    Pulled,
    Pushed,
    PushTarget,
    Reserved,
    StepTokens,
    TokenUpdate,
    WorkRefused,
)
from pdengine.transport.transfer import PeerConnected

MAX_TOKENS = 6


def answers(prompt_ids: list[int], n: int, max_tokens: int = MAX_TOKENS) -> dict[tuple[str, int], list[int]]:
    return {("request", choice): answer_to(prompt_ids, max_tokens, choice) for choice in range(n)}


def rest_of(prompt_ids: list[int], n: int) -> dict[tuple[str, int], list[int]]:
    """What follows the first tokens."""
    return {answer: tokens[1:] for answer, tokens in answers(prompt_ids, n).items()}


@pytest.mark.parametrize("salt", [None, ""], ids=["alone", "with a prefix cache"])
@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 10, 17])
@pytest.mark.parametrize("n", [2, 4])
def test_one_worker_or_two_write_the_same_answers(
    start_pair: StartPair, n: int, length: int, salt: str | None
) -> None:
    pair, prompt_ids = start_pair(num_blocks=40), list(range(100, 100 + length))
    pair.decode.whole("request", prompt_ids, n=n, max_tokens=MAX_TOKENS, salt=salt)
    assert pair.decode.collect_answers(n) == answers(prompt_ids, n)

    pair.prefill.prefill("request", prompt_ids, n=n, max_tokens=MAX_TOKENS, salt=salt)
    prefilled = pair.prefill.expect(Prefilled)
    assert [(token.choice, token.position) for token in prefilled.tokens] == [(c, 0) for c in range(n)]
    assert [token.token_id for token in prefilled.tokens] == [
        tokens[0] for tokens in answers(prompt_ids, n).values()
    ]
    pair.decode.decode("request", prompt_ids, prefilled, max_tokens=MAX_TOKENS, salt="another")
    assert pair.decode.expect(Pulled).stats.num_blocks == -(-length // 4)
    assert pair.decode.collect_answers(n) == rest_of(prompt_ids, n)
    pair.free(prefilled)


def test_the_blocks_of_the_prompt_are_there_once(cluster: Cluster) -> None:
    worker, runner = cluster.start("worker")
    prompt_ids = list(range(100, 108))
    runner.hold(free_steps=2)
    worker.whole("request", prompt_ids, n=4, max_tokens=MAX_TOKENS)
    runner.wait_until_held()
    assert worker.engine.load.free_blocks == 16 - 2 - 4, "two of the prompt, and one for each answer"
    runner.release()
    assert worker.collect_answers(4) == answers(prompt_ids, 4)


@pytest.mark.parametrize("ended", [{0}, {1, 2}, {0, 3}, {0, 1, 2, 3}], ids=str)
def test_answers_that_end_with_their_first_token_are_not_decoded(
    start_pair: StartPair, ended: set[int]
) -> None:
    pair = start_pair(num_blocks=40)
    first = [answer_to(PROMPT, 1, choice)[0] for choice in range(4)]
    stop = tuple(first[choice] for choice in ended)
    pair.prefill.add(make_sequence("request", Mode.PREFILL, PROMPT, n=4, stop_token_ids=stop))
    prefilled = pair.prefill.expect(Prefilled)
    assert {token.choice for token in prefilled.tokens if token.finish_reason == "stop"} == ended
    assert (prefilled.lease is None) == (len(ended) == 4)
    if prefilled.lease is not None:
        pair.decode.decode("request", PROMPT, prefilled)
        expected = {("request", choice): answer_to(PROMPT, 4, choice)[1:] for choice in {0, 1, 2, 3} - ended}
        pair.decode.expect(Pulled)
        assert pair.decode.collect_answers(4 - len(ended)) == expected
        pair.free(prefilled)


def test_an_early_pull_becomes_the_pull_of_all_answers(start_pair: StartPair) -> None:
    pair, prompt_ids = start_pair(num_blocks=40), list(range(300, 330))
    pair.prefill.prefill("request", prompt_ids, n=3, max_tokens=MAX_TOKENS)
    prefilled = pair.prefill.expect(Prefilled)
    pair.decode.pull_early(pair.prefill.expect_progress())
    pair.decode.settle()
    pair.decode.decode("request", prompt_ids, prefilled, max_tokens=MAX_TOKENS)
    assert pair.decode.expect(Pulled).stats.num_early_blocks == 2
    assert pair.decode.collect_answers(3) == rest_of(prompt_ids, 3)
    pair.free(prefilled)


def test_an_early_pull_without_places_for_all_answers_is_made_again(start_pair: StartPair) -> None:
    pair, prompt_ids = start_pair(num_blocks=60, max_requests=3), list(range(300, 330))
    pair.prefill.prefill("request", prompt_ids, n=3, max_tokens=MAX_TOKENS)
    prefilled = pair.prefill.expect(Prefilled)
    pair.decode.pull_early(pair.prefill.expect_progress())
    pair.decode_runner.hold()
    pair.decode.whole("other", [1, 2], max_tokens=2)
    pair.decode_runner.wait_until_held()
    pair.decode.decode("request", prompt_ids, prefilled, max_tokens=MAX_TOKENS)
    pair.decode_runner.release()
    events = [pair.decode.expect(object) for _ in range(3)]
    assert isinstance(events[-1], Pulled)
    assert events[-1].stats.num_early_blocks == 0
    assert pair.decode.collect_answers(3) == rest_of(prompt_ids, 3)
    pair.free(prefilled)


def test_answers_that_differ_already_go_on_together(cluster: Cluster) -> None:
    """The second one finds the prompt in the prefix cache, or computes it, too."""
    worker, _ = cluster.start("worker", num_blocks=40)
    written = {choice: answer_to(PROMPT, 3 + choice, choice) for choice in (0, 2, 3)}
    choices = [Choice(choice, tokens) for choice, tokens in written.items()]
    work = make_work("request", PROMPT, choices, max_tokens=9, salt="")
    worker.add(*sequences_of(work, Mode.WHOLE, block_size=4))
    token_ids = worker.collect_answers(3)
    for choice, tokens in written.items():
        assert tokens + token_ids["request", choice] == answer_to(PROMPT, 9, choice)


def test_answers_that_differ_are_refused_together(cluster: Cluster) -> None:
    worker, runner = cluster.start("worker", num_blocks=40, max_requests=2)
    runner.hold()
    worker.whole("other", [1, 2])
    runner.wait_until_held()
    choices = [Choice(choice, answer_to(PROMPT, 2, choice)) for choice in (0, 1)]
    work = make_work("request", PROMPT, choices)
    worker.add(*sequences_of(work, Mode.WHOLE, block_size=4, may_wait=False))
    worker.add(*sequences_of(work, Mode.WHOLE, block_size=4))
    runner.release()
    events: list[object] = []
    while not any(isinstance(event, WorkRefused) for event in events):
        events.append(worker.expect(object))
    tokens = worker.collect_answers(3 - any("other" in str(e) and "length" in str(e) for e in events))
    assert tokens["request", 1] == answer_to(PROMPT, 4, 1)[2:]


@pytest.mark.parametrize("free_steps", [0, 1, 3])
def test_an_abort_takes_all_answers(cluster: Cluster, free_steps: int) -> None:
    """Before the prompt is computed, and after: the pool is checked at the end."""
    worker, runner = cluster.start("worker", num_blocks=40)
    runner.hold(free_steps=free_steps)
    worker.whole("request", PROMPT, n=4, max_tokens=20)
    runner.wait_until_held()
    worker.abort("request")
    runner.release()
    worker.engine.post(PeerConnected("the end", ""))
    while not isinstance(event := worker.expect(object), PeerConnected):
        assert isinstance(event, StepTokens)
    assert worker.engine.load.running == worker.engine.load.waiting == 0


def test_a_duplicate_of_a_request_changes_nothing(cluster: Cluster) -> None:
    worker, runner = cluster.start("worker", num_blocks=40)
    runner.hold(free_steps=3)
    worker.whole("request", PROMPT, n=2, max_tokens=MAX_TOKENS)
    runner.wait_until_held()
    worker.whole("request", PROMPT, n=2, max_tokens=MAX_TOKENS)
    runner.release()
    assert worker.collect_answers(2) == answers(PROMPT, 2)


def test_a_newer_attempt_replaces_all_answers(cluster: Cluster) -> None:
    worker, runner = cluster.start("worker", num_blocks=40)
    runner.hold(free_steps=3)
    worker.whole("request", PROMPT, n=3, max_tokens=20)
    runner.wait_until_held()
    worker.whole("request", PROMPT, n=3, max_tokens=2, attempt=2)
    runner.release()
    updates: list[TokenUpdate] = []
    while sum(update.finish_reason is not None for update in updates) < 3:
        updates += worker.expect(StepTokens).updates
    newer = [update for update in updates if update.attempt == 2]
    assert len(newer) == 6
    assert updates[-6:] == newer, "nothing of the older attempt comes later"


# ---------------------------------------------------------------------------------------------- pushed


@pytest.mark.parametrize("stop", [None, 0, 2])
def test_pushed_answers_are_those_of_one_worker(cluster: Cluster, stop: int | None) -> None:
    """stop: the answer that ends with its first token."""
    prefill, decode, runner = start_pushing(cluster)
    pair = Pair(prefill, decode, runner)
    stops = () if stop is None else (answer_to(PROMPT, 1, stop)[0],)
    reserved = make_sequence("request", Mode.DECODE, PROMPT, n=3, max_tokens=MAX_TOKENS, stop_token_ids=stops)
    reserved.writer = prefill.engine_id
    decode.add(reserved)
    block_ids = decode.expect(Reserved).block_ids
    assert len(block_ids) == 3
    prompt = make_sequence("request", Mode.PREFILL, PROMPT, n=3, max_tokens=MAX_TOKENS, stop_token_ids=stops)
    prompt.push = Push("request", 1, PushTarget(decode.engine_id, block_ids))
    prefill.add(prompt)
    prefilled = pair.prefill.expect(Prefilled)
    assert (prefilled.lease, prefilled.pushed) == (None, True)
    prefill.expect(Pushed)
    work = make_work(
        "request", PROMPT, unfinished(prefilled), max_tokens=MAX_TOKENS, stop_token_ids=stops, salt=""
    )
    decode.engine.post(StartPushed(work))
    expected = rest_of(PROMPT, 3)
    expected.pop(("request", -1 if stop is None else stop), None)
    assert decode.collect_answers(len(expected)) == expected


def start_pushing(cluster: Cluster) -> tuple[EngineWorker, EngineWorker, TokenRunner]:
    prefill, _ = cluster.start("prefill", num_blocks=64)
    decode, runner = cluster.start("decode", num_blocks=64)
    prefill.transfer.connect_to_push(decode.engine_id, decode.transfer.worker_address, decode.region)
    assert prefill.expect(PeerConnected).engine_id == decode.engine_id
    return prefill, decode, runner
