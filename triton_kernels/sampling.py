"""Triton: from logits to tokens on the GPU, without a sort and without a round trip to the host.

One program takes one row, which stays in the L2 cache over its passes. A filter's threshold is found by
bisection over the float32 numbers, ordered as integers: each pass sums the weight of the tokens at or above a
middle, and moves one end of the interval to the nearest logit that is there; so it is exact, and ends after
about as many passes as the logits around the threshold have distinct bits (32 at most). FlashInfer's
sampling without sorts is alike (https://flashinfer.ai/2025/03/10/sampling.html). The noise is the one that
`torch_sampling` defines.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from pdengine.triton_kernels.ahead_of_time import CompileCase
from pdengine.triton_kernels.kernels import SamplingBatch

MAX_TILE = 4096  # logits in flight in a program
NUM_WARPS = 16

STAGES = tl.constexpr(4)  # tiles that are on their way from L2

SMALLEST_NORMAL = tl.constexpr(2.0**-126)
LARGEST_BELOW_1 = tl.constexpr(1.0 - 2.0**-24)


def sample(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """See `Kernels.sample`; `logits` is contiguous. To read the result is to wait for the GPU."""
    assert logits.is_contiguous()
    rows, vocabulary = logits.shape
    token_ids = torch.empty(rows, dtype=torch.int64, device=logits.device)
    _sample_kernel[(rows,)](
        logits,
        batch.temperatures,
        batch.min_p,
        batch.top_k,
        batch.top_p,
        batch.seeds,
        batch.positions,
        token_ids,
        vocabulary,
        TILE=min(MAX_TILE, max(16, triton.next_power_of_2(vocabulary))),
        num_warps=NUM_WARPS,
    )
    return token_ids


@triton.jit
def _sample_kernel(
    logits_ptr: tl.tensor,  # [rows, vocabulary] float32
    temperatures_ptr: tl.tensor,  # this and what follows: [rows], see SamplingBatch
    min_p_ptr: tl.tensor,
    top_k_ptr: tl.tensor,
    top_p_ptr: tl.tensor,
    seeds_ptr: tl.tensor,
    positions_ptr: tl.tensor,
    token_ids_ptr: tl.tensor,
    vocabulary: tl.tensor,
    TILE: tl.constexpr,
) -> None:
    row = tl.program_id(0)
    logits_ptr += row.to(tl.int64) * vocabulary
    temperature = tl.load(temperatures_ptr + row)
    smallest, largest, token_id = _range_and_argmax(logits_ptr, vocabulary, TILE)
    if temperature > 0:
        factor = tl.div_rn(1.0, tl.maximum(temperature, SMALLEST_NORMAL))
        floor = tl.log(tl.load(min_p_ptr + row))  # of logits after temperature, whose largest is 0
        top_k = tl.load(top_k_ptr + row)
        top_p = tl.load(top_p_ptr + row)
        threshold = smallest  # of logits as they came
        if (top_k > 0) & (top_k < vocabulary):
            threshold = _highest_reaching(
                logits_ptr, vocabulary, smallest, largest, factor, floor, top_k.to(tl.float32), False, TILE
            )
        if top_p < 1:
            total = _mass(logits_ptr, vocabulary, threshold, largest, factor, floor, TILE)
            threshold = _highest_reaching(
                logits_ptr, vocabulary, threshold, largest, factor, floor, top_p * total, True, TILE
            )
        token_id = _draw(
            logits_ptr,
            vocabulary,
            threshold,
            largest,
            factor,
            floor,
            tl.load(seeds_ptr + row),
            tl.load(positions_ptr + row),
            TILE,
        )
    tl.store(token_ids_ptr + row, token_id)


@triton.jit
def _range_and_argmax(
    logits_ptr: tl.tensor, vocabulary: tl.tensor, TILE: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The smallest logit, the largest, and the first token that has it."""
    lowest = tl.full([TILE], float("inf"), tl.float32)
    best = tl.full([TILE], -float("inf"), tl.float32)
    best_token = tl.zeros([TILE], tl.int64)
    for start in tl.range(0, vocabulary, TILE, num_stages=STAGES):
        token = start + tl.arange(0, TILE)
        x = tl.load(logits_ptr + token, mask=token < vocabulary, other=-float("inf"))
        lowest = tl.minimum(lowest, tl.where(token < vocabulary, x, float("inf")))
        best_token = tl.where(x > best, token, best_token)
        best = tl.maximum(best, x)
    largest = tl.max(best, axis=0)
    return tl.min(lowest, axis=0), largest, _first_best(best, best_token, vocabulary)


@triton.jit
def _first_best(best: tl.tensor, best_token: tl.tensor, vocabulary: tl.tensor) -> tl.tensor:
    """The token of the largest number, of equals the first; with nothing but NaN still a token."""
    first = tl.min(tl.where(best == tl.max(best, axis=0), best_token, vocabulary), axis=0)
    return tl.minimum(first, vocabulary - 1)


@triton.jit
def _mass(
    logits_ptr: tl.tensor,
    vocabulary: tl.tensor,
    threshold: tl.tensor,
    largest: tl.tensor,
    factor: tl.tensor,
    floor: tl.tensor,
    TILE: tl.constexpr,
) -> tl.tensor:
    """The sum of exp(scaled) over the tokens left so far."""
    sums = tl.zeros([TILE], tl.float32)
    for start in tl.range(0, vocabulary, TILE, num_stages=STAGES):
        token = start + tl.arange(0, TILE)
        x = tl.load(logits_ptr + token, mask=token < vocabulary, other=-float("inf"))
        scaled = (x - largest) * factor
        sums += tl.where((x >= threshold) & (scaled >= floor), tl.exp(scaled), 0.0)
    return tl.sum(sums, axis=0)


