"""x W^T for few rows x, on packed weights: bound by how fast the weights are read, not by arithmetic.

The weights lie in panels of 64 outputs, `[panels, inputs, 64]` float32 or `[panels, inputs / 2, 64, 2]`
bfloat16, as oneDNN packs them for CPUs with vectors of 512 bits. Each thread takes a panel at a time, until
there are none.
"""

from __future__ import annotations

from numba.extending import register_jitable

from pdengine.triton_kernels.cpu_launch import SCRATCH_BYTES, scratch_on_the_stack
from pdengine.triton_kernels.linear_code import (
    CHUNK_ROWS,
    MAX_TILE_ROWS,
    PANEL_COLUMNS,
    ROW_BYTES,
    start_sums,
    store_sums_bfloat16,
    store_sums_float32,
    tile_bfloat16,
    tile_float32,
)
from pdengine.triton_kernels.vector_code import load_integer, take_ticket

MAX_ROWS = SCRATCH_BYTES // ROW_BYTES


@register_jitable
def linear_float32(words: int) -> None:
    """The C function of `_multiply_panels`."""
    _multiply_panels(words, tile_float32, store_sums_float32, 4)


@register_jitable
def linear_bfloat16(words: int) -> None:
    """The C function of `_multiply_panels`; only where `has_bf16_dot_product`."""
    _multiply_panels(words, tile_bfloat16, store_sums_bfloat16, 2)


@register_jitable
def _multiply_panels(words, tile, store_sums, item_bytes):  # type: ignore[no-untyped-def]
    """words: the counter of panels; the address of the inputs, bytes from one row of them to the next, rows,
    words of 32 bits in a row; the address of the panels, bytes of a panel; the address of a bias, float32 of
    all panels, or 0; the address of the outputs, `[rows, outputs]`, and how many."""
    inputs, input_stride = load_integer(words + 8), load_integer(words + 16)
    num_rows, num_words = load_integer(words + 24), load_integer(words + 32)
    panels, panel_bytes = load_integer(words + 40), load_integer(words + 48)
    bias = load_integer(words + 56)
    outputs, num_outputs = load_integer(words + 64), load_integer(words + 72)
    num_panels = -(-num_outputs // PANEL_COLUMNS)
    num_tiles = -(-num_rows // MAX_TILE_ROWS)
    chunk = num_words if num_tiles == 1 else CHUNK_ROWS
    sums = scratch_on_the_stack()
    while True:
        panel = take_ticket(words)
        if panel >= num_panels:
            return
        column = panel * PANEL_COLUMNS
        for row in range(num_rows):
            start_sums(bias + 4 * column if bias else 0, sums + row * ROW_BYTES)
        for first in range(0, num_words, chunk):
            for index in range(num_tiles):
                row = num_rows * index // num_tiles
                tile(
                    num_rows * (index + 1) // num_tiles - row,
                    inputs + row * input_stride + 4 * first,
                    input_stride,
                    panels + panel * panel_bytes + first * ROW_BYTES,
                    min(chunk, num_words - first),
                    sums + row * ROW_BYTES,
                )
        for row in range(num_rows):
            place = outputs + (row * num_outputs + column) * item_bytes
            store_sums(sums + row * ROW_BYTES, place, num_outputs - column)
