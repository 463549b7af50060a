"""What a request gives: deltas, a completion, or one of the typed errors."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from pdengine.transport.messages import FinishReason, TokenLogprobs, TransferStats, Usage

PromptLike: TypeAlias = str | Sequence[int] | Sequence[Mapping[str, str]]
"""A text, token ids, or chat messages such as `{"role": "user", "content": "Hello"}`."""


@dataclass(frozen=True)
class Delta:
    """New tokens of answer `index`, and the text that they complete.

    text: may lag the tokens by part of a character, or by what may become a stop text. finish_reason: with
    the last delta of each answer. logprobs: of each of `token_ids`, if they were asked for.
    """

    text: str
    token_ids: list[int]
    index: int = 0
    finish_reason: FinishReason | None = None
    logprobs: list[TokenLogprobs] | None = None


@dataclass(frozen=True)
class Choice:
    """One whole answer. What stopped it, a token or a text, is in token_ids and in usage, but not in text.

    logprobs: of each of `token_ids`; None unless they were asked for.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    logprobs: list[TokenLogprobs] | None = None


@dataclass(frozen=True)
class Completion:
    """All answers to a prompt, in the order of their index; `text`, `token_ids`, `finish_reason` and
    `logprobs` are those of the first one.

    usage: of all of them together. Its cached_tokens are those of the prompt that were not computed, because
    they were in a prefix cache. attempts: 1, or more if workers were lost. transfer: what the decode worker
    pulled; None where one worker did all of it. request_id: under which the cluster's logs have the request.
    prompt_logprobs: of each token of the prompt but the first; None unless they were asked for.
    """

    choices: list[Choice]
    usage: Usage
    prefill_worker: str
    decode_worker: str
    attempts: int
    transfer: TransferStats | None
    request_id: str
    prompt_logprobs: list[TokenLogprobs] | None = None

    @property
    def text(self) -> str:
        return self.choices[0].text

    @property
    def token_ids(self) -> list[int]:
        return self.choices[0].token_ids

    @property
    def finish_reason(self) -> FinishReason:
        return self.choices[0].finish_reason

    @property
    def logprobs(self) -> list[TokenLogprobs] | None:
        return self.choices[0].logprobs


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
            _logprobs_of(pieces[index]),
        )
        for index, finish_reason in enumerate(finish_reasons)
    ]


def _logprobs_of(pieces: Sequence[Delta]) -> list[TokenLogprobs] | None:
    """Of all tokens of one answer; None if they were not asked for."""
    known = [piece.logprobs for piece in pieces if piece.logprobs is not None]
    return [token for logprobs in known for token in logprobs] if known else None


class GenerateError(RuntimeError):
    """A request that did not finish; every other error of this module is one."""


class Rejected(GenerateError):
    """The router refused the request at the door; `field` is the argument at fault, if there is one."""

    def __init__(self, reason: str, field: str | None) -> None:
        super().__init__(reason)
        self.field = field


class Failed(GenerateError):
    """The cluster could not finish the request. retry: another router, or this one later, may do it."""

    def __init__(self, reason: str, *, retry: bool = False) -> None:
        super().__init__(reason)
        self.retry = retry


class TimedOut(GenerateError):
    """The request's deadline passed."""


class Cancelled(GenerateError):
    """The request was cancelled by this client."""


class RouterUnavailable(GenerateError):
    """No router answers, or the connection to the one that had the request was lost while it ran."""
