"""Requests in flight at the router, read in batches: what is there already is taken at once.

At thousands of tokens per second it is this that counts: a wake-up per batch, not per token.
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from time import monotonic

import msgspec

from pdengine.client import AsyncClient, Cancelled, Failed, Rejected, RouterUnavailable
from pdengine.client.connection import INQUIRE_SECONDS, Reply
from pdengine.client.results import GenerateError
from pdengine.router.http.metrics import HttpMetrics
from pdengine.transport import messages
from pdengine.transport.messages import (
    Accepted,
    Delta,
    Finished,
    Generate,
    Inquire,
    PromptLogprobs,
    TokenLogprobs,
    Usage,
)


class Answer:
    """The answers to one prompt, on their way. `cancel` it unless it has finished.

    request_id: the router's, once it has accepted the request. prompt_logprobs: of the prompt's tokens but
    the first, if they were asked for; there before the first batch. usage: once it has finished.
    """

    def __init__(self, client: AsyncClient, request: Generate, metrics: HttpMetrics, asked_at: float) -> None:
        self._client = client
        self._request = request
        self._metrics = metrics
        self._asked_at = asked_at
        self._tag: int | None = None
        self._replies: asyncio.Queue[Reply] = asyncio.Queue()
        self._last_at: list[float | None] = [None] * request.n
        self._heard = False
        self._silence: asyncio.TimerHandle | None = None
        self._error: GenerateError | None = None  # raised when all that came before it has been taken
        self.request_id: str | None = None
        self.prompt_logprobs: list[TokenLogprobs] | None = None
        self.usage: Usage | None = None

    async def next_batch(self) -> list[Delta]:
        """At least one delta and all that are there, or none after the last.

        Raises what the request ended with, a GenerateError.
        """
        if self._tag is None and self.usage is None:
            await self._start()
        deltas: list[Delta] = []
        while self.usage is None and not deltas:
            if self._error is not None:
                raise self._error
            self._take(await self._replies.get(), deltas)
            while self._error is None and not self._replies.empty():
                self._take(self._replies.get_nowait(), deltas)
        self._observe(deltas)
        return deltas

    def cancel(self) -> None:
        """End the request if it has not ended, and wake whoever waits for it; idempotent."""
        self._error = Cancelled("the request was cancelled")
        if self._tag is not None:
            if self.usage is None:
                self._client.cancel(self._tag)
            self._forget()
        self._replies.put_nowait(self._error)

    async def _start(self) -> None:
        if self._error is None:
            await self._client.wait_connected()
        if self._error is not None:  # it was cancelled in the meantime
            raise self._error
        self._tag, self._replies = self._client.open()
        try:
            self._client.send(msgspec.structs.replace(self._request, tag=self._tag))
        except ValueError as error:  # larger than a message may be
            self._forget()
            raise Rejected(str(error), "prompt") from error
        self._heard = True
        self._break_silence()

    def _forget(self) -> None:
        if self._tag is not None:
            self._client.forget(self._tag)
            self._tag = None
        if self._silence is not None:
            self._silence.cancel()

    def _take(self, reply: Reply, deltas: list[Delta]) -> None:
        match reply:
            case Delta():
                deltas.append(reply)
            case Accepted(_, request_id):
                self.request_id = request_id
            case PromptLogprobs(_, logprobs):
                self.prompt_logprobs = logprobs
            case Finished(usage=usage):
                self.usage = usage
                self._forget()
            case messages.Rejected(_, reason, field):
                self._error = Rejected(reason, field)
            case messages.Failed(_, reason):
                self._error = Failed(reason)
            case messages.Aborted(cause=cause):
                self._error = Cancelled(f"the request was ended: {cause}")
            case GenerateError():
                self._error = reply

    def _break_silence(self) -> None:
        """Every so often: ask the router whether it still has the request, if it said nothing since."""
        if self._tag is None:
            return
        if not self._heard:
            try:
                self._client.send(Inquire(self._tag))
            except RouterUnavailable as error:
                self._replies.put_nowait(error)
                return
        self._heard = False
        loop = asyncio.get_running_loop()
        self._silence = loop.call_later(INQUIRE_SECONDS, self._break_silence)

    def _observe(self, deltas: Sequence[Delta]) -> None:
        now = monotonic()
        self._heard = True
        for delta in deltas:
            last_at = self._last_at[delta.index]
            if last_at is not None:
                self._metrics.inter_token_latency.observe(now - last_at)
            elif not any(self._last_at):
                self._metrics.time_to_first_token.observe(now - self._asked_at)
            self._last_at[delta.index] = now


class Answers:
    """The answers to all prompts of one request."""

    def __init__(self, answers: Sequence[Answer]) -> None:
        self._answers = answers

    @property
    def request_ids(self) -> list[str]:
        """The router's, of the prompts that it has accepted."""
        return [answer.request_id for answer in self._answers if answer.request_id is not None]

    def prompt_logprobs(self, index: int) -> list[TokenLogprobs] | None:
        """Of this prompt, as `Answer` has them."""
        return self._answers[index].prompt_logprobs

    @property
    def usages(self) -> list[Usage]:
        """By prompt, of those that have finished."""
        return [answer.usage for answer in self._answers if answer.usage is not None]

    def cancel(self) -> None:
        for answer in self._answers:
            answer.cancel()

    async def batches(self) -> AsyncGenerator[tuple[int, list[Delta]]]:
        """Batches of deltas with the index of their prompt, as they come. Raises a GenerateError."""
        if len(self._answers) == 1:
            while batch := await self._answers[0].next_batch():
                yield 0, batch
            return
        arrived: asyncio.Queue[tuple[int, list[Delta]] | Exception] = asyncio.Queue()
        readers = [
            asyncio.create_task(_read(index, answer, arrived)) for index, answer in enumerate(self._answers)
        ]
        num_unfinished = len(readers)
        try:
            while num_unfinished:
                item = await arrived.get()
                if isinstance(item, Exception):
                    raise item
                if item[1]:
                    yield item
                else:
                    num_unfinished -= 1
        finally:
            for reader in readers:
                reader.cancel()


async def _read(
    index: int, answer: Answer, arrived: asyncio.Queue[tuple[int, list[Delta]] | Exception]
) -> None:
    """Pass on every batch, an empty one at the end, or the error that there is instead."""
    try:
        while batch := await answer.next_batch():
            arrived.put_nowait((index, batch))
        arrived.put_nowait((index, []))
    except Exception as error:
        arrived.put_nowait(error)
