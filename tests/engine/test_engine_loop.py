"""The engine loop, on its thread: requests that run, and requests that are taken away."""

from __future__ import annotations

import random

import pytest
from engine_cluster import PROMPT, Cluster, Pair, StartPair
from engine_worker import LEASE_SECONDS, answer_to

from pdengine.engine.commands import FreeLease
from pdengine.transport.messages import Prefilled, Pulled, StepTokens, TokenUpdate
from pdengine.transport.transfer import PeerConnected, PeerFailed

# ------------------------------------------------------------------------------------ the way through


@pytest.mark.parametrize("num_prompt_tokens", [1, 3, 4, 5, 8, 17, 30])
def test_a_pulled_prompt_goes_on_as_if_it_had_run_here(pair: Pair, num_prompt_tokens: int) -> None:
    prompt_ids = list(range(100, 100 + num_prompt_tokens))
    prefilled = pair.prefilled("request", prompt_ids)
    pair.decode.decode("request", prompt_ids, prefilled, max_tokens=6)
    pulled = pair.decode.expect(Pulled)
    decoded = pair.decode.collect(1)["request"]
    pair.decode.whole("whole", prompt_ids, max_tokens=6)
    whole = pair.decode.collect(1)["whole"]

    assert [prefilled.tokens[0].token_id, *decoded] == whole == answer_to(prompt_ids, 6)
    assert pulled.stats.num_blocks == -(-num_prompt_tokens // 4)
    assert pulled.stats.num_bytes == pulled.stats.num_blocks * 32
    assert pulled.stats.num_gets == 1, "neighbouring blocks are one read"
    assert pulled.stats.lanes == "memory"
    pair.free(prefilled)


def test_prefilled_carries_the_token_and_the_lease(pair: Pair) -> None:
    prefilled = pair.prefilled("request", PROMPT, attempt=3)
    lease = prefilled.lease
    assert lease is not None
    assert (prefilled.request_id, prefilled.attempt) == ("request", 3)
    assert prefilled.tokens == [TokenUpdate("request", 3, 0, 0, answer_to(PROMPT, 1)[0], None)]
    assert (lease.engine_id, lease.num_tokens, lease.duration) == ("prefill", 10, LEASE_SECONDS)
    assert len(lease.block_ids) == 3
    pair.prefill.settle()
    assert pair.prefill.engine.load.pinned_blocks == 3
    assert pair.prefill.engine.load.free_blocks == 253
    pair.free(prefilled)


def test_an_answer_of_one_token_needs_no_lease(pair: Pair) -> None:
    pair.prefill.prefill("request", PROMPT, max_tokens=1)
    prefilled = pair.prefill.expect(Prefilled)
    assert (prefilled.tokens[0].finish_reason, prefilled.lease) == ("length", None)


def test_a_batch_pulled_into_scattered_blocks(pair: Pair) -> None:
    prompts = {f"request-{n}": list(range(200 * n + 1, 200 * n + 4 + 3 * n)) for n in range(1, 4)}
    leases = {name: pair.prefilled(name, prompt_ids) for name, prompt_ids in prompts.items()}
    # Every second block is taken here, so that no two blocks of a pull are neighbours.
    taken = pair.decode.pool.allocate(16)
    assert taken is not None
    pair.decode.pool.free(taken[1::2])
    for name, prefilled in leases.items():
        pair.decode.decode(name, prompts[name], prefilled, max_tokens=3)
    first = pair.decode.expect(Pulled)
    assert first.stats.num_gets == first.stats.num_blocks == 2
    assert pair.decode.collect(3) == {name: answer_to(prompts[name], 3)[1:] for name in leases}
    pair.decode.settle()
    pair.decode.pool.free(taken[0::2])
    pair.free(*leases.values())


def test_who_waits_runs_as_soon_as_there_is_room(cluster: Cluster) -> None:
    """Nobody has to send another command for it."""
    worker, runner = cluster.start("worker", max_requests=1)
    runner.hold()
    worker.whole("first", PROMPT)
    runner.wait_until_held()
    worker.whole("second", PROMPT[1:])
    worker.whole("third", PROMPT[2:])
    runner.release()
    assert worker.collect(3) == {
        "first": answer_to(PROMPT, 4),
        "second": answer_to(PROMPT[1:], 4),
        "third": answer_to(PROMPT[2:], 4),
    }


def test_a_prompt_waits_for_pinned_blocks(cluster: Cluster) -> None:
    worker, _ = cluster.start("worker", num_blocks=4)
    worker.prefill("first", PROMPT)
    first = worker.expect_lease()
    worker.prefill("second", PROMPT)
    worker.settle()
    assert (worker.engine.load.running, worker.engine.load.waiting) == (0, 1)
    worker.engine.post(FreeLease(first.lease_id))
    worker.engine.post(FreeLease(worker.expect_lease().lease_id))


def test_step_age_counts_only_while_a_sequence_can_run(pair: Pair) -> None:
    assert pair.decode.engine.step_age() == 0.0
    prefilled = pair.prefilled("request", PROMPT)
    pair.decode.transfer.hold()
    pair.decode.decode("request", PROMPT, prefilled)
    pair.decode.settle()
    assert pair.decode.engine.load.running == 1
    assert pair.decode.engine.step_age() == 0.0, "it sleeps until the pull ends"
    pair.decode_runner.hold()
    pair.decode.transfer.release()
    pair.decode_runner.wait_until_held()
    assert pair.decode.engine.step_age() > 0.0
    pair.decode_runner.release()
    pair.decode.expect(Pulled)
    pair.decode.collect(1)
    pair.free(prefilled)


# ---------------------------------------------------------------------------------------------- aborts


def test_abort_while_waiting(pair: Pair) -> None:
    prefilled = pair.prefilled("waiting", PROMPT)
    blocker = pair.decode.pool.allocate(16)
    assert blocker is not None
    borrowed = pair.decode.decode("waiting", PROMPT, prefilled)
    pair.decode.settle()
    assert pair.decode.engine.load.waiting == 1
    pair.decode.abort("waiting")
    pair.decode.settle()
    assert pair.decode.engine.load.waiting == 0
    assert pair.decode.unneeded == [borrowed]
    pair.decode.pool.free(blocker)
    pair.free(prefilled)


def test_abort_while_pulling(pair: Pair) -> None:
    prefilled = pair.prefilled("pulling", PROMPT)
    pair.decode.transfer.hold()
    pair.decode.decode("pulling", PROMPT, prefilled)
    pair.decode.settle()
    pair.decode.abort("pulling")
    pair.decode.settle()
    load = pair.decode.engine.load
    assert (load.running, load.quarantined_blocks, load.free_blocks) == (0, 3, 13)
    pair.decode.transfer.release()
    pair.decode.settle()
    load = pair.decode.engine.load
    assert (load.quarantined_blocks, load.free_blocks) == (0, 16)
    pair.free(prefilled)


@pytest.mark.parametrize("finishing", [False, True])
def test_abort_while_running(pair: Pair, finishing: bool) -> None:
    pair.decode_runner.hold()
    pair.decode.whole("running", PROMPT[:4], max_tokens=1 if finishing else 9)
    pair.decode_runner.wait_until_held()
    pair.decode.abort("running")
    pair.decode_runner.release()
    # The step that was under way reports its token; the abort comes after it, or too late.
    (update,) = pair.decode.expect(StepTokens).updates
    assert (update.position, update.finish_reason) == (0, "length" if finishing else None)
    pair.decode.settle()
    assert pair.decode.engine.load.free_blocks == 16


def test_abort_between_two_chunks_of_a_prompt(pair: Pair) -> None:
    pair.decode_runner.hold()
    pair.decode.prefill("prompt", PROMPT)
    pair.decode_runner.wait_until_held()
    pair.decode.abort("prompt")
    pair.decode_runner.release()
    pair.decode.settle()
    assert pair.decode.engine.load.pinned_blocks == 0


def test_abort_of_a_leased_or_unknown_request_changes_nothing(pair: Pair) -> None:
    prefilled = pair.prefilled("request", PROMPT)
    pair.prefill.abort("request")
    pair.prefill.abort("never heard of")
    pair.prefill.settle()
    assert pair.prefill.engine.load.pinned_blocks == 3
    pair.free(prefilled)


def test_abort_all_takes_everything_but_leases(start_pair: StartPair) -> None:
    pair = start_pair(max_requests=2)
    leases = [pair.prefilled(name, PROMPT) for name in ("pulling", "waiting")]
    pair.decode.transfer.hold()
    pair.decode.decode("pulling", PROMPT, leases[0])
    pair.decode_runner.hold()
    pair.decode.prefill("running", PROMPT)
    pair.decode_runner.wait_until_held()
    pair.decode.decode("waiting", PROMPT, leases[1])
    pair.decode.abort_all()
    pair.decode_runner.release()
    pair.decode.settle()
    load = pair.decode.engine.load
    assert (load.running, load.waiting, load.pinned_blocks, load.quarantined_blocks) == (0, 0, 0, 3)
    pair.prefill.abort_all()
    pair.prefill.settle()
    assert pair.prefill.engine.load.pinned_blocks == 6
    pair.decode.transfer.release()
    pair.free(*leases)


# ---------------------------------------------------------------------------------- peers, and at random


def test_connections_are_reported(pair: Pair) -> None:
    pair.decode.transfer.connect("prefill", b"nowhere", pair.prefill.region)
    assert pair.decode.expect(PeerFailed).engine_id == "prefill"
    pair.decode.transfer.connect("prefill", pair.prefill.transfer.worker_address, pair.prefill.region)
    assert pair.decode.expect(PeerConnected) == PeerConnected("prefill", "memory")


@pytest.mark.parametrize("seed", range(8))
def test_many_requests_with_aborts_and_late_pulls(pair: Pair, seed: int) -> None:
    """Whatever overtakes what, every token that is written is right, and nothing is left behind."""
    rng = random.Random(seed)
    prompts = {f"request-{n}": [rng.randrange(900) for _ in range(rng.randint(1, 24))] for n in range(30)}
    leases = {name: pair.prefilled(name, prompt_ids) for name, prompt_ids in prompts.items()}
    aborted: set[str] = set()
    for number, (name, prompt_ids) in enumerate(prompts.items()):
        pair.decode.decode(name, prompt_ids, leases[name], max_tokens=5)
        if rng.random() < 0.3:
            victim = f"request-{rng.randint(0, number)}"
            aborted.add(victim)
            pair.decode.abort(victim)
        if rng.random() < 0.4:
            pair.decode.transfer.hold()
        elif rng.random() < 0.5:
            pair.decode.transfer.release()
    pair.decode.engine.post(PeerConnected("after the last abort", ""))
    pair.decode.transfer.release()

    token_ids = {name: [leases[name].tokens[0].token_id] for name in prompts}
    finished: set[str] = set()
    all_aborted = False
    while not (all_aborted and finished >= prompts.keys() - aborted):
        event = pair.decode.expect(object)
        assert isinstance(event, Pulled | StepTokens | PeerConnected)
        all_aborted |= isinstance(event, PeerConnected)
        for update in event.updates if isinstance(event, StepTokens) else []:
            assert update.position == len(token_ids[update.request_id])
            token_ids[update.request_id].append(update.token_id)
            if update.finish_reason is not None:
                finished.add(update.request_id)
    for name, prompt_ids in prompts.items():
        expected = answer_to(prompt_ids, 5)
        assert token_ids[name] == expected[: len(token_ids[name])]
        assert (len(token_ids[name]) == 5) == (name in finished)
    pair.free(*leases.values())
