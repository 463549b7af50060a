"""`python -m pdengine.bench.gpu_attention`: paged attention beside the ceilings, torch and FlashInfer.

Decode reads each key and value once, so its ceiling is the copy bandwidth; prefill is matrix products, so its
ceiling is their rate. Blocks are scattered over a pool of many layers, and each repetition takes another
layer: nothing is left of it in the L2.
"""

import traceback
from collections.abc import Callable
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from pdengine.bench.gpu_measure import Row, Setup, bench_command, median_seconds, report, share
from pdengine.triton_kernels.attention import AttentionBatch
from pdengine.triton_kernels.kernels import Kernels, kernels_for

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 32, 8, 128
BLOCK_SIZE = 16
NUM_LAYERS = 32
SCALE = HEAD_DIM**-0.5
DECODES = [(64, 4096), (1, 131072), (256, 512)]  # sequences, tokens of context
PREFILLS = [(1, 8192), (16, 1024)]  # prompts, tokens of each


def run(setup: Setup) -> None:
    """Decode and prefill attention, 32 query and 8 KV heads of 128 dimensions, blocks of 16 tokens."""
    decodes, prefills, num_layers = DECODES, PREFILLS, NUM_LAYERS
    if setup.is_dry:
        decodes, prefills, num_layers = [(2, 40)], [(2, 24)], 2
    num_blocks = max(sequences * -(-tokens // BLOCK_SIZE) for sequences, tokens in decodes + prefills)
    pool_sizes = (num_blocks, NUM_KV_HEADS, num_layers, 2, BLOCK_SIZE, HEAD_DIM)
    pool = torch.empty(pool_sizes, dtype=setup.dtype, device=setup.device).normal_()
    kernels = kernels_for(setup.device)
    errors: list[str] = []
    rows = [row for shape in decodes for row in _decode_rows(setup, kernels, pool, *shape, errors)]
    rows += [row for shape in prefills for row in _prefill_rows(setup, kernels, pool, *shape, errors)]
    report(setup, "attention", "Attention", {"rows": rows, "errors": errors})
    if any("ImportError" not in error and "ModuleNotFoundError" not in error for error in errors):
        raise SystemExit("something failed: see the errors above")


def _decode_rows(
    setup: Setup, kernels: Kernels, pool: Tensor, sequences: int, tokens: int, errors: list[str]
) -> list[Row]:
    batch = _batch(setup, pool.shape[0], [1] * sequences, [tokens] * sequences)
    query = torch.randn(sequences, NUM_HEADS, HEAD_DIM, device=setup.device).to(setup.dtype)
    num_bytes = 2 * sequences * tokens * NUM_KV_HEADS * HEAD_DIM * pool.element_size()
    ceiling = setup.ceiling("copy_bytes_per_second")

    # The same, without pages. Several copies of K and V take turns, like the layers of the pool.
    kv = torch.randn(2, 2, sequences, NUM_KV_HEADS, tokens, HEAD_DIM, device=setup.device, dtype=setup.dtype)
    alone = query.unsqueeze(2)  # [sequences, heads, 1, head_dim]
    contenders: dict[str, Callable[[int], object]] = {
        "pdengine": lambda index: kernels.paged_attention(query, pool, index % pool.shape[2], batch, SCALE),
        "torch SDPA, contiguous": lambda index: scaled_dot_product_attention(
            alone, kv[index % 2, 0], kv[index % 2, 1], scale=SCALE, enable_gqa=True
        ),
        "FlashInfer": _flashinfer_decode(setup, query, sequences, tokens),
    }
    rows = []
    for name, function in contenders.items():
        seconds = _try(setup, f"decode {sequences} x {tokens}, {name}", function, errors)
        if seconds is not None:
            rate = num_bytes / seconds
            rows.append(
                {
                    "what": f"decode {sequences} x {tokens}",
                    "by": name,
                    "us": seconds * 1e6,
                    "GB/s": rate / 1e9,
                    "TFLOP/s": None,
                    "share of ceiling": share(rate, ceiling),
                }
            )
    return rows


def _prefill_rows(
    setup: Setup, kernels: Kernels, pool: Tensor, prompts: int, tokens: int, errors: list[str]
) -> list[Row]:
    batch = _batch(setup, pool.shape[0], [tokens] * prompts, [tokens] * prompts)
    query = torch.randn(prompts * tokens, NUM_HEADS, HEAD_DIM, device=setup.device).to(setup.dtype)
    # Two products of 2 * head_dim operations for each pair of a query and a key that it sees.
    operations = 4 * HEAD_DIM * NUM_HEADS * prompts * tokens * (tokens + 1) // 2
    ceiling = setup.ceiling("matmul_flop_per_second")

    padded = query.view(prompts, tokens, NUM_HEADS, HEAD_DIM).transpose(1, 2).contiguous()
    key, value = torch.randn(
        2, prompts, NUM_KV_HEADS, tokens, HEAD_DIM, device=setup.device, dtype=setup.dtype
    ).unbind()

    def torch_flash(_: int) -> Tensor:
        backend = SDPBackend.MATH if setup.is_dry else SDPBackend.FLASH_ATTENTION
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(
                padded, key, value, is_causal=True, scale=SCALE, enable_gqa=True
            )

    contenders: dict[str, Callable[[int], object]] = {
        "pdengine": lambda index: kernels.paged_attention(query, pool, index % pool.shape[2], batch, SCALE),
        "torch SDPA flash, contiguous": torch_flash,
    }
    rows = []
    for name, function in contenders.items():
        seconds = _try(setup, f"prefill {prompts} x {tokens}, {name}", function, errors)
        if seconds is not None:
            rate = operations / seconds
            rows.append(
                {
                    "what": f"prefill {prompts} x {tokens}",
                    "by": name,
                    "us": seconds * 1e6,
                    "GB/s": None,
                    "TFLOP/s": rate / 1e12,
                    "share of ceiling": share(rate, ceiling),
                }
            )
    return rows


def _try(setup: Setup, what: str, function: Callable[[int], object], errors: list[str]) -> float | None:
    """The median time; None, and an entry in `errors`, if it fails."""
    try:
        return median_seconds(setup, function)
    except Exception as error:
        errors.append(f"{what}: {type(error).__name__}: {error}")
        if not isinstance(error, ImportError):
            traceback.print_exc()
        return None


def _batch(setup: Setup, num_blocks: int, new_tokens: list[int], contexts: list[int]) -> AttentionBatch:
    """Sequences whose blocks are scattered over the pool."""
    used = [-(-context // BLOCK_SIZE) for context in contexts]
    scattered = torch.split(torch.randperm(num_blocks)[: sum(used)], used)
    tables = torch.nn.utils.rnn.pad_sequence(list(scattered), batch_first=True)
    query_starts = [0, *accumulate(new_tokens)]
    positions = torch.cat(
        [torch.arange(context - new, context) for new, context in zip(new_tokens, contexts, strict=True)]
    )
    sequences = torch.repeat_interleave(torch.arange(len(new_tokens)), torch.tensor(new_tokens))
    return AttentionBatch(
        block_ids=tables[sequences, positions // BLOCK_SIZE].to(setup.device),
        block_offsets=(positions % BLOCK_SIZE).to(setup.device),
        block_tables=tables.to(setup.device),
        query_starts=torch.tensor(query_starts, device=setup.device),
        context_lengths=torch.tensor(contexts, device=setup.device),
        query_starts_on_host=query_starts,
        context_lengths_on_host=contexts,
        num_decodes=len(new_tokens) if new_tokens[0] == 1 else 0,
    )


def _flashinfer_decode(setup: Setup, query: Tensor, sequences: int, tokens: int) -> Callable[[int], object]:
    """FlashInfer's paged decode over two pools of its own layout, by turns. Its plan is not timed."""
    runs: list[Callable[[], object]] = []

    def run(index: int) -> object:
        if not runs:
            import flashinfer  # type: ignore[import-not-found]

            pages = tokens // BLOCK_SIZE
            counts = torch.arange(sequences + 1, dtype=torch.int32, device=setup.device) * pages
            pages_of_all = torch.randperm(sequences * pages, device=setup.device).to(torch.int32)
            last_page = torch.full((sequences,), BLOCK_SIZE, dtype=torch.int32, device=setup.device)
            workspace = torch.empty(256 << 20, dtype=torch.uint8, device=setup.device)
            wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=True)
            sizes = (counts, pages_of_all, last_page, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE)
            wrapper.plan(*sizes, q_data_type=setup.dtype, kv_data_type=setup.dtype)
            pool_sizes = (sequences * pages, 2, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM)
            for _ in range(2):
                pool = torch.empty(pool_sizes, dtype=setup.dtype, device=setup.device).normal_()
                runs.append(lambda pool=pool: wrapper.run(query, pool))  # type: ignore[misc]
        return runs[index % 2]()

    return run


main = bench_command(run)

if __name__ == "__main__":
    main()
