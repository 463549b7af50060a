"""CPU kernels at both ends of a step of single tokens: what its layers start from, and the likeliest tokens.

A task is a token. The words behind the counter are named where a kernel reads them.
"""

from __future__ import annotations

import math

from numba.extending import register_jitable

from pdengine.triton_kernels.cpu_elementwise import load_floats
from pdengine.triton_kernels.cpu_launch import scratch_on_the_stack
from pdengine.triton_kernels.vector_code import (
    first_lanes,
    larger,
    largest_lane,
    load_integer,
    load_number,
    splat,
    store_float32,
    store_integer,
    store_number,
    take_ticket,
)

CHUNK = 512  # logits that are searched again for the place of the largest one


def start_tokens(words: int) -> None:
    """Copy the embedding of each token, as float32, and compute its cos and sin (see `rope_cos_sin`).

    `embeddings` is `[vocabulary, hidden]`, and `hidden` a multiple of 16. cos and sin are `[tokens, pairs]`.
    """
    token_ids, positions = load_integer(words + 8), load_integer(words + 16)
    embeddings, residual = load_integer(words + 24), load_integer(words + 32)
    hidden, num_tokens = load_integer(words + 40), load_integer(words + 48)
    cos, sin, frequencies = load_integer(words + 56), load_integer(words + 64), load_integer(words + 72)
    pairs, scale, is_bfloat16 = load_integer(words + 80), load_number(words + 88), load_integer(words + 96)
    token = take_ticket(words)
    while token < num_tokens:
        row = load_integer(token_ids + 8 * token) * hidden
        for index in range(0, hidden, 16):
            value = load_floats(embeddings, row + index, is_bfloat16 != 0)
            store_float32(residual + 4 * (token * hidden + index), value)
        position = load_integer(positions + 8 * token)
        for pair in range(pairs):
            store_angle(cos, sin, position, token * pairs + pair, load_number(frequencies + 4 * pair), scale)
        token = take_ticket(words)


@register_jitable
def store_angle(cos, sin, position, index, frequency, scale):  # type: ignore[no-untyped-def]
    store_number(cos + 4 * index, 0.0)
    angle = to_float32(position, frequency, cos + 4 * index)
    store_number(cos + 4 * index, math.cos(angle) * scale)
    store_number(sin + 4 * index, math.sin(angle) * scale)


@register_jitable
def to_float32(position, frequency, place):  # type: ignore[no-untyped-def]
    """Their product as a float32, which is what models are trained with; `place` is memory for it."""
    store_number(place, float(position))
    store_number(place, load_number(place) * frequency)
    return float(load_number(place))


def choose_largest(words: int) -> None:
    """The place of the largest logit of each row, of equals the first. logits: `[rows, vocabulary]`, with 16
    more elements that can be read behind them."""
    logits, chosen = load_integer(words + 8), load_integer(words + 16)
    num_rows, vocabulary = load_integer(words + 24), load_integer(words + 32)
    is_bfloat16 = load_integer(words + 40) != 0
    scratch = scratch_on_the_stack()
    row = take_ticket(words)
    while row < num_rows:
        start, best, best_chunk = row * vocabulary, -math.inf, 0
        for chunk in range(0, vocabulary, CHUNK):
            end = min(chunk + CHUNK, vocabulary)
            largest = splat(-math.inf)
            for index in range(chunk, end, 16):
                value = load_floats(logits, start + index, is_bfloat16)
                largest = larger(first_lanes(value, end - index, -math.inf), largest)
            top = largest_lane(largest)
            if top > best:
                best, best_chunk = top, chunk
        end = min(best_chunk + CHUNK, vocabulary)
        for index in range(best_chunk, end, 16):
            value = load_floats(logits, start + index, is_bfloat16)
            store_float32(scratch + 4 * (index - best_chunk), value)
        token = best_chunk
        while token + 1 < end and load_number(scratch + 4 * (token - best_chunk)) != best:
            token += 1
        store_integer(chosen + 8 * row, token)
        row = take_ticket(words)
