"""What some requests of a step ask for beside their tokens: changed logits, and log probabilities."""

from collections.abc import Sequence as Sequence_
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from torch import Tensor

from pdengine.engine.logit_table import LogitChanges, LogitTable
from pdengine.engine.sequence import Sequence
from pdengine.engine.step import Chunk
from pdengine.engine.step_upload import Array
from pdengine.transport.messages import TokenLogprobs
from pdengine.triton_kernels.logits import LogitAdjustment, Scores


@dataclass(frozen=True)
class StepResult:
    """token_ids: the next token of each chunk that samples, in order, and behind it those of the siblings of
    its sequence. logprobs: of each of them whose request asked; None if none did. prompt_logprobs: by index
    of the chunk, those of the next tokens of its prompt, from `num_scored` on.
    """

    token_ids: list[int]
    logprobs: list[TokenLogprobs | None] | None = None
    prompt_logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)


@dataclass(frozen=True)
class ScoredAnswers:
    """The rows of the sampled logits whose token is scored, and of how many of the likeliest tokens."""

    rows: Tensor  # [n] int64
    rows_on_host: list[int]
    num_top: list[int]

    def read(self, scores: Scores, num_rows: int) -> list[TokenLogprobs | None]:
        """Waits for the device."""
        logprobs: list[TokenLogprobs | None] = [None] * num_rows
        for row, scored in zip(self.rows_on_host, _read(scores, self.num_top), strict=True):
            logprobs[row] = scored
        return logprobs


@dataclass(frozen=True)
class ScoredPrompts:
    """Tokens of prompts that are scored, by the hidden state of the token before each."""

    hidden_rows: Tensor  # [n] int64
    token_ids: Tensor  # [n] int64
    chunks: list[int]  # [n], the index of each token's chunk
    num_top: list[int]  # [n]

    def read(self, scores: Scores) -> dict[int, list[TokenLogprobs]]:
        """Waits for the device."""
        logprobs: dict[int, list[TokenLogprobs]] = {}
        for chunk, scored in zip(self.chunks, _read(scores, self.num_top), strict=True):
            logprobs.setdefault(chunk, []).append(scored)
        return logprobs


@dataclass(frozen=True)
class StepExtras:
    adjustment: LogitAdjustment | None = None
    answers: ScoredAnswers | None = None
    prompts: ScoredPrompts | None = None


NO_EXTRAS = StepExtras()


def _read(scores: Scores, num_top: list[int]) -> list[TokenLogprobs]:
    columns = (scores.logprobs, scores.ranks, scores.top_ids, scores.top_logprobs)
    rows = zip(num_top, *(column.tolist() for column in columns), strict=True)
    return [
        TokenLogprobs(logprob, rank, list(zip(top_ids[:count], top_logprobs[:count], strict=True)))
        for count, logprob, rank, top_ids, top_logprobs in rows
    ]


class ExtrasPlan:
    """The extras of a step on the host. `arrays` are uploaded, and `on_device` takes their tensors.

    query_starts: `[chunks + 1]`, where the tokens of each chunk begin.
    """

    def __init__(
        self,
        chunks: Sequence_[Chunk],
        query_starts: Sequence_[int],
        *,
        eos_token_ids: Sequence_[int],
        vocab_size: int,
    ) -> None:
        self._eos_token_ids = eos_token_ids
        self._vocab_size = vocab_size
        self._changes: list[tuple[int, LogitChanges]] = []  # with the row of the sampled logits
        self._scored: list[tuple[int, int]] = []  # row of the sampled logits, number of likeliest tokens
        self._prompt_tokens: list[tuple[int, int, int, int]] = []  # hidden row, token id, chunk, likeliest
        row = 0
        for index, chunk in enumerate(chunks):
            sequence, samples = chunk.sequence, chunk.samples
            if not sequence.is_plain:
                self._add_prompt(index, chunk, query_starts[index])
                for offset, answer in enumerate(sequence.answers if samples else ()):
                    self._add_answer(row + offset, answer)
            row += sequence.num_slots if samples else 0

    @property
    def arrays(self) -> list[Array]:
        arrays: list[Array] = []
        if self._changes:
            rows, changes = zip(*self._changes, strict=True)
            arrays.append(np.repeat(np.array(rows, np.int64), [len(change.token_ids) for change in changes]))
            arrays += [np.concatenate(columns) for columns in zip(*changes, strict=True)]
        if self._scored:
            arrays.append(_column(self._scored, 0))
        if self._prompt_tokens:
            arrays += [_column(self._prompt_tokens, 0), _column(self._prompt_tokens, 1)]
        return arrays

    def on_device(self, tensors: list[Tensor]) -> StepExtras:
        rest = iter(tensors)
        adjustment, answers, prompts = None, None, None
        if self._changes:
            adjustment = LogitAdjustment(next(rest), next(rest), next(rest), next(rest), next(rest))
        if self._scored:
            answers = ScoredAnswers(
                next(rest), [row for row, _ in self._scored], [count for _, count in self._scored]
            )
        if self._prompt_tokens:
            chunks = [chunk for _, _, chunk, _ in self._prompt_tokens]
            num_top = [count for _, _, _, count in self._prompt_tokens]
            prompts = ScoredPrompts(next(rest), next(rest), chunks, num_top)
        return StepExtras(adjustment, answers, prompts)

    def _add_answer(self, row: int, answer: Sequence) -> None:
        if answer.changes_logits:
            if answer.logit_table is None:
                answer.logit_table = self._new_table(answer)
            changes = answer.logit_table.changes(answer.token_ids)
            if changes is not None:
                self._changes.append((row, changes))
        if answer.sampling.logprobs is not None:
            self._scored.append((row, answer.sampling.logprobs))

    def _new_table(self, answer: Sequence) -> LogitTable:
        ends = set(answer.sampling.stop_token_ids)
        if not answer.sampling.ignore_eos:
            ends.update(self._eos_token_ids)
        return LogitTable(answer.sampling, answer.num_prompt_tokens, ends, self._vocab_size)

    def _add_prompt(self, index: int, chunk: Chunk, query_start: int) -> None:
        sequence, num_tokens = chunk
        first = sequence.num_computed
        num_top = sequence.sampling.prompt_logprobs or 0
        # The token at `position` is predicted where the one before it was computed.
        for position in range(
            max(first + 1, sequence.num_scored), min(first + num_tokens + 1, sequence.num_prompt_tokens)
        ):
            row = query_start + position - 1 - first
            self._prompt_tokens.append((row, sequence.token_ids[position], index, num_top))


def _column(rows: Sequence_[tuple[int, ...]], index: int) -> npt.NDArray[np.int64]:
    return np.array([row[index] for row in rows], np.int64)
