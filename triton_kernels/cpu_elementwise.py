"""CPU kernels of what surrounds the matrix products: norms, rotation and KV store, the gate of the MLP.

Each is one pass over its rows; a task is a few rows. The words behind the counter are named where a kernel
reads them. Tensors are contiguous, and their dtypes float32 or bfloat16.
"""

from __future__ import annotations

import math

from numba.extending import register_jitable

from pdengine.triton_kernels.vector_code import (
    divide,
    exp2,
    load_bfloat16,
    load_float32,
    load_integer,
    load_number,
    splat,
    store_bfloat16,
    store_float32,
    sum_of_lanes,
    take_ticket,
)

LOG2_E = 1.0 / math.log(2.0)
# Rows are bundled into tasks of about this many elements: a task then takes some microseconds.
TASK_ELEMENTS = 8192


@register_jitable
def load_floats(place, index, is_bfloat16):  # type: ignore[no-untyped-def]
    """Elements index to index + 15 of the array at `place`."""
    if is_bfloat16:
        return load_bfloat16(place + 2 * index)
    return load_float32(place + 4 * index)


@register_jitable
def store_floats(place, index, value, is_bfloat16):  # type: ignore[no-untyped-def]
    if is_bfloat16:
        store_bfloat16(place + 2 * index, value)
    else:
        store_float32(place + 4 * index, value)


