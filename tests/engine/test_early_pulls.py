"""Pulls that begin while the prompt is still computed: nobody waits for them, nobody depends on them."""

from __future__ import annotations

import random
from dataclasses import replace

import msgspec
import pytest
from engine_cluster import Cluster, Pair, StartPair
from engine_worker import EngineWorker, answer_to
from sequences import make_sequence

from pdengine.engine.commands import AddRequest, CoverLease, FreeLease, LoseLease
from pdengine.engine.sequence import Mode
from pdengine.transport.messages import (
    KVLease,
    Prefilled,
    PromptProgress,
    Pulled,
    StepTokens,
    WorkFailed,
    WorkRefused,
)
from pdengine.transport.transfer import PeerConnected

LONG_PROMPT = list(range(300, 330))  # eight blocks of four tokens, computed in four chunks of at most eight
NUM_CHUNKS_BEFORE_THE_LAST = 3


def prefill_in_chunks(pair: Pair, *, attempt: int = 1) -> tuple[list[PromptProgress], Prefilled]:
    """What the prefill worker tells of the long prompt."""
    prefilled = pair.prefilled("request", LONG_PROMPT, attempt=attempt)
    return [pair.prefill.expect_progress() for _ in range(NUM_CHUNKS_BEFORE_THE_LAST)], prefilled


def pull_early(pair: Pair, *progress: PromptProgress) -> None:
    """Each piece of news is read before the next one comes."""
    for news in progress:
        pair.decode.pull_early(news)
        pair.decode.settle()
        pair.decode.settle()  # the end of the read was in the inbox by now


def free_blocks(worker: EngineWorker) -> int:
    worker.settle()
    return worker.engine.load.free_blocks


def test_progress_tells_how_far_the_prompt_is_and_which_lease_it_will_have(pair: Pair) -> None:
    progress, prefilled = prefill_in_chunks(pair)
    assert [news.num_tokens for news in progress] == [8, 16, 24]
    assert [news.lease for news in progress] == [prefilled.lease] * 3
    pair.free(prefilled)


def test_only_the_rest_is_pulled_at_the_end(pair: Pair) -> None:
    progress, prefilled = prefill_in_chunks(pair)
    pull_early(pair, *progress)
    assert free_blocks(pair.decode) == 16 - 8
    assert pair.decode.engine.load.running == 1
    pair.decode.decode("request", LONG_PROMPT, prefilled)
    stats = pair.decode.expect(Pulled).stats
    assert (stats.num_blocks, stats.num_early_blocks, stats.num_gets) == (8, 6, 4)
    assert stats.num_bytes == 8 * 32
    assert [prefilled.tokens[0].token_id, *pair.decode.collect(1)["request"]] == answer_to(LONG_PROMPT, 4)
    pair.free(prefilled)


