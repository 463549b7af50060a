"""What a worker finds in its prefix cache: less to compute, less to pull, and the same tokens."""

from __future__ import annotations

import random

import pytest
from engine_cluster import Cluster, Pair, StartPair
from engine_worker import EngineWorker, answer_to
from exposition import samples

from pdengine.transport.messages import PREFIX_TAG_BYTES, Prefilled, PrefixHit, Pulled

LONG_PROMPT = list(range(300, 330))  # eight blocks of four tokens, computed in four chunks of at most eight
NEVER = float("-inf")  # a lease that its owner has not confirmed


def known(worker: EngineWorker) -> int:
    """Blocks that the worker says can be found."""
    worker.settle()
    return len(worker.cached_tags)


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 9, 12])
@pytest.mark.parametrize("num_shared", [0, 3, 4, 8, 12])
def test_a_prompt_is_computed_from_where_it_is_new(cluster: Cluster, length: int, num_shared: int) -> None:
    worker, _ = cluster.start("worker")
    prompt_ids = list(range(100, 100 + length))
    worker.whole("first", [*prompt_ids[:num_shared], 7, 7, 7, 7], salt="")
    worker.collect(1)
    worker.whole("second", prompt_ids, salt="")
    assert worker.collect(1)["second"] == answer_to(prompt_ids, 4)
    num_cached = min(min(num_shared, length) // 4 * 4, length - 1)
    expected = [PrefixHit("second", 1, num_cached)] if num_cached else []
    assert worker.hits == expected
    found = samples(worker.metrics.exposition())
    assert found["pdengine_prefix_cache_hits_total"] == num_cached
    assert found["pdengine_prefix_cache_queries_total"] == min(num_shared, length) + 4 + length


def test_an_answer_is_found_by_the_next_turn_of_a_conversation(cluster: Cluster) -> None:
    worker, _ = cluster.start("worker", num_blocks=32)
    prompt_ids = list(range(100, 110))
    worker.whole("first", prompt_ids, max_tokens=11, salt="")
    answer = worker.collect(1)["first"]
    worker.settle()
    worker.whole("second", [*prompt_ids, *answer, 5, 6, 7], salt="")
    assert worker.collect(1)["second"] == answer_to([*prompt_ids, *answer, 5, 6, 7], 4)
    assert worker.hits == [PrefixHit("second", 1, 20)], "the last token of an answer was never computed"


@pytest.mark.parametrize("salts", [("one", "another"), ("one", None), (None, "one")])
def test_another_salt_finds_nothing(cluster: Cluster, salts: tuple[str | None, str | None]) -> None:
    worker, _ = cluster.start("worker", num_blocks=32)
    for salt in salts:
        worker.whole("request", LONG_PROMPT, salt=salt)
        assert worker.collect(1)["request"] == answer_to(LONG_PROMPT, 4)
    assert worker.hits == []


# ------------------------------------------------------------------------------------------ what is told


def test_the_router_is_told_what_is_there_and_what_is_gone(cluster: Cluster) -> None:
    worker, _ = cluster.start("worker", num_blocks=16)
    worker.whole("first", LONG_PROMPT, salt="")
    worker.collect(1)
    assert known(worker) == 8, "of 33 computed tokens"
    assert worker.engine.load.idle_blocks == 8
    assert worker.engine.load.free_blocks == 16
    worker.whole("second", list(range(40)), salt="")
    worker.collect(1)
    assert known(worker) == 16 - 1, "one block is not full"
    worker.whole("third", list(range(500, 550)), salt="")
    worker.collect(1)
    worker.settle()
    assert worker.cached_tags == {name[:PREFIX_TAG_BYTES] for name in worker.pool.names()}


def test_a_new_router_is_told_everything(cluster: Cluster) -> None:
    worker, _ = cluster.start("worker", num_blocks=16)
    worker.whole("first", LONG_PROMPT, salt="")
    worker.collect(1)
    assert known(worker) == 8
    worker.cached_tags = {b"of the past"}
    worker.abort_all()
    assert known(worker) == 8
    assert b"of the past" not in worker.cached_tags


# ------------------------------------------------------------------------------------------------ pulls


def cached_at(pair: Pair, num_blocks: int) -> None:
    """Let so many blocks of the long prompt be in the cache of the decode worker."""
    if num_blocks:
        pair.decode.whole("before", LONG_PROMPT[: 4 * num_blocks], max_tokens=1, salt="")
        pair.decode.collect(1)


@pytest.mark.parametrize("num_cached", [0, 1, 5, 7])
def test_only_what_is_not_cached_is_pulled(pair: Pair, num_cached: int) -> None:
    cached_at(pair, num_cached)
    prefilled = pair.prefilled("request", LONG_PROMPT)
    pair.decode.decode("request", LONG_PROMPT, prefilled, salt="")
    stats = pair.decode.expect(Pulled).stats
    assert (stats.num_blocks, stats.num_cached_blocks) == (8 - num_cached, num_cached)
    assert stats.num_bytes == 32 * stats.num_blocks
    assert pair.decode.collect(1)["request"] == answer_to(LONG_PROMPT, 4)[1:]
    pair.free(prefilled)


def test_a_prompt_that_is_cached_whole_is_not_pulled_and_needs_no_confirmed_lease(pair: Pair) -> None:
    prompt_ids = LONG_PROMPT[:28]
    pair.decode.whole("before", prompt_ids, salt="")
    pair.decode.collect(1)
    prefilled = pair.prefilled("request", prompt_ids)
    pair.decode.transfer.hold()
    borrowed = pair.decode.decode("request", prompt_ids, prefilled, salt="", covered_until=NEVER)
    stats = pair.decode.expect(Pulled).stats
    assert (stats.num_blocks, stats.num_cached_blocks, stats.num_gets, stats.num_bytes) == (0, 7, 0, 0)
    assert pair.decode.collect(1)["request"] == answer_to(prompt_ids, 4)[1:]
    assert pair.decode.unneeded == [borrowed]
    assert samples(pair.decode.metrics.exposition())["pdengine_kv_pull_bytes_count"] == 0
    pair.free(prefilled)


@pytest.mark.parametrize("num_cached", [1, 3, 7])
def test_an_early_pull_reads_only_what_is_not_cached(pair: Pair, num_cached: int) -> None:
    cached_at(pair, num_cached)
    prefilled = pair.prefilled("request", LONG_PROMPT)
    progress = [pair.prefill.expect_progress() for _ in range(3)]
    for news in progress:
        pair.decode.pull_early(news, LONG_PROMPT, salt="")
        pair.decode.settle()
        pair.decode.settle()
    pair.decode.decode("request", LONG_PROMPT, prefilled, salt="")
    stats = pair.decode.expect(Pulled).stats
    assert (stats.num_blocks, stats.num_cached_blocks) == (8 - num_cached, num_cached)
    assert stats.num_early_blocks == max(0, 6 - num_cached)
    assert pair.decode.collect(1)["request"] == answer_to(LONG_PROMPT, 4)[1:]
    found = samples(pair.decode.metrics.exposition())
    assert found["pdengine_prefix_cache_hits_total"] == 4 * num_cached
    pair.free(prefilled)


@pytest.mark.parametrize("early", [False, True])
def test_cached_blocks_are_no_quarantine(pair: Pair, early: bool) -> None:
    cached_at(pair, 5)
    prefilled = pair.prefilled("request", LONG_PROMPT)
    news = [pair.prefill.expect_progress() for _ in range(3)]
    pair.decode.transfer.hold()
    if early:
        pair.decode.pull_early(news[2], LONG_PROMPT, salt="")
    else:
        pair.decode.decode("request", LONG_PROMPT, prefilled, salt="")
    pair.decode.settle()
    pair.decode.abort("request")
    pair.decode.settle()
    load = pair.decode.engine.load
    assert (load.quarantined_blocks, load.free_blocks) == (3, 13)
    assert known(pair.decode) == 5
    pair.decode.whole("next", LONG_PROMPT, salt="")
    assert pair.decode.collect(1)["next"] == answer_to(LONG_PROMPT, 4)
    pair.decode.transfer.release()
    pair.free(prefilled)


def test_prompts_that_share_blocks_have_leases_of_their_own(pair: Pair) -> None:
    other = [*LONG_PROMPT[:20], 1, 2, 3]
    leases = []
    for name, prompt_ids in (("one", LONG_PROMPT), ("two", other), ("three", LONG_PROMPT)):
        pair.prefill.prefill(name, prompt_ids, salt="")
        leases.append(pair.prefill.expect(Prefilled))
    assert pair.prefill.hits == [PrefixHit("two", 1, 20), PrefixHit("three", 1, 28)]
    pair.prefill.settle()
    assert pair.prefill.engine.load.pinned_blocks == 8 + 1 + 1
    pair.free(leases[0])
    for name, prompt_ids, prefilled in (("two", other, leases[1]), ("three", LONG_PROMPT, leases[2])):
        pair.decode.decode(name, prompt_ids, prefilled, salt="")
        pair.decode.expect(Pulled)
        assert pair.decode.collect(1)[name] == answer_to(prompt_ids, 4)[1:]
    pair.free(*leases[1:])
    pair.prefill.settle()
    assert pair.prefill.engine.load.pinned_blocks == 0


@pytest.mark.parametrize("seed", range(6))
def test_conversations_on_small_pools_write_the_right_tokens(start_pair: StartPair, seed: int) -> None:
    """Prefixes that are shared, grow, are forgotten and pulled again, with early pulls and aborts between."""
    rng = random.Random(seed)
    pair = start_pair(num_blocks=24)
    histories = [[rng.randrange(900) for _ in range(rng.randint(1, 12))] for _ in range(3)]
    for number in range(40):
        name, history = f"request-{number}", rng.choice(histories)
        prompt_ids = [*history, *(rng.randrange(900) for _ in range(rng.randint(1, 9)))]
        pair.prefill.prefill(name, prompt_ids, max_tokens=5, salt="")
        prefilled = pair.prefill.expect(Prefilled)
        while not pair.prefill.progress.empty():
            news = pair.prefill.progress.get()
            if rng.random() < 0.5:
                pair.decode.pull_early(news, prompt_ids, salt="")
        if rng.random() < 0.2:
            pair.decode.abort(name)
        else:
            pair.decode.decode(name, prompt_ids, prefilled, max_tokens=5, salt="")
            answer = answer_to(prompt_ids, 5)
            assert pair.decode.collect(1)[name] == answer[1:]
            if len(history) < 40:
                history[:] = prompt_ids + answer
        pair.free(prefilled)
    pair.decode.settle()
    assert samples(pair.decode.metrics.exposition())["pdengine_prefix_cache_hits_total"] > 0
