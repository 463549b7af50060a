"""Causal attention of chunks of prompts over the paged KV cache, which holds their prefix and themselves.

FlashAttention-2 (arXiv 2307.08691) on chunks of any length, packed without padding. The rows of a tile are
the (token, query head) pairs of one KV head: its whole group shares each tile of K and V, the triangle at the
diagonal is narrower, and short chunks fill their tiles. Keys that every row sees take a loop without masks.
"""

import math
from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from pdengine.triton_kernels.ahead_of_time import HEAD_DIMS, TRITON_TYPES, CompileCase
from pdengine.triton_kernels.attention_plan import PrefillPlan
from pdengine.triton_kernels.attention_tiles import PrefillTile, padded_head_dim, prefill_tiles
from pdengine.triton_kernels.kv_tiles import NO_KEY_YET, dot, key_row_offsets, load_rows, online_softmax_step


def prefill_attention(
    query: Tensor,
    kv_pool: Tensor,
    layer: int,
    block_tables: Tensor,
    plan: PrefillPlan,
    scale: float,
    output: Tensor,
    window: int | None = None,
) -> None:
    """Attend with the tokens of the planned chunks, which are the last of their contexts.

    `query` is `[tokens, num_heads, head_dim]` with any strides but the last (1), `kv_pool` `[num_blocks,
    num_kv_heads, num_layers, 2, block_size, head_dim]`, its last four dimensions contiguous, `block_tables`
    `[sequences, max_blocks]` int64. `window`: tokens visible to a query, itself included. Writes the rows of
    its chunks in `output`, contiguous and of the query's shape. `scale` is positive.
    """
    num_heads, head_dim = query.shape[1:]
    num_kv_heads, block_size = kv_pool.shape[1], kv_pool.shape[4]
    attend_tile_kernel[(len(plan.tiles) * num_kv_heads,)](
        output,
        query,
        kv_pool,
        block_tables,
        plan.tiles,
        layer,
        scale * math.log2(math.e),
        num_kv_heads,
        query.stride(0),
        query.stride(1),
        block_tables.stride(0),
        kv_pool.stride(0),
        kv_pool.stride(1),
        GROUP_SIZE=num_heads // num_kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        WINDOW=window or 0,
        ROWS=plan.tile.rows,
        TILE=plan.tile.tokens,
        PADDED_HEAD_DIM=padded_head_dim(head_dim),
        num_warps=plan.tile.num_warps,
        num_stages=plan.tile.num_stages,
    )


