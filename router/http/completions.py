"""`/v1/completions` and `/v1/chat/completions`: from a checked body to an answer, whole or streamed."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from http import HTTPStatus
from time import monotonic, time
from uuid import uuid4

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from pdengine.client import GenerateError
from pdengine.router.admission import MAX_TOKENS_OF_CHOICES
from pdengine.router.http.answers import Answer, Answers
from pdengine.router.http.errors import ApiError, ClientGone, error_body, of_outcome
from pdengine.router.http.fields import (
    NEUTRAL,
    NEUTRAL_IN_CHAT,
    NEUTRAL_IN_MESSAGE,
    check_unknown,
)
from pdengine.router.http.replies import total_usage
from pdengine.router.http.requests import ChatBody, ChatMessageBody, CompletionBody, SamplingBody, extras
from pdengine.router.http.service import Service
from pdengine.router.http.shapes import DONE, ChatShape, CompletionShape, Shape, WholeAnswer, error_event
from pdengine.transport.messages import (
    ChatMessage,
    ChatPrompt,
    Delta,
    FinishReason,
    Generate,
    Prompt,
    TextPrompt,
    TokenPrompt,
)

logger = logging.getLogger(__name__)

DEFAULT_MAX_TOKENS = 16  # of completions, as OpenAI has it
STREAM_HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would hold events back
)


def complete(service: Service, body: CompletionBody) -> "AnswerResponse":
    """The response with the answers to every prompt of the body. Raises ApiError."""
    service.check_model(body.model)
    check_unknown(extras(body), NEUTRAL)
    shape = CompletionShape(
        f"cmpl-{uuid4().hex}", service.model, int(time()), includes_usage=body.includes_usage
    )
    max_tokens = body.max_tokens or DEFAULT_MAX_TOKENS
    return AnswerResponse(service, body, _prompts(body), max_tokens, shape, "prompt")


def complete_chat(service: Service, body: ChatBody) -> "AnswerResponse":
    """The response with the answers to the messages of the body. Raises ApiError."""
    service.check_model(body.model)
    check_unknown(extras(body), NEUTRAL_IN_CHAT)
    shape = ChatShape(
        f"chatcmpl-{uuid4().hex}", service.model, int(time()), includes_usage=body.includes_usage
    )
    max_tokens = body.max_completion_tokens or body.max_tokens
    return AnswerResponse(service, body, [chat_prompt(body.messages)], max_tokens, shape, "messages")


def chat_prompt(messages: Sequence[ChatMessageBody]) -> ChatPrompt:
    """Raises ApiError for a field of a message that the prompt would not show."""
    for index, message in enumerate(messages):
        check_unknown(extras(message), NEUTRAL_IN_MESSAGE, where=f"messages[{index}].")
    return ChatPrompt([ChatMessage(message.role, message.text) for message in messages])


def _prompts(body: CompletionBody) -> list[Prompt]:
    match body.prompt:
        case str(text):
            return [TextPrompt(text)]
        case [int(), *_] as token_ids:
            return [TokenPrompt(token_ids)]  # type: ignore[arg-type]
        case prompts:
            return [TextPrompt(p) if isinstance(p, str) else TokenPrompt(p) for p in prompts]  # type: ignore[arg-type]


class AnswerResponse(Response):
    """Asks the router when it is sent, so that one scope holds all of a request, whatever it ends with.

    Nothing is sent before the first token is there: what goes wrong until then raises ApiError, and has a
    status of its own. What goes wrong later is the last event of the stream. A client that goes away ends its
    requests at once.
    """

    def __init__(
        self,
        service: Service,
        body: SamplingBody,
        prompts: Sequence[Prompt],
        max_tokens: int | None,
        shape: Shape,
        prompt_field: str,
    ) -> None:
        """max_tokens: None for what the context leaves. prompt_field: what the client calls the prompt."""
        super().__init__()
        if body.stream_options is not None and not body.stream:
            raise ApiError(HTTPStatus.BAD_REQUEST, "stream_options: only with stream", param="stream_options")
        self._service = service
        self._body = body
        self._prompts = prompts
        self._max_tokens = max_tokens
        self._shape = shape
        self._prompt_field = prompt_field
        self._n = body.n or 1
        self._asked_at = monotonic()
        self._client_gone = False
        self._started = False  # the status has been sent

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._service.admitted(len(self._prompts), self._n):
            requests = [await self._to_generate(prompt) for prompt in self._prompts]
            answers = Answers(
                [Answer(self._service.client, r, self._service.metrics, self._asked_at) for r in requests]
            )
            watcher = asyncio.create_task(self._watch(receive, answers))
            try:
                async with aclosing(answers.batches()) as batches:
                    if self._body.stream:
                        await self._stream(batches, answers, send)
                    else:
                        await self._collect(batches, answers, send)
                self._log("finished", answers)
            except GenerateError as error:
                if self._client_gone:
                    self._log("the client closed the connection", answers)
                    if self._started:
                        return
                    raise ClientGone() from error
                self._log(str(error), answers)
                raise of_outcome(error, self._prompt_field) from error
            finally:
                watcher.cancel()
                answers.cancel()

    async def _to_generate(self, prompt: Prompt) -> Generate:
        body, max_tokens = self._body, self._max_tokens
        tokens = await self._service.to_tokens(prompt, self._prompt_field)
        if max_tokens is None:
            # If nothing is left, the router says so.
            max_tokens = max(1, await self._service.max_request_tokens() - len(tokens.token_ids))
            if self._n > 1:
                max_tokens = min(max_tokens, MAX_TOKENS_OF_CHOICES // self._n)
        return Generate(
            tag=0,
            prompt=tokens,
            sampling=body.sampling(max_tokens),
            n=self._n,
            priority=body.priority or 0,
            cache_salt=body.cache_salt or "",
        )

    async def _watch(self, receive: Receive, answers: Answers) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._client_gone = True
        answers.cancel()

    async def _collect(
        self, batches: AsyncGenerator[tuple[int, list[Delta]]], answers: Answers, send: Send
    ) -> None:
        """Send the whole answer at once."""
        num_choices = self._n * len(self._prompts)
        texts: list[list[str]] = [[] for _ in range(num_choices)]
        finish_reasons: list[FinishReason] = ["stop"] * num_choices
        async for prompt_index, deltas in batches:
            for delta in deltas:
                choice = prompt_index * self._n + delta.index
                texts[choice].append(delta.text)
                if delta.finish_reason is not None:
                    finish_reasons[choice] = delta.finish_reason
        whole = [WholeAnswer("".join(t), reason) for t, reason in zip(texts, finish_reasons, strict=True)]
        body = self._shape.whole(whole, total_usage(answers.usages))
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        await send(self._start(headers))
        await send({"type": "http.response.body", "body": body})

    async def _stream(
        self, batches: AsyncGenerator[tuple[int, list[Delta]]], answers: Answers, send: Send
    ) -> None:
        """Send tokens as they come; those that came together share a write."""
        shape, n = self._shape, self._n
        try:
            async for prompt_index, deltas in batches:
                events = [
                    shape.event(prompt_index * n + delta.index, delta.text, delta.finish_reason)
                    for delta in deltas
                ]
                if not self._started:
                    self._started = True
                    await send(self._start(STREAM_HEADERS))
                    events = [shape.opening(index) for index in range(n * len(self._prompts))] + events
                await send({"type": "http.response.body", "body": b"".join(events), "more_body": True})
        except GenerateError as error:
            if not self._started or self._client_gone:
                raise
            self._log(f"failed in the middle of the stream: {error}", answers)
            last = error_event(error_body(of_outcome(error, self._prompt_field)))
            await send({"type": "http.response.body", "body": last})
            return
        usage = shape.usage_event(total_usage(answers.usages)) if self._body.includes_usage else b""
        await send({"type": "http.response.body", "body": usage + DONE})

    def _start(self, headers: Sequence[tuple[bytes, bytes]]) -> Message:
        request_id = (b"x-request-id", self._shape.request_id.encode())
        return {"type": "http.response.start", "status": HTTPStatus.OK, "headers": [*headers, request_id]}

    def _log(self, outcome: str, answers: Answers) -> None:
        usage = total_usage(answers.usages)
        logger.info(
            "%s: %s; %d prompt and %d answer tokens, %.3f s",
            self._shape.request_id,
            outcome,
            usage.prompt_tokens,
            usage.completion_tokens,
            monotonic() - self._asked_at,
        )
