"""What few requests ask of logits: changes before a token is drawn, and log probabilities after it.

Torch's operations, so they run wherever the logits are; none of them waits for a GPU.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

SLICE_LOGITS = 2**22  # this many logits are scored at a time, which bounds the memory that it takes
ID_BITS = 32


@dataclass(frozen=True)
class LogitAdjustment:
    """What is done to single logits, `[n]` each, no (row, token) twice: the bias is added, the result divided
    by the factor if it is positive and else multiplied, and the penalty taken off. (The order of vLLM.)
    """

    rows: Tensor  # int64
    token_ids: Tensor  # int64
    bias: Tensor  # float32; -inf excludes the token
    factor: Tensor  # float32, positive; of the repetition penalty (CTRL, arXiv 1909.05858)
    penalty: Tensor  # float32; of the frequency and presence penalties

    def apply(self, logits: Tensor) -> Tensor:
        """Change `logits` `[rows, vocabulary]` float32 in place. Returns what `restore` takes."""
        before = logits[self.rows, self.token_ids]
        biased = before + self.bias
        repeated = torch.where(biased > 0, biased / self.factor, biased * self.factor)
        logits[self.rows, self.token_ids] = repeated - self.penalty
        return before

    def restore(self, logits: Tensor, before: Tensor) -> None:
        """Undo `apply`, exactly."""
        logits[self.rows, self.token_ids] = before


class Scores(NamedTuple):
    """Of one token per row: its log probability and rank, and the likeliest tokens of the row.

    The rank is 1 plus the number of tokens that are likelier. Of equally likely tokens the lower id comes
    first among the likeliest.
    """

    logprobs: Tensor  # [rows] float32
    ranks: Tensor  # [rows] int64
    top_ids: Tensor  # [rows, num_top] int64
    top_logprobs: Tensor  # [rows, num_top] float32, falling


def score(logits: Tensor, token_ids: Tensor, num_top: int) -> Scores:
    """`logits` is `[rows, vocabulary]` float32, `token_ids` `[rows]` int64: one token of each row."""
    logprobs = logits.log_softmax(dim=-1)
    chosen = logprobs.gather(1, token_ids.unsqueeze(1))
    ranks = (logprobs > chosen).sum(dim=1) + 1
    top_ids = _likeliest(logprobs, min(num_top, logits.shape[1]))
    return Scores(chosen.squeeze(1), ranks, top_ids, logprobs.gather(1, top_ids))


def slice_rows(vocab_size: int) -> int:
    """Rows that are scored at a time."""
    return max(1, SLICE_LOGITS // vocab_size)


def join(scores: list[Scores]) -> Scores:
    """One below the other; at least one."""
    return scores[0] if len(scores) == 1 else Scores(*map(torch.cat, zip(*scores, strict=True)))


def _likeliest(logprobs: Tensor, count: int) -> Tensor:
    """[rows, count] int64. torch.topk promises no order of equals, so none are left: the bits of a float32,
    turned so that they sort like the numbers, stand above the id, which counts down."""
    if count == 0:
        return torch.empty((len(logprobs), 0), dtype=torch.int64, device=logprobs.device)
    bits = logprobs.view(torch.int32)
    keys = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(torch.int64) << ID_BITS
    keys += torch.arange(logprobs.shape[1] - 1, -1, -1, device=logprobs.device)
    countdown: Tensor = keys.topk(count, dim=1).values & (2**ID_BITS - 1)
    return logprobs.shape[1] - 1 - countdown
