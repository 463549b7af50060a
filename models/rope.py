"""Angles of rotary position embeddings (RoFormer, arXiv 2104.09864), float32 whatever the model's dtype."""

import math

import torch
from torch import Tensor

from pdengine.models.config import RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """Radians per position of each pair of dimensions: `[rotary_dim / 2]` float32, on the CPU.

    rotary_dim is the even number of dimensions that are rotated: `head_dim`, or the part of it that
    `partial_rotary_factor` says.
    """
    rotary_dim = int(head_dim * rope.partial_rotary_factor)
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device="cpu") / rotary_dim
    periods = rope.theta**exponents  # positions per radian
    if rope.kind == "linear":
        return 1.0 / periods / rope.factor
    if rope.kind == "yarn":
        return _yarn_scaled(periods, rope)
    if rope.kind == "llama3":
        return _llama3_scaled(1.0 / periods, rope)
    if rope.kind == "longrope":
        return 1.0 / (torch.tensor(rope.short_factors, dtype=torch.float32, device="cpu") * periods)
    return 1.0 / periods


def _llama3_scaled(frequencies: Tensor, rope: RopeConfig) -> Tensor:
    """Stretch wavelengths that the original context barely covers, as in Meta's Llama 3.1 reference code.

    Wavelengths shorter than original / high_freq_factor stay, those longer than original / low_freq_factor
    are stretched by `factor`, and between the two the scaling is interpolated.
    """
    turns = rope.original_max_position_embeddings * frequencies / (2 * math.pi)  # over the original context
    kept = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    kept = kept.clamp(0.0, 1.0)
    return kept * frequencies + (1.0 - kept) * frequencies / rope.factor


def _yarn_scaled(periods: Tensor, rope: RopeConfig) -> Tensor:
    """YaRN's "NTK-by-parts" (arXiv 2309.00071, section 3.2), with the bounds of the ramp of transformers.

    Pairs that turn more than beta_fast times over the original context keep their frequency, those that turn
    less than beta_slow times are slowed by `factor`, and between the two the mixture follows a linear ramp.
    """
    rotary_dim = 2 * len(periods)

    log_of_original = math.log(rope.original_max_position_embeddings / (2 * math.pi))

    def pair_that_turns(times: float) -> float:
        return rotary_dim * (log_of_original - math.log(times)) / (2 * math.log(rope.theta))

    first, last = pair_that_turns(rope.beta_fast), pair_that_turns(rope.beta_slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rotary_dim - 1)
    if first == last:
        last += 0.001  # a step instead of a ramp
    pairs = torch.arange(len(periods), dtype=torch.float32, device="cpu")
    slowed = ((pairs - first) / (last - first)).clamp(0.0, 1.0)
    return slowed / (rope.factor * periods) + (1.0 - slowed) / periods


def rope_cos_sin(positions: Tensor, frequencies: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """cos and sin, times `scale`, for `positions` `[tokens]`: each `[tokens, 1, rotary_dim / 2]` float32."""
    angles = (positions.to(torch.float32).unsqueeze(1) * frequencies).unsqueeze(1)
    return angles.cos() * scale, angles.sin() * scale
