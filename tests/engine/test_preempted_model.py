"""A real model on a pool that is much too small: preempted, cached or not, the tokens are the same."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pytest
import torch
from checkpoints import write_checkpoint
from engine_cluster import Cluster
from engine_worker import EngineWorker
from exposition import samples
from sequences import make_sequence
from torch import Tensor

from pdengine.engine.batch import build_batch
from pdengine.engine.kv_cache import KVCache
from pdengine.engine.runner import Runner
from pdengine.engine.sequence import Mode, blocks_for
from pdengine.engine.step import Chunk
from pdengine.engine.step_upload import upload_for
from pdengine.models.config import load_config
from pdengine.models.decoder import Decoder
from pdengine.models.weights import load_decoder

BLOCK_SIZE = 8
TINY_BLOCKS = 12
LARGE_BLOCKS = 3_000
AT_ONCE = 500  # no more than may wait
NEAR = 1e-4  # between two logits: the rounding of float32 depends on the batch, and may decide


@dataclass(frozen=True)
class Asked:
    prompt_ids: list[int]
    max_tokens: int
    n: int
    priority: int


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    directory: Path = tmp_path_factory.mktemp("qwen3")
    write_checkpoint("qwen3", directory)
    config = load_config(directory)
    return load_decoder(directory, config, dtype=torch.float32, device=torch.device("cpu"))


def start(cluster: Cluster, model: Decoder, num_blocks: int) -> EngineWorker:
    kv_cache = KVCache(model.config, num_blocks=num_blocks, block_size=BLOCK_SIZE, dtype=torch.float32)
    kv_cache.pool.fill_(torch.nan)  # what nobody has written must never be read
    return cluster.add(
        EngineWorker(
            cluster.fabric,
            f"pool of {num_blocks}",
            runner=Runner(model, kv_cache, torch.device("cpu")),
            region=kv_cache.describe(),
            block_size=BLOCK_SIZE,
            max_batch_tokens=64,
            max_requests=16,
        )
    )


def random_requests(model: Decoder, count: int) -> dict[str, Asked]:
    """Each fits alone; a third share the beginning of their prompts."""
    rng, vocabulary = random.Random(11), range(1, model.config.vocab_size)
    shared = rng.choices(vocabulary, k=40)
    requests = {}
    for number in range(count):
        beginning = shared[: rng.randint(8, 40)] if rng.random() < 0.3 else []
        prompt_ids = beginning + rng.choices(vocabulary, k=rng.randint(1, 30))
        max_tokens = rng.randint(1, min(40, TINY_BLOCKS * BLOCK_SIZE + 1 - len(prompt_ids)))
        asked = Asked(prompt_ids, max_tokens, n=rng.choice([1, 1, 1, 2]), priority=rng.randint(0, 1))
        requests[f"request-{number}"] = asked
    return requests


def answers(
    worker: EngineWorker, requests: dict[str, Asked], *, salt: str | None
) -> dict[tuple[str, int], list[int]]:
    found: dict[tuple[str, int], list[int]] = {}
    for batch in batched(requests.items(), AT_ONCE):
        for name, asked in batch:
            worker.whole(
                name,
                asked.prompt_ids,
                n=asked.n,
                max_tokens=asked.max_tokens,
                priority=asked.priority,
                salt=salt,
            )
        found |= worker.collect_answers(sum(asked.n for _, asked in batch))
    return found


def batched(requests: Iterable[tuple[str, Asked]], size: int) -> Iterator[list[tuple[str, Asked]]]:
    rest = iter(requests)
    while batch := list(islice(rest, size)):
        yield batch


def check(cluster: Cluster, model: Decoder, count: int) -> None:
    requests = random_requests(model, count)
    calm = answers(start(cluster, model, LARGE_BLOCKS), requests, salt=None)
    for salt in (None, ""):
        worker = start(cluster, model, TINY_BLOCKS)
        disturbed = answers(worker, requests, salt=salt)
        found = samples(worker.metrics.exposition())
        assert found["pdengine_preemptions_total"] > count / 10
        assert (found["pdengine_prefix_cache_hits_total"] > 0) == (salt is not None)
        assert disturbed.keys() == calm.keys()
        different = [answer for answer in calm if calm[answer] != disturbed[answer]]
        assert len(different) <= count / 500
        for answer in different:
            check_tie(model, requests[answer[0]].prompt_ids, calm[answer], disturbed[answer])


def check_tie(model: Decoder, prompt_ids: list[int], one: list[int], other: list[int]) -> None:
    """Where the two answers part, the model must hardly prefer one of the tokens."""
    same = next(i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b)
    logits = logits_after(model, prompt_ids + one[:same])
    assert abs(float(logits[one[same]] - logits[other[same]])) < NEAR


@torch.inference_mode()
def logits_after(model: Decoder, token_ids: list[int]) -> Tensor:
    num_blocks = blocks_for(len(token_ids), BLOCK_SIZE)
    kv_cache = KVCache(model.config, num_blocks=num_blocks, block_size=BLOCK_SIZE, dtype=torch.float32)
    sequence = make_sequence("request", Mode.WHOLE, token_ids)
    sequence.block_ids = list(range(num_blocks))
    batch = build_batch([Chunk(sequence, len(token_ids))], BLOCK_SIZE, upload_for(torch.device("cpu")))
    hidden = model(batch.token_ids, batch.positions, kv_cache.pool, batch.attention)
    logits: Tensor = model.logits(hidden[-1:])[0]
    return logits


def test_a_tiny_pool_writes_the_tokens_of_a_large_one(cluster: Cluster, model: Decoder) -> None:
    check(cluster, model, 60)


@pytest.mark.long
def test_two_thousand_requests_on_a_tiny_pool(cluster: Cluster, model: Decoder) -> None:
    check(cluster, model, 2_000)
