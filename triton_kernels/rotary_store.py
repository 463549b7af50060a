"""Triton: norm and rotate queries and keys, and write keys and values into the paged KV cache, in one pass.

A program takes one token and a tile of its heads, of all kinds: queries go to their own tensor, keys and
values straight to their place in the pool `[num_blocks, num_kv_heads, num_layers, 2, block_size, head_dim]`.
Rotation ("rotate half", arXiv 2104.09864) pairs dimension i with i + rotary_dim / 2; the partner is read a
second time, from L1, where its permutation costs an address instead of a shuffle.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from pdengine.triton_kernels.ahead_of_time import CompileCase
from pdengine.triton_kernels.attention import AttentionBatch

TILE_ELEMENTS = 1024  # of a program: heads times padded head_dim
NUM_WARPS = 4


def rotate_and_store(
    qkv: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    query_norm: Tensor | None,
    key_norm: Tensor | None,
    eps: float,
    kv_pool: Tensor,
    layer: int,
    batch: AttentionBatch,
) -> Tensor:
    """See `Kernels.rotate_and_store`; `qkv`, `cos` and `sin` are contiguous."""
    assert qkv.is_contiguous()
    assert kv_pool.is_contiguous()
    tokens, num_qkv_heads, head_dim = qkv.shape
    _, num_kv_heads, num_layers, _, block_size, _ = kv_pool.shape
    num_heads = num_qkv_heads - 2 * num_kv_heads
    query = torch.empty(tokens, num_heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    padded_dim = triton.next_power_of_2(head_dim)
    tile_heads = max(1, TILE_ELEMENTS // padded_dim)
    _rotate_and_store_kernel[(tokens, triton.cdiv(num_qkv_heads, tile_heads))](
        qkv,
        # A pointer that is not read still must be one.
        qkv if cos is None else cos,
        qkv if sin is None else sin,
        qkv if query_norm is None else query_norm,
        qkv if key_norm is None else key_norm,
        query,
        kv_pool,
        batch.block_ids,
        batch.block_offsets,
        eps,
        layer,
        num_heads,
        num_kv_heads,
        num_layers,
        BLOCK_SIZE=block_size,
        HEAD_DIM=head_dim,
        PAIRS=0 if cos is None else cos.shape[-1],
        HAS_NORM=query_norm is not None,
        TILE_HEADS=tile_heads,
        PADDED_DIM=padded_dim,
        num_warps=NUM_WARPS,
    )
    return query


@triton.jit(do_not_specialize=["layer"])
def _rotate_and_store_kernel(
    qkv_ptr: tl.tensor,  # [tokens, num_heads + 2 * num_kv_heads, HEAD_DIM]
    cos_ptr: tl.tensor,  # [tokens, PAIRS] float32
    sin_ptr: tl.tensor,
    query_norm_ptr: tl.tensor,  # [HEAD_DIM] float32
    key_norm_ptr: tl.tensor,
    query_ptr: tl.tensor,  # [tokens, num_heads, HEAD_DIM]
    kv_pool_ptr: tl.tensor,
    block_ids_ptr: tl.tensor,  # [tokens] int64
    block_offsets_ptr: tl.tensor,
    eps: tl.tensor,
    layer: tl.tensor,
    num_heads: tl.tensor,
    num_kv_heads: tl.tensor,
    num_layers: tl.tensor,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAIRS: tl.constexpr,  # 0: no rotation
    HAS_NORM: tl.constexpr,
    TILE_HEADS: tl.constexpr,
    PADDED_DIM: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * TILE_HEADS + tl.arange(0, TILE_HEADS)[:, None]
    dim = tl.arange(0, PADDED_DIM)[None, :]
    is_query = head < num_heads
    is_value = head >= num_heads + num_kv_heads
    inside = (head < num_heads + 2 * num_kv_heads) & (dim < HEAD_DIM)

    heads_ptr = qkv_ptr + (token * (num_heads + 2 * num_kv_heads) + head) * HEAD_DIM
    stored = tl.load(heads_ptr + dim, mask=inside, other=0.0)
    x = stored.to(tl.float32)
    if HAS_NORM:
        inverse_rms = tl.rsqrt(tl.sum(x * x, axis=1) / HEAD_DIM + eps)[:, None]
        x *= inverse_rms * _norm_weight(query_norm_ptr, key_norm_ptr, dim, is_query, HEAD_DIM)
    if PAIRS > 0:
        partner = tl.where(dim < PAIRS, dim + PAIRS, dim - PAIRS)
        is_rotated = dim < 2 * PAIRS
        y = tl.load(heads_ptr + partner, mask=inside & is_rotated, other=0.0).to(tl.float32)
        if HAS_NORM:
            y *= inverse_rms * _norm_weight(query_norm_ptr, key_norm_ptr, partner, is_query, HEAD_DIM)
        pair = token * PAIRS + tl.minimum(dim, partner)
        cos = tl.load(cos_ptr + pair, mask=is_rotated, other=1.0)
        sin = tl.load(sin_ptr + pair, mask=is_rotated, other=0.0)
        x = x * cos + tl.where(dim < PAIRS, -y, y) * sin
    result = tl.where(is_value, stored, x.to(stored.dtype))

    tl.store(query_ptr + (token * num_heads + head) * HEAD_DIM + dim, result, mask=inside & is_query)
    block, offset = tl.load(block_ids_ptr + token), tl.load(block_offsets_ptr + token)
    kv_head = head - num_heads - tl.where(is_value, num_kv_heads, 0)
    tile = ((block * num_kv_heads + kv_head) * num_layers + layer) * 2 + tl.where(is_value, 1, 0)  # int64
    slot = tile * BLOCK_SIZE + offset
    tl.store(kv_pool_ptr + slot * HEAD_DIM + dim, result, mask=inside & (head >= num_heads))


@triton.jit
def _norm_weight(
    query_norm_ptr: tl.tensor,
    key_norm_ptr: tl.tensor,
    dim: tl.tensor,
    is_query: tl.tensor,
    HEAD_DIM: tl.constexpr,
) -> tl.tensor:
    inside = (dim >= 0) & (dim < HEAD_DIM)
    query_weight = tl.load(query_norm_ptr + dim, mask=inside, other=0.0)
    key_weight = tl.load(key_norm_ptr + dim, mask=inside, other=0.0)
    return tl.where(is_query, query_weight, key_weight)


def ahead_of_time(capability: int) -> Iterator[CompileCase]:
    for dtype in ("bf16", "fp16", "fp32"):
        for head_dim, pairs, has_norm in (
            (128, 64, True),
            (128, 64, False),
            (128, 0, False),
            (64, 32, False),
            (80, 40, False),
            (96, 36, False),
            (256, 128, True),
        ):
            padded_dim = triton.next_power_of_2(head_dim)
            yield CompileCase(
                _rotate_and_store_kernel,
                f"{dtype} head_dim={head_dim} rotary_dim={2 * pairs}" + (" with norm" if has_norm else ""),
                {
                    "qkv_ptr": f"*{dtype}",
                    "cos_ptr": "*fp32" if pairs else f"*{dtype}",
                    "sin_ptr": "*fp32" if pairs else f"*{dtype}",
                    "query_norm_ptr": "*fp32" if has_norm else f"*{dtype}",
                    "key_norm_ptr": "*fp32" if has_norm else f"*{dtype}",
                    "query_ptr": f"*{dtype}",
                    "kv_pool_ptr": f"*{dtype}",
                    "block_ids_ptr": "*i64",
                    "block_offsets_ptr": "*i64",
                    "eps": "fp32",
                    "layer": "i32",
                    "num_heads": "i32",
                    "num_kv_heads": "i32",
                    "num_layers": "i32",
                },
                {
                    "BLOCK_SIZE": 16,
                    "HEAD_DIM": head_dim,
                    "PAIRS": pairs,
                    "HAS_NORM": has_norm,
                    "TILE_HEADS": max(1, TILE_ELEMENTS // padded_dim),
                    "PADDED_DIM": padded_dim,
                },
                num_warps=NUM_WARPS,
            )
