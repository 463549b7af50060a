"""From logits to the next token of each sequence.

The noise is a counter-based function of (seed, position) (Philox: Salmon et al., "Parallel random numbers: as
easy as 1, 2, 3", SC 2011), so that a token depends neither on the worker nor on the batch that computes it.
Sampling takes the largest of logits / temperature + Gumbel noise, which draws from the softmax exactly.
"""

from collections.abc import Sequence as Sequence_

import numpy as np
import torch
from torch import Tensor

from pdengine.engine.sequence import Sequence
from pdengine.transport.messages import SamplingParams

TINY = float(np.finfo(np.float32).tiny)  # the smallest normal number


def sample(logits: Tensor, sequences: Sequence_[Sequence]) -> list[int]:
    """The next token of each sequence. logits: [sequences, vocabulary], float32."""
    token_ids: list[int] = logits.argmax(dim=-1).tolist()
    for row, sequence in enumerate(sequences):
        if sequence.sampling.temperature > 0:
            position = len(sequence.token_ids)
            token_ids[row] = sample_one(logits[row], sequence.sampling, position)
    return token_ids


def sample_one(logits: Tensor, sampling: SamplingParams, position: int) -> int:
    """One draw for the token at `position`. logits: [vocabulary], float32."""
    assert sampling.seed is not None, "the router draws a seed at admission"
    # The largest is 0 before the division, so that no temperature, however small, makes two of them infinite.
    scaled = (logits - logits.max()) / max(sampling.temperature, TINY)
    scaled = keep_likeliest(scaled, sampling.top_k, sampling.top_p)
    noise = gumbel_noise(sampling.seed, position, logits.shape[0]).to(logits.device)
    return int((scaled + noise).argmax())


def keep_likeliest(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Logits [vocabulary] with -inf for what top_k and then top_p exclude; the likeliest always stays."""
    vocabulary = logits.shape[0]
    if 0 < top_k < vocabulary:
        threshold = logits.topk(top_k).values[-1]
        logits = logits.masked_fill(logits < threshold, float("-inf"))
    if top_p < 1:
        ordered, order = logits.sort(descending=True, stable=True)
        probabilities = ordered.softmax(dim=-1)
        # A token stays while the mass before it is under top_p.
        excluded = probabilities.cumsum(dim=-1) - probabilities >= top_p
        excluded[0] = False
        logits = logits.clone()
        logits[order[excluded]] = float("-inf")
    return logits


def gumbel_noise(seed: int, position: int, size: int) -> Tensor:
    """[size] float32 Gumbel noise, a function of seed (64 bits) and position alone."""
    generator = np.random.Generator(np.random.Philox(key=seed % 2**64, counter=[0, 0, 0, position]))
    uniform = generator.random(size, dtype=np.float32)
    return torch.from_numpy(-np.log(-np.log(np.maximum(uniform, np.float32(TINY)))))
