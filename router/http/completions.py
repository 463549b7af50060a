"""`/v1/completions` and `/v1/chat/completions`: from a checked body to an answer, whole or streamed."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from http import HTTPStatus
from time import monotonic, time

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from pdengine.client import GenerateError
from pdengine.router.admission import MAX_TOKENS_OF_CHOICES
from pdengine.router.http.answers import Answers
from pdengine.router.http.chunks import ChunkWriter, chunk_writer
from pdengine.router.http.errors import LOGGED, ApiError, ClientGone, error_body, of_outcome
from pdengine.router.http.fields import NEUTRAL, NEUTRAL_IN_CHAT, check_unknown
from pdengine.router.http.prompts import Asked, conversation_of, prompts_of
from pdengine.router.http.replies import Usage, total_usage
from pdengine.router.http.requests import ChatBody, CompletionBody, SamplingBody, extras
from pdengine.router.http.service import Service
from pdengine.router.http.shapes import (
    DONE,
    ChatShape,
    CompletionShape,
    Echo,
    Shape,
    WholeAnswer,
    error_event,
)
from pdengine.transport.messages import Delta, Generate, TextPrompt, TokenLogprobs

logger = logging.getLogger(__name__)

DEFAULT_MAX_TOKENS = 16  # of completions, as OpenAI has it
STREAM_HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would hold events back
)


def complete(service: Service, body: CompletionBody, request_id: str) -> "AnswerResponse":
    """The response with the answers to every prompt of the body. Raises ApiError."""
    service.check_model(body.model or None)
    check_unknown(extras(body), NEUTRAL)
    if body.max_tokens == 0 and not body.echo:
        raise ApiError(HTTPStatus.BAD_REQUEST, "max_tokens: 0 only with echo", param="max_tokens")
    if body.max_tokens == 0 and body.min_tokens:
        raise ApiError(HTTPStatus.BAD_REQUEST, "min_tokens: more than max_tokens", param="min_tokens")
    shape = CompletionShape(
        f"cmpl-{request_id}",
        service.model,
        int(time()),
        service.token_names,
        includes_usage=body.includes_usage,
        counts_usage=body.counts_usage,
        returns_token_ids=bool(body.return_token_ids),
    )
    max_tokens = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    return AnswerResponse(service, body, prompts_of(body), max_tokens, shape, "prompt")


def complete_chat(service: Service, body: ChatBody, request_id: str) -> "AnswerResponse":
    """The response with the answers to the messages of the body. Raises ApiError."""
    service.check_model(body.model or None)
    check_unknown(extras(body), NEUTRAL_IN_CHAT)
    if body.tools and body.tool_choice != "none":
        raise ApiError(
            HTTPStatus.BAD_REQUEST,
            'tools: calls in the answer are not recognized; tool_choice "none" only tells the model of them',
            param="tools",
            code="unsupported_value",
        )
    if body.top_logprobs and not body.logprobs:
        raise ApiError(HTTPStatus.BAD_REQUEST, "top_logprobs: only with logprobs", param="top_logprobs")
    shape = ChatShape(
        f"chatcmpl-{request_id}",
        service.model,
        int(time()),
        service.token_names,
        includes_usage=body.includes_usage,
        counts_usage=body.counts_usage,
        returns_token_ids=bool(body.return_token_ids),
    )
    max_tokens = body.max_completion_tokens or body.max_tokens
    prompt = conversation_of(body.messages, body)
    return AnswerResponse(service, body, [prompt], max_tokens, shape, "messages")


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
        prompts: Sequence[Asked],
        max_tokens: int | None,
        shape: Shape,
        prompt_field: str,
    ) -> None:
        """max_tokens: None for what the context leaves; 0 for the prompt alone, of which one token is written
        and not shown. prompt_field: what the client calls the prompt."""
        super().__init__()
        if body.stream_options is not None and not body.stream:
            raise ApiError(HTTPStatus.BAD_REQUEST, "stream_options: only with stream", param="stream_options")
        self._service = service
        self._body = body
        self._prompts = prompts
        self._max_tokens = max_tokens
        self._shows_answers = max_tokens != 0
        self._shape = shape
        self._prompt_field = prompt_field
        self._n = body.n or 1
        self._logprobs_per_token = 0 if body.num_logprobs is None else 1 + body.num_logprobs
        self._num_logprobs = 0
        self._asked_at = monotonic()
        self._prompt_ids: list[list[int]] = []
        self._echoes: dict[int, Echo] = {}  # by prompt
        self._client_gone = False
        self._started = False  # the status has been sent
        self._writer: ChunkWriter | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope[LOGGED] = True
        self._writer = chunk_writer(scope)
        service = self._service
        answers = Answers(service.client, [], service.metrics, self._asked_at)
        try:
            with service.admitted(len(self._prompts), self._n):
                requests = [await self._to_generate(prompt) for prompt in self._prompts]
                answers = Answers(service.client, requests, service.metrics, self._asked_at)
                watcher = asyncio.create_task(self._watch(receive, answers))
                try:
                    await self._answer(answers, send)
                finally:
                    watcher.cancel()
                    answers.cancel()
        except GenerateError as error:
            if self._client_gone:
                self._log("client gone", answers)
                if self._started:
                    return
                raise ClientGone() from error
            self._log("failed", answers, str(error))
            raise of_outcome(error, self._prompt_field) from error
        except ApiError as error:
            self._log("rejected", answers, error.message)
            raise

    async def _answer(self, answers: Answers, send: Send) -> None:
        async with aclosing(self._batches(answers)) as batches:
            if self._body.stream:
                await self._stream(batches, answers, send)
            else:
                await self._collect(batches, answers, send)

    async def _to_generate(self, prompt: Asked) -> Generate:
        body, max_tokens, num_logprobs = self._body, self._max_tokens, self._logprobs_per_token
        tokens = await self._service.to_tokens(
            prompt, self._prompt_field, add_special_tokens=body.add_special_tokens
        )
        self._prompt_ids.append(tokens.token_ids)
        if max_tokens is None:
            # If nothing is left, the router says so.
            max_tokens = max(1, await self._service.max_request_tokens() - len(tokens.token_ids))
            if self._n > 1 or num_logprobs > 1:
                max_tokens = min(max_tokens, MAX_TOKENS_OF_CHOICES // (self._n * max(1, num_logprobs)))
        self._count_logprobs(max_tokens + (len(tokens.token_ids) if body.echoes else 0))
        return Generate(
            tag=0,
            prompt=tokens,
            sampling=body.sampling(max(1, max_tokens), self._service.sampling_defaults),
            n=self._n,
            priority=body.priority or 0,
            cache_salt=body.cache_salt or "",
            stop=body.stop_strings,
            include_stop=bool(body.include_stop_str_in_output),
        )

    def _count_logprobs(self, num_tokens: int) -> None:
        """All of them are in memory at once. Raises ApiError for more than that bears.

        num_tokens: of each of the n answers to one prompt.
        """
        self._num_logprobs += self._n * num_tokens * self._logprobs_per_token
        if self._num_logprobs > MAX_TOKENS_OF_CHOICES:
            raise ApiError(
                HTTPStatus.BAD_REQUEST,
                f"the answers may have {self._num_logprobs} log probabilities, the limit is "
                f"{MAX_TOKENS_OF_CHOICES}: ask for fewer of logprobs, n or max_tokens",
                param="logprobs",
            )

    async def _batches(self, answers: Answers) -> AsyncGenerator[tuple[int, list[Delta]]]:
        """Deltas as they are shown, with the index of their prompt, whose echo is there before them."""
        async with aclosing(answers.batches()) as batches:
            async for index, deltas in batches:
                if self._body.echoes and index not in self._echoes:
                    self._echoes[index] = await self._echo(index, answers)
                yield index, deltas if self._shows_answers else [_unshown(delta) for delta in deltas]

    async def _echo(self, index: int, answers: Answers) -> Echo:
        token_ids, logprobs = self._prompt_ids[index], answers.prompt_logprobs(index)
        match self._prompts[index]:
            case TextPrompt(text):
                return Echo(text, token_ids, logprobs)
        text = await self._service.on_thread(lambda: self._service.tokenizer.decode(token_ids))
        return Echo(text, token_ids, logprobs)

    async def _watch(self, receive: Receive, answers: Answers) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._client_gone = True
        answers.cancel()

    async def _collect(
        self, batches: AsyncGenerator[tuple[int, list[Delta]]], answers: Answers, send: Send
    ) -> None:
        """Send the whole answer at once."""
        choices: dict[int, list[WholeAnswer]] = {}

        def append_at_once(index: int, delta: Delta) -> bool:
            if index not in choices:
                return False
            choices[index][delta.index].append(delta)
            return True

        if self._shows_answers:
            answers.take_at_once = append_at_once
        async for index, deltas in batches:
            if index not in choices:
                echo, prompt_ids = self._echoes.get(index), self._prompt_ids[index]
                choices[index] = [WholeAnswer(echo, prompt_ids) for _ in range(self._n)]
            for delta in deltas:
                choices[index][delta.index].append(delta)
        whole = [choice for index in sorted(choices) for choice in choices[index]]
        usage = self._usage(answers)
        if self._body.num_logprobs is None:
            body = self._shape.whole(whole, usage)
        else:
            body = await self._service.on_thread(lambda: self._shape.whole(whole, usage))
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        await send(self._start(headers))
        await send({"type": "http.response.body", "body": body})
        self._log("finished", answers)

    async def _stream(
        self, batches: AsyncGenerator[tuple[int, list[Delta]]], answers: Answers, send: Send
    ) -> None:
        """Send tokens as they come; what gathered while the client did not read shares a write."""
        shape, n, writer = self._shape, self._n, self._writer
        opened: set[int] = set()

        def write_at_once(index: int, delta: Delta) -> bool:
            if writer is None or index not in opened or not writer.is_ready:
                return False
            writer.write(shape.event(index * n + delta.index, delta))
            return True

        if self._shows_answers:
            answers.take_at_once = write_at_once
        try:
            async for index, deltas in batches:
                events = []
                if index not in opened:
                    opened.add(index)
                    events = await self._openings(index)
                events += [shape.event(index * n + delta.index, delta) for delta in deltas]
                if not self._started:
                    self._started = True
                    await send(self._start(STREAM_HEADERS))
                elif writer is not None:
                    writer.flush()
                await send({"type": "http.response.body", "body": b"".join(events), "more_body": True})
        except GenerateError as error:
            if not self._started or self._client_gone:
                raise
            await self._end(send, error_event(error_body(of_outcome(error, self._prompt_field))))
            self._log("failed", answers, str(error))
            return
        usage = shape.usage_event(self._usage(answers)) if self._body.includes_usage else b""
        await self._end(send, usage + DONE)
        self._log("finished", answers)

    async def _end(self, send: Send, last: bytes) -> None:
        """End a stream, with `last` behind all that has been written."""
        if self._writer is not None:
            self._writer.flush()
        await send({"type": "http.response.body", "body": last})

    async def _openings(self, index: int) -> list[bytes]:
        """The events with which the answers to this prompt begin."""
        shape, echo, prompt_ids = self._shape, self._echoes.get(index), self._prompt_ids[index]
        choices = range(index * self._n, (index + 1) * self._n)
        if echo is None or echo.logprobs is None:
            return [shape.opening(choice, prompt_ids, echo) for choice in choices]
        return await self._service.on_thread(
            lambda: [shape.opening(choice, prompt_ids, echo) for choice in choices]
        )

    def _usage(self, answers: Answers) -> Usage:
        return total_usage(answers.usages, shows_answers=self._shows_answers)

    def _start(self, headers: Sequence[tuple[bytes, bytes]]) -> Message:
        request_id = (b"x-request-id", self._shape.request_id.encode())
        return {"type": "http.response.start", "status": HTTPStatus.OK, "headers": [*headers, request_id]}

    def _log(self, outcome: str, answers: Answers, reason: str = "") -> None:
        """The one line of a request. The router has an id for each prompt."""
        usage = self._usage(answers)
        logger.info(
            "request finished",
            extra={
                "request_id": ",".join(answers.request_ids),
                "http_id": self._shape.request_id,
                "outcome": outcome,
                **({"reason": reason} if reason else {}),
                "prompt_tokens": usage.prompt_tokens,
                "cached_tokens": sum(usage.cached_tokens for usage in answers.usages),
                "output_tokens": usage.completion_tokens,
                "seconds": round(monotonic() - self._asked_at, 3),
            },
        )


def _unshown(delta: Delta) -> Delta:
    """What is left of an answer that is only there because there must be one."""
    logprobs: list[TokenLogprobs] | None = None if delta.logprobs is None else []
    return Delta(delta.tag, "", [], delta.index, delta.finish_reason and "length", logprobs)
