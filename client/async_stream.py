"""One request of the asyncio client, from its first step to its outcome."""

import asyncio
import math
from time import monotonic
from types import TracebackType
from typing import TYPE_CHECKING

import msgspec

from pdengine.client import connection
from pdengine.client.connection import ConnectionLost, Reply, RouterStalled
from pdengine.client.results import (
    Cancelled,
    Completion,
    Delta,
    Failed,
    GenerateError,
    Rejected,
    RouterUnavailable,
    TimedOut,
    choices_of,
)
from pdengine.transport import messages
from pdengine.transport.messages import (
    Accepted,
    Finished,
    Generate,
    Inquire,
    PromptLogprobs,
    TokenLogprobs,
)

if TYPE_CHECKING:
    from pdengine.client.async_client import AsyncClient

GRACE_SECONDS = 5.0  # beyond a request's own timeout, for the router's answer to arrive


class AsyncStream:
    """One request in flight: an asynchronous iterator of Delta. Use it as `async with`, or call `aclose`.

    A stream that is dropped while it runs is cancelled, too, when it is garbage collected. request_id: under
    which the cluster's logs have the request, once it was accepted.
    """

    def __init__(self, client: "AsyncClient", request: Generate, retries: int) -> None:
        self._tag: int | None = None  # of the attempt that is in flight
        self._client = client
        self._request = request
        self._retries_left = retries
        self._retried_after: GenerateError | None = None
        self._deadline: float | None = None
        self._replies: asyncio.Queue[Reply] = asyncio.Queue()
        self._deltas: list[Delta] = []
        self._prompt_logprobs: list[TokenLogprobs] | None = None
        self._finished: Finished | None = None
        self._reading = False
        self._closed = False
        self.request_id = ""

    @property
    def completion(self) -> Completion:
        """The whole answer, once the iteration has ended."""
        if self._finished is None:
            raise RuntimeError("the stream has not ended")
        return Completion(
            choices=choices_of(self._deltas, self._finished.finish_reasons),
            usage=self._finished.usage,
            prefill_worker=self._finished.prefill_worker,
            decode_worker=self._finished.decode_worker,
            attempts=self._finished.attempts,
            transfer=self._finished.transfer,
            request_id=self.request_id,
            prompt_logprobs=self._prompt_logprobs,
        )

    @property
    def prompt_logprobs(self) -> list[TokenLogprobs] | None:
        """Of each token of the prompt but the first, if they were asked for; there with the first delta."""
        return self._prompt_logprobs

    def __aiter__(self) -> "AsyncStream":
        return self

    async def __anext__(self) -> Delta:
        if self._reading:
            raise RuntimeError("the next delta of this stream is being waited for already")
        if self._closed:
            raise StopAsyncIteration
        self._reading = True
        try:
            delta = await self._next_delta()
        except BaseException:
            await self.aclose()
            raise
        finally:
            self._reading = False
        if delta is None:
            await self.aclose()
            raise StopAsyncIteration
        self._deltas.append(delta)
        return delta

    async def aclose(self) -> None:
        """End the request if it has not ended; idempotent."""
        if self._closed:
            return
        self._closed = True
        self._give_up_attempt()
        self._replies.put_nowait(Cancelled("the stream was closed"))  # somebody may be waiting for more
        self._client.wake()  # or for a router

    async def __aenter__(self) -> "AsyncStream":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def __del__(self) -> None:
        if self._tag is not None:
            self._client.abandon(self._tag)

    # -------------------------------------------------------------------------------- attempts

    async def _next_delta(self) -> Delta | None:
        """The next piece of the answer, or None after the last. Raises what the request ended with."""
        while self._finished is None:
            try:
                if self._tag is None:
                    await self._ask()
                delta = self._take(await self._next_reply())
            except (ConnectionLost, Failed) as error:
                self._prepare_retry(error)
            else:
                if delta is not None:
                    return delta
        return None

    async def _ask(self) -> None:
        """Send the request to a router, under a new tag: late words to an older one find nobody."""
        timeout = self._request.timeout
        if self._deadline is None and timeout is not None and 0 < timeout < math.inf:
            self._deadline = monotonic() + timeout
        await self._wait_for_router()
        if self._closed:
            raise Cancelled("the stream was closed")
        if self._deadline is not None:
            timeout = self._seconds_left()
        self._replies = asyncio.Queue()
        self._tag = self._client.open(self._replies.put_nowait)
        self._client.send(msgspec.structs.replace(self._request, tag=self._tag, timeout=timeout))

    async def _wait_for_router(self) -> None:
        try:
            await self._client.wait_connected(unless=lambda: self._closed, at_most=self._seconds_left())
        except RouterUnavailable as error:
            if self._seconds_left() > 0 and self._retried_after is None:
                raise
            reason = error if self._retried_after is None else f"{self._retried_after}; {error}"
            if self._seconds_left() <= 0:
                raise TimedOut(f"no answer within {self._request.timeout:g} s: {reason}") from error
            raise RouterUnavailable(str(reason)) from error
        if self._seconds_left() <= 0:
            raise TimedOut(f"no answer within {self._request.timeout:g} s")

    def _seconds_left(self) -> float:
        return math.inf if self._deadline is None else self._deadline - monotonic()

    def _prepare_retry(self, error: GenerateError) -> None:
        """Raise `error` unless the request may be sent again: as long as nobody has seen a token of it."""
        hopeless = isinstance(error, Failed) and not error.retry
        if hopeless or self._deltas or self._retries_left == 0 or self._closed:
            raise error
        self._retries_left -= 1
        self._retried_after = error
        self._give_up_attempt()
        self._prompt_logprobs = None

    def _give_up_attempt(self) -> None:
        if self._tag is None:
            return
        if self._finished is None:
            # Also after a loss: what was sent is delivered when the connection is up again, and so is this.
            self._client.cancel(self._tag)
        self._client.forget(self._tag)
        self._tag = None

    # --------------------------------------------------------------------------------- replies

    def _take(self, reply: Reply) -> Delta | None:
        """The delta, if it is one. Raises what the request ended with."""
        match reply:
            case messages.Delta(_, text, token_ids, index, finish_reason, logprobs):
                return Delta(text, token_ids, index, finish_reason, logprobs)
            case Accepted(_, request_id):
                self.request_id = request_id
            case PromptLogprobs(_, logprobs):
                self._prompt_logprobs = [*(self._prompt_logprobs or []), *logprobs]
            case Finished():
                self._finished = reply
            case messages.Rejected(_, reason, field):
                raise Rejected(reason, field)
            case messages.Failed(_, reason, retry):
                raise Failed(reason, retry=retry)
            case messages.Aborted(_, "timeout"):
                raise TimedOut(f"the request did not finish within {self._request.timeout:g} s")
            case messages.Aborted():
                raise Cancelled("the request was cancelled")
            case RouterStalled() if self._deltas or not self._retries_left:
                return None  # it may go on
            case GenerateError():
                raise reply
        return None

    async def _next_reply(self) -> Reply:
        """Wait for the router's next word; after a silence ask it whether it still has the request.

        It drops the requests of a client that did not read for long, for instance while it was stopped.
        """
        while self._replies.empty():
            seconds = min(connection.INQUIRE_SECONDS, self._seconds_left() + GRACE_SECONDS)
            try:
                # Not wait_for: in Python 3.11 it swallows a cancellation that meets a reply.
                async with asyncio.timeout(seconds):
                    return await self._replies.get()
            except TimeoutError:
                if self._seconds_left() + GRACE_SECONDS <= 0:
                    raise TimedOut(f"no answer within {self._request.timeout:g} s") from None
            if self._tag is not None:
                self._client.send(Inquire(self._tag))
        return self._replies.get_nowait()
