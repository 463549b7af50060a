"""A real model: tokens written from a pulled KV cache are those of a model that computed it itself."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from checkpoints import write_checkpoint
from engine_cluster import Cluster
from engine_worker import EngineWorker

from pdengine.engine.commands import FreeLease
from pdengine.engine.kv_cache import KVCache
from pdengine.engine.runner import Runner
from pdengine.models.config import load_config
from pdengine.models.decoder import Decoder
from pdengine.models.weights import load_decoder
from pdengine.transport.messages import Prefilled

NUM_BLOCKS = 96
BLOCK_SIZE = 8
MAX_TOKENS = 16
PROMPT_LENGTHS = (1, 3, 8, 9, 31, 64, 77)


@pytest.fixture(scope="module", params=["llama3-rope", "qwen2", "qwen3"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    directory: Path = tmp_path_factory.mktemp(request.param)
    write_checkpoint(request.param, directory)
    config = load_config(directory)
    return load_decoder(directory, config, dtype=torch.float32, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def prompts(model: Decoder) -> dict[str, list[int]]:
    rng = random.Random(3)
    vocabulary = range(1, model.config.vocab_size)
    return {f"prompt of {n}": rng.choices(vocabulary, k=n) for n in PROMPT_LENGTHS}


def start(
    cluster: Cluster, engine_id: str, model: Decoder, max_batch_tokens: int
) -> tuple[EngineWorker, KVCache]:
    kv_cache = KVCache(model.config, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, dtype=torch.float32)
    kv_cache.pool.fill_(torch.nan)  # what nobody has written or pulled must never be read
    worker = EngineWorker(
        cluster.fabric,
        engine_id,
        runner=Runner(model, kv_cache, torch.device("cpu")),
        region=kv_cache.describe(),
        block_size=BLOCK_SIZE,
        max_batch_tokens=max_batch_tokens,
    )
    return cluster.add(worker), kv_cache


def run_whole(cluster: Cluster, model: Decoder, prompts: dict[str, list[int]]) -> dict[str, list[int]]:
    worker, _ = start(cluster, "whole", model, max_batch_tokens=512)
    for name, prompt_ids in prompts.items():
        worker.whole(name, prompt_ids, max_tokens=MAX_TOKENS)
    return worker.collect(len(prompts))


def run_disaggregated(
    cluster: Cluster, model: Decoder, prompts: dict[str, list[int]], *, zero_block_of: str | None = None
) -> dict[str, list[int]]:
    """Prefill in small chunks, then pull. `zero_block_of`: lose one block of this prompt on the way."""
    prefill, prefill_cache = start(cluster, "prefill", model, max_batch_tokens=13)
    decode, _ = start(cluster, "decode", model, max_batch_tokens=4)
    decode.connect(prefill)
    for name, prompt_ids in prompts.items():
        prefill.prefill(name, prompt_ids, max_tokens=MAX_TOKENS)
    answers = [prefill.expect(Prefilled) for _ in prompts]
    token_ids = {prefilled.request_id: [prefilled.tokens[0].token_id] for prefilled in answers}
    for prefilled in answers:
        name, lease = prefilled.request_id, prefilled.lease
        assert lease is not None
        if name == zero_block_of:
            prefill_cache.pool[lease.block_ids[1]] = 0.0
        decode.decode(name, prompts[name], prefilled, max_tokens=MAX_TOKENS)
    for name, decoded in decode.collect(len(prompts)).items():
        token_ids[name] += decoded
    for prefilled in answers:
        assert prefilled.lease is not None
        prefill.engine.post(FreeLease(prefilled.lease.lease_id))
    return token_ids


def test_disaggregated_tokens_are_those_of_one_engine(
    cluster: Cluster, model: Decoder, prompts: dict[str, list[int]]
) -> None:
    whole = run_whole(cluster, model, prompts)
    assert all(len(token_ids) == MAX_TOKENS for token_ids in whole.values())
    assert len({tuple(token_ids) for token_ids in whole.values()}) == len(prompts)
    assert run_disaggregated(cluster, model, prompts) == whole


def test_one_lost_block_changes_the_answer_of_its_request_alone(
    cluster: Cluster, model: Decoder, prompts: dict[str, list[int]]
) -> None:
    whole = run_whole(cluster, model, prompts)
    victim = "prompt of 64"
    damaged = run_disaggregated(cluster, model, prompts, zero_block_of=victim)
    assert {name for name in prompts if damaged[name] != whole[name]} == {victim}
