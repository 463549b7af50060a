"""Attention of decoding sequences, one new token each, over the paged KV cache: flash-decoding.

A context is split into parts that different programs read at the same time; a second, small kernel joins the
partial results of sequences with several parts (https://pytorch.org/blog/flash-decoding, and split-KV in
FlashInfer, arXiv 2501.01005). All query heads of a KV head are the rows of one matrix product, so each K and
V is read once. The step is bound by that reading: a program keeps several tiles in flight.
"""

import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from pdengine.triton_kernels.ahead_of_time import HEAD_DIMS, TRITON_TYPES, CompileCase
from pdengine.triton_kernels.attention_plan import DecodePlan
from pdengine.triton_kernels.attention_tiles import decode_tile, padded_head_dim
from pdengine.triton_kernels.kv_tiles import NO_KEY_YET, dot, key_row_offsets, load_rows, online_softmax_step

REDUCED_PARTS = 16  # parts that the reduction loads at once
REDUCTION_WARPS = 4


def decode_attention(
    query: Tensor,
    kv_pool: Tensor,
    layer: int,
    block_tables: Tensor,
    plan: DecodePlan,
    scale: float,
    output: Tensor,
) -> None:
    """Attend with the one new token of each planned sequence; row i of `query` belongs to sequence i.

    `query` is `[tokens, num_heads, head_dim]` with any strides but the last (1), `kv_pool` `[num_blocks,
    num_kv_heads, num_layers, 2, block_size, head_dim]`, its last four dimensions contiguous, `block_tables`
    `[sequences, max_blocks]` int64. Writes the rows of its sequences in `output`, contiguous and of the
    query's shape. `scale` is positive.
    """
    num_heads, head_dim = query.shape[1:]
    num_kv_heads, block_size = kv_pool.shape[1], kv_pool.shape[4]
    group_size = num_heads // num_kv_heads
    attend_part_kernel[(len(plan.parts) * num_kv_heads,)](
        output,
        plan.partial_outputs,
        plan.partial_lse,
        query,
        kv_pool,
        block_tables,
        plan.parts,
        layer,
        scale * math.log2(math.e),
        num_kv_heads,
        query.stride(0),
        query.stride(1),
        block_tables.stride(0),
        kv_pool.stride(0),
        kv_pool.stride(1),
        GROUP_SIZE=group_size,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        ROWS=max(16, triton.next_power_of_2(group_size)),
        TILE=plan.tile.tokens,
        PADDED_HEAD_DIM=padded_head_dim(head_dim),
        num_warps=plan.tile.num_warps,
        num_stages=plan.tile.num_stages,
    )
    if len(plan.reductions) > 0:
        reduce_parts_kernel[(len(plan.reductions) * num_heads,)](
            output,
            plan.partial_outputs,
            plan.partial_lse,
            plan.reductions,
            num_heads,
            HEAD_DIM=head_dim,
            PADDED_HEAD_DIM=padded_head_dim(head_dim),
            PARTS=REDUCED_PARTS,
            num_warps=REDUCTION_WARPS,
        )


