"""What a request gives: deltas, a completion, or one of the typed errors."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from pdengine.transport.messages import FinishReason, TransferStats, Usage

PromptLike: TypeAlias = str | Sequence[int] | Sequence[Mapping[str, str]]
"""A text, token ids, or chat messages such as `{"role": "user", "content": "Hello"}`."""


@dataclass(frozen=True)
class Delta:
    """New tokens of answer `index`, and the text that they complete: text may lag the tokens by part of a
    character. finish_reason: with the last delta of each answer."""

    text: str
    token_ids: list[int]
    index: int = 0
    finish_reason: FinishReason | None = None


@dataclass(frozen=True)
class Choice:
    """One whole answer. The token that stopped it is in token_ids and in usage, but not in text."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason


@dataclass(frozen=True)
class Completion:
    """All answers to a prompt, in the order of their index; `text`, `token_ids` and `finish_reason` are those
    of the first one.

    usage: of all of them together. Its cached_tokens are those of the prompt that were not computed, because
    they were in a prefix cache. transfer: what the decode worker pulled; None where one worker did all of it.
    """

    choices: list[Choice]
    usage: Usage
    prefill_worker: str
    decode_worker: str
    attempts: int
    transfer: TransferStats | None

    @property
    def text(self) -> str:
        return self.choices[0].text

    @property
    def token_ids(self) -> list[int]:
        return self.choices[0].token_ids

    @property
    def finish_reason(self) -> FinishReason:
        return self.choices[0].finish_reason


def choices_of(deltas: Iterable[Delta], finish_reasons: Sequence[FinishReason]) -> list[Choice]:
    """The whole answers that `deltas`, in the order of their arrival, are the pieces of."""
    pieces: list[list[Delta]] = [[] for _ in finish_reasons]
    for delta in deltas:
        pieces[delta.index].append(delta)
    return [
        Choice(
            index,
            "".join(delta.text for delta in pieces[index]),
            [token_id for delta in pieces[index] for token_id in delta.token_ids],
            finish_reason,
        )
        for index, finish_reason in enumerate(finish_reasons)
    ]


class GenerateError(RuntimeError):
    """A request that did not finish; every other error of this module is one."""


class Rejected(GenerateError):
    """The router refused the request at the door; `field` is the argument at fault, if there is one."""

    def __init__(self, reason: str, field: str | None) -> None:
        super().__init__(reason)
        self.field = field


class Failed(GenerateError):
    """The request was accepted and could not be finished."""


class TimedOut(GenerateError):
    """The request's deadline passed."""


class Cancelled(GenerateError):
    """The request was cancelled by this client."""


class RouterUnavailable(GenerateError):
    """No router answers at this address, or the connection to it was lost while the request ran."""