@triton.jit
def _highest_reaching(
    logits_ptr: tl.tensor,
    vocabulary: tl.tensor,
    low: tl.tensor,
    largest: tl.tensor,
    factor: tl.tensor,
    floor: tl.tensor,
    target: tl.tensor,
    BY_MASS: tl.constexpr,
    TILE: tl.constexpr,
) -> tl.tensor:
    """The highest logit t such that the tokens with logits of at least t together weigh `target` or more.

    A token weighs exp(scaled), 0 below the floor; or 1, if not BY_MASS. `low` is a logit of the row, and the
    tokens from it on together weigh enough.
    """
    low_key, high_key = _key(low), _key(largest)
    while low_key < high_key:
        difference = high_key - low_key
        middle_key = high_key - (difference >> 1)  # above low_key
        middle = _number(middle_key)
        sums = tl.zeros([TILE], tl.float32)
        above = tl.full([TILE], float("inf"), tl.float32)
        below = tl.full([TILE], -float("inf"), tl.float32)
        for start in tl.range(0, vocabulary, TILE, num_stages=STAGES):
            token = start + tl.arange(0, TILE)
            x = tl.load(logits_ptr + token, mask=token < vocabulary, other=-float("inf"))
            is_above = x >= middle
            if BY_MASS:
                scaled = (x - largest) * factor
                sums += tl.where(is_above & (scaled >= floor), tl.exp(scaled), 0.0)
            else:
                sums += tl.where(is_above, 1.0, 0.0)
            above = tl.minimum(above, tl.where(is_above, x, float("inf")))
            below = tl.maximum(below, tl.where(is_above, -float("inf"), x))
        if tl.sum(sums, axis=0) >= target:
            # Not below the middle: of 0.0 and -0.0, which are equal, `above` may be the wrong one.
            low_key = tl.maximum(middle_key, _key(tl.min(above, axis=0)))
        else:
            high_key = _key(tl.max(below, axis=0))
    return _number(low_key)


@triton.jit
def _key(x: tl.tensor) -> tl.tensor:
    """A float32 as a uint32, in the same order."""
    bits = x.to(tl.uint32, bitcast=True)
    return bits ^ tl.where(bits >> 31 == 1, 0xFFFFFFFF, 0x80000000).to(tl.uint32)


@triton.jit
def _number(key: tl.tensor) -> tl.tensor:
    """The float32 of a key."""
    bits = key ^ tl.where(key >> 31 == 1, 0x80000000, 0xFFFFFFFF).to(tl.uint32)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _draw(
    logits_ptr: tl.tensor,
    vocabulary: tl.tensor,
    threshold: tl.tensor,
    largest: tl.tensor,
    factor: tl.tensor,
    floor: tl.tensor,
    seed: tl.tensor,
    position: tl.tensor,
    TILE: tl.constexpr,
) -> tl.tensor:
    """The token with the largest scaled logit plus noise among those left."""
    best = tl.full([TILE], -float("inf"), tl.float32)
    best_token = tl.zeros([TILE], tl.int64)
    for start in tl.range(0, vocabulary, TILE, num_stages=STAGES):
        token = start + tl.arange(0, TILE)
        x = tl.load(logits_ptr + token, mask=token < vocabulary, other=-float("inf"))
        scaled = (x - largest) * factor
        left = (x >= threshold) & (scaled >= floor) & (token < vocabulary)
        if tl.max(left.to(tl.int32), axis=0) > 0:  # after top_p most tiles are empty
            perturbed = tl.where(left, scaled + _gumbel_noise(seed, position, start, TILE), -float("inf"))
            best_token = tl.where(perturbed > best, token, best_token)
            best = tl.maximum(best, perturbed)
    return _first_best(best, best_token, vocabulary)


@triton.jit
def _gumbel_noise(seed: tl.tensor, position: tl.tensor, start: tl.tensor, TILE: tl.constexpr) -> tl.tensor:
    """The noise of tokens start .. start + TILE - 1; `start` is a multiple of 4."""
    group = start // 4 + tl.arange(0, TILE // 4)
    zero = group * 0
    low, high = zero + (position & 0xFFFFFFFF).to(tl.int32), zero + (position >> 32).to(tl.int32)
    word0, word1, word2, word3 = tl.philox(seed, group, low, high, zero)
    bits = tl.join(tl.join(word0, word2), tl.join(word1, word3)).reshape([TILE])  # 0, 1, 2, 3 of each group
    return _gumbel(bits)


@triton.jit
def _gumbel(bits: tl.tensor) -> tl.tensor:
    """See `torch_sampling.gumbel`."""
    v = tl.minimum((bits.to(tl.float32) + 0.5) * 2.0**-32, LARGEST_BELOW_1)
    # log(1 - v) without the error of rounding 1 - v: D. Goldberg, "What every computer scientist should know
    # about floating-point arithmetic", 1991, theorem 4.
    rounded = 1.0 - v
    log1p = tl.where(rounded == 1.0, -v, tl.log(rounded) * (v / (1.0 - rounded)))
    return -tl.log(-log1p)


def ahead_of_time(capability: int) -> Iterator[CompileCase]:
    yield CompileCase(
        _sample_kernel,
        f"tile={MAX_TILE}",
        {
            "logits_ptr": "*fp32",
            "temperatures_ptr": "*fp32",
            "min_p_ptr": "*fp32",
            "top_k_ptr": "*i64",
            "top_p_ptr": "*fp32",
            "seeds_ptr": "*i64",
            "positions_ptr": "*i64",
            "token_ids_ptr": "*i64",
            "vocabulary": "i32",
        },
        {"TILE": MAX_TILE},
        num_warps=NUM_WARPS,
        divisible_by_16=("vocabulary",),
    )
