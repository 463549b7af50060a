"""Tile sizes of the attention kernels, by dtype, head dimension and compute capability.

They neither spill registers nor exceed the shared memory, and leave room for several decode programs per
multiprocessor. They were chosen from what the compiler reports (`compile_report`); no GPU has timed them yet.
"""

from dataclasses import dataclass

import torch

from pdengine.triton_kernels.device_limits import DeviceLimits

# What a thread of a decode program takes at most, at any tile size; the tests ask the compiler.
DECODE_REGISTERS = 168


@dataclass(frozen=True)
class DecodeTile:
    """Tokens of K and V that a decode program takes at once. `num_stages` - 1 such tiles are in flight."""

    tokens: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class PrefillTile:
    """Query rows of a prefill program, and the tokens of K and V that it takes at once."""

    rows: int
    tokens: int
    num_warps: int
    num_stages: int


# By padded head dimension: K and V of a 16-bit tile are 32 KiB. Products of float32 run without tensor cores
# and hold both operands in registers.
MAX_HEAD_DIM = 256
DECODE_TILES = {64: DecodeTile(128, 4, 3), 128: DecodeTile(64, 4, 3), 256: DecodeTile(32, 4, 3)}
FLOAT32_DECODE_TILE = DecodeTile(16, 4, 3)

# By padded head dimension, for chunks of few and of many rows.
PREFILL_TILES = {
    64: (PrefillTile(16, 64, 4, 3), PrefillTile(64, 64, 4, 3), PrefillTile(128, 64, 8, 3)),
    128: (PrefillTile(16, 64, 4, 2), PrefillTile(64, 32, 4, 3), PrefillTile(128, 32, 8, 3)),
    256: (PrefillTile(16, 32, 4, 2), PrefillTile(64, 32, 8, 2)),
}
# Compute capabilities 9 and 10 have more shared memory, and matrix products that read it directly.
PREFILL_TILES_9_AND_10 = {
    64: PREFILL_TILES[64],
    128: (PrefillTile(16, 64, 4, 3), PrefillTile(64, 32, 4, 3), PrefillTile(128, 64, 8, 3)),
    256: (PrefillTile(16, 32, 4, 2), PrefillTile(64, 32, 8, 3)),
}
FLOAT32_PREFILL_TILES = {
    64: (PrefillTile(16, 16, 4, 2),),
    128: (PrefillTile(16, 16, 8, 2),),
    256: (PrefillTile(16, 16, 8, 2),),
}


def padded_head_dim(head_dim: int) -> int:
    """The next power of two, at least 16: what Triton's tensors and matrix products take."""
    return max(16, 1 << (head_dim - 1).bit_length())


def decode_tile(dtype: torch.dtype, head_dim: int) -> DecodeTile:
    return FLOAT32_DECODE_TILE if dtype == torch.float32 else DECODE_TILES[_table_key(head_dim)]


def prefill_tiles(dtype: torch.dtype, head_dim: int, capability: int) -> tuple[PrefillTile, ...]:
    """From few rows to many."""
    if dtype == torch.float32:
        return FLOAT32_PREFILL_TILES[_table_key(head_dim)]
    tiles = PREFILL_TILES_9_AND_10 if 90 <= capability < 120 else PREFILL_TILES
    return tiles[_table_key(head_dim)]


def prefill_tile(dtype: torch.dtype, head_dim: int, capability: int, num_rows: int) -> PrefillTile:
    """The smallest with room for `num_rows` rows, new tokens times heads of a group; or the largest."""
    tiles = prefill_tiles(dtype, head_dim, capability)
    return next((tile for tile in tiles if tile.rows >= num_rows), tiles[-1])


def resident_decode_programs(
    tile: DecodeTile, dtype: torch.dtype, head_dim: int, limits: DeviceLimits
) -> int:
    """How many decode programs the whole device runs at once."""
    shared_memory = decode_shared_memory(tile, dtype, head_dim)
    per_multiprocessor = limits.resident_programs(shared_memory, DECODE_REGISTERS, tile.num_warps)
    return limits.num_multiprocessors * per_multiprocessor


def decode_shared_memory(tile: DecodeTile, dtype: torch.dtype, head_dim: int) -> int:
    """Bytes of shared memory that a decode program takes, for groups of up to 16 query heads."""
    dims = padded_head_dim(head_dim)
    tiles_in_flight = (tile.num_stages - 1) * 2 * tile.tokens * dims
    queries_and_weights = 16 * (dims + tile.tokens)
    return (tiles_in_flight + queries_and_weights) * dtype.itemsize


def _table_key(head_dim: int) -> int:
    return max(64, padded_head_dim(head_dim))
