"""Scheduler and runner on our Triton kernels, on a GPU or interpreted: the tokens of the CPU path."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import write_checkpoint
from sequences import make_sequence

from pdengine.engine.block_pool import BlockPool
from pdengine.engine.kv_cache import KVCache
from pdengine.engine.runner import Runner
from pdengine.engine.scheduler import Scheduler, SchedulerConfig
from pdengine.engine.sequence import Mode, Sequence
from pdengine.models.config import load_config
from pdengine.models.weights import load_decoder
from pdengine.transport.messages import SamplingParams
from pdengine.triton_kernels.gpu_kernels import TritonKernels
from pdengine.triton_kernels.kernels import Kernels, kernels_for
from pdengine.triton_kernels.torch_kernels import TorchKernels

# Triton's interpreter computes with numpy, which warns of what is meant to overflow or to be infinite.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
BLOCK_SIZE = 16
NUM_BLOCKS = 40
MAX_TOKENS = 4
# Interpreted kernels are slow: two layers where a second one shows something, and one elsewhere.
OVERRIDES: dict[str, dict[str, object]] = {
    "qwen3": {"num_hidden_layers": 2},
    "smollm3": {"num_hidden_layers": 2, "no_rope_layers": [1, 0]},
}
SAMPLINGS = [
    SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0),
    SamplingParams(max_tokens=MAX_TOKENS, temperature=1.0, seed=-3),
    SamplingParams(max_tokens=MAX_TOKENS, temperature=0.8, top_k=20, top_p=0.9, seed=2**63 + 5),
    SamplingParams(max_tokens=MAX_TOKENS, temperature=2.0, min_p=0.05, seed=7),
    SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0),
]
PROMPT_LENGTHS = (1, 16, 17, 40, 29)


def sequences_of(vocabulary: int) -> list[Sequence]:
    generator = random.Random(5)
    sequences = []
    for index, (length, sampling) in enumerate(zip(PROMPT_LENGTHS, SAMPLINGS, strict=True)):
        sequence = make_sequence(str(index), Mode.WHOLE, generator.choices(range(vocabulary), k=length))
        sequence.sampling = sampling
        sequences.append(sequence)
    return sequences


def run(directory: Path, kernels: Kernels, device: torch.device) -> list[list[int]]:
    """The answers of mixed batches: chunks of prompts beside sequences that decode."""
    config = load_config(directory)
    model = load_decoder(directory, config, dtype=torch.float32, device=device, kernels=kernels)
    kv_cache = KVCache(
        config, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, dtype=torch.float32, device=device
    )
    kv_cache.pool.fill_(torch.nan)  # what nobody has written must never be read
    runner = Runner(model, kv_cache, device)
    scheduler = Scheduler(SchedulerConfig(BLOCK_SIZE, 24, 8, NUM_BLOCKS), BlockPool(NUM_BLOCKS))
    sequences = sequences_of(config.vocab_size)
    for sequence in sequences:
        scheduler.add(sequence)
    while list(scheduler):
        scheduler.admit()
        step = scheduler.schedule()
        scheduler.postprocess(step, runner.run(step.chunks, None, step.copies), frozenset())
    return [sequence.token_ids[sequence.num_prompt_tokens :] for sequence in sequences]


def test_a_worker_on_a_cpu_never_imports_triton() -> None:
    """It would start later for something that it has no use for."""
    code = (
        "import sys, torch, pdengine.engine.start_worker\n"
        "from pdengine.triton_kernels.kernels import kernels_for\n"
        "print(type(kernels_for(torch.device('cpu'))).__name__, 'triton' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert result.stdout.split() == ["CpuKernels", "False"]


def test_a_device_without_kernels_is_refused() -> None:
    with pytest.raises(ValueError, match="device is mps, it must be a CPU or a CUDA GPU"):
        kernels_for(torch.device("mps"))


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "phi3-longrope", "smollm3"])
def test_the_tokens_of_a_model_are_those_of_the_cpu_path(family: str, tmp_path: Path) -> None:
    """Between them: biases, norms of queries and keys, partial rotation, layers without, shared KV heads."""
    write_checkpoint(family, tmp_path, overrides={"num_hidden_layers": 1, **OVERRIDES.get(family, {})})
    expected = run(tmp_path, TorchKernels(), torch.device("cpu"))
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    assert run(tmp_path, TritonKernels(), device) == expected
    assert all(len(answer) == MAX_TOKENS for answer in expected)
