"""Requests in flight at the router: what it says of them, passed on at once or in batches.

At thousands of tokens per second it is this that counts: no task is woken for a token that can be passed on
the moment that it comes, and one that is woken takes all that is there.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from functools import partial
from time import monotonic

import msgspec

from pdengine.client import AsyncClient, Cancelled, Failed, Rejected
from pdengine.client.connection import INQUIRE_SECONDS, ConnectionLost, Listener, Reply, RouterStalled
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

RETRIES = 3  # at other routers


class Answer:
    """The answers to one prompt, on their way.

    request_id: the router's, once it has accepted the request. prompt_logprobs: of the prompt's tokens but
    the first, if they were asked for; there before the first delta. usage: once it has finished.
    """

    def __init__(self, client: AsyncClient, request: Generate, metrics: HttpMetrics, asked_at: float) -> None:
        self._client = client
        self._request = request
        self._metrics = metrics
        self._asked_at = asked_at
        self._tag: int | None = None
        self._last_at: dict[int, float] = {}  # by choice
        self._heard = False
        self._silence: asyncio.TimerHandle | None = None
        self._listener: Listener = _deaf
        self._retries_left = RETRIES
        self.request_id: str | None = None
        self.prompt_logprobs: list[TokenLogprobs] | None = None
        self.usage: Usage | None = None

    def ask(self, listener: Listener) -> None:
        """Send the request. listener: gets what the router says of it. Raises a GenerateError."""
        self._listener = listener
        self._tag = self._client.open(listener)
        try:
            self._client.send(msgspec.structs.replace(self._request, tag=self._tag))
        except ValueError as error:  # larger than a message may be
            self._forget()
            raise Rejected(str(error), "prompt") from error
        self._heard = True
        self._break_silence()

    def ask_elsewhere(self, error: GenerateError) -> bool:
        """Send the request again, if it is the router that failed, no token has come and another router is
        there at once. Returns whether it has been tried: what goes wrong then, the listener is told."""
        of_router = isinstance(error, ConnectionLost) or (isinstance(error, Failed) and error.retry)
        if not of_router or self._last_at or not self._retries_left or not self._client.has_usable_router:
            return False
        self._retries_left -= 1
        self.cancel()
        self.request_id = self.prompt_logprobs = None
        try:
            self.ask(self._listener)
        except GenerateError as failure:
            self._listener(failure)
        return True

    def cancel(self) -> None:
        """End the request if it has not ended; idempotent."""
        if self._tag is not None:
            self._client.cancel(self._tag)
            self._forget()

    def end(self) -> None:
        """Cancel, and let go of the listener: if it has this, both would wait for the garbage collection."""
        self.cancel()
        self._listener = _deaf

    def observe(self, delta: Delta) -> None:
        """Count when it came."""
        now = monotonic()
        self._heard = True
        last_at = self._last_at.get(delta.index)
        if last_at is not None:
            self._metrics.inter_token_latency.observe(now - last_at)
        elif not self._last_at:
            self._metrics.time_to_first_token.observe(now - self._asked_at)
        self._last_at[delta.index] = now

    def take(self, reply: Reply) -> None:
        """Note what is no delta. Raises what the request ended with, a GenerateError."""
        self._heard = True
        match reply:
            case Accepted(_, request_id):
                self.request_id = request_id
            case PromptLogprobs(_, logprobs):
                self.prompt_logprobs = logprobs
            case Finished(usage=usage):
                self.usage = usage
                self._forget()
            case messages.Rejected(_, reason, field):
                raise Rejected(reason, field)
            case messages.Failed(_, reason, retry):
                raise Failed(reason, retry=retry)
            case messages.Aborted(cause=cause):
                raise Cancelled(f"the request was ended: {cause}")
            case GenerateError():
                raise reply

    def _forget(self) -> None:
        if self._tag is not None:
            self._client.forget(self._tag)
            self._tag = None
        if self._silence is not None:
            self._silence.cancel()

    def _break_silence(self) -> None:
        """Every so often: ask the router whether it still has the request, if it said nothing since."""
        if self._tag is None:
            return
        if not self._heard:
            try:
                self._client.send(Inquire(self._tag))
            except GenerateError as error:
                self._listener(error)
                return
        self._heard = False
        loop = asyncio.get_running_loop()
        self._silence = loop.call_later(INQUIRE_SECONDS, self._break_silence)


class Answers:
    """The answers to all prompts of one request. `cancel` them in the end.

    take_at_once: may be set to what is offered a delta, with the index of its prompt, the moment that it
    comes: as long as `batches` is waited for, so that none comes before an older one. Returns whether it took
    the delta; if not, or if it raises, the delta is in the next batch.
    """

    def __init__(
        self, client: AsyncClient, requests: Sequence[Generate], metrics: HttpMetrics, asked_at: float
    ) -> None:
        self._client = client
        self._answers = [Answer(client, request, metrics, asked_at) for request in requests]
        self._waiting: list[tuple[int, Reply]] = []  # by the index of the prompt, what nobody has taken yet
        self._arrived = asyncio.Event()
        self._is_read = False  # all that came has been taken, and somebody waits for more
        self._cancelled = False
        self.take_at_once: Callable[[int, Delta], bool] = _never

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
        """End what has not ended, and wake whoever waits for it; idempotent."""
        self._cancelled = True
        for answer in self._answers:
            answer.end()
        self._is_read = False
        self.take_at_once = _never
        self._waiting.clear()
        self._arrived.set()

    async def batches(self) -> AsyncGenerator[tuple[int, list[Delta]]]:
        """Ask, and give all deltas that are there of a prompt, with its index, until all have finished.

        Raises what a request ended with, a GenerateError, when all that came before has been given.
        """
        await self._client.wait_connected()
        for index, answer in enumerate(self._answers):
            self._raise_if_cancelled()
            answer.ask(partial(self._hear, index))
        while len(self.usages) < len(self._answers):
            self._is_read = not self._waiting
            await self._arrived.wait()
            self._arrived.clear()
            self._raise_if_cancelled()
            deltas, error = self._take_waiting()
            for item in deltas.items():
                yield item
            if error is not None:
                try:
                    raise error.with_traceback(None)
                finally:
                    del error  # its traceback has this frame: both would wait for the garbage collection

    def _take_waiting(self) -> tuple[dict[int, list[Delta]], GenerateError | None]:
        """The deltas that are there, by prompt, and the error that came after them, if one did."""
        waiting, self._waiting = self._waiting, []
        deltas: dict[int, list[Delta]] = {}
        moved: set[int] = set()
        for index, reply in waiting:
            if index in moved:
                continue  # a late word of the router that has lost it
            answer = self._answers[index]
            if isinstance(reply, Delta):
                answer.observe(reply)
                deltas.setdefault(index, []).append(reply)
                continue
            try:
                answer.take(reply)
            except GenerateError as error:
                if answer.ask_elsewhere(error):
                    moved.add(index)
                elif not isinstance(error, RouterStalled):  # then it may go on
                    return deltas, error
        return deltas, None

    def _hear(self, index: int, reply: Reply) -> None:
        if self._is_read and isinstance(reply, Delta) and self._passed_on(index, reply):
            self._answers[index].observe(reply)
            return
        self._is_read = False
        self._waiting.append((index, reply))
        self._arrived.set()

    def _passed_on(self, index: int, delta: Delta) -> bool:
        try:
            return self.take_at_once(index, delta)
        except Exception:  # it would end the connection to the router; so it is raised where it is read
            return False

    def _raise_if_cancelled(self) -> None:
        if self._cancelled:
            raise Cancelled("the request was cancelled")


def _never(_index: int, _delta: Delta) -> bool:
    return False


def _deaf(_reply: Reply) -> None:
    pass
