"""CPU kernel: causal paged attention of chunks of new tokens, by tiles (FlashAttention, arXiv 2205.14135).

A task is a block of a chunk's tokens for one KV head and all query heads that share it. For each 64 tokens of
the context that the block sees, K and V are packed as `linear_code` multiplies them, K transposed, and all
rows of the block pass by, six at a time: scores, weights relative to a reference, sums of values. The
reference of a row is raised, and its sums scaled, only when a score exceeds it by far: exact in any case, as
in FlashAttention-4.

Where the CPU multiplies bfloat16, queries, K, V and weights are bfloat16, and everything else is float32.
Elsewhere all of it is float32; K and V of a bfloat16 pool are converted when they are packed.
"""

from __future__ import annotations

import math

from numba.extending import register_jitable

from pdengine.triton_kernels.cpu_launch import THREAD_COUNTER, scratch_on_the_stack
from pdengine.triton_kernels.linear_code import TILES_BFLOAT16, TILES_FLOAT32
from pdengine.triton_kernels.vector_code import (
    exp2,
    first_lanes,
    has_bf16_dot_product,
    interleave_rows,
    larger,
    largest_lane,
    load_bfloat16,
    load_even_odd_bfloat16,
    load_float32,
    load_integer,
    load_number,
    splat,
    store_bfloat16,
    store_float32,
    store_number,
    sum_of_lanes,
    take_ticket,
    transpose_words,
)

PANEL_TOKENS = 64
TILE_ROWS = 6
PANEL_BYTES = 4 * PANEL_TOKENS  # of one row of a panel
REFERENCE_SLACK = (
    8.0  # weights of up to 2 ** 8 stay, which float32 and bfloat16 hold as exactly as those below 1
)

HAS_DOT_PRODUCT = has_bf16_dot_product()
SIX_BFLOAT16, ONE_BFLOAT16 = TILES_BFLOAT16[5], TILES_BFLOAT16[0]
SIX_FLOAT32, ONE_FLOAT32 = TILES_FLOAT32[5], TILES_FLOAT32[0]

# The int64 that describe a batch, in bytes from their start. A task is a sequence, the row of its first query
# in the batch, the position of that in the context, and the number of its queries.
NUM_TASKS, TASKS, BLOCK_TABLES, TABLE_WIDTH, CONTEXT_LENGTHS = (8 * word for word in range(5))
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, BLOCK_BYTES, HEAD_BYTES = (8 * word for word in range(5, 11))
POOL_IS_BFLOAT16, IS_BFLOAT16, MEMORY, MEMORY_BYTES, MAX_QUERIES = (8 * word for word in range(11, 16))

# The stack of a task: scores [6, 64] float32, weights [6, 64] of the dtype that is multiplied, words of K.
_SCORES, _WEIGHTS, _WORDS = 0, TILE_ROWS * PANEL_BYTES, 2 * TILE_ROWS * PANEL_BYTES


