"""Which program of the attention kernels does which part of a step, computed on the host once per step.

Every program is listed: no grid is padded to the longest sequence, so a batch of very different lengths
wastes nothing. The lists go to the device in one asynchronous copy each.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pdengine.triton_kernels.attention_tiles import DecodeTile, PrefillTile

# Estimates, in the time that a full device takes for one tile per program (about 3 us on an H200):
PROGRAM_COST = 1.0  # a decode program's start, first loads and end
REDUCTION_COST = 2.0  # the launch of the second kernel, and the way of the partial results to it
# The share of the programs a device can run at once that already reads at the memory's full rate.
SATURATING_SHARE = 0.5


@dataclass(frozen=True)
class DecodePlan:
    """The parts of the contexts of the decoding sequences, flash-decoding style.

    A sequence with one part is finished by its program. The others leave partial results, which the second
    kernel reduces.
    """

    parts: Tensor  # [parts, 4] int32: sequence, first token, end token, row of its partial result or -1
    reductions: Tensor  # [split sequences, 3] int32: sequence, row of its first part, number of parts
    partial_outputs: Tensor  # [rows, num_heads, head_dim] float32
    partial_lse: Tensor  # [rows, num_heads] float32: log2 of the sum of 2 ** score
    tile: DecodeTile


@dataclass(frozen=True)
class PrefillPlan:
    """The tiles of the chunks. The rows of a chunk are its (token, head of the group), heads fastest."""

    tiles: Tensor  # [tiles, 5] int32: sequence, first query token, new tokens, context length, first row
    tile: PrefillTile


@dataclass(frozen=True)
class AttentionPlan:
    decode: DecodePlan | None  # None where a step has none
    prefill: PrefillPlan | None


def plan_decodes(
    context_lengths: list[int],
    *,
    window: int | None,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    tile: DecodeTile,
    num_resident: int,
    device: torch.device,
) -> DecodePlan:
    """Split the visible contexts of sequences 0, 1, ... into parts of the same number of tiles.

    `num_resident` is the number of programs that the device runs at once. The longest parts come first.
    """
    ends = np.asarray(context_lengths, dtype=np.int32)
    firsts = np.zeros_like(ends) if window is None else np.maximum(ends - np.int32(window), 0)
    first_tiles = firsts // tile.tokens
    num_tiles = -(-ends // tile.tokens) - first_tiles
    part_tiles = tiles_per_part(num_tiles, num_kv_heads, num_resident)

    num_parts = -(-num_tiles // part_tiles)
    sequences = np.repeat(np.arange(len(ends), dtype=np.int32), num_parts)
    index_in_sequence = np.arange(len(sequences)) - np.repeat(np.cumsum(num_parts) - num_parts, num_parts)
    part_starts = (first_tiles[sequences] + index_in_sequence * part_tiles) * tile.tokens
    is_split = num_parts > 1
    partial_rows = np.where(is_split[sequences], np.cumsum(is_split[sequences]) - 1, -1)
    parts = np.stack(
        (
            sequences,
            np.maximum(part_starts, firsts[sequences]),
            np.minimum(part_starts + part_tiles * tile.tokens, ends[sequences]),
            partial_rows,
        ),
        axis=1,
    ).astype(np.int32)
    (split,) = np.nonzero(is_split)
    first_rows = np.cumsum(num_parts[split]) - num_parts[split]
    reductions = np.stack((split, first_rows, num_parts[split]), axis=1).astype(np.int32)

    num_partials = int(num_parts[split].sum())
    longest_first = np.argsort(parts[:, 1] - parts[:, 2], kind="stable")
    return DecodePlan(
        parts=_to_device(parts[longest_first], device),
        reductions=_to_device(reductions, device),
        partial_outputs=torch.empty(num_partials, num_heads, head_dim, dtype=torch.float32, device=device),
        partial_lse=torch.empty(num_partials, num_heads, dtype=torch.float32, device=device),
        tile=tile,
    )


def tiles_per_part(num_tiles: NDArray[np.int32], num_kv_heads: int, num_resident: int) -> int:
    """The size of parts, in tiles, with which a step should end soonest on `num_resident` programs at once.

    `num_tiles` is that of each sequence. The largest parts start first: they run in waves, the last of which
    shares the device with the remainders, or has it for itself and runs faster, but may leave it idle. A
    sequence in one part needs no reduction.
    """
    largest = int(num_tiles.max())
    num_sizes = 1 + int(np.log(largest) / np.log(1.1))
    sizes = np.unique(np.ceil(largest / 1.1 ** np.arange(num_sizes + 1)).astype(np.int64))
    num_full = num_kv_heads * (num_tiles[:, None] // sizes).sum(axis=0)
    num_programs = num_kv_heads * (-(-num_tiles[:, None] // sizes)).sum(axis=0)
    full_waves = num_full // num_resident
    last_share = ((num_programs - full_waves * num_resident) / num_resident).clip(SATURATING_SHARE, 1)
    last_wave = np.where(num_full > full_waves * num_resident, last_share, 0)
    waves_end = (full_waves + last_wave) * (sizes + PROGRAM_COST)
    mean_load = (num_kv_heads * num_tiles.sum() + PROGRAM_COST * num_programs) / num_resident
    costs = np.maximum(waves_end, mean_load) + REDUCTION_COST * (sizes < largest)
    return int(sizes[len(sizes) - 1 - np.argmin(costs[::-1])])  # of equals the largest


def plan_prefills(
    query_starts: list[int],
    context_lengths: list[int],
    first_sequence: int,
    *,
    group_size: int,
    tile: PrefillTile,
    window: int | None,
    device: torch.device,
) -> PrefillPlan:
    """Tiles of `tile.rows` rows for the chunks of sequences `first_sequence` and later.

    Those that see the most keys come first, so that the last programs to run are short ones.
    """
    starts = np.asarray(query_starts[first_sequence:], dtype=np.int64)
    lengths = np.asarray(context_lengths[first_sequence:], dtype=np.int64)
    new_tokens = np.diff(starts)
    num_tiles = -(-new_tokens * group_size // tile.rows)
    chunks = np.repeat(np.arange(len(lengths)), num_tiles)
    index_in_chunk = np.arange(len(chunks)) - np.repeat(np.cumsum(num_tiles) - num_tiles, num_tiles)
    first_rows = index_in_chunk * tile.rows
    tiles = np.stack(
        (first_sequence + chunks, starts[chunks], new_tokens[chunks], lengths[chunks], first_rows), axis=1
    ).astype(np.int32)

    last_tokens = np.minimum((first_rows + tile.rows - 1) // group_size, new_tokens[chunks] - 1)
    visible = lengths[chunks] - new_tokens[chunks] + last_tokens + 1
    if window is not None:
        visible = np.minimum(visible, window + tile.rows // group_size)
    longest_first = np.argsort(-visible, kind="stable")
    return PrefillPlan(_to_device(tiles[longest_first], device), tile)


def _to_device(table: NDArray[np.int32], device: torch.device) -> Tensor:
    """Without waiting for the device: torch keeps the pinned memory until the copy is done."""
    tensor = torch.from_numpy(np.ascontiguousarray(table))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