def test_blocks_are_read_while_the_prompt_is_computed(cluster: Cluster) -> None:
    prefill, prefill_runner = cluster.start("prefill")
    decode, decode_runner = cluster.start("decode")
    decode.connect(prefill)
    prefill_runner.hold(free_steps=2)
    prefill.prefill("request", LONG_PROMPT)
    prefill_runner.wait_until_held()
    prefill.expect_progress()
    news = prefill.expect_progress()
    assert news.num_tokens == 16
    pull_early(Pair(prefill, decode, decode_runner), news)
    landed = decode_runner.pool[: news.num_tokens // 4].flatten().tolist()
    assert landed == LONG_PROMPT[: news.num_tokens]
    prefill_runner.release()
    prefilled = prefill.expect(Prefilled)
    decode.decode("request", LONG_PROMPT, prefilled)
    assert decode.expect(Pulled).stats.num_early_blocks == 4
    assert [prefilled.tokens[0].token_id, *decode.collect(1)["request"]] == answer_to(LONG_PROMPT, 4)
    assert prefilled.lease is not None
    prefill.engine.post(FreeLease(prefilled.lease.lease_id))


def test_what_became_ready_during_a_read_is_one_more_read(pair: Pair) -> None:
    progress, prefilled = prefill_in_chunks(pair)
    pair.decode.transfer.hold()
    for news in progress:
        pair.decode.pull_early(news)
    pair.decode.settle()
    assert len(pair.decode.transfer.held) == 1
    pair.decode.decode("request", LONG_PROMPT, prefilled)
    pair.decode.settle()
    pair.decode.transfer.release()
    stats = pair.decode.expect(Pulled).stats
    assert (stats.num_blocks, stats.num_early_blocks, stats.num_gets) == (8, 2, 2)
    assert [prefilled.tokens[0].token_id, *pair.decode.collect(1)["request"]] == answer_to(LONG_PROMPT, 4)
    pair.free(prefilled)


@pytest.mark.parametrize("options", [{"num_blocks": 9}, {"max_requests": 1}], ids=["blocks", "requests"])
def test_without_room_nothing_is_pulled_early(start_pair: StartPair, options: dict[str, int]) -> None:
    pair = start_pair(**options)
    progress, prefilled = prefill_in_chunks(pair)
    other = pair.prefilled("other", [1, 2])
    pair.decode.transfer.hold()
    pair.decode.decode("other", [1, 2], other)
    for news in progress:
        pair.decode.pull_early(news)
    pair.decode.settle()
    assert pair.decode.num_dropped == NUM_CHUNKS_BEFORE_THE_LAST
    assert len(pair.decode.transfer.held) == 1
    assert pair.decode.engine.load.running == 1
    pair.decode.decode("request", LONG_PROMPT, prefilled)
    pair.decode.transfer.release()
    assert pair.decode.collect(2)["request"] == answer_to(LONG_PROMPT, 4)[1:]
    pair.free(prefilled, other)


def test_a_request_that_waits_is_not_overtaken(start_pair: StartPair) -> None:
    pair = start_pair(num_blocks=16)
    progress, prefilled = prefill_in_chunks(pair)
    large, small = list(range(50)), [7, 8]
    pair.decode.transfer.hold()
    leases = [pair.prefilled("large", large), pair.prefilled("small", small)]
    pair.decode.decode("large", large, leases[0])  # 14 of 16 blocks
    pair.decode.whole("waits", list(range(40)))
    pair.decode.decode("small", small, leases[1])
    pair.decode.pull_early(progress[0])
    pair.decode.settle()
    assert (pair.decode.engine.load.running, pair.decode.engine.load.waiting) == (1, 2)
    pair.decode.transfer.release()
    assert len(pair.decode.collect(3)) == 3
    pair.free(prefilled, *leases)


def test_an_early_pull_that_nobody_wants_leaves_no_trace(pair: Pair) -> None:
    progress, prefilled = prefill_in_chunks(pair)
    pair.decode.pull_early(progress[0])
    assert free_blocks(pair.decode) == 8
    pair.decode.abort("request")
    assert free_blocks(pair.decode) == 16
    assert pair.decode.engine.load.quarantined_blocks == 0
    pair.free(prefilled)


def test_blocks_that_an_early_read_may_write_stay_in_quarantine(pair: Pair) -> None:
    progress, prefilled = prefill_in_chunks(pair)
    pair.decode.transfer.hold()
    pair.decode.pull_early(progress[0])
    pair.decode.abort_all()
    assert free_blocks(pair.decode) == 8
    assert pair.decode.engine.load.quarantined_blocks == 8
    pair.decode.transfer.release()
    assert free_blocks(pair.decode) == 16
    pair.free(prefilled)


def test_a_failed_early_read_is_made_good_by_the_pull(pair: Pair) -> None:
    progress, prefilled = prefill_in_chunks(pair)
    pair.decode.transfer.hold()
    pair.decode.pull_early(progress[1])
    pair.decode.settle()
    (read_id,) = pair.decode.transfer.held
    pair.decode.transfer.fail(read_id, "the cable was cut")
    assert free_blocks(pair.decode) == 16
    pair.decode.transfer.release()
    pair.decode.decode("request", LONG_PROMPT, prefilled)
    assert pair.decode.expect(Pulled).stats.num_early_blocks == 0
    assert [prefilled.tokens[0].token_id, *pair.decode.collect(1)["request"]] == answer_to(LONG_PROMPT, 4)
    pair.free(prefilled)


def test_an_early_pull_without_news_is_given_up(start_pair: StartPair) -> None:
    pair = start_pair(pull_seconds=0.05)
    progress, prefilled = prefill_in_chunks(pair)
    pair.decode.pull_early(progress[0])
    while free_blocks(pair.decode) < 16:
        pass
    assert pair.decode.num_dropped == 1
    pair.free(prefilled)


def test_a_newer_attempt_starts_anew_and_an_older_one_is_ignored(pair: Pair) -> None:
    old_progress, old = prefill_in_chunks(pair)
    progress, prefilled = prefill_in_chunks(pair, attempt=2)
    pull_early(pair, old_progress[2], progress[0], old_progress[2])
    assert free_blocks(pair.decode) == 8
    pair.decode.decode("request", LONG_PROMPT, prefilled, attempt=2)
    assert pair.decode.expect(Pulled).stats.num_early_blocks == 2
    assert [prefilled.tokens[0].token_id, *pair.decode.collect(1)["request"]] == answer_to(LONG_PROMPT, 4)
    pair.free(old, prefilled)


def test_what_was_read_under_another_lease_is_not_used(pair: Pair) -> None:
    progress, prefilled = prefill_in_chunks(pair)
    _, other = prefill_in_chunks(pair)
    pair.decode.pull_early(progress[2])
    pair.decode.decode("request", LONG_PROMPT, other)
    assert pair.decode.expect(Pulled).stats.num_early_blocks == 0
    assert [other.tokens[0].token_id, *pair.decode.collect(1)["request"]] == answer_to(LONG_PROMPT, 4)
    pair.free(prefilled, other)


# --------------------------------------------------------------------- leases confirmed after the pull


def test_a_pull_waits_for_the_confirmation_of_its_lease(pair: Pair) -> None:
    prefilled = pair.prefilled("request", LONG_PROMPT)
    borrowed = pair.decode.decode("request", LONG_PROMPT, prefilled, covered_until=float("-inf"))
    pair.decode.settle()  # it has landed, and nothing is said
    borrowed.covered_until = float("inf")
    pair.decode.engine.post(CoverLease(borrowed))
    assert pair.decode.expect(Pulled).stats.num_blocks == 8
    assert pair.decode.collect(1)["request"] == answer_to(LONG_PROMPT, 4)[1:]
    pair.free(prefilled)


def test_a_pull_whose_lease_is_never_confirmed_is_discarded(pair: Pair) -> None:
    prefilled = pair.prefilled("request", LONG_PROMPT)
    borrowed = pair.decode.decode("request", LONG_PROMPT, prefilled, covered_until=float("-inf"))
    pair.decode.settle()
    pair.decode.engine.post(LoseLease(borrowed, "it has expired"))
    assert pair.decode.expect(WorkFailed).reason == "it has expired"
    assert free_blocks(pair.decode) == 16
    pair.free(prefilled)


# ------------------------------------------------------------------------------------ work refused


def test_work_that_may_not_wait_is_refused_where_it_would(start_pair: StartPair) -> None:
    pair = start_pair(max_requests=1)
    running = make_sequence("running", Mode.WHOLE, list(range(20)), may_wait=False)
    refused = make_sequence("refused", Mode.WHOLE, [1, 2], may_wait=False)
    waits = make_sequence("waits", Mode.WHOLE, [1, 2])
    for sequence in (running, refused, waits):
        pair.decode.engine.post(AddRequest([sequence]))
    refusal = pair.decode.expect(WorkRefused)
    assert (refusal.request_id, refusal.attempt) == ("refused", 1)
    assert pair.decode.collect(2).keys() == {"running", "waits"}


def test_a_prompt_is_refused_where_the_pool_is_pinned(pair: Pair) -> None:
    pair.prefill.scheduler.config = replace(pair.prefill.scheduler.config, max_pinned_blocks=8)
    pinned = pair.prefilled("pinned", LONG_PROMPT)
    sequence = make_sequence("refused", Mode.PREFILL, LONG_PROMPT, may_wait=False)
    pair.prefill.engine.post(AddRequest([sequence]))
    assert "8 KV blocks are pinned" in pair.prefill.expect(WorkRefused).reason
    pair.free(pinned)


def test_a_full_queue_refuses_everybody(start_pair: StartPair) -> None:
    pair = start_pair(max_requests=1)
    pair.decode.scheduler.config = replace(pair.decode.scheduler.config, max_waiting=1)
    pair.decode_runner.hold()
    pair.decode.whole("running", [1, 2])
    pair.decode_runner.wait_until_held()
    pair.decode.whole("waits", [1, 2])
    pair.decode.whole("refused", [1, 2])
    pair.decode_runner.release()
    events: list[object] = []
    while not any(isinstance(event, WorkRefused) for event in events):
        events.append(pair.decode.expect(object))
    assert "1 requests are waiting, which is the limit" in str(events[-1])
    finished = sum(
        u.finish_reason is not None for e in events if isinstance(e, StepTokens) for u in e.updates
    )
    pair.decode.collect(2 - finished)


# ------------------------------------------------------------------------------------------- random


@pytest.mark.parametrize("seed", range(8))
def test_whatever_overtakes_what_the_tokens_are_right(start_pair: StartPair, seed: int) -> None:
    """Early pulls that are followed by a decode, aborted, held, failed, or outdated by another attempt."""
    rng = random.Random(seed)
    pair = start_pair(num_blocks=40)
    decode, expected, granted = pair.decode, {}, []
    for number in range(20):
        name, attempt = f"request-{number}", 1
        prompt_ids = [rng.randrange(900) for _ in range(rng.randint(9, 40))]
        while True:
            pair.prefill.prefill(name, prompt_ids, attempt=attempt)
            prefilled = pair.prefill.expect(Prefilled)
            granted.append(prefilled)
            for _ in range((len(prompt_ids) - 1) // 8):
                news = pair.prefill.expect_progress()
                if rng.random() < 0.7:
                    decode.pull_early(news)
                if rng.random() < 0.3:
                    rng.choice([decode.transfer.hold, decode.transfer.release])()
            if rng.random() < 0.7:
                break
            attempt += 1
            pair.free(granted.pop())  # though somebody may still read it
            if rng.random() < 0.5:
                decode.abort(name)
        if rng.random() < 0.8:
            decode.decode(name, prompt_ids, prefilled, attempt=attempt)
            expected[name] = answer_to(prompt_ids, 4)[1:]
        else:
            decode.abort(name)
    decode.engine.post(PeerConnected("after the last command", ""))
    decode.transfer.release()
    token_ids: dict[str, list[int]] = {}
    all_handled = False
    while not all_handled or any(len(token_ids.get(name, [])) < 3 for name in expected):
        event = decode.expect(object)
        assert isinstance(event, Pulled | StepTokens | PeerConnected)
        all_handled |= isinstance(event, PeerConnected)
        for update in event.updates if isinstance(event, StepTokens) else []:
            token_ids.setdefault(update.request_id, []).append(update.token_id)
    decode.settle()
    assert token_ids == expected
    pair.free(*granted)


def test_a_lease_that_is_borrowed_anew_is_the_same(pair: Pair) -> None:
    """The early pull knows the lease from a message of its own: they are compared by value."""
    progress, prefilled = prefill_in_chunks(pair)
    copied = msgspec.msgpack.decode(msgspec.msgpack.encode(progress[2].lease), type=KVLease)
    pull_early(pair, msgspec.structs.replace(progress[2], lease=copied))
    pair.decode.decode("request", LONG_PROMPT, prefilled)
    assert pair.decode.expect(Pulled).stats.num_early_blocks == 6
    pair.decode.collect(1)
    pair.free(prefilled)
