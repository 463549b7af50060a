"""How a GPU's memory is divided, and the step that is tried to find out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pdengine.engine.gpu_memory import (
    TRIAL_BLOCKS,
    GpuUse,
    check_gpu_model,
    describe_gpu_use,
    largest_step,
    measure_gpu_use,
    plan_gpu_memory,
    trial_steps,
)
from pdengine.engine.kv_cache import KVCache
from pdengine.engine.memory import kv_block_bytes
from pdengine.engine.runner import Runner
from pdengine.engine.worker_config import StartupError, WorkerConfig
from pdengine.models.config import ModelConfig, load_config
from pdengine.models.demo.facts import checkpoint_directory
from pdengine.models.weights import load_decoder

GIB = 2**30
USE = GpuUse(total=100 * GIB, free=80 * GIB, weights=15 * GIB, step=5 * GIB)


@pytest.fixture(scope="module")
def model() -> ModelConfig:
    config = load_config(checkpoint_directory())
    return replace(config, dtype="bfloat16", num_layers=32, num_kv_heads=8, head_dim=128)


def worker(**options: Any) -> WorkerConfig:
    return WorkerConfig("unified", Path(), "tcp://127.0.0.1:9", device="cuda:0", **options)


def test_the_cache_gets_what_weights_and_steps_leave(model: ModelConfig) -> None:
    plan = plan_gpu_memory(worker(gpu_memory_utilization=0.9), model, USE)
    assert plan.block_bytes == kv_block_bytes(model, block_size=16, item_bytes=2) == 2 * 2**20
    assert plan.pool_bytes == (90 - 15 - 5) * GIB
    line = describe_gpu_use(plan, USE)
    assert line.startswith("weights 15.0 GiB, KV cache 70.0 GiB = 35840 blocks of 2.0 MiB = 573440 tokens")
    assert line.endswith("a step up to 5.0 GiB, 5.0 GiB of 100.0 GiB left free")


def test_a_size_that_was_asked_for_wins(model: ModelConfig) -> None:
    assert plan_gpu_memory(worker(kv_memory=3 * GIB), model, USE).pool_bytes == 3 * GIB


@pytest.mark.parametrize(
    ("options", "use", "words"),
    [
        ({"gpu_memory_utilization": 0.2}, USE, "leaves no room for one block"),
        ({"gpu_memory_utilization": 1.0}, USE, "75.0 GiB of 100.0 GiB are free"),
        ({"kv_memory": 76 * GIB}, USE, "a KV cache of 76.0 GiB"),
        ({"kv_memory": 2**20}, USE, "no room for one block"),
    ],
)
def test_what_does_not_fit_is_refused(
    options: dict[str, float], use: GpuUse, words: str, model: ModelConfig
) -> None:
    with pytest.raises(StartupError) as raised:
        plan_gpu_memory(worker(**options), model, replace(use, free=75 * GIB))
    assert words in str(raised.value)
    assert "cuda:0" in str(raised.value)


@given(
    max_batch_tokens=st.integers(1, 300),
    max_requests=st.integers(1, 40),
    context=st.integers(1, 100),
    block_size=st.sampled_from((16, 64)),
)
def test_no_step_is_larger_than_the_one_that_is_tried(
    max_batch_tokens: int, max_requests: int, context: int, block_size: int, model: ModelConfig
) -> None:
    config = worker(max_batch_tokens=max_batch_tokens, max_requests=max_requests, block_size=block_size)
    chunks = largest_step(config, replace(model, max_position_embeddings=context))
    assert len(chunks) == min(max_requests, max_batch_tokens)
    sizes = [chunk.num_tokens for chunk in chunks]
    assert sum(sizes) == min(max_batch_tokens, len(chunks) * context)
    assert sizes == sorted(sizes)  # decodes first
    for chunk in chunks:
        assert chunk.samples
        assert 1 <= len(chunk.sequence.token_ids) <= context
        assert len(chunk.sequence.block_ids) * block_size >= len(chunk.sequence.token_ids)
        assert max(chunk.sequence.block_ids) < TRIAL_BLOCKS


def test_small_steps_are_tried_too(model: ModelConfig) -> None:
    config = worker(max_batch_tokens=300, max_requests=3)
    steps = trial_steps(config, replace(model, max_position_embeddings=100))
    sizes = [[chunk.num_tokens for chunk in step] for step in steps]
    assert sizes[1:] == [[1], [2], [4], [8], [16], [32], [64]]
    assert len(steps[1][0].sequence.token_ids) == 100


@pytest.mark.parametrize("sizes", [{"hidden_size": 16385}, {"head_dim": 257}])
def test_sizes_that_the_kernels_do_not_take_are_refused(sizes: dict[str, int], model: ModelConfig) -> None:
    check_gpu_model(replace(model, hidden_size=16384, head_dim=256))
    with pytest.raises(StartupError, match=f"is {next(iter(sizes.values()))}, on a GPU it can be at most"):
        check_gpu_model(replace(model, **sizes))


def test_the_step_that_is_tried_can_be_run() -> None:
    config = load_config(checkpoint_directory())
    cpu = torch.device("cpu")
    decoder = load_decoder(checkpoint_directory(), config, dtype=torch.float32, device=cpu)
    cache = KVCache(config, num_blocks=TRIAL_BLOCKS, block_size=16, dtype=torch.float32)
    chunks = largest_step(worker(max_batch_tokens=50, max_requests=3), config)
    assert len(Runner(decoder, cache, cpu).run(chunks)) == 3


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """torch's view of a GPU that holds 15 GiB of weights; a step would raise the peak."""
    state = {"held": 15 * GIB, "peak": 40 * GIB}  # the peak is that of loading, and must not count
    device = torch.device("cuda", 0)

    def fake(name: str, function: Callable[[], object]) -> None:
        def call(of: torch.device = device) -> object:
            assert of == device
            return function()

        monkeypatch.setattr(torch.cuda, name, call)

    fake("synchronize", lambda: None)
    fake("empty_cache", lambda: None)
    fake("reset_peak_memory_stats", lambda: state.update(peak=state["held"]))
    fake("memory_allocated", lambda: state["held"])
    fake("max_memory_allocated", lambda: state["peak"])
    fake("mem_get_info", lambda: (80 * GIB, 100 * GIB))
    return state


def test_only_the_peak_of_the_step_counts(gpu: dict[str, int]) -> None:
    use = measure_gpu_use(torch.device("cuda", 0), lambda: gpu.update(peak=gpu["held"] + 5 * GIB))
    assert use == USE


def test_a_step_for_which_there_is_no_memory(gpu: dict[str, int]) -> None:
    def run_step() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(StartupError, match=r"weights, which take 15\.0 GiB, .* --max-batch-tokens"):
        measure_gpu_use(torch.device("cuda", 0), run_step)
