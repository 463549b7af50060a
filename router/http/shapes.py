"""The two forms in which answers leave: completions, and chat completions; whole, or as chunks."""

from dataclasses import dataclass
from typing import Protocol

import msgspec
from msgspec import UNSET, UnsetType

from pdengine.router.http.replies import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatMessage,
    Completion,
    CompletionChoice,
    Usage,
)
from pdengine.transport.messages import FinishReason

DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class WholeAnswer:
    text: str
    finish_reason: FinishReason


class Shape(Protocol):
    """Events are server-sent ones, complete with their frame (https://html.spec.whatwg.org, section 9.2)."""

    request_id: str

    def whole(self, answers: list[WholeAnswer], usage: Usage) -> bytes:
        """The body of an answer that is not streamed."""

    def opening(self, index: int) -> bytes:
        """The event with which choice `index` begins, if it has one."""

    def event(self, index: int, text: str, finish_reason: FinishReason | None) -> bytes:
        """New text of choice `index`."""

    def usage_event(self, usage: Usage) -> bytes:
        """The last event, where it was asked for."""


class CompletionShape:
    """includes_usage: every chunk has the field, null until the last one."""

    def __init__(self, request_id: str, model: str, created: int, *, includes_usage: bool) -> None:
        self.request_id, self._model, self._created = request_id, model, created
        self._no_usage: UnsetType | None = None if includes_usage else UNSET
        self._encode = msgspec.json.Encoder().encode

    def whole(self, answers: list[WholeAnswer], usage: Usage) -> bytes:
        choices = [CompletionChoice(i, answer.text, answer.finish_reason) for i, answer in enumerate(answers)]
        return self._encode(Completion(self.request_id, self._created, self._model, choices, usage))

    def opening(self, index: int) -> bytes:
        return b""

    def event(self, index: int, text: str, finish_reason: FinishReason | None) -> bytes:
        choices = [CompletionChoice(index, text, finish_reason)]
        return self._event(Completion(self.request_id, self._created, self._model, choices, self._no_usage))

    def usage_event(self, usage: Usage) -> bytes:
        return self._event(Completion(self.request_id, self._created, self._model, [], usage))

    def _event(self, chunk: Completion) -> bytes:
        return b"data: %b\n\n" % self._encode(chunk)


class ChatShape:
    """includes_usage: every chunk has the field, null until the last one."""

    def __init__(self, request_id: str, model: str, created: int, *, includes_usage: bool) -> None:
        self.request_id, self._model, self._created = request_id, model, created
        self._no_usage: UnsetType | None = None if includes_usage else UNSET
        self._encode = msgspec.json.Encoder().encode

    def whole(self, answers: list[WholeAnswer], usage: Usage) -> bytes:
        choices = [
            ChatChoice(i, ChatMessage(answer.text), answer.finish_reason) for i, answer in enumerate(answers)
        ]
        return self._encode(ChatCompletion(self.request_id, self._created, self._model, choices, usage))

    def opening(self, index: int) -> bytes:
        return self._event([ChatChunkChoice(index, ChatDelta("", role="assistant"))], self._no_usage)

    def event(self, index: int, text: str, finish_reason: FinishReason | None) -> bytes:
        return self._event([ChatChunkChoice(index, ChatDelta(text), finish_reason)], self._no_usage)

    def usage_event(self, usage: Usage) -> bytes:
        return self._event([], usage)

    def _event(self, choices: list[ChatChunkChoice], usage: Usage | UnsetType | None) -> bytes:
        chunk = ChatChunk(self.request_id, self._created, self._model, choices, usage)
        return b"data: %b\n\n" % self._encode(chunk)


def error_event(error_body: bytes) -> bytes:
    """What a stream ends with that fails after its first token; no [DONE] follows."""
    return b"data: %b\n\n" % error_body