@triton.jit(do_not_specialize=["layer", "block_table_stride"])
def attend_part_kernel(
    output: tl.tensor,
    partial_outputs: tl.tensor,
    partial_lse: tl.tensor,
    query: tl.tensor,
    kv_pool: tl.tensor,
    block_tables: tl.tensor,
    parts: tl.tensor,
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
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    PADDED_HEAD_DIM: tl.constexpr,
) -> None:
    """One part of one sequence, for all query heads of one KV head."""
    program = tl.program_id(0)
    kv_head = program % num_kv_heads
    part = parts + (program // num_kv_heads) * 4
    sequence = tl.load(part).to(tl.int64)
    first_token, end_token, partial_row = tl.load(part + 1), tl.load(part + 2), tl.load(part + 3)

    rows, dims, lanes = tl.arange(0, ROWS), tl.arange(0, PADDED_HEAD_DIM), tl.arange(0, TILE)
    heads = kv_head * GROUP_SIZE + rows
    mask = (rows < GROUP_SIZE)[:, None] & (dims < HEAD_DIM)[None, :]
    query_offsets = sequence * query_token_stride + heads[:, None] * query_head_stride + dims[None, :]
    queries = tl.load(query + query_offsets, mask=mask, other=0.0)

    block_table = block_tables + sequence * block_table_stride
    head_keys = kv_pool + kv_head.to(tl.int64) * pool_head_stride + layer * (2 * BLOCK_SIZE * HEAD_DIM)
    accumulated = tl.zeros([ROWS, PADDED_HEAD_DIM], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    maximum = tl.full([ROWS], NO_KEY_YET, tl.float32)
    first_tile = first_token // TILE * TILE
    row_offsets = key_row_offsets(
        block_table, first_tile, end_token, pool_block_stride, HEAD_DIM, BLOCK_SIZE, TILE
    )
    for start in tl.range(first_tile, end_token, TILE):
        tokens = start + lanes
        seen = (tokens >= first_token) & (tokens < end_token)
        pointers = head_keys + row_offsets[:, None] + dims[None, :]
        # The block ids are read a turn ahead, so that the pipelined loads of K and V wait for no other load.
        row_offsets = key_row_offsets(
            block_table, start + TILE, end_token, pool_block_stride, HEAD_DIM, BLOCK_SIZE, TILE
        )
        key = load_rows(pointers, seen, dims, HEAD_DIM, PADDED_HEAD_DIM, True)
        value = load_rows(pointers + BLOCK_SIZE * HEAD_DIM, seen, dims, HEAD_DIM, PADDED_HEAD_DIM, True)
        scores = dot(queries, tl.trans(key), tl.zeros([ROWS, TILE], tl.float32))
        scores = tl.where(seen[None, :], scores, float("-inf"))
        accumulated, total, maximum = online_softmax_step(
            accumulated, total, maximum, scores, value, scale_log2
        )

    attended = accumulated / total[:, None]
    num_heads = num_kv_heads * GROUP_SIZE
    if partial_row < 0:
        head_rows = sequence * num_heads + heads
        tl.store(
            output + head_rows[:, None] * HEAD_DIM + dims[None, :], attended.to(output.dtype.element_ty), mask
        )
    else:
        head_rows = partial_row.to(tl.int64) * num_heads + heads
        tl.store(partial_outputs + head_rows[:, None] * HEAD_DIM + dims[None, :], attended, mask)
        tl.store(partial_lse + head_rows, maximum + tl.log2(total), rows < GROUP_SIZE)


@triton.jit
def reduce_parts_kernel(
    output: tl.tensor,
    partial_outputs: tl.tensor,
    partial_lse: tl.tensor,
    reductions: tl.tensor,
    num_heads: tl.tensor,
    HEAD_DIM: tl.constexpr,
    PADDED_HEAD_DIM: tl.constexpr,
    PARTS: tl.constexpr,
) -> None:
    """Join the parts of one query head of one sequence, each weighted by its share of the softmax's sum."""
    program = tl.program_id(0)
    head = program % num_heads
    reduction = reductions + (program // num_heads) * 3
    sequence = tl.load(reduction).to(tl.int64)
    first_row, num_parts = tl.load(reduction + 1), tl.load(reduction + 2)

    dims, lanes = tl.arange(0, PADDED_HEAD_DIM), tl.arange(0, PARTS)
    accumulated = tl.zeros([PADDED_HEAD_DIM], tl.float32)
    total = tl.full([], 0.0, tl.float32)
    maximum = tl.full([], NO_KEY_YET, tl.float32)
    for start in range(0, num_parts, PARTS):
        present = start + lanes < num_parts
        rows = (first_row + start + lanes).to(tl.int64) * num_heads + head
        lse = tl.load(partial_lse + rows, present, other=float("-inf"))
        mask = present[:, None] & (dims < HEAD_DIM)[None, :]
        partial = tl.load(partial_outputs + rows[:, None] * HEAD_DIM + dims[None, :], mask, other=0.0)
        new_maximum = tl.maximum(maximum, tl.max(lse, 0))
        weights = tl.exp2(lse - new_maximum)
        correction = tl.exp2(maximum - new_maximum)
        accumulated = accumulated * correction + tl.sum(partial * weights[:, None], 0)
        total = total * correction + tl.sum(weights, 0)
        maximum = new_maximum
    attended = (accumulated / total).to(output.dtype.element_ty)
    tl.store(output + (sequence * num_heads + head) * HEAD_DIM + dims, attended, dims < HEAD_DIM)


def ahead_of_time(capability: int) -> Iterator[CompileCase]:
    """See `ahead_of_time.CompileCase`. Groups of up to 16 heads are the same size to the compiler."""
    for dtype, dtype_name in TRITON_TYPES.items():
        for head_dim, block_size in [*((head_dim, 16) for head_dim in HEAD_DIMS), (128, 256)]:
            yield _part_case(dtype, dtype_name, head_dim, block_size)
    for dtype_name in TRITON_TYPES.values():
        for head_dim in HEAD_DIMS:
            yield _reduction_case(dtype_name, head_dim)


def _part_case(dtype: torch.dtype, dtype_name: str, head_dim: int, block_size: int) -> CompileCase:
    tile = decode_tile(dtype, head_dim)
    return CompileCase(
        attend_part_kernel,
        f"{dtype_name} head_dim={head_dim} block={block_size} tile={tile.tokens}",
        {
            "output": f"*{dtype_name}",
            "partial_outputs": "*fp32",
            "partial_lse": "*fp32",
            "query": f"*{dtype_name}",
            "kv_pool": f"*{dtype_name}",
            "block_tables": "*i64",
            "parts": "*i32",
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
            "GROUP_SIZE": 4,
            "HEAD_DIM": head_dim,
            "BLOCK_SIZE": block_size,
            "ROWS": 16,
            "TILE": tile.tokens,
            "PADDED_HEAD_DIM": padded_head_dim(head_dim),
        },
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        divisible_by_16=("query_token_stride", "query_head_stride", "pool_block_stride", "pool_head_stride"),
    )


def _reduction_case(dtype_name: str, head_dim: int) -> CompileCase:
    return CompileCase(
        reduce_parts_kernel,
        f"{dtype_name} head_dim={head_dim}",
        {
            "output": f"*{dtype_name}",
            "partial_outputs": "*fp32",
            "partial_lse": "*fp32",
            "reductions": "*i32",
            "num_heads": "i32",
        },
        {"HEAD_DIM": head_dim, "PADDED_HEAD_DIM": padded_head_dim(head_dim), "PARTS": REDUCED_PARTS},
        num_warps=REDUCTION_WARPS,
    )
