"""A KV cache in which every slot says what it was computed from, and a model that notices a wrong one."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Sequence_

from pdengine.engine.step import Chunk, Step

GARBAGE = -1


def states(token_ids: Iterable[int]) -> list[int]:
    """What the slot of each token holds: keys and values depend on all tokens up to it."""
    state, result = 0, []
    for token_id in token_ids:
        state = hash((state, token_id))
        result.append(state)
    return result


class PagedMemory:
    """Slots of blocks, written only by `write`, `copy` and `run`."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.blocks = [[GARBAGE] * block_size for _ in range(num_blocks)]

    def read(self, block_ids: Sequence_[int], num_tokens: int) -> list[int]:
        slots = [slot for block_id in block_ids for slot in self.blocks[block_id]]
        assert len(slots) >= num_tokens, "fewer blocks than tokens"
        return slots[:num_tokens]

    def write(self, block_ids: Sequence_[int], token_ids: Sequence_[int], start: int, end: int) -> None:
        """The slots of tokens `start` to `end`."""
        computed = states(token_ids[:end])
        for position in range(start, end):
            block_id = block_ids[position // self.block_size]
            self.blocks[block_id][position % self.block_size] = computed[position]

    def spoil(self, block_ids: Iterable[int]) -> None:
        for block_id in block_ids:
            self.blocks[block_id] = [GARBAGE] * self.block_size

    def run(self, step: Step) -> list[int]:
        """Copy, then compute: each chunk's context is what its own tokens give, before all chunks have
        written and after. Returns a next token for each answer that gets one: a function of what is known."""
        destinations = [copy.destination for copy in step.copies]
        assert len(destinations) == len(set(destinations))
        copied = [list(self.blocks[copy.source]) for copy in step.copies]
        for destination, slots in zip(destinations, copied, strict=True):
            self.blocks[destination] = slots
        for sequence, _ in step.chunks:
            self._check(Chunk(sequence, 0))
        for sequence, num_tokens in step.chunks:
            end = sequence.num_computed + num_tokens
            self.write(sequence.block_ids, sequence.token_ids, sequence.num_computed, end)
        for chunk in step.chunks:
            self._check(chunk)
        return [
            next_token(answer.token_ids, answer.choice)
            for chunk in step.chunks
            if chunk.samples
            for answer in (chunk.sequence, *chunk.sequence.siblings)
        ]

    def _check(self, chunk: Chunk) -> None:
        sequence = chunk.sequence
        end = sequence.num_computed + chunk.num_tokens
        assert self.read(sequence.block_ids, end) == states(sequence.token_ids[:end])


def next_token(token_ids: Sequence_[int], choice: int) -> int:
    """0 to 7: one in eight ends the answer, if 0 does."""
    return hash((choice, *token_ids)) // 64 % 8
