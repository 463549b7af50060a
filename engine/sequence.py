"""An answer inside the engine: its tokens, its blocks, and how far its KV cache has come."""

from collections.abc import Container
from dataclasses import dataclass, field
from enum import Enum

from pdengine.engine.leases import BorrowedLease
from pdengine.engine.logit_table import LogitTable, changes_logits
from pdengine.models.prefix_hashes import PrefixHashes, unpack_hashes
from pdengine.transport.messages import FinishReason, PushTarget, SamplingParams, Work


class Mode(Enum):
    """What the worker was asked to do with a request."""

    PREFILL = "prefill"  # compute the prompt, sample one token, hold the KV cache under a lease
    DECODE = "decode"  # pull the KV cache, then write the answer
    WHOLE = "whole"  # do both here


@dataclass(eq=False)
class Push:
    """The KV cache of one prompt on its way to blocks of another worker. Written by the engine and Pushes.

    num_writing: writes in flight. started_at, completed_at: of the first and the last one; time.monotonic().
    lease_id: set once the prompt is computed; it keeps the blocks until they are written. is_unwanted: the
    target only waits for its end.
    """

    request_id: str
    attempt: int
    target: PushTarget
    num_writing: int = 0
    num_bytes: int = 0
    num_puts: int = 0
    started_at: float = float("inf")
    completed_at: float = float("-inf")
    lease_id: int | None = None
    has_failed: bool = False
    is_unwanted: bool = False


@dataclass(eq=False)
class Sequence:
    """One answer to a prompt. Written by the scheduler and by `append`; compared by identity.

    siblings: other answers to the same prompt, which hold no blocks until its KV cache is there: then they
    are forked from this one. prefix: names of the blocks, if they may be shared with other requests.
    """

    request_id: str
    attempt: int
    mode: Mode
    sampling: SamplingParams
    num_prompt_tokens: int
    token_ids: list[int]  # prompt and answer so far
    choice: int = 0  # which of the answers it is
    priority: int = 0  # lower is more urgent
    siblings: "list[Sequence]" = field(default_factory=list)
    prefix: PrefixHashes | None = None
    lease: BorrowedLease | None = None  # mode DECODE: what to pull
    lease_id: int | None = None  # mode PREFILL: of the lease that will be granted, once somebody was told
    push: Push | None = None  # mode PREFILL: where the KV cache is written to, if nobody pulls it
    writer: str | None = None  # mode DECODE: the worker that pushes the KV cache here and has not ended yet
    may_wait: bool = True  # whether it may be queued, or is refused if it cannot start at once
    order: int = 0  # of arrival; the same for all answers to a prompt, and stays when one is preempted
    block_ids: list[int] = field(default_factory=list)
    num_computed: int = 0  # leading tokens whose keys and values are in the pool
    num_named: int = 0  # leading blocks that other requests can find
    num_cached_blocks: int = 0  # leading blocks that were found when it was admitted
    num_writable: int = 0  # as long as it has no more tokens, its blocks need not be looked at to write them
    was_preempted: bool = False  # at least once
    finish_reason: FinishReason | None = None
    num_scored: int = field(init=False)  # leading tokens of the prompt that need no log probabilities
    changes_logits: bool = field(init=False)  # those of its next token
    is_plain: bool = field(init=False)  # from now on only tokens are asked for, of the model's own logits
    logit_table: LogitTable | None = None  # made when it is needed first

    def __post_init__(self) -> None:
        sampling = self.sampling
        scores_prompt = sampling.prompt_logprobs is not None and self.mode is not Mode.DECODE
        self.num_scored = 1 if scores_prompt else self.num_prompt_tokens
        self.changes_logits = changes_logits(sampling, self.num_output_tokens)
        self.is_plain = not (self.changes_logits or scores_prompt or sampling.logprobs is not None)

    @property
    def answers(self) -> list["Sequence"]:
        """It and its siblings."""
        return [self, *self.siblings]

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_slots(self) -> int:
        """Places in a batch that it and its siblings take."""
        return 1 + len(self.siblings)

    @property
    def rank(self) -> tuple[int, int, int]:
        """The lower, the earlier it is served, and the later it is preempted."""
        return self.priority, self.order, self.choice

    @property
    def is_reserved(self) -> bool:
        """Whether it has got its blocks and another worker may write to them."""
        return self.writer is not None and bool(self.block_ids)

    @property
    def max_cached_tokens(self) -> int:
        """Tokens whose keys and values this worker will ever hold; the last token of an answer needs none."""
        if self.mode is Mode.PREFILL:
            return len(self.token_ids)
        return self.num_prompt_tokens + self.sampling.max_tokens - 1

    def append(self, token_id: int, eos_token_ids: frozenset[int]) -> None:
        """Take the next token of the answer and see whether it is the last one."""
        sampling = self.sampling
        self.token_ids.append(token_id)
        if not self.is_plain:  # its prompt is scored by now, and is not again if it is computed anew
            self.changes_logits = changes_logits(sampling, self.num_output_tokens)
            self.is_plain = not self.changes_logits and sampling.logprobs is None
        ends = token_id in sampling.stop_token_ids or (token_id in eos_token_ids and not sampling.ignore_eos)
        if ends and self.num_output_tokens > sampling.min_tokens:
            self.finish_reason = "stop"
        elif len(self.token_ids) - self.num_prompt_tokens >= sampling.max_tokens:
            self.finish_reason = "length"

    def give_up(self, choices: Container[int]) -> bool:
        """Drop these of its answers, its own or siblings'. Returns whether any is left.

        If its own is dropped alone, the first of the others takes its place, and with it the blocks: they
        hold the prompt, which is the same.
        """
        left = [answer for answer in self.answers if answer.choice not in choices]
        if not left:
            return False
        first, *self.siblings = left
        if first is not self:
            self.choice, self.token_ids = first.choice, first.token_ids
            self.prefix, self.logit_table = first.prefix, first.logit_table
        return True


def sequences_of(work: Work, mode: Mode, *, block_size: int, may_wait: bool = True) -> list[Sequence]:
    """The answers that `work` asks for: one sequence, with the others as its siblings.

    Only where a whole request is taken up in the middle, the answers differ already: then each is a sequence
    of its own, and computes the prompt for itself, but for what the prefix cache had before.
    """
    names = work.prefix
    blocks = [] if names is None else unpack_hashes(names.blocks)
    sequences = [
        Sequence(
            request_id=work.request_id,
            attempt=work.attempt,
            mode=mode,
            sampling=work.sampling,
            num_prompt_tokens=len(work.prompt_ids),
            token_ids=work.prompt_ids + choice.output_ids,
            choice=choice.index,
            priority=work.priority,
            prefix=None if names is None else PrefixHashes(names.root, block_size, blocks),
            may_wait=may_wait,
        )
        for choice in work.choices
    ]
    for sequence in sequences[1:]:
        sequence.num_scored = sequence.num_prompt_tokens  # the first one scores the prompt for all
    if mode is Mode.WHOLE and any(choice.output_ids for choice in work.choices):
        return sequences
    leader, *leader.siblings = sequences
    return [leader]


def blocks_for(num_tokens: int, block_size: int) -> int:
    """Blocks that hold `num_tokens` tokens."""
    return -(-num_tokens // block_size)
