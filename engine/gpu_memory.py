"""How the memory of a GPU is divided: the weights, what a step needs at most, and the rest to the KV cache.

What a step needs is not computed but measured, by running the largest one that the scheduler can make on a
small pool. A few small steps beside it compile what kernels they need, so that no request waits for that.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from msgspec.structs import replace

from pdengine.engine.memory import MemoryPlan, format_bytes, kv_block_bytes
from pdengine.engine.sequence import Mode, Sequence, blocks_for
from pdengine.engine.step import Chunk
from pdengine.engine.worker_config import ITEM_BYTES, StartupError, WorkerConfig
from pdengine.models.config import ModelConfig
from pdengine.transport.messages import SamplingParams

MAX_HIDDEN_SIZE, MAX_HEAD_DIM = 16384, 256  # of the kernels, which a worker on a CPU does not import
TRIAL_BLOCKS = 16  # of the pool for the measurement
DRAWN = SamplingParams(max_tokens=1, temperature=1.0, top_k=50, top_p=0.9, seed=0)
# All that takes memory but penalties, which take about 60 bytes per row and distinct token.
SCORED = replace(DRAWN, logit_bias={0: 1.0}, logprobs=20, prompt_logprobs=20)


@dataclass(frozen=True)
class GpuUse:
    """Bytes of a GPU once the weights are loaded and a step was tried."""

    total: int
    free: int  # that no process holds, all of torch's unused memory given back
    weights: int
    step: int  # the peak of what a step adds


def check_gpu_model(model: ModelConfig) -> None:
    """Raise StartupError for sizes that the kernels do not take."""
    for name, size, limit in (
        ("hidden size", model.hidden_size, MAX_HIDDEN_SIZE),
        ("head dimension", model.head_dim, MAX_HEAD_DIM),
    ):
        if size > limit:
            raise StartupError(f"the model's {name} is {size}, on a GPU it can be at most {limit}")


def measure_gpu_use(device: torch.device, run_step: Callable[[], object]) -> GpuUse:
    """Run a step on a GPU that holds the weights and nothing else of this process.

    Raises StartupError if its memory is too small for that.
    """
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    weights = torch.cuda.memory_allocated(device)
    try:
        run_step()
    except torch.OutOfMemoryError:
        raise StartupError(
            f"{device}: beside the weights, which take {format_bytes(weights)}, there is too little memory "
            f"for a step; --max-batch-tokens and --max-requests make steps smaller"
        ) from None
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return GpuUse(total, free, weights, peak - weights)


def trial_steps(config: WorkerConfig, model: ModelConfig) -> list[list[Chunk]]:
    """The largest step, and then small ones whose kernels are specialised in another way: the longest context
    alone, and prompts of all sizes up to the budget."""
    alone = _chunks(config, model, [1])
    longest = min(config.max_batch_tokens, model.max_position_embeddings)
    sizes = [2**power for power in range(1, longest.bit_length())]
    return [largest_step(config, model), alone, *(_chunks(config, model, [size]) for size in sizes)]


def largest_step(config: WorkerConfig, model: ModelConfig) -> list[Chunk]:
    """As many sequences and tokens as a step can have, all of them sampled; for a pool of TRIAL_BLOCKS.

    Decodes have the longest context there is; their blocks are the same few again and again.
    """
    longest = model.max_position_embeddings
    sizes = [1] * min(config.max_requests, config.max_batch_tokens)
    left = config.max_batch_tokens - len(sizes)
    for index in reversed(range(len(sizes))):  # decodes come first
        more = min(left, longest - 1)
        sizes[index] += more
        left -= more
    return _chunks(config, model, sizes, SCORED)


def _chunks(
    config: WorkerConfig, model: ModelConfig, sizes: list[int], sampling: SamplingParams = DRAWN
) -> list[Chunk]:
    """New tokens by sequence; a sequence with one is a decode of the longest context."""
    longest = model.max_position_embeddings
    decoded = [0] * longest  # the same list for all of them: a context can have millions of tokens
    block_ids = [index % TRIAL_BLOCKS for index in range(blocks_for(longest, config.block_size))]
    chunks = []
    for size in sizes:
        token_ids = decoded if size == 1 else [0] * size
        length = len(token_ids)
        sequence = Sequence(
            "", 0, Mode.WHOLE, sampling, length, token_ids, block_ids=block_ids, num_computed=length - size
        )
        chunks.append(Chunk(sequence, size))
    return chunks


def plan_gpu_memory(config: WorkerConfig, model: ModelConfig, use: GpuUse) -> MemoryPlan:
    """The KV cache that was asked for, or as much as fits. Raises StartupError if there is no room for it."""
    block_bytes = kv_block_bytes(
        model, block_size=config.block_size, item_bytes=ITEM_BYTES[config.dtype or model.dtype]
    )
    share = int(use.total * config.gpu_memory_utilization)
    pool_bytes = share - use.weights - use.step if config.kv_memory is None else config.kv_memory
    plan = MemoryPlan(use.weights, block_bytes, pool_bytes // block_bytes, config.block_size)
    taken = f"weights take {format_bytes(use.weights)}, a step up to {format_bytes(use.step)}"
    if plan.num_blocks < 1 and config.kv_memory is None:
        raise StartupError(
            f"{config.device}: {taken}, which leaves no room for one block of KV cache in "
            f"{config.gpu_memory_utilization:g} of {format_bytes(use.total)}; --max-batch-tokens makes steps "
            f"smaller, and --gpu-memory-utilization the share larger"
        )
    if plan.num_blocks < 1:
        raise StartupError(
            f"{config.device}: KV memory of {config.kv_memory} bytes has no room for one block of "
            f"{config.block_size} tokens, which takes {block_bytes} bytes"
        )
    if plan.pool_bytes > use.free - use.step:
        raise StartupError(
            f"{config.device}: {taken}, and {format_bytes(use.free)} of {format_bytes(use.total)} are free "
            f"before that step: too little for a KV cache of {format_bytes(plan.pool_bytes)}, maybe because "
            f"other processes use this GPU; --kv-memory or --gpu-memory-utilization makes it smaller"
        )
    return plan


def describe_gpu_use(plan: MemoryPlan, use: GpuUse) -> str:
    """What went where, in one line."""
    left = use.free - plan.pool_bytes - use.step
    return (
        f"{plan.describe()}, a step up to {format_bytes(use.step)}, "
        f"{format_bytes(left)} of {format_bytes(use.total)} left free"
    )
