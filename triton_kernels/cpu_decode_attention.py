"""CPU kernel: paged attention of single new tokens, which reads each K and V once, where it lies in the pool.

A task is a part of the context of one sequence, for one KV head and all query heads that share it. It goes
through the part in chunks: the scores of a chunk, their softmax against the running maximum (arXiv
1805.02867), the values. While a tile of 16 tokens is worked on, a later one is asked for, because the CPU's
own prefetchers do not know the block table. The parts of a context that is split among tasks leave
partial results, which `reduce_parts` puts together (Flash-Decoding).

K and V are read as pairs of vectors: even and odd elements of bfloat16, two vectors in a row of float32.
Queries and sums are kept in the same order, and put back when they are stored.
"""

from __future__ import annotations

import math

from numba.extending import register_jitable

from pdengine.triton_kernels.cpu_launch import scratch_on_the_stack
from pdengine.triton_kernels.vector_code import (
    LINE_BYTES,
    exp2,
    first_lanes,
    larger,
    largest_lane,
    load_even_odd_bfloat16,
    load_float32,
    load_integer,
    load_number,
    prefetch_to_l2,
    splat,
    store_even_odd_bfloat16,
    store_float32,
    store_number,
    sum_of_lanes,
    sums_of_rows,
    take_ticket,
)

TILE_TOKENS = 16  # those of a vector; block sizes are multiples of it
CHUNK_TOKENS = 128
# How far ahead tiles are asked for. Measured on a Zen 4: two tiles of 4 KiB ahead and into the second cache,
# the kernel reads at 1.6 times the rate of one ahead into the first cache, which has room for few requests.
PREFETCH_TILES = 2
MAX_GROUP_SIZE = 16
MAX_GROUP_ELEMENTS = 2048  # head_dim times group size

# The scratch memory of a task, in bytes from its start. Of each head of the group: query, sum, ...
_QUERIES = 0
_SUMS = _QUERIES + 4 * MAX_GROUP_ELEMENTS
_SCORES = _SUMS + 4 * MAX_GROUP_ELEMENTS  # [heads, CHUNK_TOKENS]
_PRODUCTS = _SCORES + 4 * MAX_GROUP_SIZE * CHUNK_TOKENS  # [heads, 16 tokens, 16 lanes]
_MAXIMA = _PRODUCTS + 4 * MAX_GROUP_SIZE * TILE_TOKENS * 16
_WEIGHTS = _MAXIMA + 4 * MAX_GROUP_SIZE

# The int64 that describe a batch, in bytes from their start. A part is a sequence, its first token, and the
# row of the sequence's query.
NUM_TASKS, PARTS, PART_TOKENS, FIRST_PARTS, PARTIAL_SUMS, PARTIAL_SCALES = (8 * word for word in range(6))
BLOCK_TABLES, TABLE_WIDTH, CONTEXT_LENGTHS = (8 * word for word in range(6, 9))
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, IS_BFLOAT16 = (8 * word for word in range(9, 13))
BLOCK_SIZE, BLOCK_BYTES, HEAD_BYTES = (8 * word for word in range(13, 16))


@register_jitable
def load_pair(place, is_bfloat16):  # type: ignore[no-untyped-def]
    """32 elements in the order that they are computed in."""
    if is_bfloat16:
        return load_even_odd_bfloat16(place)
    return (load_float32(place), load_float32(place + 64))


@register_jitable
def store_pair(place, first, second, is_bfloat16):  # type: ignore[no-untyped-def]
    if is_bfloat16:
        store_even_odd_bfloat16(place, first, second)
    else:
        store_float32(place, first)
        store_float32(place + 64, second)


def decode_attention(words: int) -> None:
    """See `Kernels.paged_attention`. The words: query, output, layer's K in the first block, batch, scale."""
    query, output, pool_layer = load_integer(words + 8), load_integer(words + 16), load_integer(words + 24)
    batch, scale = load_integer(words + 32), load_number(words + 40)
    is_bfloat16 = load_integer(batch + IS_BFLOAT16) != 0
    head_dim, num_heads = load_integer(batch + HEAD_DIM), load_integer(batch + NUM_HEADS)
    num_kv_heads = load_integer(batch + NUM_KV_HEADS)
    item_bytes = 2 if is_bfloat16 else 4
    group_size = num_heads // num_kv_heads
    scratch = scratch_on_the_stack()

    num_tasks = load_integer(batch + NUM_TASKS)
    task = take_ticket(words)
    while task < num_tasks:
        part, kv_head = task // num_kv_heads, task % num_kv_heads
        place = load_integer(batch + PARTS) + 24 * part
        sequence, start, row = load_integer(place), load_integer(place + 8), load_integer(place + 16)
        context_length = load_integer(load_integer(batch + CONTEXT_LENGTHS) + 8 * sequence)
        end = min(start + load_integer(batch + PART_TOKENS), context_length)
        first_head = row * num_heads + kv_head * group_size
        place = query + first_head * head_dim * item_bytes
        load_queries(scratch, place, group_size, head_dim, scale, is_bfloat16)
        pool_head = pool_layer + kv_head * load_integer(batch + HEAD_BYTES)
        for chunk in range(start, end, CHUNK_TOKENS):
            attend_chunk(
                scratch, batch, sequence, pool_head, chunk, min(chunk + CHUNK_TOKENS, end), end,
                group_size, head_dim, is_bfloat16,
            )  # fmt: skip
        if start == 0 and end == context_length:
            place = output + first_head * head_dim * item_bytes
            store_outputs(scratch, place, group_size, head_dim, is_bfloat16)
        else:
            partial_row = part * num_heads + kv_head * group_size
            store_partial_results(scratch, batch, partial_row, group_size, head_dim)
        task = take_ticket(words)


