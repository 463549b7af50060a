"""The two forms in which answers leave: completions, and chat completions; whole, or as chunks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol
from uuid import uuid4

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
    """Of a choice, all that was written. logprobs: of each of `token_ids`, if they were asked for."""

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
        self.token_ids += delta.token_ids
        if delta.logprobs is not None:
            if self.logprobs is None:
                self.logprobs = []
            self.logprobs += delta.logprobs

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


class UsageOfChunks:
    """What the chunks of a stream have as their usage: nothing, null, or what their choice has so far."""

    def __init__(self, *, includes_usage: bool, counts_usage: bool) -> None:
        self._constant: UnsetType | None = None if includes_usage else UNSET
        self._counts = counts_usage
        self._tokens: dict[int, list[int]] = {}  # by choice: of the prompt, and written so far

    def opening(self, index: int, prompt_ids: Sequence[int]) -> Usage | UnsetType | None:
        """Of choice `index`, of which nothing is written yet."""
        self._tokens[index] = [len(prompt_ids), 0]
        return self.next(index, 0)

    def next(self, index: int, num_tokens: int) -> Usage | UnsetType | None:
        """Of choice `index`, which has so many tokens more."""
        if not self._counts:
            return self._constant
        tokens = self._tokens[index]
        tokens[1] += num_tokens
        return Usage(tokens[0], tokens[1], sum(tokens))


class TextEvents:
    """Events that are alike but for their text: what is around it is encoded once for each choice.

    event: makes that of a choice with a text.
    """

    def __init__(self, event: Callable[[int, str], bytes]) -> None:
        self._event = event
        self._encode = msgspec.json.Encoder().encode
        self._around: dict[int, tuple[bytes, bytes]] = {}

    def __call__(self, index: int, text: str) -> bytes:
        around = self._around.get(index)
        if around is None:
            mark = uuid4().hex
            head, _, tail = self._event(index, mark).partition(self._encode(mark))
            around = self._around[index] = head, tail
        return b"%b%b%b" % (around[0], self._encode(text), around[1])


class CompletionShape:
    """includes_usage: every chunk has the field, null until the last one, or with `counts_usage` that of its
    choice so far."""

    def __init__(
        self,
        request_id: str,
        model: str,
        created: int,
        names: TokenNames,
        *,
        includes_usage: bool,
        counts_usage: bool,
        returns_token_ids: bool,
    ) -> None:
        self.request_id, self._model, self._created = request_id, model, created
        self._names = names
        self._scribes: dict[int, CompletionScribe] = {}
        self._untold_prompts: dict[int, list[int]] = {}  # by choice, if token ids are returned
        self._usage = UsageOfChunks(includes_usage=includes_usage, counts_usage=counts_usage)
        self._encode = msgspec.json.Encoder().encode
        self._returns_token_ids = returns_token_ids
        self._has_text_events = not counts_usage and not returns_token_ids
        self._text_event = TextEvents(lambda index, text: self._event_of(index, Delta(0, text, [], index)))

    def whole(self, answers: list[WholeAnswer], usage: Usage) -> bytes:
        choices = [self._choice(i, answer) for i, answer in enumerate(answers)]
        return self._encode(Completion(self.request_id, self._created, self._model, choices, usage))

    def opening(self, index: int, prompt_ids: Sequence[int], echo: Echo | None) -> bytes:
        scribe = self._scribes[index] = CompletionScribe(self._names, prompt_ids)
        usage = self._usage.opening(index, prompt_ids)
        if self._returns_token_ids:
            self._untold_prompts[index] = list(prompt_ids)
        if echo is None:
            return b""
        token_ids, prompt_token_ids = self._told_ids(index, [])
        choice = CompletionChoice(index, echo.text, None, _of_echo(scribe, echo), token_ids, prompt_token_ids)
        return self._event(choice, usage)

    def event(self, index: int, delta: Delta) -> bytes:
        if self._has_text_events and _is_text_alone(delta):
            return self._text_event(index, delta.text)
        return self._event_of(index, delta)

    def _event_of(self, index: int, delta: Delta) -> bytes:
        logprobs = None
        if delta.logprobs is not None:
            logprobs = self._scribes[index].of_answer(delta.token_ids, delta.logprobs)
        token_ids, prompt_token_ids = self._told_ids(index, delta.token_ids)
        choice = CompletionChoice(
            index, delta.text, delta.finish_reason, logprobs, token_ids, prompt_token_ids
        )
        return self._event(choice, self._usage.next(index, len(delta.token_ids)))

    def _told_ids(
        self, index: int, token_ids: list[int]
    ) -> tuple[list[int] | UnsetType, list[int] | UnsetType]:
        """What a chunk of this choice has as `token_ids` and, the first one, as `prompt_token_ids`."""
        if not self._returns_token_ids:
            return UNSET, UNSET
        return token_ids, self._untold_prompts.pop(index, UNSET)

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
        choice = CompletionChoice(index, text, answer.finish_reason, _joined(parts))
        if not self._returns_token_ids:
            return choice
        return msgspec.structs.replace(
            choice, token_ids=answer.token_ids, prompt_token_ids=list(answer.prompt_ids)
        )

    def _event(self, choice: CompletionChoice, usage: Usage | UnsetType | None) -> bytes:
        return self._frame(Completion(self.request_id, self._created, self._model, [choice], usage))

    def _frame(self, chunk: Completion) -> bytes:
        return b"data: %b\n\n" % self._encode(chunk)


class ChatShape:
    """As CompletionShape."""

    def __init__(
        self,
        request_id: str,
        model: str,
        created: int,
        names: TokenNames,
        *,
        includes_usage: bool,
        counts_usage: bool,
        returns_token_ids: bool,
    ) -> None:
        self.request_id, self._model, self._created = request_id, model, created
        self._names = names
        self._usage = UsageOfChunks(includes_usage=includes_usage, counts_usage=counts_usage)
        self._encode = msgspec.json.Encoder().encode
        self._returns_token_ids = returns_token_ids
        self._has_text_events = not counts_usage and not returns_token_ids
        self._text_event = TextEvents(lambda index, text: self._event_of(index, Delta(0, text, [], index)))

    def whole(self, answers: list[WholeAnswer], usage: Usage) -> bytes:
        choices = [
            ChatChoice(
                i,
                ChatMessage(answer.text),
                answer.finish_reason,
                self._logprobs(answer.token_ids, answer.logprobs),
                answer.token_ids if self._returns_token_ids else UNSET,
            )
            for i, answer in enumerate(answers)
        ]
        prompt_ids = list(answers[0].prompt_ids) if self._returns_token_ids else UNSET
        return self._encode(
            ChatCompletion(self.request_id, self._created, self._model, choices, usage, prompt_ids)
        )

    def opening(self, index: int, prompt_ids: Sequence[int], echo: Echo | None) -> bytes:
        choice = ChatChunkChoice(index, ChatDelta("", role="assistant"))
        told_ids = list(prompt_ids) if self._returns_token_ids else UNSET
        return self._event([choice], self._usage.opening(index, prompt_ids), told_ids)

    def event(self, index: int, delta: Delta) -> bytes:
        if self._has_text_events and _is_text_alone(delta):
            return self._text_event(index, delta.text)
        return self._event_of(index, delta)

    def _event_of(self, index: int, delta: Delta) -> bytes:
        logprobs = self._logprobs(delta.token_ids, delta.logprobs)
        token_ids = delta.token_ids if self._returns_token_ids else UNSET
        choice = ChatChunkChoice(index, ChatDelta(delta.text), delta.finish_reason, logprobs, token_ids)
        return self._event([choice], self._usage.next(index, len(delta.token_ids)))

    def usage_event(self, usage: Usage) -> bytes:
        return self._event([], usage)

    def _logprobs(
        self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs] | None
    ) -> ChatLogprobs | None:
        return None if logprobs is None else chat_logprobs(self._names, token_ids, logprobs)

    def _event(
        self,
        choices: list[ChatChunkChoice],
        usage: Usage | UnsetType | None,
        prompt_ids: list[int] | UnsetType = UNSET,
    ) -> bytes:
        chunk = ChatChunk(self.request_id, self._created, self._model, choices, usage, prompt_ids)
        return b"data: %b\n\n" % self._encode(chunk)


def _is_text_alone(delta: Delta) -> bool:
    return delta.logprobs is None and delta.finish_reason is None


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
