"""Rotary position embeddings (RoFormer, arXiv 2104.09864), in float32 whatever the model's dtype."""

import math

import torch
from torch import Tensor

from pdengine.models.config import RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """Radians per position of each pair of dimensions: `[head_dim / 2]` float32, on the CPU."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
    frequencies = 1.0 / rope.theta**exponents
    if rope.kind == "llama3":
        frequencies = _llama3_scaled(frequencies, rope)
    return frequencies


def _llama3_scaled(frequencies: Tensor, rope: RopeConfig) -> Tensor:
    """Stretch wavelengths that the original context barely covers, as in Meta's Llama 3.1 reference code.

    Wavelengths shorter than original / high_freq_factor stay, those longer than original / low_freq_factor
    are stretched by `factor`, and between the two the scaling is interpolated.
    """
    turns = rope.original_max_position_embeddings * frequencies / (2 * math.pi)  # over the original context
    kept = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    kept = kept.clamp(0.0, 1.0)
    return kept * frequencies + (1.0 - kept) * frequencies / rope.factor


def rope_cos_sin(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin for `positions` `[tokens]`: each `[tokens, 1, head_dim / 2]` float32."""
    angles = (positions.to(torch.float32).unsqueeze(1) * frequencies).unsqueeze(1)
    return angles.cos(), angles.sin()


def apply_rope(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate `heads` `[tokens, heads, head_dim]` and return float32.

    Dimension i is paired with i + head_dim / 2 ("rotate half"), the convention of Hugging Face checkpoints.
    """
    first, second = heads.to(torch.float32).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
