"""`python -m pdengine.bench.gpu_model`: steps of whole models with random weights, beside their floor.

A decode step must read every weight and the KV cache of every sequence once; its floor is those bytes over
the copy bandwidth. A prefill step must do two operations per weight and token; its floor is those over the
rate of a matrix product.
"""

from statistics import median
from time import perf_counter

import torch

from pdengine.bench.gpu_measure import Row, Setup, bench_command, report
from pdengine.engine.kv_cache import KVCache
from pdengine.engine.memory import kv_block_bytes
from pdengine.engine.runner import Runner
from pdengine.engine.sequence import Mode, Sequence
from pdengine.engine.step import Chunk
from pdengine.models.config import ModelConfig, RopeConfig
from pdengine.models.decoder import Decoder
from pdengine.transport.messages import SamplingParams
from pdengine.triton_kernels.kernels import kernels_for

BLOCK_SIZE = 16
CONTEXT = 1024
BATCHES = [1, 16, 64, 256]
PROMPT = 2048
WARM_UP, REPEATS = 3, 15
GREEDY = SamplingParams(max_tokens=1, temperature=0)


def run(setup: Setup) -> None:
    """Steps of Qwen3-0.6B and Llama-3-8B in bfloat16: decodes at 1024 tokens of context, a prompt of 2048."""
    models, batches, context, prompt = (
        {"Qwen3-0.6B": qwen3_06b(), "Llama-3-8B": llama3_8b()},
        BATCHES,
        CONTEXT,
        PROMPT,
    )
    if setup.is_dry:
        models, batches, context, prompt = {"tiny": tiny()}, [1, 2], 33, 40
    rows: list[Row] = []
    errors: list[str] = []
    for name, config in models.items():
        try:
            rows += _model_rows(setup, name, config, batches, context, prompt)
        except Exception as error:
            errors.append(f"{name}: {type(error).__name__}: {error}")
        if setup.device.type == "cuda":
            torch.cuda.empty_cache()
    report(setup, "model", "Whole models, random weights", {"rows": rows, "errors": errors})
    if errors:
        raise SystemExit("\n".join(errors))


def _model_rows(
    setup: Setup, name: str, config: ModelConfig, batches: list[int], context: int, prompt: int
) -> list[Row]:
    model = random_decoder(config, setup.dtype, setup.device)
    blocks_each = -(-context // BLOCK_SIZE)
    num_blocks = max(max(batches) * blocks_each, -(-prompt // BLOCK_SIZE))
    kv_cache = KVCache(
        config, num_blocks=num_blocks, block_size=BLOCK_SIZE, dtype=setup.dtype, device=setup.device
    )
    kv_cache.pool.normal_()
    runner = Runner(model, kv_cache, setup.device)
    scattered = torch.randperm(num_blocks).tolist()
    copy_bandwidth = setup.ceiling("copy_bytes_per_second")
    matmul_rate = setup.ceiling("matmul_flop_per_second")
    weight_bytes = _bytes_read(model)
    block_bytes = kv_block_bytes(config, block_size=BLOCK_SIZE, item_bytes=setup.dtype.itemsize)
    rows: list[Row] = []
    for batch in batches:
        chunks = [
            Chunk(_sequence(context, 1, scattered[row * blocks_each : (row + 1) * blocks_each]), 1)
            for row in range(batch)
        ]
        seconds = _step_seconds(setup, runner, chunks)
        num_bytes = weight_bytes + batch * context * block_bytes // BLOCK_SIZE
        floor = None if copy_bandwidth is None else num_bytes / copy_bandwidth
        rows.append(_row(name, f"decode {batch} x {context}", seconds, batch, floor))
    chunks = [Chunk(_sequence(prompt, prompt, scattered[: -(-prompt // BLOCK_SIZE)]), prompt)]
    seconds = _step_seconds(setup, runner, chunks)
    operations = 2 * sum(p.numel() for p in model.layers.parameters()) * prompt
    floor = None if matmul_rate is None else operations / matmul_rate
    rows.append(_row(name, f"prefill {prompt}", seconds, prompt, floor))
    return rows


def _row(name: str, what: str, seconds: float, tokens: int, floor: float | None) -> Row:
    return {
        "model": name,
        "step": what,
        "ms": seconds * 1e3,
        "tokens/s": tokens / seconds,
        "floor ms": None if floor is None else floor * 1e3,
        "share of floor": None if floor is None else floor / seconds,
    }


def _step_seconds(setup: Setup, runner: Runner, chunks: list[Chunk]) -> float:
    """The median time of a step as the engine sees it: tensors built, kernels launched, tokens read."""
    seconds = []
    for index in range(WARM_UP + (2 if setup.is_dry else REPEATS)):
        started_at = perf_counter()
        runner.run(chunks)
        if index >= WARM_UP:
            seconds.append(perf_counter() - started_at)
    return median(seconds)


def _sequence(length: int, new_tokens: int, block_ids: list[int]) -> Sequence:
    """All of its tokens but the last `new_tokens` are in the cache."""
    tokens = [position % 97 for position in range(length)]
    return Sequence(
        "", 0, Mode.WHOLE, GREEDY, length, tokens, block_ids=block_ids, num_computed=length - new_tokens
    )


def _bytes_read(model: Decoder) -> int:
    """Of weights, by one step. Of embeddings it reads a few rows, unless they are the output matrix, too."""
    num_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    if model.lm_head is not None:
        embeddings = model.embed_tokens.weight
        num_bytes -= embeddings.numel() * embeddings.element_size()
    return num_bytes


def random_decoder(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> Decoder:
    """A model of this shape whose activations stay of the order of one."""
    with device:
        model = Decoder(config, dtype, kernels_for(device))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        if parameter.dim() > 1:
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
    model.inverse_frequencies = model.inverse_frequencies.to(device)
    return model.eval()


def qwen3_06b() -> ModelConfig:
    return _config("Qwen3ForCausalLM", 151936, 1024, 28, 16, 8, 3072, 1e6, is_tied=True, has_qk_norm=True)


def llama3_8b() -> ModelConfig:
    return _config("LlamaForCausalLM", 128256, 4096, 32, 32, 8, 14336, 5e5, is_tied=False, has_qk_norm=False)


def tiny() -> ModelConfig:
    return _config("Qwen3ForCausalLM", 256, 64, 2, 4, 2, 128, 1e4, is_tied=True, has_qk_norm=True)


def _config(
    architecture: str,
    vocab_size: int,
    hidden_size: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    intermediate_size: int,
    theta: float,
    *,
    is_tied: bool,
    has_qk_norm: bool,
) -> ModelConfig:
    """Head dimension 128, as all of these have."""
    return ModelConfig(
        architecture=architecture,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=128,
        intermediate_size=intermediate_size,
        rms_norm_eps=1e-6,
        rope=RopeConfig(theta=theta),
        max_position_embeddings=8192,
        tie_word_embeddings=is_tied,
        qkv_bias=False,
        attention_output_bias=False,
        mlp_bias=False,
        qk_norm=has_qk_norm,
        dtype="bfloat16",
        eos_token_ids=(),
        bos_token_id=None,
    )


main = bench_command(run)

if __name__ == "__main__":
    main()
