"""What a request gives: deltas, a completion, or one of the typed errors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from pdengine.transport.messages import FinishReason, TransferStats, Usage

PromptLike: TypeAlias = str | Sequence[int] | Sequence[Mapping[str, str]]
"""A text, token ids, or chat messages such as `{"role": "user", "content": "Hello"}`."""


@dataclass(frozen=True)
class Delta:
    """New tokens, and the text that they complete: text may lag the tokens by part of a character."""

    text: str
    token_ids: list[int]


@dataclass(frozen=True)
class Completion:
    """A whole answer. The token that stopped it is in token_ids and in usage, but not in text.

    transfer: what the decode worker pulled; None where one worker did all of it.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    usage: Usage
    prefill_worker: str
    decode_worker: str
    attempts: int
    transfer: TransferStats | None


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