@triton.jit(do_not_specialize=["layer", "block_table_stride"])
def attend_tile_kernel(
    output: tl.tensor,
    query: tl.tensor,
    kv_pool: tl.tensor,
    block_tables: tl.tensor,
    tiles: tl.tensor,
    layer: tl.tensor,
    scale_log2: tl.tensor,
    num_kv_heads: tl.tensor,
    query_token_stride: tl.tensor,
    query_head_stride: tl.tensor,
    block_table_stride: tl.tensor,
    pool_block_stride: tl.tensor,
    pool_head_stride: tl.tensor,
    GROUP_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    PADDED_HEAD_DIM: tl.constexpr,
) -> None:
    """ROWS rows of one chunk, for one KV head. WINDOW 0 stands for none."""
    program = tl.program_id(0)
    kv_head = program % num_kv_heads
    tile = tiles + (program // num_kv_heads) * 5
    sequence, first_query = tl.load(tile).to(tl.int64), tl.load(tile + 1).to(tl.int64)
    num_tokens, context_length, first_row = tl.load(tile + 2), tl.load(tile + 3), tl.load(tile + 4)

    rows, dims = first_row + tl.arange(0, ROWS), tl.arange(0, PADDED_HEAD_DIM)
    tokens, heads = rows // GROUP_SIZE, kv_head * GROUP_SIZE + rows % GROUP_SIZE
    mask = (tokens < num_tokens)[:, None] & (dims < HEAD_DIM)[None, :]
    query_rows = (first_query + tokens) * query_token_stride + heads * query_head_stride
    queries = tl.load(query + query_rows[:, None] + dims[None, :], mask=mask, other=0.0)

    num_cached = context_length - num_tokens
    first_position = num_cached + first_row // GROUP_SIZE
    last_position = num_cached + tl.minimum((first_row + ROWS - 1) // GROUP_SIZE, num_tokens - 1)
    positions = tl.minimum(num_cached + tokens, last_position)  # rows past the chunk compute something finite
    # Keys [full_start, full_end) are seen by every row; those before and after must be masked.
    window_start, full_start = 0, 0
    full_end = (first_position + 1) // TILE * TILE
    if WINDOW > 0:
        window_start = tl.maximum(first_position + 1 - WINDOW, 0) // TILE * TILE
        full_start = tl.minimum(tl.cdiv(tl.maximum(last_position + 1 - WINDOW, 0), TILE) * TILE, full_end)

    block_table = block_tables + sequence * block_table_stride
    head_keys = kv_pool + kv_head.to(tl.int64) * pool_head_stride + layer * (2 * BLOCK_SIZE * HEAD_DIM)
    accumulated = tl.zeros([ROWS, PADDED_HEAD_DIM], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    maximum = tl.full([ROWS], NO_KEY_YET, tl.float32)
    for phase in tl.static_range(0 if WINDOW > 0 else 1, 3):
        if phase == 0:  # the edge of the window
            phase_start, phase_end = window_start, full_start
        elif phase == 1:
            phase_start, phase_end = full_start, full_end
        else:  # the diagonal
            phase_start, phase_end = full_end, last_position + 1
        row_offsets = key_row_offsets(
            block_table, phase_start, last_position + 1, pool_block_stride, HEAD_DIM, BLOCK_SIZE, TILE
        )
        for start in tl.range(phase_start, phase_end, TILE):
            keys = start + tl.arange(0, TILE)
            pointers = head_keys + row_offsets[:, None] + dims[None, :]
            # A turn ahead, so that the pipelined loads of K and V wait for no other load.
            row_offsets = key_row_offsets(
                block_table, start + TILE, last_position + 1, pool_block_stride, HEAD_DIM, BLOCK_SIZE, TILE
            )
            present = keys <= last_position
            key = load_rows(pointers, present, dims, HEAD_DIM, PADDED_HEAD_DIM, phase != 1)
            value_pointers = pointers + BLOCK_SIZE * HEAD_DIM
            value = load_rows(value_pointers, present, dims, HEAD_DIM, PADDED_HEAD_DIM, phase != 1)
            scores = dot(queries, tl.trans(key), tl.zeros([ROWS, TILE], tl.float32))
            if phase != 1:
                seen = keys[None, :] <= positions[:, None]
                if WINDOW > 0:
                    seen = seen & (keys[None, :] > positions[:, None] - WINDOW)
                scores = tl.where(seen, scores, float("-inf"))
            accumulated, total, maximum = online_softmax_step(
                accumulated, total, maximum, scores, value, scale_log2
            )

    output_rows = ((first_query + tokens) * num_kv_heads * GROUP_SIZE + heads) * HEAD_DIM
    attended = (accumulated / total[:, None]).to(output.dtype.element_ty)
    tl.store(output + output_rows[:, None] + dims[None, :], attended, mask)


def ahead_of_time(capability: int) -> Iterator[CompileCase]:
    """See `ahead_of_time.CompileCase`."""
    specialisations = [(head_dim, 4, 16, 0) for head_dim in HEAD_DIMS]
    specialisations += [
        (128, 7, 16, 0),
        (128, 4, 256, 0),
        (128, 4, 16, 4096),
        (128, 7, 16, 4096),
        (256, 4, 16, 4096),
    ]
    for dtype, dtype_name in TRITON_TYPES.items():
        for head_dim, group_size, block_size, window in specialisations:
            for tile in reversed(prefill_tiles(dtype, head_dim, capability)):
                yield _compile_case(dtype_name, head_dim, group_size, block_size, window, tile)


def _compile_case(
    dtype_name: str, head_dim: int, group_size: int, block_size: int, window: int, tile: PrefillTile
) -> CompileCase:
    return CompileCase(
        attend_tile_kernel,
        f"{dtype_name} head_dim={head_dim} group={group_size} block={block_size}"
        + (f" window={window}" if window else "")
        + f" tile={tile.rows}x{tile.tokens}",
        {
            "output": f"*{dtype_name}",
            "query": f"*{dtype_name}",
            "kv_pool": f"*{dtype_name}",
            "block_tables": "*i64",
            "tiles": "*i32",
            "layer": "i32",
            "scale_log2": "fp32",
            "num_kv_heads": "i32",
            "query_token_stride": "i32",
            "query_head_stride": "i32",
            "block_table_stride": "i32",
            "pool_block_stride": "i32",
            "pool_head_stride": "i32",
        },
        {
            "GROUP_SIZE": group_size,
            "HEAD_DIM": head_dim,
            "BLOCK_SIZE": block_size,
            "WINDOW": window,
            "ROWS": tile.rows,
            "TILE": tile.tokens,
            "PADDED_HEAD_DIM": padded_head_dim(head_dim),
        },
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        divisible_by_16=("query_token_stride", "query_head_stride", "pool_block_stride", "pool_head_stride"),
    )
