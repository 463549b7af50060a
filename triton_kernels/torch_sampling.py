"""Sampling on a CPU: also the reference for the Triton kernel.

The noise is a counter-based function of (seed, position, token), so that a drawn token depends neither on the
worker nor on the batch that draws it. Its bits are Philox4x32-10 (Salmon et al., "Parallel random numbers: as
easy as 1, 2, 3", SC 2011) with the seed as key and (token // 4, position, 0) as counter, the position taking
two words; a counter gives the bits of four tokens.
"""

from functools import cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from numba import njit
from torch import Tensor

from pdengine.triton_kernels.kernels import SamplingBatch

TINY = float(np.finfo(np.float32).tiny)  # the smallest normal number
# Rows are drawn together until they have this many logits, so that a group stays in a core's cache.
GROUP_LOGITS = 2**18

WORD_BITS, WORD_MASK, SIGN = np.uint64(32), np.uint64(2**32 - 1), np.uint32(2**31)
PHILOX_MULTIPLIER_0, PHILOX_MULTIPLIER_2 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
PHILOX_WEYL_0, PHILOX_WEYL_1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)

_Words32 = npt.NDArray[np.uint32]
_Words64 = npt.NDArray[np.uint64]


def sample(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """See `Kernels.sample`."""
    is_greedy = batch.temperatures == 0
    if bool(is_greedy.all()):
        return _argmax(logits)
    token_ids = torch.empty(len(logits), dtype=torch.int64)
    token_ids[is_greedy] = _argmax(logits[is_greedy])
    drawn = is_greedy.logical_not().nonzero().flatten()
    for rows in torch.split(drawn, max(1, GROUP_LOGITS // logits.shape[1])):
        token_ids[rows] = _draw(logits[rows], batch, rows)
    return token_ids


def _argmax(logits: Tensor) -> Tensor:
    # numpy's is twenty times as fast as torch's on a CPU.
    return torch.from_numpy(logits.numpy().argmax(axis=-1))


def _draw(logits: Tensor, batch: SamplingBatch, rows: Tensor) -> Tensor:
    """The tokens of some rows of a batch, none of them greedy; `logits` are theirs."""
    # The largest becomes 0 first, so that no temperature, however small, makes two of them infinite.
    factors = batch.temperatures[rows].clamp(min=TINY).reciprocal()
    scaled = (logits - logits.amax(dim=-1, keepdim=True)).mul_(factors.unsqueeze(1))
    filters = (batch.min_p[rows].tolist(), batch.top_k[rows].tolist(), batch.top_p[rows].tolist())
    for row, (min_p, top_k, top_p) in enumerate(zip(*filters, strict=True)):
        if min_p > 0 or top_k > 0 or top_p < 1:
            excluded = excluded_tokens(logits[row], scaled[row], min_p, top_k, top_p)
            scaled[row].masked_fill_(excluded, -torch.inf)
    scaled += gumbel_noise(batch.seeds[rows], batch.positions[rows], logits.shape[1])
    return _argmax(scaled)


def excluded_tokens(logits: Tensor, scaled: Tensor, min_p: float, top_k: int, top_p: float) -> Tensor:
    """Which tokens of one row the filters of SamplingBatch exclude: `[vocabulary]` bool.

    `logits` is `[vocabulary]` float32, and so is `scaled`: (logits - the largest of them) / temperature.
    """
    excluded = scaled < torch.tensor(min_p).log()
    if 0 < top_k < len(logits):
        excluded |= logits < _highest_reaching(logits, torch.ones_like(logits), float(top_k))
    if top_p < 1:
        weights = scaled.exp().masked_fill_(excluded, 0.0)
        total = float(weights.sum(dtype=torch.float64))
        excluded |= logits < _highest_reaching(logits, weights, max(top_p * total, TINY))
    return excluded


def gumbel_noise(seeds: Tensor, positions: Tensor, vocabulary: int) -> Tensor:
    """[rows, vocabulary] float32 Gumbel noise; `seeds` and `positions` are `[rows]` int64."""
    bits = np.empty((len(seeds), -(-vocabulary // 4) * 4), np.uint32)
    _native().fill_bits(seeds.numpy().view(np.uint64), positions.numpy().view(np.uint64), bits)
    return gumbel(torch.from_numpy(bits[:, :vocabulary]).to(torch.float32))


def gumbel(bits: Tensor) -> Tensor:
    """Gumbel noise from 32 random bits each, as float32, which are overwritten.

    -log(-log(1 - v)) of v = (bits + 1/2) / 2^32 in (0, 1): near 0, where the large values of the noise come
    from, v keeps all 32 bits, so that unlikely tokens are drawn as often as they should be.
    """
    v = bits.add_(0.5).mul_(2.0**-32).clamp_(max=1.0 - 2.0**-24)  # bits close to 2^32 have been rounded up
    return v.neg_().log1p_().neg_().log_().neg_()


def _highest_reaching(logits: Tensor, weights: Tensor, target: float) -> float:
    """The largest logit t such that the tokens with logits of at least t together weigh `target` or more.

    Both are `[vocabulary]` float32. Exact, and without a sort.
    """
    key = np.uint32(_native().highest_key(logits.numpy().view(np.uint32), weights.numpy(), target))
    return float((key ^ SIGN if key & SIGN else ~key).view(np.float32))


class _NativeFunctions(NamedTuple):
    fill_bits: Any
    highest_key: Any


@cache
def _native() -> _NativeFunctions:
    """Compile, or load from numba's cache; without a writable cache folder, compile anew."""
    try:
        return _compile(cache=True)
    except (RuntimeError, OSError):  # numba's "no locator available", or a folder that cannot be written
        return _compile(cache=False)


def _compile(cache: bool) -> _NativeFunctions:
    return _NativeFunctions(
        fill_bits=njit("void(uint64[::1], uint64[::1], uint32[:, ::1])", cache=cache)(_fill_bits),
        highest_key=njit("uint32(uint32[::1], float32[::1], float64)", cache=cache)(_highest_key),
    )


def _fill_bits(seeds: _Words64, positions: _Words64, bits: _Words32) -> None:
    """Fill `bits` `[rows, a multiple of 4]`. Philox stands in the loop, because calls would keep the compiler
    from working on several counters at once."""
    for row in range(len(seeds)):
        for group in range(bits.shape[1] // 4):
            key0, key1 = np.uint32(seeds[row] & WORD_MASK), np.uint32(seeds[row] >> WORD_BITS)
            word0, word1 = np.uint32(group), np.uint32(positions[row] & WORD_MASK)
            word2, word3 = np.uint32(positions[row] >> WORD_BITS), np.uint32(0)
            for _ in range(10):
                product0 = PHILOX_MULTIPLIER_0 * np.uint64(word0)
                product2 = PHILOX_MULTIPLIER_2 * np.uint64(word2)
                word0 = np.uint32(np.uint32(product2 >> WORD_BITS) ^ word1 ^ key0)
                word2 = np.uint32(np.uint32(product0 >> WORD_BITS) ^ word3 ^ key1)
                word1, word3 = np.uint32(product2 & WORD_MASK), np.uint32(product0 & WORD_MASK)
                key0 = np.uint32((key0 + PHILOX_WEYL_0) & WORD_MASK)
                key1 = np.uint32((key1 + PHILOX_WEYL_1) & WORD_MASK)
            bits[row, 4 * group], bits[row, 4 * group + 1] = word0, word1
            bits[row, 4 * group + 2], bits[row, 4 * group + 3] = word2, word3


def _highest_key(float_bits: _Words32, weights: npt.NDArray[np.float32], target: float) -> int:
    """What `_highest_reaching` finds, as a key: bits of a float32, turned so that they sort like the numbers.

    The digits of the key from the highest to the lowest; for each, the weights of the tokens that share the
    digits before it are summed by digit.
    """
    found, missing = 0, target
    for shift, num_bits in ((21, 11), (10, 11), (0, 10)):
        sums = np.zeros(2**num_bits)
        for token in range(len(float_bits)):
            bits = np.int64(float_bits[token])
            key = bits ^ 0xFFFFFFFF if bits & 0x80000000 else bits ^ 0x80000000
            if key >> (shift + num_bits) == found:
                sums[(key >> shift) & (2**num_bits - 1)] += weights[token]
        digit = 2**num_bits - 1
        while digit > 0 and sums[digit] < missing:
            missing -= sums[digit]
            digit -= 1
        found = found << num_bits | digit
    return found
