"""The two forms in which answers leave: completions, and chat completions; whole, or as chunks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec
from msgspec import UNSET, UnsetType

from pdengine.router.http.logprobs import CompletionScribe, TokenNames, chat_logprobs
from pdengine.router.http.replies import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    Usage,
)
from pdengine.transport.messages import Delta, FinishReason, TokenLogprobs

DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class Echo:
    """A prompt that comes before its answers. logprobs: of its tokens but the first, if asked for."""

    text: str
    token_ids: Sequence[int]
    logprobs: Sequence[TokenLogprobs] | None


class WholeAnswer:
    """Of a choice, all that was written. token_ids, logprobs: if they were asked for."""

    def __init__(self, echo: Echo | None, prompt_ids: Sequence[int]) -> None:
        self.echo = echo
        self.prompt_ids = prompt_ids
        self.finish_reason: FinishReason = "stop"
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprobs] | None = None
        self._texts: list[str] = []

    def append(self, delta: Delta) -> None:
        self._texts.append(delta.text)
        if delta.finish_reason is not None:
            self.finish_reason = delta.finish_reason
        if delta.logprobs is not None:
            if self.logprobs is None:
                self.logprobs = []
            self.logprobs += delta.logprobs
            self.token_ids += delta.token_ids

    @property
    def text(self) -> str:
        return "".join(self._texts)


class Shape(Protocol):
    """Events are server-sent ones, complete with their frame (https://html.spec.whatwg.org, section 9.2)."""

    request_id: str

    def whole(self, answers: list[WholeAnswer], usage: Usage) -> bytes:
        """The body of an answer that is not streamed."""

    def opening(self, index: int, prompt_ids: Sequence[int], echo: Echo | None) -> bytes:
        """The event with which choice `index` begins, if it has one. To be called once for each."""

    def event(self, index: int, delta: Delta) -> bytes:
        """What is new of choice `index`."""

    def usage_event(self, usage: Usage) -> bytes:
        """The last event, where it was asked for."""


class CompletionShape:
    """includes_usage: every chunk has the field, null until the last one."""

    def __init__(
        self, request_id: str, model: str, created: int, names: TokenNames, *, includes_usage: bool
    ) -> None:
        self.request_id, self._model, self._created = request_id, model, created
        self._names = names
        self._scribes: dict[int, CompletionScribe] = {}
        self._no_usage: UnsetType | None = None if includes_usage else UNSET
        self._encode = msgspec.json.Encoder().encode

    def whole(self, answers: list[WholeAnswer], usage: Usage) -> bytes:
        choices = [self._choice(i, answer) for i, answer in enumerate(answers)]
        return self._encode(Completion(self.request_id, self._created, self._model, choices, usage))

    def opening(self, index: int, prompt_ids: Sequence[int], echo: Echo | None) -> bytes:
        scribe = self._scribes[index] = CompletionScribe(self._names, prompt_ids)
        if echo is None:
            return b""
        return self._event(CompletionChoice(index, echo.text, None, _of_echo(scribe, echo)))

    def event(self, index: int, delta: Delta) -> bytes:
        logprobs = None
        if delta.logprobs is not None:
            logprobs = self._scribes[index].of_answer(delta.token_ids, delta.logprobs)
        return self._event(CompletionChoice(index, delta.text, delta.finish_reason, logprobs))

    def usage_event(self, usage: Usage) -> bytes:
        return self._frame(Completion(self.request_id, self._created, self._model, [], usage))

    def _choice(self, index: int, answer: WholeAnswer) -> CompletionChoice:
        scribe = CompletionScribe(self._names, answer.prompt_ids)
        parts, text = [], answer.text
        if answer.echo is not None:
            text = answer.echo.text + text
            parts.append(_of_echo(scribe, answer.echo))
        if answer.logprobs is not None:
            parts.append(scribe.of_answer(answer.token_ids, answer.logprobs))
        return CompletionChoice(index, text, answer.finish_reason, _joined(parts))

    def _event(self, choice: CompletionChoice) -> bytes:
        return self._frame(Completion(self.request_id, self._created, self._model, [choice], self._no_usage))

    def _frame(self, chunk: Completion) -> bytes:
        return b"data: %b\n\n" % self._encode(chunk)


class ChatShape:
    """includes_usage: every chunk has the field, null until the last one."""

    def __init__(
        self, request_id: str, model: str, created: int, names: TokenNames, *, includes_usage: bool
    ) -> None:
        self.request_id, self._model, self._created = request_id, model, created
        self._names = names
        self._no_usage: UnsetType | None = None if includes_usage else UNSET
        self._encode = msgspec.json.Encoder().encode

    def whole(self, answers: list[WholeAnswer], usage: Usage) -> bytes:
        choices = [
            ChatChoice(
                i,
                ChatMessage(answer.text),
                answer.finish_reason,
                self._logprobs(answer.token_ids, answer.logprobs),
            )
            for i, answer in enumerate(answers)
        ]
        return self._encode(ChatCompletion(self.request_id, self._created, self._model, choices, usage))

    def opening(self, index: int, prompt_ids: Sequence[int], echo: Echo | None) -> bytes:
        return self._event([ChatChunkChoice(index, ChatDelta("", role="assistant"))], self._no_usage)

    def event(self, index: int, delta: Delta) -> bytes:
        logprobs = self._logprobs(delta.token_ids, delta.logprobs)
        choice = ChatChunkChoice(index, ChatDelta(delta.text), delta.finish_reason, logprobs)
        return self._event([choice], self._no_usage)

    def usage_event(self, usage: Usage) -> bytes:
        return self._event([], usage)

    def _logprobs(
        self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs] | None
    ) -> ChatLogprobs | None:
        return None if logprobs is None else chat_logprobs(self._names, token_ids, logprobs)

    def _event(self, choices: list[ChatChunkChoice], usage: Usage | UnsetType | None) -> bytes:
        chunk = ChatChunk(self.request_id, self._created, self._model, choices, usage)
        return b"data: %b\n\n" % self._encode(chunk)


def error_event(error_body: bytes) -> bytes:
    """What a stream ends with that fails after its first token; no [DONE] follows."""
    return b"data: %b\n\n" % error_body


def _of_echo(scribe: CompletionScribe, echo: Echo) -> CompletionLogprobs | None:
    return None if echo.logprobs is None else scribe.of_prompt(echo.text, echo.logprobs)


def _joined(parts: Sequence[CompletionLogprobs | None]) -> CompletionLogprobs | None:
    """Those of a prompt and those of its answer, as far as there are any."""
    told = [part for part in parts if part is not None]
    if not told:
        return None
    return CompletionLogprobs(
        [token for part in told for token in part.tokens],
        [logprob for part in told for logprob in part.token_logprobs],
        [top for part in told for top in part.top_logprobs],
        [offset for part in told for offset in part.text_offset],
    )