@register_jitable
def take_rows(words, num_rows, row_elements):  # type: ignore[no-untyped-def]
    """First and end row of this thread's next task; nothing is left if the first is `num_rows`."""
    rows = max(1, TASK_ELEMENTS // row_elements)
    first = min(take_ticket(words) * rows, num_rows)
    return first, min(first + rows, num_rows)


@register_jitable
def inverse_rms(square_sum, count, eps):  # type: ignore[no-untyped-def]
    return 1.0 / math.sqrt(square_sum / count + eps)


def add_rms_norm(words: int) -> None:
    """See `Kernels.add_rms_norm`; `hidden` is a multiple of 16."""
    residual, update, weight, normed = (
        load_integer(words + 8), load_integer(words + 16), load_integer(words + 24), load_integer(words + 32)
    )  # fmt: skip
    num_rows, hidden = load_integer(words + 40), load_integer(words + 48)
    eps = load_number(words + 56)
    update_is_bfloat16, normed_is_bfloat16 = load_integer(words + 64) != 0, load_integer(words + 72) != 0
    first, end = take_rows(words, num_rows, hidden)
    while first < num_rows:
        for row in range(first, end):
            start = row * hidden
            squares, more_squares = splat(0.0), splat(0.0)
            for index in range(start, start + hidden, 16):
                value = load_float32(residual + 4 * index)
                if update != 0:
                    value = value + load_floats(update, index, update_is_bfloat16)
                    store_float32(residual + 4 * index, value)
                squares, more_squares = more_squares, squares + value * value
            factor = splat(inverse_rms(sum_of_lanes(squares + more_squares), hidden, eps))
            for index in range(0, hidden, 16):
                value = load_float32(residual + 4 * (start + index)) * factor
                value = value * load_float32(weight + 4 * index)
                store_floats(normed, start + index, value, normed_is_bfloat16)
        first, end = take_rows(words, num_rows, hidden)


def silu_multiply(words: int) -> None:
    """See `Kernels.silu_multiply`; the intermediate size is a multiple of 16."""
    gate_up, product = load_integer(words + 8), load_integer(words + 16)
    num_rows, size = load_integer(words + 24), load_integer(words + 32)
    is_bfloat16 = load_integer(words + 40) != 0
    one, minus_log2_e = splat(1.0), splat(-LOG2_E)
    first, end = take_rows(words, num_rows, size)
    while first < num_rows:
        for row in range(first, end):
            start = row * size
            for index in range(0, size, 16):
                gate = load_floats(gate_up, 2 * start + index, is_bfloat16)
                up = load_floats(gate_up, 2 * start + size + index, is_bfloat16)
                value = divide(gate, one + exp2(gate * minus_log2_e)) * up
                store_floats(product, start + index, value, is_bfloat16)
        first, end = take_rows(words, num_rows, size)


def rotate_and_store(words: int) -> None:
    """See `Kernels.rotate_and_store`; `head_dim` and the number of rotated pairs are multiples of 16.

    `sizes` are int64: heads, KV heads, head_dim, pairs (0 without rope), whether bfloat16, block size,
    elements of a block of the pool, and of one KV head in it. `pool_layer` is the address of the layer's K in
    the first block.
    """
    qkv, query = load_integer(words + 8), load_integer(words + 16)
    cos, sin = load_integer(words + 24), load_integer(words + 32)
    query_norm, key_norm, eps = load_integer(words + 40), load_integer(words + 48), load_number(words + 56)
    pool_layer, block_ids, block_offsets = (
        load_integer(words + 64), load_integer(words + 72), load_integer(words + 80)
    )  # fmt: skip
    num_tokens, sizes = load_integer(words + 88), load_integer(words + 96)
    heads, kv_heads, head_dim, pairs = (
        load_integer(sizes), load_integer(sizes + 8), load_integer(sizes + 16), load_integer(sizes + 24)
    )  # fmt: skip
    is_bfloat16, block_size = load_integer(sizes + 32) != 0, load_integer(sizes + 40)
    block_elements, head_elements = load_integer(sizes + 48), load_integer(sizes + 56)
    item_bytes = 2 if is_bfloat16 else 4
    token_elements = (heads + 2 * kv_heads) * head_dim

    first, end = take_rows(words, num_tokens, token_elements)
    while first < num_tokens:
        for token in range(first, end):
            source = qkv + token * token_elements * item_bytes
            token_cos, token_sin = cos + 4 * token * pairs, sin + 4 * token * pairs
            for head in range(heads):
                turn_head(
                    source + head * head_dim * item_bytes,
                    query + (token * heads + head) * head_dim * item_bytes,
                    query_norm, eps, token_cos, token_sin, head_dim, pairs, is_bfloat16,
                )  # fmt: skip
            slot = load_integer(block_ids + 8 * token) * block_elements
            slot += load_integer(block_offsets + 8 * token) * head_dim
            for head in range(kv_heads):
                key_place = pool_layer + (slot + head * head_elements) * item_bytes
                key = source + (heads + head) * head_dim * item_bytes
                turn_head(key, key_place, key_norm, eps, token_cos, token_sin, head_dim, pairs, is_bfloat16)
                value = key + kv_heads * head_dim * item_bytes
                value_place = key_place + block_size * head_dim * item_bytes
                for index in range(0, head_dim, 16):
                    store_floats(value_place, index, load_floats(value, index, is_bfloat16), is_bfloat16)
        first, end = take_rows(words, num_tokens, token_elements)


@register_jitable
def turn_head(source, target, norm, eps, cos, sin, head_dim, pairs, is_bfloat16):  # type: ignore[no-untyped-def]
    """Norm one head, unless `norm` is 0, and rotate its first 2 * pairs dimensions."""
    factor = splat(1.0)
    if norm != 0:
        squares = splat(0.0)
        for index in range(0, head_dim, 16):
            value = load_floats(source, index, is_bfloat16)
            squares = squares + value * value
        factor = splat(inverse_rms(sum_of_lanes(squares), head_dim, eps))
    for index in range(0, pairs, 16):
        first = load_normed(source, index, norm, factor, is_bfloat16)
        second = load_normed(source, index + pairs, norm, factor, is_bfloat16)
        cosine, sine = load_float32(cos + 4 * index), load_float32(sin + 4 * index)
        store_floats(target, index, first * cosine - second * sine, is_bfloat16)
        store_floats(target, index + pairs, second * cosine + first * sine, is_bfloat16)
    for index in range(2 * pairs, head_dim, 16):
        store_floats(target, index, load_normed(source, index, norm, factor, is_bfloat16), is_bfloat16)


@register_jitable
def load_normed(source, index, norm, factor, is_bfloat16):  # type: ignore[no-untyped-def]
    value = load_floats(source, index, is_bfloat16)
    if norm != 0:
        value = value * factor * load_float32(norm + 4 * index)
    return value