@register_jitable
def load_queries(scratch, query, group_size, head_dim, scale, is_bfloat16):  # type: ignore[no-untyped-def]
    """Start a task: its queries, times scale and log2(e), and empty sums."""
    factor, zero = splat(scale * (1.0 / math.log(2.0))), splat(0.0)
    item_bytes = 2 if is_bfloat16 else 4
    for index in range(0, group_size * head_dim, 32):
        first, second = load_pair(query + index * item_bytes, is_bfloat16)
        store_float32(scratch + _QUERIES + 4 * index, first * factor)
        store_float32(scratch + _QUERIES + 4 * index + 64, second * factor)
        store_float32(scratch + _SUMS + 4 * index, zero)
        store_float32(scratch + _SUMS + 4 * index + 64, zero)
    for head in range(group_size):
        store_number(scratch + _MAXIMA + 4 * head, -math.inf)
        store_number(scratch + _WEIGHTS + 4 * head, 0.0)


@register_jitable
def tile_place(batch, sequence, pool_head, token, row_bytes):  # type: ignore[no-untyped-def]
    """Where K of `token` lies."""
    block_size = load_integer(batch + BLOCK_SIZE)
    table = load_integer(batch + BLOCK_TABLES) + 8 * sequence * load_integer(batch + TABLE_WIDTH)
    block = load_integer(table + 8 * (token // block_size))
    return pool_head + block * load_integer(batch + BLOCK_BYTES) + token % block_size * row_bytes


@register_jitable
def tile_to_prefetch(  # type: ignore[no-untyped-def]
    batch, sequence, pool_head, start, end, part_end, index, row_bytes, value_offset
):
    """Where the tile lies that is read PREFETCH_TILES after the `index`-th of a chunk: first come those of K,
    then those of V, then those of K of the next chunk. 0 if there is none."""
    num_tiles = (end - start + TILE_TOKENS - 1) // TILE_TOKENS
    index += PREFETCH_TILES
    token, offset = start + TILE_TOKENS * index, 0
    if index >= 2 * num_tiles:
        token = end + TILE_TOKENS * (index - 2 * num_tiles)
        if token >= part_end:
            return 0
    elif index >= num_tiles:
        token, offset = token - TILE_TOKENS * num_tiles, value_offset
    return tile_place(batch, sequence, pool_head, token, row_bytes) + offset


@register_jitable
def attend_chunk(  # type: ignore[no-untyped-def]
    scratch, batch, sequence, pool_head, start, end, part_end, group_size, head_dim, is_bfloat16
):
    """Add tokens `start` to `end` to the sums."""
    row_bytes = head_dim * (2 if is_bfloat16 else 4)
    value_offset = load_integer(batch + BLOCK_SIZE) * row_bytes
    index = 0
    for token in range(start, end, TILE_TOKENS):
        tile = tile_place(batch, sequence, pool_head, token, row_bytes)
        upcoming = tile_to_prefetch(
            batch, sequence, pool_head, start, end, part_end, index, row_bytes, value_offset
        )
        num_tokens = min(TILE_TOKENS, end - token)
        multiply_keys(scratch, tile, upcoming, num_tokens, group_size, head_dim, is_bfloat16)
        for head in range(group_size):
            scores = sums_of_rows(scratch + _PRODUCTS + 1024 * head)
            scores = first_lanes(scores, num_tokens, -math.inf)
            store_float32(scratch + _SCORES + 4 * (head * CHUNK_TOKENS + token - start), scores)
        index += 1
    for head in range(group_size):
        soften(scratch, head, end - start, head_dim)
    for token in range(start, end, TILE_TOKENS):
        tile = tile_place(batch, sequence, pool_head, token, row_bytes) + value_offset
        upcoming = tile_to_prefetch(
            batch, sequence, pool_head, start, end, part_end, index, row_bytes, value_offset
        )
        num_tokens = min(TILE_TOKENS, end - token)
        add_values(scratch, tile, upcoming, token - start, num_tokens, group_size, head_dim, is_bfloat16)
        index += 1


@register_jitable
def multiply_keys(  # type: ignore[no-untyped-def]
    scratch, tile, upcoming, num_tokens, group_size, head_dim, is_bfloat16
):
    """The products of queries and keys of a tile, to be summed over their 16 lanes."""
    item_bytes = 2 if is_bfloat16 else 4
    row_bytes = head_dim * item_bytes
    for token in range(0, num_tokens, 4):  # of those past the end the sums do not count
        key = tile + token * row_bytes
        if upcoming != 0:
            for line in range(0, 4 * row_bytes, LINE_BYTES):
                prefetch_to_l2(upcoming + token * row_bytes + line)
        head = 0
        while head < group_size:
            # Two heads at once; an odd last one is computed twice.
            other = min(head + 1, group_size - 1)
            query = scratch + _QUERIES + 4 * head * head_dim
            other_query = scratch + _QUERIES + 4 * other * head_dim
            a0, a1, a2, a3 = splat(0.0), splat(0.0), splat(0.0), splat(0.0)
            b0, b1, b2, b3 = splat(0.0), splat(0.0), splat(0.0), splat(0.0)
            for index in range(0, head_dim, 32):
                place = key + index * item_bytes
                x0, y0 = load_pair(place, is_bfloat16)
                x1, y1 = load_pair(place + row_bytes, is_bfloat16)
                x2, y2 = load_pair(place + 2 * row_bytes, is_bfloat16)
                x3, y3 = load_pair(place + 3 * row_bytes, is_bfloat16)
                x, y = load_float32(query + 4 * index), load_float32(query + 4 * index + 64)
                a0 = a0 + x0 * x + y0 * y
                a1 = a1 + x1 * x + y1 * y
                a2 = a2 + x2 * x + y2 * y
                a3 = a3 + x3 * x + y3 * y
                x, y = load_float32(other_query + 4 * index), load_float32(other_query + 4 * index + 64)
                b0 = b0 + x0 * x + y0 * y
                b1 = b1 + x1 * x + y1 * y
                b2 = b2 + x2 * x + y2 * y
                b3 = b3 + x3 * x + y3 * y
            products = scratch + _PRODUCTS + 64 * token
            store_float32(products + 1024 * head, a0)
            store_float32(products + 1024 * head + 64, a1)
            store_float32(products + 1024 * head + 128, a2)
            store_float32(products + 1024 * head + 192, a3)
            store_float32(products + 1024 * other, b0)
            store_float32(products + 1024 * other + 64, b1)
            store_float32(products + 1024 * other + 128, b2)
            store_float32(products + 1024 * other + 192, b3)
            head += 2


@register_jitable
def soften(scratch, head, num_tokens, head_dim):  # type: ignore[no-untyped-def]
    """Scores of a chunk to weights; what has been summed so far is scaled to the new maximum."""
    scores = scratch + _SCORES + 4 * head * CHUNK_TOKENS
    largest = load_float32(scores)
    for index in range(16, num_tokens, 16):
        largest = larger(largest, load_float32(scores + 4 * index))
    old_maximum = load_number(scratch + _MAXIMA + 4 * head)
    maximum = max(old_maximum, largest_lane(largest))
    weights = splat(0.0)
    for index in range(0, num_tokens, 16):
        weight = exp2(load_float32(scores + 4 * index) - splat(maximum))
        store_float32(scores + 4 * index, weight)
        weights = weights + weight
    total = sum_of_lanes(weights)
    if maximum != old_maximum and old_maximum != -math.inf:
        factor = 2.0 ** (old_maximum - maximum)
        total += load_number(scratch + _WEIGHTS + 4 * head) * factor
        for index in range(0, head_dim, 16):
            place = scratch + _SUMS + 4 * (head * head_dim + index)
            store_float32(place, load_float32(place) * splat(factor))
    else:
        total += load_number(scratch + _WEIGHTS + 4 * head)
    store_number(scratch + _MAXIMA + 4 * head, maximum)
    store_number(scratch + _WEIGHTS + 4 * head, total)


@register_jitable
def add_values(  # type: ignore[no-untyped-def]
    scratch, tile, upcoming, chunk_token, num_tokens, group_size, head_dim, is_bfloat16
):
    """Add the values of a tile's tokens, each times its weight; none past the end, which may be NaN."""
    item_bytes = 2 if is_bfloat16 else 4
    row_bytes = head_dim * item_bytes
    # A part of the next tile for each part of the row that is worked on.
    part_bytes = num_tokens * row_bytes // (head_dim // 32)
    for index in range(0, head_dim, 32):
        if upcoming != 0:
            for line in range(0, part_bytes, LINE_BYTES):
                prefetch_to_l2(upcoming + index // 32 * part_bytes + line)
        head = 0
        while head < group_size:
            other = min(head + 1, group_size - 1)
            weight = scratch + _SCORES + 4 * (head * CHUNK_TOKENS + chunk_token)
            other_weight = scratch + _SCORES + 4 * (other * CHUNK_TOKENS + chunk_token)
            total = scratch + _SUMS + 4 * (head * head_dim + index)
            other_total = scratch + _SUMS + 4 * (other * head_dim + index)
            a0, a1 = load_float32(total), load_float32(total + 64)
            b0, b1 = load_float32(other_total), load_float32(other_total + 64)
            for token in range(num_tokens):
                x, y = load_pair(tile + token * row_bytes + index * item_bytes, is_bfloat16)
                a, b = splat(load_number(weight + 4 * token)), splat(load_number(other_weight + 4 * token))
                a0 = a0 + x * a
                a1 = a1 + y * a
                b0 = b0 + x * b
                b1 = b1 + y * b
            store_float32(total, a0)
            store_float32(total + 64, a1)
            store_float32(other_total, b0)
            store_float32(other_total + 64, b1)
            head += 2


@register_jitable
def store_outputs(scratch, output, group_size, head_dim, is_bfloat16):  # type: ignore[no-untyped-def]
    item_bytes = 2 if is_bfloat16 else 4
    for head in range(group_size):
        factor = splat(1.0 / load_number(scratch + _WEIGHTS + 4 * head))
        for index in range(head * head_dim, (head + 1) * head_dim, 32):
            first = load_float32(scratch + _SUMS + 4 * index) * factor
            second = load_float32(scratch + _SUMS + 4 * index + 64) * factor
            store_pair(output + index * item_bytes, first, second, is_bfloat16)


@register_jitable
def store_partial_results(scratch, batch, row, group_size, head_dim):  # type: ignore[no-untyped-def]
    """`row` is that of the group's first head: of the sums, and of the maxima and weights."""
    sums = load_integer(batch + PARTIAL_SUMS) + 4 * row * head_dim
    scales = load_integer(batch + PARTIAL_SCALES) + 8 * row
    for index in range(0, group_size * head_dim, 16):
        store_float32(sums + 4 * index, load_float32(scratch + _SUMS + 4 * index))
    for head in range(group_size):
        store_number(scales + 8 * head, load_number(scratch + _MAXIMA + 4 * head))
        store_number(scales + 8 * head + 4, load_number(scratch + _WEIGHTS + 4 * head))


def reduce_parts(words: int) -> None:
    """Put the parts of split contexts together. The words: unused, output, number of sequences, batch."""
    num_sequences, output = load_integer(words + 24), load_integer(words + 16)
    batch = load_integer(words + 32)
    is_bfloat16 = load_integer(batch + IS_BFLOAT16) != 0
    head_dim, num_heads = load_integer(batch + HEAD_DIM), load_integer(batch + NUM_HEADS)
    first_parts = load_integer(batch + FIRST_PARTS)  # [sequences + 1], of those in the parts
    item_bytes = 2 if is_bfloat16 else 4
    task = take_ticket(words)
    while task < num_sequences:
        first, end = load_integer(first_parts + 8 * task), load_integer(first_parts + 8 * task + 8)
        if end - first > 1:
            row = load_integer(load_integer(batch + PARTS) + 24 * first + 16)
            for head in range(num_heads):
                place = output + (row * num_heads + head) * head_dim * item_bytes
                reduce_head(batch, first, end, head, num_heads, head_dim, place, is_bfloat16)
        task = take_ticket(words)


@register_jitable
def reduce_head(  # type: ignore[no-untyped-def]
    batch, first, end, head, num_heads, head_dim, output, is_bfloat16
):
    sums, scales = load_integer(batch + PARTIAL_SUMS), load_integer(batch + PARTIAL_SCALES)
    item_bytes = 2 if is_bfloat16 else 4
    maximum = load_number(scales + 8 * (first * num_heads + head))
    for part in range(first + 1, end):
        maximum = max(maximum, load_number(scales + 8 * (part * num_heads + head)))
    total = 0.0
    for part in range(first, end):
        scale = scales + 8 * (part * num_heads + head)
        total += 2.0 ** (load_number(scale) - maximum) * load_number(scale + 4)
    for index in range(0, head_dim, 32):
        a, b = splat(0.0), splat(0.0)
        for part in range(first, end):
            row = part * num_heads + head
            factor = splat(2.0 ** (load_number(scales + 8 * row) - maximum) / total)
            a = a + load_float32(sums + 4 * (row * head_dim + index)) * factor
            b = b + load_float32(sums + 4 * (row * head_dim + index) + 64) * factor
        store_pair(output + index * item_bytes, a, b, is_bfloat16)
