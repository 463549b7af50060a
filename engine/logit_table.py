"""The logits that a request changes before a token of one of its answers is drawn."""

from collections import Counter
from collections.abc import Iterable
from collections.abc import Sequence as Sequence_
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pdengine.transport.messages import SamplingParams

BIAS, FACTOR, PENALTY = 0, 1, 2
NOTHING = np.array([[0.0], [1.0], [0.0]], np.float32)  # what a token has that nothing is done to


class LogitChanges(NamedTuple):
    """See LogitAdjustment; `[n]` each. May be views of what the next token changes."""

    token_ids: npt.NDArray[np.int64]
    bias: npt.NDArray[np.float32]
    factor: npt.NDArray[np.float32]
    penalty: npt.NDArray[np.float32]


def changes_logits(sampling: SamplingParams, num_written: int) -> bool:
    """Whether any field does anything to the logits of the token after the first `num_written` of the answer.
    Once none does, none ever will."""
    has_ends = bool(sampling.stop_token_ids) or not sampling.ignore_eos
    return changes_all(sampling) or (has_ends and num_written < sampling.min_tokens)


def changes_all(sampling: SamplingParams) -> bool:
    """Whether the logits of every token are changed, from the first to the last."""
    return (
        sampling.repetition_penalty != 1
        or sampling.presence_penalty != 0
        or sampling.frequency_penalty != 0
        or bool(sampling.logit_bias)
    )


class LogitTable:
    """The tokens whose logits are changed, and by what: a function of the parameters and of the tokens so
    far. So it is made anew wherever an answer goes on, and grows by one token with each token of it.

    end_token_ids: what min_tokens keeps from being drawn. Tokens beyond the vocabulary are left out.
    """

    def __init__(
        self,
        sampling: SamplingParams,
        num_prompt_tokens: int,
        end_token_ids: Iterable[int],
        vocab_size: int,
    ) -> None:
        self._sampling = sampling
        self._num_prompt_tokens = num_prompt_tokens
        self._num_taken = 0  # leading tokens of the sequence that are in the table
        self._counts: Counter[int] = Counter()  # of the answer, if they matter
        self._changes_all = changes_all(sampling)
        self._places: dict[int, int] = {}  # token id -> place in the arrays, which have room for more
        self._token_ids = np.empty(0, np.int64)
        self._columns = np.empty((3, 0), np.float32)
        bias = {token: value for token, value in sampling.logit_bias.items() if 0 <= token < vocab_size}
        self._write(BIAS, list(bias), list(bias.values()))
        self._ends: list[int] = []
        if sampling.min_tokens > 0:
            self._ends = self._find_places([token for token in end_token_ids if 0 <= token < vocab_size])

    def changes(self, token_ids: list[int]) -> LogitChanges | None:
        """For the token after `token_ids`, the prompt and the answer so far; they only grow. None is none."""
        num_written = len(token_ids) - self._num_prompt_tokens
        is_too_short = num_written < self._sampling.min_tokens
        if not (self._changes_all or is_too_short):
            return None
        self._take(token_ids)
        count = len(self._places)
        bias = self._columns[BIAS, :count]
        if is_too_short:
            bias = bias.copy()
            bias[self._ends] = -np.inf
        return LogitChanges(
            self._token_ids[:count], bias, self._columns[FACTOR, :count], self._columns[PENALTY, :count]
        )

    def _take(self, token_ids: list[int]) -> None:
        sampling = self._sampling
        start, self._num_taken = self._num_taken, len(token_ids)
        if sampling.repetition_penalty != 1:
            distinct = list(dict.fromkeys(token_ids[start:]))  # at first it is the whole prompt
            self._write(FACTOR, distinct, sampling.repetition_penalty)
        if sampling.presence_penalty or sampling.frequency_penalty:
            written = token_ids[max(start, self._num_prompt_tokens) :]
            self._counts.update(written)
            penalties = [
                sampling.frequency_penalty * self._counts[token] + sampling.presence_penalty
                for token in written
            ]
            self._write(PENALTY, written, penalties)

    def _write(self, column: int, token_ids: list[int], values: float | list[float]) -> None:
        places = self._find_places(token_ids)  # before the arrays are looked at: they may grow
        self._columns[column, places] = values

    def _find_places(self, token_ids: Sequence_[int]) -> list[int]:
        """Where these tokens stand; new ones get a place at the end."""
        places = self._places
        old = len(places)
        found = [places.setdefault(token_id, len(places)) for token_id in token_ids]
        count = len(places)
        if count > old:
            if count > len(self._token_ids):
                self._grow(2 * count)
            # A token may come twice: its place was written with the first one.
            for token_id, place in zip(token_ids, found, strict=True):
                if place >= old:
                    self._token_ids[place] = token_id
        return found

    def _grow(self, capacity: int) -> None:
        old = len(self._token_ids)
        self._token_ids = np.concatenate([self._token_ids, np.zeros(capacity - old, np.int64)])
        self._columns = np.concatenate([self._columns, np.repeat(NOTHING, capacity - old, axis=1)], axis=1)
