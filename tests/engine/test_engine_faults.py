"""The engine loop when something goes wrong: pulls, peers and leases that fail, attempts that overlap."""

from __future__ import annotations

from time import monotonic

import pytest
from engine_cluster import PROMPT, Pair, StartPair
from engine_worker import LEASE_SECONDS, EngineWorker, answer_to

from pdengine.engine.commands import LoseLease
from pdengine.transport.messages import Pulled, StepTokens, WorkFailed


def expect_failure(worker: EngineWorker, request_id: str, reason: str, attempt: int = 1) -> None:
    failed = worker.expect(WorkFailed)
    assert (failed.request_id, failed.attempt, failed.retry) == (request_id, attempt, True)
    assert reason in failed.reason


# ---------------------------------------------------------------------------------------- failed pulls


def test_a_failed_pull_fails_the_request(pair: Pair) -> None:
    prefilled = pair.prefilled("request", PROMPT)
    pair.decode.transfer.hold()
    borrowed = pair.decode.decode("request", PROMPT, prefilled)
    pair.decode.settle()
    (pull_id,) = pair.decode.transfer.held
    pair.decode.transfer.fail(pull_id, "the cable was cut")
    expect_failure(pair.decode, "request", "the cable was cut")
    assert pair.decode.unneeded == [borrowed]
    pair.free(prefilled)


def test_a_peer_that_is_gone_fails_the_request(pair: Pair) -> None:
    prefilled = pair.prefilled("request", PROMPT)
    pair.decode.transfer.hold()
    pair.decode.decode("request", PROMPT, prefilled)
    pair.decode.settle()
    pair.prefill.transfer.close()
    failures = [pair.decode.expect(object), pair.decode.expect(object)]
    assert sorted(type(failure).__name__ for failure in failures) == ["PeerFailed", "WorkFailed"]
    pair.decode.transfer.release()
    pair.decode.decode("request", PROMPT, prefilled, attempt=2)
    expect_failure(pair.decode, "request", "not connected", attempt=2)
    pair.free(prefilled)


@pytest.mark.parametrize("end", ["completes", "fails"])
def test_an_overdue_pull_keeps_its_blocks_until_it_ends(start_pair: StartPair, end: str) -> None:
    pair = start_pair(num_blocks=4, pull_seconds=0.05)
    prefilled = pair.prefilled("overdue", PROMPT)
    pair.decode.transfer.hold()
    pair.decode.decode("overdue", PROMPT, prefilled)
    expect_failure(pair.decode, "overdue", "did not end in time")
    pair.decode.whole("next", PROMPT)
    pair.decode.settle()
    load = pair.decode.engine.load
    assert (load.quarantined_blocks, load.free_blocks, load.waiting) == (3, 1, 1)
    (pull_id,) = pair.decode.transfer.held
    if end == "completes":
        pair.decode.transfer.release(pull_id)
    else:
        pair.decode.transfer.fail(pull_id, "the peer was declared dead")
    assert pair.decode.collect(1) == {"next": answer_to(PROMPT, 4)}
    pair.free(prefilled)


def test_a_pull_that_outlasts_its_lease_is_not_trusted(pair: Pair) -> None:
    prefilled = pair.prefilled("request", PROMPT)
    borrowed = pair.decode.decode("request", PROMPT, prefilled, covered_until=monotonic())
    expect_failure(pair.decode, "request", "ran out before the pull had ended")
    assert pair.decode.unneeded == [borrowed]
    pair.free(prefilled)


def test_a_renewal_during_the_pull_counts(pair: Pair) -> None:
    prefilled = pair.prefilled("request", PROMPT)
    pair.decode.transfer.hold()
    borrowed = pair.decode.decode("request", PROMPT, prefilled, covered_until=monotonic())
    pair.decode.settle()
    borrowed.covered_until = monotonic() + LEASE_SECONDS
    pair.decode.transfer.release()
    pair.decode.expect(Pulled)
    assert pair.decode.collect(1) == {"request": answer_to(PROMPT, 4)[1:]}
    pair.free(prefilled)


# ----------------------------------------------------------------------------------------- lost leases


def test_a_lost_lease_fails_who_waits_and_who_pulls(start_pair: StartPair) -> None:
    pair = start_pair(max_requests=1)
    leases = [pair.prefilled(name, PROMPT) for name in ("pulling", "waiting")]
    pair.decode.transfer.hold()
    pulling = pair.decode.decode("pulling", PROMPT, leases[0])
    waiting = pair.decode.decode("waiting", PROMPT, leases[1])
    pair.decode.settle()
    pair.decode.engine.post(LoseLease(waiting, "expired"))
    expect_failure(pair.decode, "waiting", "expired")
    pair.decode.engine.post(LoseLease(pulling, "expired"))
    expect_failure(pair.decode, "pulling", "expired")
    pair.decode.settle()
    assert pair.decode.engine.load.quarantined_blocks == 3
    pair.decode.transfer.release()
    pair.free(*leases)


