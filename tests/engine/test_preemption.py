"""Pools that are too small for what runs: answers are preempted, and nobody can tell by the tokens."""

from __future__ import annotations

import random
from time import monotonic

import pytest
from engine_cluster import Cluster, StartPair
from engine_worker import DEADLINE_SECONDS, EngineWorker, answer_to
from exposition import samples

from pdengine.engine.engine import Engine
from pdengine.engine.step_limit import StepLimit
from pdengine.transport.messages import Prefilled, Pulled, StepTokens

LONG_PROMPT = list(range(300, 330))  # eight blocks of four tokens


def num_preemptions(worker: EngineWorker) -> float:
    worker.settle()
    return samples(worker.metrics.exposition())["pdengine_preemptions_total"]


@pytest.mark.parametrize("salt", [None, ""], ids=["no prefix cache", "prefix cache"])
def test_two_answers_that_do_not_fit_together_are_both_right(cluster: Cluster, salt: str | None) -> None:
    worker, _ = cluster.start("worker", num_blocks=8)
    prompts = {"first": [1, 2, 3, 4], "second": [5, 6, 7, 8]}
    for name, prompt_ids in prompts.items():
        worker.whole(name, prompt_ids, max_tokens=26, salt=salt)
    assert worker.collect(2) == {name: answer_to(prompt_ids, 26) for name, prompt_ids in prompts.items()}
    assert num_preemptions(worker) > 0
    assert worker.hits == [], "what is found after a preemption is nobody's news"


def test_the_urgent_one_keeps_its_blocks(cluster: Cluster) -> None:
    worker, runner = cluster.start("worker", num_blocks=8)
    runner.hold()
    worker.whole("early", [1, 2, 3, 4], max_tokens=26, priority=1)
    runner.wait_until_held()
    worker.whole("urgent", [5, 6, 7, 8], max_tokens=26, priority=0)
    runner.release()
    finished: list[str] = []
    while len(finished) < 2:
        for update in worker.expect(StepTokens).updates:
            finished += [update.request_id] if update.finish_reason is not None else []
    assert finished == ["urgent", "early"]
    assert num_preemptions(worker) > 0


def test_more_answers_to_one_prompt_than_the_pool_can_hold_at_once(cluster: Cluster) -> None:
    worker, _ = cluster.start("worker", num_blocks=8)
    worker.whole("request", [1, 2, 3, 4, 5, 6], n=6, max_tokens=20, salt="")
    expected = {("request", choice): answer_to([1, 2, 3, 4, 5, 6], 20, choice) for choice in range(6)}
    assert worker.collect_answers(6) == expected
    assert num_preemptions(worker) > 0


def test_a_pulled_answer_that_is_preempted_is_computed_here(start_pair: StartPair) -> None:
    pair = start_pair(num_blocks=9)
    prompts = {"first": list(range(8)), "second": list(range(100, 108))}
    leases = [pair.prefilled(name, prompt_ids) for name, prompt_ids in prompts.items()]
    for prefilled, (name, prompt_ids) in zip(leases, prompts.items(), strict=True):
        pair.decode.decode(name, prompt_ids, prefilled, max_tokens=20)
    pair.free(*leases)  # nobody needs them after the pulls, which end before anything runs
    for _ in leases:
        pair.decode.expect(Pulled)
    tokens = pair.decode.collect(2)
    assert tokens == {name: answer_to(prompt_ids, 20)[1:] for name, prompt_ids in prompts.items()}
    assert num_preemptions(pair.decode) > 0


def test_an_early_pull_gives_way_before_an_answer_does(start_pair: StartPair) -> None:
    pair = start_pair(num_blocks=16)
    pair.prefill.prefill("early", LONG_PROMPT)
    prefilled = pair.prefill.expect(Prefilled)
    news = pair.prefill.expect_progress()
    pair.decode_runner.hold()
    for name in ("first", "second"):
        pair.decode.whole(name, [1, 2, 3, 4], max_tokens=13)
    pair.decode_runner.wait_until_held()
    pair.decode.pull_early(news)
    pair.decode_runner.release()
    assert pair.decode.collect(2) == dict.fromkeys(("first", "second"), answer_to([1, 2, 3, 4], 13))
    assert pair.decode.num_dropped == 0, "there was room for it"
    for name in ("first", "second"):
        pair.decode.whole(name, [1, 2, 3, 4], max_tokens=25)
    pair.decode.collect(2)
    assert pair.decode.num_dropped == 1
    assert num_preemptions(pair.decode) == 0
    pair.decode.decode("early", LONG_PROMPT, prefilled)
    assert pair.decode.expect(Pulled).stats.num_early_blocks == 0
    assert pair.decode.collect(1)["early"] == answer_to(LONG_PROMPT, 4)[1:]
    pair.free(prefilled)