def memory_bytes(head_dim: int, group_size: int, max_queries: int) -> int:
    """What a thread needs: panels of K and V, and of each row sums, reference and total weight."""
    value_panels = -(-head_dim // PANEL_TOKENS)
    panels = (head_dim + value_panels * PANEL_TOKENS) * PANEL_BYTES
    return panels + group_size * max_queries * (value_panels * PANEL_BYTES + 8)


@register_jitable
def multiply_six(inputs, stride, panel, count, sums, is_bfloat16):  # type: ignore[no-untyped-def]
    """count: elements of an input."""
    if HAS_DOT_PRODUCT and is_bfloat16:  # the first is a constant: LLVM leaves the call out where it is False
        SIX_BFLOAT16(inputs, stride, panel, count // 2, sums)
    else:
        SIX_FLOAT32(inputs, stride, panel, count, sums)


@register_jitable
def multiply_one(inputs, panel, count, sums, is_bfloat16):  # type: ignore[no-untyped-def]
    if HAS_DOT_PRODUCT and is_bfloat16:
        ONE_BFLOAT16(inputs, 0, panel, count // 2, sums)
    else:
        ONE_FLOAT32(inputs, 0, panel, count, sums)


def prefill_attention(words: int) -> None:
    """See `Kernels.paged_attention`. The words: query, output, layer's K in the first block, batch, scale.

    Query and output are of the dtype that is multiplied.
    """
    query, output, pool_layer = load_integer(words + 8), load_integer(words + 16), load_integer(words + 24)
    batch, scale = load_integer(words + 32), load_number(words + 40)
    thread = take_ticket(words + THREAD_COUNTER)
    memory = load_integer(batch + MEMORY) + thread * load_integer(batch + MEMORY_BYTES)
    num_heads, num_kv_heads = load_integer(batch + NUM_HEADS), load_integer(batch + NUM_KV_HEADS)
    head_dim, is_bfloat16 = load_integer(batch + HEAD_DIM), load_integer(batch + IS_BFLOAT16) != 0
    group_size, row_bytes = num_heads // num_kv_heads, head_dim * (2 if is_bfloat16 else 4)
    stack = scratch_on_the_stack()
    num_tasks = load_integer(batch + NUM_TASKS) * num_kv_heads
    task = take_ticket(words)
    while task < num_tasks:
        place, kv_head = load_integer(batch + TASKS) + 32 * (task // num_kv_heads), task % num_kv_heads
        sequence, row = load_integer(place), load_integer(place + 8)
        position, num_queries = load_integer(place + 16), load_integer(place + 24)
        start = (row * num_heads + kv_head * group_size) * row_bytes
        pool_head = pool_layer + kv_head * load_integer(batch + HEAD_BYTES)
        attend_block(
            stack, memory, batch, sequence, pool_head, query + start, output + start, position, num_queries,
            group_size, num_heads * row_bytes, head_dim, is_bfloat16, scale * (1.0 / math.log(2.0)),
        )  # fmt: skip
        task = take_ticket(words)


@register_jitable
def attend_block(  # type: ignore[no-untyped-def]
    stack, memory, batch, sequence, pool_head, query, output, position, num_queries,
    group_size, token_bytes, head_dim, is_bfloat16, scale,
):  # fmt: skip
    """The queries of a task; consecutive tokens of a head are `token_bytes` apart."""
    value_panels = (head_dim + PANEL_TOKENS - 1) // PANEL_TOKENS
    max_queries = load_integer(batch + MAX_QUERIES)
    key_panel = memory
    value_panel = key_panel + head_dim * PANEL_BYTES
    sums = value_panel + value_panels * PANEL_TOKENS * PANEL_BYTES
    references = sums + group_size * max_queries * value_panels * PANEL_BYTES
    item_bytes = 2 if is_bfloat16 else 4
    head_sums = max_queries * value_panels * PANEL_BYTES
    clear(sums, references, group_size, max_queries, value_panels)
    for token in range(0, position + num_queries, PANEL_TOKENS):
        pack_panels(stack, batch, sequence, pool_head, token, key_panel, value_panel, head_dim, is_bfloat16)
        # Queries before the panel do not see it.
        first = max(0, token - position) // TILE_ROWS * TILE_ROWS
        for head in range(group_size):
            row = first
            while row < num_queries:
                num_rows = TILE_ROWS if num_queries - row >= TILE_ROWS else 1
                attend_tile(
                    stack, query + row * token_bytes + head * head_dim * item_bytes, token_bytes, num_rows,
                    key_panel, value_panel, value_panels, position + row - token + 1,
                    sums + head * head_sums + row * PANEL_BYTES, max_queries * PANEL_BYTES,
                    references + 8 * (head * max_queries + row), head_dim, is_bfloat16, scale,
                )  # fmt: skip
                row += num_rows
    for head in range(group_size):
        for row in range(num_queries):
            factor = splat(1.0 / load_number(references + 8 * (head * max_queries + row) + 4))
            place = output + row * token_bytes + head * head_dim * item_bytes
            for index in range(0, head_dim, 16):
                panel, lane = index // PANEL_TOKENS, index % PANEL_TOKENS
                total = sums + head * head_sums + (panel * max_queries + row) * PANEL_BYTES + 4 * lane
                value = load_float32(total) * factor
                if is_bfloat16:
                    store_bfloat16(place + 2 * index, value)
                else:
                    store_float32(place + 4 * index, value)


@register_jitable
def clear(sums, references, group_size, max_queries, value_panels):  # type: ignore[no-untyped-def]
    zero = splat(0.0)
    for place in range(sums, references, 64):
        store_float32(place, zero)
    for row in range(group_size * max_queries):
        store_number(references + 8 * row, -math.inf)
        store_number(references + 8 * row + 4, 0.0)


@register_jitable
def attend_tile(  # type: ignore[no-untyped-def]
    stack, query, token_bytes, num_rows, key_panel, value_panel, value_panels, visible,
    sums, panel_stride, references, head_dim, is_bfloat16, scale,
):  # fmt: skip
    """Add a panel to the sums of `num_rows` queries, of which the first sees `visible` tokens of it and each
    other one more than the one before. visible may be below 1 and above 64."""
    scores, weights, zero = stack + _SCORES, stack + _WEIGHTS, splat(0.0)
    item_bytes = 2 if is_bfloat16 else 4
    for place in range(scores, scores + num_rows * PANEL_BYTES, 64):
        store_float32(place, zero)
    if num_rows == TILE_ROWS:
        multiply_six(query, token_bytes, key_panel, head_dim, scores, is_bfloat16)
    else:
        multiply_one(query, key_panel, head_dim, scores, is_bfloat16)
    for row in range(num_rows):
        soften(
            scores + row * PANEL_BYTES, weights + row * PANEL_TOKENS * item_bytes, visible + row,
            sums + row * PANEL_BYTES, panel_stride, value_panels, references + 8 * row, is_bfloat16, scale,
        )  # fmt: skip
    for panel in range(value_panels):
        values = value_panel + panel * PANEL_TOKENS * PANEL_BYTES * item_bytes // 4
        place = sums + panel * panel_stride
        if num_rows == TILE_ROWS:
            multiply_six(weights, PANEL_TOKENS * item_bytes, values, PANEL_TOKENS, place, is_bfloat16)
        else:
            multiply_one(weights, values, PANEL_TOKENS, place, is_bfloat16)


@register_jitable
def soften(  # type: ignore[no-untyped-def]
    scores, weights, visible, sums, panel_stride, value_panels, reference_place, is_bfloat16, scale
):
    """A row of scores to weights; its sums are scaled if its reference rises."""
    factor = splat(scale)
    a, b = load_float32(scores) * factor, load_float32(scores + 64) * factor
    c, d = load_float32(scores + 128) * factor, load_float32(scores + 192) * factor
    if visible < PANEL_TOKENS:
        a, b = first_lanes(a, visible, -math.inf), first_lanes(b, visible - 16, -math.inf)
        c, d = first_lanes(c, visible - 32, -math.inf), first_lanes(d, visible - 48, -math.inf)
    reference = load_number(reference_place)
    maximum = largest_lane(larger(larger(a, b), larger(c, d)))
    if maximum > reference + REFERENCE_SLACK:
        if reference != -math.inf:
            change = 2.0 ** (reference - maximum)
            store_number(reference_place + 4, load_number(reference_place + 4) * change)
            for panel in range(value_panels):
                for place in range(sums + panel * panel_stride, sums + panel * panel_stride + 256, 64):
                    store_float32(place, load_float32(place) * splat(change))
        reference = maximum
        store_number(reference_place, reference)
    shift = splat(reference)
    a, b, c, d = exp2(a - shift), exp2(b - shift), exp2(c - shift), exp2(d - shift)
    total = load_number(reference_place + 4) + sum_of_lanes(a + b + (c + d))
    store_number(reference_place + 4, total)
    if is_bfloat16:
        store_bfloat16(weights, a)
        store_bfloat16(weights + 32, b)
        store_bfloat16(weights + 64, c)
        store_bfloat16(weights + 96, d)
    else:
        store_float32(weights, a)
        store_float32(weights + 64, b)
        store_float32(weights + 128, c)
        store_float32(weights + 192, d)


@register_jitable
def pack_panels(  # type: ignore[no-untyped-def]
    stack, batch, sequence, pool_head, token, key_panel, value_panel, head_dim, is_bfloat16
):
    """K and V of 64 tokens from `token` on, zeros past the context."""
    block_size = load_integer(batch + BLOCK_SIZE)
    table = load_integer(batch + BLOCK_TABLES) + 8 * sequence * load_integer(batch + TABLE_WIDTH)
    context_length = load_integer(load_integer(batch + CONTEXT_LENGTHS) + 8 * sequence)
    pool_is_bfloat16 = load_integer(batch + POOL_IS_BFLOAT16) != 0
    row_bytes = head_dim * (2 if pool_is_bfloat16 else 4)
    for column in range(0, PANEL_TOKENS, 16):
        first = token + column
        num_tokens = min(16, max(0, context_length - first))
        tile = pool_head
        if num_tokens > 0:
            block = load_integer(table + 8 * (first // block_size))
            tile = pool_head + block * load_integer(batch + BLOCK_BYTES) + first % block_size * row_bytes
        pack_keys(
            stack,
            tile,
            row_bytes,
            num_tokens,
            key_panel + 4 * column,
            head_dim,
            pool_is_bfloat16,
            is_bfloat16,
        )
        pack_values(
            tile + block_size * row_bytes, row_bytes, num_tokens, value_panel, column, head_dim,
            pool_is_bfloat16, is_bfloat16,
        )  # fmt: skip


@register_jitable
def pack_keys(  # type: ignore[no-untyped-def]
    stack, tile, row_bytes, num_tokens, panel, head_dim, pool_is_bfloat16, is_bfloat16
):
    """16 columns of the panel of K: words of the tile's 16 rows, transposed."""
    if pool_is_bfloat16 and not is_bfloat16:
        for word in range(0, head_dim // 2, 16):
            transpose_words(tile + 4 * word, row_bytes, num_tokens, stack + _WORDS, 64)
            for row in range(16):
                even, odd = load_even_odd_bfloat16(stack + _WORDS + 64 * row)
                store_float32(panel + 2 * (word + row) * PANEL_BYTES, even)
                store_float32(panel + (2 * (word + row) + 1) * PANEL_BYTES, odd)
    else:
        for word in range(0, row_bytes // 4, 16):
            transpose_words(tile + 4 * word, row_bytes, num_tokens, panel + word * PANEL_BYTES, PANEL_BYTES)


@register_jitable
def pack_values(  # type: ignore[no-untyped-def]
    tile, row_bytes, num_tokens, panels, first_row, head_dim, pool_is_bfloat16, is_bfloat16
):
    """16 rows of the panels of V: pairs of tokens side by side if bfloat16 are multiplied."""
    zero = splat(0.0)
    for index in range(0, head_dim, 16):
        panel = index // PANEL_TOKENS * (PANEL_TOKENS * PANEL_BYTES)
        if is_bfloat16:
            panel = panels + panel // 2 + 4 * (index % PANEL_TOKENS)
            for row in range(0, 16, 2):
                place = panel + (first_row + row) // 2 * PANEL_BYTES
                interleave_rows(tile + row * row_bytes + 2 * index, row_bytes, num_tokens - row, place)
        else:
            panel = panels + panel + 4 * (index % PANEL_TOKENS)
            for row in range(16):
                value = zero
                if row < num_tokens:
                    if pool_is_bfloat16:
                        value = load_bfloat16(tile + row * row_bytes + 2 * index)
                    else:
                        value = load_float32(tile + row * row_bytes + 4 * index)
                store_float32(panel + (first_row + row) * PANEL_BYTES, value)
