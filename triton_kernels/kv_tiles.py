"""What the attention kernels share: finding keys in the paged pool, and one step of the online softmax."""

import triton
import triton.language as tl

# The running maximum of a row that has seen no key. It is finite, so that a row whose keys are all masked
# computes exp2(-inf - finite) = 0 and not exp2(-inf + inf) = NaN.
NO_KEY_YET = tl.constexpr(-1e30)
# Triton's interpreter multiplies the bits of bfloat16 as if they were integers: see `dot`.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(left: tl.tensor, right: tl.tensor, accumulated: tl.tensor) -> tl.tensor:
    """accumulated + left @ right, in float32; float32 operands are not rounded to TF32."""
    if INTERPRETED:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, accumulated, input_precision="ieee")


@triton.jit
def key_row_offsets(
    block_table: tl.tensor,
    first_token: tl.tensor,
    end_token: tl.tensor,
    pool_block_stride: tl.tensor,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
) -> tl.tensor:
    """Element offsets `[TILE]` int64 of the keys from `first_token` on, from the head's tile of block 0.

    `first_token` is a multiple of TILE. Those at or past `end_token` point to some row of block 0.
    """
    lanes = tl.arange(0, TILE)
    if BLOCK_SIZE >= TILE:  # the tile lies within one block
        block = tl.load(block_table + first_token // BLOCK_SIZE, mask=first_token < end_token, other=0)
        return block * pool_block_stride + (first_token % BLOCK_SIZE + lanes) * HEAD_DIM
    tokens = first_token + lanes
    blocks = tl.load(block_table + tokens // BLOCK_SIZE, mask=tokens < end_token, other=0)
    return blocks * pool_block_stride + (lanes % BLOCK_SIZE) * HEAD_DIM


@triton.jit
def load_rows(
    pointers: tl.tensor,
    row_mask: tl.tensor,
    dims: tl.tensor,
    HEAD_DIM: tl.constexpr,
    PADDED_HEAD_DIM: tl.constexpr,
    MASKED: tl.constexpr,
) -> tl.tensor:
    """`pointers` `[rows, PADDED_HEAD_DIM]`; what is masked or past the head's dimensions is 0."""
    if HEAD_DIM != PADDED_HEAD_DIM:
        return tl.load(pointers, mask=row_mask[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)
    if MASKED:
        return tl.load(pointers, mask=row_mask[:, None], other=0.0)
    return tl.load(pointers)


@triton.jit
def online_softmax_step(
    accumulated: tl.tensor,
    total: tl.tensor,
    maximum: tl.tensor,
    scores: tl.tensor,
    value: tl.tensor,
    scale_log2: tl.tensor,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Take one tile of keys into the running result (FlashAttention-2, arXiv 2307.08691, algorithm 1).

    `scores` `[rows, tile]` are unscaled, -inf where masked; `scale_log2` > 0 is scale * log2(e), so that exp2
    serves for exp, as it does in hardware. Returns the new accumulated output, total weight and maximum.
    """
    new_maximum = tl.maximum(maximum, tl.max(scores, 1) * scale_log2)
    weights = tl.exp2(scores * scale_log2 - new_maximum[:, None])
    correction = tl.exp2(maximum - new_maximum)
    total = total * correction + tl.sum(weights, 1)
    accumulated = dot(weights.to(value.dtype), value, accumulated * correction[:, None])
    return accumulated, total, new_maximum