def test_a_lease_lost_after_the_pull_does_not_matter(pair: Pair) -> None:
    prefilled = pair.prefilled("request", PROMPT)
    pair.decode_runner.hold()
    borrowed = pair.decode.decode("request", PROMPT, prefilled)
    pair.decode_runner.wait_until_held()
    pair.free(prefilled)
    pair.decode.engine.post(LoseLease(borrowed, "expired"))
    pair.decode_runner.release()
    pair.decode.expect(Pulled)
    assert pair.decode.collect(1) == {"request": answer_to(PROMPT, 4)[1:]}


def test_a_lost_lease_of_an_older_attempt_does_not_matter(pair: Pair) -> None:
    leases = [pair.prefilled("request", PROMPT, attempt=attempt) for attempt in (1, 2)]
    pair.decode.transfer.hold()
    older = pair.decode.decode("request", PROMPT, leases[0], attempt=1)
    pair.decode.decode("request", PROMPT, leases[1], attempt=2)
    pair.decode.engine.post(LoseLease(older, "expired"))
    pair.decode.settle()
    pair.decode.transfer.release()
    assert pair.decode.expect(Pulled).attempt == 2
    assert pair.decode.collect(1) == {"request": answer_to(PROMPT, 4)[1:]}
    pair.free(*leases)


# -------------------------------------------------------------------------------------------- attempts


def test_a_newer_attempt_replaces_one_that_waits(pair: Pair) -> None:
    leases = [pair.prefilled("request", PROMPT, attempt=attempt) for attempt in (1, 2)]
    blocker = pair.decode.pool.allocate(16)
    assert blocker is not None
    older = pair.decode.decode("request", PROMPT, leases[0], attempt=1)
    pair.decode.decode("request", PROMPT, leases[1], attempt=2)
    pair.decode.settle()
    assert pair.decode.unneeded == [older]
    assert pair.decode.engine.load.waiting == 1
    pair.decode.pool.free(blocker)
    pair.decode.abort("somebody else")  # any command wakes the loop
    assert pair.decode.expect(Pulled).attempt == 2
    assert pair.decode.collect(1) == {"request": answer_to(PROMPT, 4)[1:]}
    pair.free(*leases)


def test_a_newer_attempt_replaces_one_that_pulls(pair: Pair) -> None:
    leases = [pair.prefilled("request", PROMPT, attempt=attempt) for attempt in (1, 2)]
    pair.decode.transfer.hold()
    older = pair.decode.decode("request", PROMPT, leases[0], attempt=1)
    pair.decode.settle()
    pair.decode.decode("request", PROMPT, leases[1], attempt=2)
    pair.decode.settle()
    assert pair.decode.unneeded == [older]
    load = pair.decode.engine.load
    assert (load.running, load.quarantined_blocks, load.free_blocks) == (1, 3, 10)
    pair.decode.transfer.release()
    assert pair.decode.expect(Pulled).attempt == 2
    assert pair.decode.collect(1) == {"request": answer_to(PROMPT, 4)[1:]}
    pair.free(*leases)


def test_a_newer_attempt_replaces_one_that_runs(pair: Pair) -> None:
    pair.decode_runner.hold()
    pair.decode.whole("request", PROMPT[:4], max_tokens=9, attempt=1)
    pair.decode_runner.wait_until_held()
    pair.decode.whole("request", PROMPT[:4], max_tokens=3, attempt=2)
    pair.decode_runner.release()
    updates = [update for _ in range(4) for update in pair.decode.expect(StepTokens).updates]
    assert [(update.attempt, update.position) for update in updates] == [(1, 0), (2, 0), (2, 1), (2, 2)]
    assert [update.token_id for update in updates[1:]] == answer_to(PROMPT[:4], 3)


def test_an_older_attempt_is_ignored_and_its_lease_given_up(pair: Pair) -> None:
    leases = [pair.prefilled("request", PROMPT, attempt=attempt) for attempt in (1, 2)]
    pair.decode.transfer.hold()
    pair.decode.decode("request", PROMPT, leases[1], attempt=2)
    older = pair.decode.decode("request", PROMPT, leases[0], attempt=1)
    pair.decode.settle()
    assert pair.decode.unneeded == [older]
    assert len(pair.decode.transfer.held) == 1
    pair.decode.transfer.release()
    assert pair.decode.expect(Pulled).attempt == 2
    pair.decode.collect(1)
    pair.free(*leases)


def test_a_duplicate_is_ignored_and_the_lease_stays_in_use(pair: Pair) -> None:
    prefilled = pair.prefilled("request", PROMPT)
    pair.decode.transfer.hold()
    pair.decode.decode("request", PROMPT, prefilled)
    duplicate = pair.decode.decode("request", PROMPT, prefilled)
    pair.decode.borrowed.remove(duplicate)  # the same lease: to be given up once
    pair.decode.settle()
    assert pair.decode.unneeded == []
    pair.decode.transfer.release()
    pair.decode.expect(Pulled)
    assert pair.decode.collect(1) == {"request": answer_to(PROMPT, 4)[1:]}
    pair.free(prefilled)
