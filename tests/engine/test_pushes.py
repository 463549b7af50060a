"""The KV cache of a prompt pushed layer by layer: right tokens, quarantine, and nothing left behind."""

from __future__ import annotations

import random
from collections.abc import Sequence as Sequence_
from pathlib import Path

import pytest
import torch
from checkpoints import write_checkpoint
from engine_cluster import Cluster, Pair
from engine_worker import EngineWorker, TokenRunner, answer_to, unfinished
from sequences import make_sequence

from pdengine.engine.commands import AddRequest
from pdengine.engine.kv_cache import KVCache
from pdengine.engine.pushes import LoseWriter, StartPushed, UnwantedPush
from pdengine.engine.runner import Runner
from pdengine.engine.sequence import Mode, Push
from pdengine.models.config import load_config
from pdengine.models.weights import load_decoder
from pdengine.transport.messages import (
    EndPush,
    Prefilled,
    Pushed,
    PushEnded,
    PushTarget,
    Reserved,
    SamplingParams,
    StepTokens,
    TokenUpdate,
    Work,
    WorkFailed,
    WorkRefused,
)
from pdengine.transport.transfer import PeerConnected

PROMPT = list(range(300, 330))  # eight blocks of four tokens, computed in four chunks of at most eight
MAX_TOKENS = 4
ORDER = EndPush("request", 1)


@pytest.fixture
def pair(cluster: Cluster) -> Pair:
    prefill, _ = cluster.start("prefill", num_blocks=256)
    decode, runner = cluster.start("decode", num_blocks=16)
    connect(prefill, decode)
    return Pair(prefill, decode, runner)


def connect(prefill: EngineWorker, decode: EngineWorker) -> None:
    prefill.transfer.connect_to_push(decode.engine_id, decode.transfer.worker_address, decode.region)
    assert prefill.expect(PeerConnected).engine_id == decode.engine_id


def reserve(
    pair: Pair, name: str, prompt_ids: Sequence_[int], *, attempt: int = 1, max_tokens: int = MAX_TOKENS
) -> None:
    sequence = make_sequence(name, Mode.DECODE, prompt_ids, attempt=attempt, max_tokens=max_tokens)
    sequence.writer = pair.prefill.engine_id
    pair.decode.engine.post(AddRequest([sequence]))


def push(pair: Pair, reserved: Reserved, prompt_ids: Sequence_[int], *, max_tokens: int = MAX_TOKENS) -> None:
    name, attempt = reserved.request_id, reserved.attempt
    sequence = make_sequence(name, Mode.PREFILL, prompt_ids, attempt=attempt, max_tokens=max_tokens)
    sequence.push = Push(name, attempt, PushTarget(pair.decode.engine_id, reserved.block_ids))
    pair.prefill.engine.post(AddRequest([sequence]))


def start_decoding(
    pair: Pair, prefilled: Prefilled, prompt_ids: Sequence_[int], *, max_tokens: int = MAX_TOKENS
) -> None:
    name, attempt = prefilled.request_id, prefilled.attempt
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0)
    work = Work(name, attempt, list(prompt_ids), unfinished(prefilled), sampling)
    pair.decode.engine.post(StartPushed(work))


def begin(pair: Pair, prompt_ids: Sequence_[int] = PROMPT) -> Prefilled:
    """Reserve blocks, compute the prompt, and have its writes posted."""
    reserve(pair, "request", prompt_ids)
    push(pair, pair.decode.expect(Reserved), prompt_ids)
    prefilled = pair.prefill.expect(Prefilled)
    assert (prefilled.lease, prefilled.pushed) == (None, True)
    return prefilled


