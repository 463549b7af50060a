"""Which blocks a benchmark pulls: consecutive ones, or runs scattered over two pools."""

from __future__ import annotations

import msgspec
import numpy as np
import numpy.typing as npt

from pdengine.transport.regions import Run

UNIT_BYTES = 32 * 1024  # pools are counted in units, so that one pool serves every size of block
PIECES_PER_BLOCK = 64  # of an engine that keeps one tensor per layer for K and for V, with 32 layers


class Scatter(msgspec.Struct, frozen=True):
    """`num_blocks` blocks of `block_bytes` each, out of pools of `pool_bytes`, in random places.

    longest_run: runs have 1 to so many consecutive blocks; 0 puts all blocks in one run. pieces: 1 if a block
    is contiguous; PIECES_PER_BLOCK if each layer keeps its keys and its values in regions of their own, where
    consecutive blocks are still neighbours in every region.
    """

    pool_bytes: int
    block_bytes: int
    num_blocks: int
    longest_run: int
    pieces: int = 1

    def runs(self, seed: int) -> list[Run]:
        """The runs to copy, counted in units of UNIT_BYTES, in other places for every seed."""
        random = np.random.default_rng(seed)
        blocks_in_pool = self.pool_bytes // self.block_bytes
        lengths = self._run_lengths(random)
        remote = _place(lengths, blocks_in_pool, random)
        local = _place(lengths, blocks_in_pool, random)
        units_per_piece = self.block_bytes // self.pieces // UNIT_BYTES
        region_units = blocks_in_pool * units_per_piece
        return [
            Run(
                region * region_units + remote_start * units_per_piece,
                region * region_units + local_start * units_per_piece,
                length * units_per_piece,
            )
            for region in range(self.pieces)
            for remote_start, local_start, length in zip(
                remote.tolist(), local.tolist(), lengths.tolist(), strict=True
            )
        ]

    def _run_lengths(self, random: np.random.Generator) -> npt.NDArray[np.int64]:
        if self.longest_run == 0:
            return np.array([self.num_blocks])
        lengths = random.integers(1, self.longest_run + 1, self.num_blocks)
        ends = np.cumsum(lengths)
        lengths = lengths[: np.searchsorted(ends, self.num_blocks) + 1]
        lengths[-1] -= lengths.sum() - self.num_blocks
        return lengths


def _place(
    lengths: npt.NDArray[np.int64], blocks_in_pool: int, random: np.random.Generator
) -> npt.NDArray[np.int64]:
    """Starts of disjoint runs of `lengths` blocks in random order, with random gaps between them."""
    num_runs = len(lengths)
    free = blocks_in_pool - lengths.sum()
    gaps = random.multinomial(free, [1 / (num_runs + 1)] * (num_runs + 1))
    order = random.permutation(num_runs)
    starts = np.empty(num_runs, np.int64)
    starts[order] = np.cumsum(lengths[order]) - lengths[order] + np.cumsum(gaps[:-1])
    return starts