@pytest.mark.parametrize("salt", [None, ""], ids=["no prefix cache", "prefix cache"])
@pytest.mark.parametrize("seed", range(6))
def test_whatever_runs_on_a_tiny_pool_the_tokens_are_right(
    cluster: Cluster, seed: int, salt: str | None
) -> None:
    rng = random.Random(seed)
    worker, _ = cluster.start("worker", num_blocks=8)
    expected = {}
    shared = [rng.randrange(900) for _ in range(12)]
    for number in range(40):
        prompt_ids = shared[: rng.randint(0, 12)] + [rng.randrange(900) for _ in range(rng.randint(1, 9))]
        max_tokens = rng.randint(1, 33 - len(prompt_ids))
        n = rng.choice([1, 1, 2, 3])
        name, priority = f"request-{number}", rng.randint(0, 2)
        worker.whole(name, prompt_ids, n=n, max_tokens=max_tokens, priority=priority, salt=salt)
        for choice in range(n):
            expected[name, choice] = answer_to(prompt_ids, max_tokens, choice)
    assert worker.collect_answers(len(expected)) == expected
    assert num_preemptions(worker) > 0


@pytest.mark.parametrize("seed", range(4))
def test_pulls_and_preemptions_mix(start_pair: StartPair, seed: int) -> None:
    """Both pools are small; a lease is given back as soon as its pull has ended, as the worker does."""
    rng = random.Random(seed)
    pair, expected, leases = start_pair(num_blocks=12), {}, {}
    for number in range(20):
        name = f"request-{number}"
        prompt_ids = [rng.randrange(900) for _ in range(rng.randint(1, 24))]
        n, max_tokens = rng.choice([1, 2]), rng.randint(2, 48 - len(prompt_ids))
        pair.prefill.prefill(name, prompt_ids, n=n, max_tokens=max_tokens)
        leases[name] = prefilled = pair.prefill.expect(Prefilled)
        while not pair.prefill.progress.empty():
            news = pair.prefill.progress.get()
            if rng.random() < 0.5:
                pair.decode.pull_early(news, prompt_ids, salt="")
        pair.decode.decode(name, prompt_ids, prefilled, max_tokens=max_tokens, salt="")
        for choice in range(n):
            expected[name, choice] = answer_to(prompt_ids, max_tokens, choice)[1:]
    assert pair.decode.collect_answers(len(expected)) == expected
    pair.free(*leases.values())


# ------------------------------------------------------------------------------------------- step limit


class CountingLimit(StepLimit):
    """Allows four prompt tokens in a step, and remembers what it was told."""

    def __init__(self) -> None:
        super().__init__(1.0, 4)
        self.asked: list[int] = []
        self.observed: list[tuple[int, int]] = []

    def max_prompt_tokens(self, num_decodes: int) -> int | None:
        self.asked.append(num_decodes)
        return 4

    def observe(self, *, num_prompt_tokens: int, num_decodes: int, seconds: float) -> None:
        assert 0 <= seconds < DEADLINE_SECONDS
        self.observed.append((num_prompt_tokens, num_decodes))


def test_a_step_limit_bounds_prompts_and_learns_from_steps(cluster: Cluster) -> None:
    worker, runner = cluster.start("worker", num_blocks=32)
    limit = CountingLimit()
    worker.engine._step_limit = limit
    runner.hold()
    worker.whole("decoding", [1, 2], max_tokens=5)
    runner.wait_until_held()
    worker.whole("prompt", LONG_PROMPT[:10], max_tokens=1)
    runner.release()
    assert worker.collect(2)["prompt"] == answer_to(LONG_PROMPT[:10], 1)
    assert limit.observed == [(2, 0), (4, 1), (4, 1), (2, 1), (0, 1)]
    assert limit.asked[:5] == [0, 1, 1, 1, 1]


def test_a_loop_that_waits_for_blocks_is_asleep(cluster: Cluster) -> None:
    """An answer that runs, but has no block for its next token, is no engine that hangs."""
    worker, _ = cluster.start("worker", num_blocks=8)
    taken = worker.pool.allocate(7)
    assert taken is not None
    worker.whole("request", [1, 2, 3], max_tokens=4)
    assert worker.expect(StepTokens).updates[0].token_id == answer_to([1, 2, 3], 1)[0]
    worker.expect(StepTokens)
    worker.settle()
    assert worker.engine.load.running == 1
    assert is_asleep(worker.engine)
    worker.pool.free(taken)
    worker.abort("somebody else")  # any command wakes the loop
    worker.collect(1)


def is_asleep(engine: Engine) -> bool:
    deadline = monotonic() + DEADLINE_SECONDS
    while engine.step_age() != 0.0:
        assert monotonic() < deadline
    return True