def free_blocks(worker: EngineWorker) -> int:
    worker.settle()
    return worker.engine.load.free_blocks


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 9, 30, 31])
def test_the_tokens_are_those_of_one_worker_and_every_block_is_written_once(pair: Pair, length: int) -> None:
    prompt_ids, num_blocks = PROMPT[:length] + [7] * (length - 30), -(-length // 4)
    prefilled = begin(pair, prompt_ids)
    stats = pair.prefill.expect(Pushed).stats
    assert (stats.num_blocks, stats.num_gets, stats.num_bytes) == (num_blocks, num_blocks, 32 * num_blocks)
    assert stats.lanes == "memory"
    start_decoding(pair, prefilled, prompt_ids)
    tokens = pair.decode.collect(1)["request"]
    assert [prefilled.tokens[0].token_id, *tokens] == answer_to(prompt_ids, MAX_TOKENS)


def test_finished_blocks_are_there_while_the_prompt_is_computed(cluster: Cluster) -> None:
    prefill, prefill_runner = cluster.start("prefill")
    decode, decode_runner = cluster.start("decode")
    connect(prefill, decode)
    pair = Pair(prefill, decode, decode_runner)
    reserve(pair, "request", PROMPT)
    reserved = decode.expect(Reserved)
    assert len(reserved.block_ids) == 8
    assert free_blocks(decode) == 16 - 8
    prefill_runner.hold(free_steps=2)
    push(pair, reserved, PROMPT)
    prefill_runner.wait_until_held()
    assert decode_runner.pool[reserved.block_ids[:4]].flatten().tolist() == PROMPT[:16]
    assert (decode_runner.pool[reserved.block_ids[4:]] == -1).all()
    prefill_runner.release()
    prefilled = prefill.expect(Prefilled)
    prefill.expect(Pushed)
    start_decoding(pair, prefilled, PROMPT)
    decode.collect(1)


def test_a_request_waits_for_room_before_its_prompt_is_computed(pair: Pair) -> None:
    prefilled = begin(pair)
    reserve(pair, "second", PROMPT)
    pair.decode.settle()  # it is not reserved
    assert pair.decode.engine.load.waiting == 1
    pair.prefill.expect(Pushed)
    start_decoding(pair, prefilled, PROMPT)
    while not isinstance(event := pair.decode.expect(object), Reserved):
        assert isinstance(event, StepTokens)
    assert event.request_id == "second"
    push(pair, event, PROMPT)
    start_decoding(pair, pair.prefill.expect(Prefilled), PROMPT)
    pair.prefill.expect(Pushed)
    pair.decode.collect(1)


def test_a_full_queue_refuses_a_reservation(pair: Pair) -> None:
    for name in ("running", "waiting"):
        reserve(pair, name, PROMPT)
    pair.decode.expect(Reserved)
    object.__setattr__(pair.decode.scheduler.config, "max_waiting", 1)
    reserve(pair, "refused", PROMPT)
    assert pair.decode.expect(WorkRefused).request_id == "refused"
    pair.decode.abort("waiting")
    pair.decode.abort("running")
    assert pair.decode.expect(UnwantedPush).order == EndPush("running", 1)
    pair.decode.engine.post(PushEnded("running", 1))


def test_blocks_of_an_aborted_push_stay_in_quarantine_until_it_has_ended(pair: Pair) -> None:
    pair.prefill.transfer.hold()
    begin(pair)
    pair.decode.abort("request")
    assert pair.decode.expect(UnwantedPush) == UnwantedPush("prefill", ORDER)
    pair.prefill.engine.post(ORDER)
    pair.prefill.settle()  # writes are in flight, so it says nothing yet
    assert free_blocks(pair.decode) == 8
    assert pair.decode.engine.load.quarantined_blocks == 8
    pair.prefill.transfer.release()
    pair.prefill.expect(Pushed)
    pair.decode.engine.post(pair.prefill.expect(PushEnded))
    assert free_blocks(pair.decode) == 16


def test_a_prompt_that_nobody_wants_any_more_is_not_finished(cluster: Cluster) -> None:
    prefill, runner = cluster.start("prefill")
    decode, decode_runner = cluster.start("decode")
    connect(prefill, decode)
    pair = Pair(prefill, decode, decode_runner)
    runner.hold(free_steps=1)
    reserve(pair, "request", PROMPT)
    push(pair, decode.expect(Reserved), PROMPT)
    runner.wait_until_held()
    decode.abort_all()
    prefill.engine.post(decode.expect(UnwantedPush).order)
    runner.release()
    decode.engine.post(prefill.expect(PushEnded))
    assert free_blocks(prefill) == free_blocks(decode) == 16


def test_work_that_comes_after_its_end_is_not_begun(pair: Pair) -> None:
    reserve(pair, "request", PROMPT)
    reserved = pair.decode.expect(Reserved)
    pair.decode.abort("request")
    pair.prefill.engine.post(pair.decode.expect(UnwantedPush).order)
    pair.decode.engine.post(pair.prefill.expect(PushEnded))
    push(pair, reserved, PROMPT)
    pair.prefill.settle()
    assert free_blocks(pair.decode) == 16
    assert (pair.decode_runner.pool == -1).all()


def test_a_lost_writer_frees_what_it_might_have_written(pair: Pair) -> None:
    reserve(pair, "request", PROMPT)
    pair.decode.expect(Reserved)
    pair.decode.abort("request")
    pair.decode.expect(UnwantedPush)
    pair.decode.engine.post(LoseWriter("another"))
    assert free_blocks(pair.decode) == 8
    pair.decode.engine.post(LoseWriter("prefill"))
    assert free_blocks(pair.decode) == 16


def test_a_failed_write_fails_the_request_once(pair: Pair) -> None:
    pair.prefill.transfer.hold()
    begin(pair)
    for write_id in pair.prefill.transfer.held:
        pair.prefill.transfer.fail(write_id, "the cable was cut")
    failed = pair.prefill.expect(WorkFailed)
    assert (failed.retry, failed.reason) == (True, "the push of its KV cache failed: the cable was cut")
    assert free_blocks(pair.prefill) == 256
    pair.decode.abort("request")
    pair.prefill.engine.post(pair.decode.expect(UnwantedPush).order)
    pair.decode.engine.post(pair.prefill.expect(PushEnded))


def test_a_write_that_fails_while_the_prompt_is_computed_stops_it(cluster: Cluster, pair: Pair) -> None:
    pair.prefill.transfer.disconnect("decode")
    reserve(pair, "request", PROMPT)
    push(pair, pair.decode.expect(Reserved), PROMPT)
    assert pair.prefill.expect(WorkFailed).reason.endswith("engine decode is not connected")
    assert free_blocks(pair.prefill) == 256
    pair.decode.engine.post(LoseWriter("prefill"))
    pair.decode.abort("request")
    pair.decode.expect(UnwantedPush)
    pair.decode.engine.post(LoseWriter("prefill"))


def test_a_request_that_ends_with_its_first_token_is_not_pushed(pair: Pair) -> None:
    reserve(pair, "request", PROMPT, max_tokens=1)
    push(pair, pair.decode.expect(Reserved), PROMPT, max_tokens=1)
    prefilled = pair.prefill.expect(Prefilled)
    assert (prefilled.tokens[0].finish_reason, prefilled.pushed, prefilled.lease) == ("length", False, None)
    pair.decode.abort("request")
    pair.prefill.engine.post(pair.decode.expect(UnwantedPush).order)
    pair.decode.engine.post(pair.prefill.expect(PushEnded))


def test_what_was_not_reserved_is_not_decoded(pair: Pair) -> None:
    token = TokenUpdate("request", 1, 0, 0, 5, None)
    start_decoding(pair, Prefilled("request", 1, [token], None, True), PROMPT)
    assert pair.decode.expect(WorkFailed).reason == "no blocks are reserved for it here"


@pytest.mark.parametrize("seed", range(8))
def test_whatever_is_aborted_or_fails_the_tokens_are_right(cluster: Cluster, seed: int) -> None:
    """The pools are checked at the end of every test."""
    rng = random.Random(seed)
    prefill, _ = cluster.start("prefill", num_blocks=256)
    decode, runner = cluster.start("decode", num_blocks=64)
    connect(prefill, decode)
    pair = Pair(prefill, decode, runner)
    expected = {}
    for number in range(20):
        name, attempt = f"request-{number}", 0
        prompt_ids = [rng.randrange(900) for _ in range(rng.randint(1, 40))]
        while name not in expected:
            attempt += 1
            reserve(pair, name, prompt_ids, attempt=attempt)
            if rng.random() < 0.4:
                prefill.transfer.hold()
            push(pair, decode.expect(Reserved), prompt_ids)
            prefilled = prefill.expect(Prefilled)
            failed = bool(prefill.transfer.held) and rng.random() < 0.5
            if failed:
                prefill.transfer.fail(rng.choice(prefill.transfer.held), "the cable was cut")
                prefill.expect(WorkFailed)
            aborted = failed or rng.random() < 0.3
            if aborted:
                rng.choice([decode.abort_all, lambda name=name: decode.abort(name)])()
                prefill.engine.post(decode.expect(UnwantedPush).order)
            prefill.transfer.release()
            ends = [prefill.expect(object) for _ in range(aborted + (not failed))]
            assert {type(end) for end in ends} <= {Pushed, PushEnded}
            if aborted:
                decode.engine.post(PushEnded(name, attempt))
            else:
                start_decoding(pair, prefilled, prompt_ids)
                assert decode.collect(1)[name] == answer_to(prompt_ids, MAX_TOKENS)[1:]
                expected[name] = True


def test_all_layers_and_heads_of_a_model_arrive(cluster: Cluster, tmp_path: Path) -> None:
    write_checkpoint("qwen3", tmp_path)
    config = load_config(tmp_path)
    model = load_decoder(tmp_path, config, dtype=torch.float32, device=torch.device("cpu"))

    def start(engine_id: str, max_batch_tokens: int) -> EngineWorker:
        kv_cache = KVCache(config, num_blocks=32, block_size=8, dtype=torch.float32)
        kv_cache.pool.fill_(torch.nan)  # what nobody has written must never be read
        return cluster.add(
            EngineWorker(
                cluster.fabric,
                engine_id,
                runner=Runner(model, kv_cache, torch.device("cpu")),
                region=kv_cache.describe(),
                block_size=8,
                max_batch_tokens=max_batch_tokens,
            )
        )

    prefill, decode, whole = start("prefill", 13), start("decode", 4), start("whole", 512)
    connect(prefill, decode)
    pair = Pair(prefill, decode, TokenRunner(1, 1))
    prompt_ids = random.Random(3).choices(range(1, config.vocab_size), k=77)
    whole.whole("request", prompt_ids, max_tokens=16)
    reserve(pair, "request", prompt_ids, max_tokens=16)
    push(pair, decode.expect(Reserved), prompt_ids, max_tokens=16)
    prefilled = prefill.expect(Prefilled)
    stats = prefill.expect(Pushed).stats
    assert stats.num_gets == 10 * config.num_layers * config.num_kv_heads
    assert stats.num_bytes == 10 * decode.region.block_bytes
    start_decoding(pair, prefilled, prompt_ids, max_tokens=16)
    assert [prefilled.tokens[0].token_id, *decode.collect(1)["request"]] == whole.collect(1)["request"]
