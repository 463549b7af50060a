"""One engine step: which tokens of which sequences it computes, and which blocks are copied before."""

from dataclasses import dataclass, field
from typing import NamedTuple

from pdengine.engine.sequence import Sequence


class Chunk(NamedTuple):
    """The next `num_tokens` tokens of a sequence, from `sequence.num_computed` on."""

    sequence: Sequence
    num_tokens: int

    @property
    def samples(self) -> bool:
        """Whether the chunk reaches the end of the known tokens, so that the next one is sampled."""
        return self.sequence.num_computed + self.num_tokens == len(self.sequence.token_ids)

    @property
    def num_prompt_tokens(self) -> int:
        """Those of the tokens that belong to the prompt."""
        missing = self.sequence.num_prompt_tokens - self.sequence.num_computed
        return min(self.num_tokens, max(0, missing))


class BlockCopy(NamedTuple):
    """Copy a block before the step: somebody else may read the source, so the copy is written instead."""

    source: int
    destination: int


@dataclass
class Step:
    """chunks: decoding sequences first. copies: take place before, all at once. is_short: there were too few
    blocks, so that somebody was preempted or waits.
    """

    chunks: list[Chunk] = field(default_factory=list)
    copies: list[BlockCopy] = field(default_factory=list)
    is_short: bool = False
