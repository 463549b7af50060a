"""The blocking client: the asyncio client on a thread of its own."""

import asyncio
import concurrent.futures
import threading
from collections.abc import Coroutine, Sequence
from types import TracebackType
from typing import Any, TypeVar, Unpack

from pdengine.client.arguments import GenerateOptions
from pdengine.client.async_client import CONNECT_SECONDS, DEFAULT_ADDRESS, RETRIES, AsyncClient
from pdengine.client.async_stream import AsyncStream
from pdengine.client.results import Cancelled, Completion, Delta, PromptLike
from pdengine.transport.keys import KeysLike
from pdengine.transport.messages import Status, TokenLogprobs

T = TypeVar("T")


class Client:
    """A client of the router at `address`, or of several; may be shared by threads. Use it as `with`, or call
    `close`. The arguments are those of AsyncClient."""

    def __init__(
        self,
        address: str | Sequence[str] = DEFAULT_ADDRESS,
        *,
        connect_timeout: float = CONNECT_SECONDS,
        retries: int = RETRIES,
        keys: KeysLike = None,
    ) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="pdengine-client", daemon=True)
        self._thread.start()
        self._closed = False
        self._lock = threading.Lock()  # once `_closed` is set, the loop gets no more coroutines
        try:
            self._client = self.wait(self._make_client(address, connect_timeout, retries, keys))
        except BaseException:
            self._closed = True
            self._stop_loop()
            raise

    def __enter__(self) -> "Client":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Cancel what is in flight and disconnect; idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        try:
            asyncio.run_coroutine_threadsafe(self._shut_down(), self._loop).result()
        finally:
            self._stop_loop()

    @property
    def closed(self) -> bool:
        return self._closed

    def generate(self, prompt: PromptLike, **options: Unpack[GenerateOptions]) -> Completion:
        """The whole answer to `prompt`, or all `n` of them. GenerateOptions says what the arguments are.

        Raises Rejected, Failed, TimedOut, Cancelled or RouterUnavailable; TypeError or ValueError for
        arguments that no router could understand.
        """
        return self.wait(self._client.generate(prompt, **options))

    def stream(self, prompt: PromptLike, **options: Unpack[GenerateOptions]) -> "Stream":
        """Like `generate`, but the answer comes as an iterator of Delta; several answers come interleaved.
        Closing it cancels the request."""
        return Stream(self, self._client.stream(prompt, **options))

    def status(self, address: str | None = None) -> Status:
        """The workers that have joined the router at `address`, and their load; by default, of any router
        that is connected.

        Raises RouterUnavailable, or ValueError for an address that is not this client's.
        """
        return self.wait(self._client.status(address))

    def wait(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the client's thread; if this thread is interrupted, it is cancelled there."""
        with self._lock:
            if self._closed:
                coroutine.close()
                raise RuntimeError("the client is closed")
            future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise Cancelled("the client was closed") from None
        except BaseException:
            future.cancel()
            raise

    @staticmethod
    async def _make_client(
        address: str | Sequence[str], connect_timeout: float, retries: int, keys: KeysLike
    ) -> AsyncClient:
        return AsyncClient(address, connect_timeout=connect_timeout, retries=retries, keys=keys)

    async def _shut_down(self) -> None:
        """Close the client, and end whatever other threads still wait for."""
        await self._client.close()
        waiting = asyncio.all_tasks() - {asyncio.current_task()}
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)

    def _stop_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class Stream:
    """One request in flight: an iterator of Delta. Use it as `with`, or call `close`; any thread may.

    A stream that is dropped while it runs is cancelled, too, when it is garbage collected.
    """

    def __init__(self, client: Client, stream: AsyncStream) -> None:
        self._client = client
        self._stream = stream

    @property
    def completion(self) -> Completion:
        """The whole answer, once the iteration has ended."""
        return self._stream.completion

    @property
    def prompt_logprobs(self) -> list[TokenLogprobs] | None:
        """Of each token of the prompt but the first, if they were asked for; there with the first delta."""
        return self._stream.prompt_logprobs

    @property
    def request_id(self) -> str:
        """Under which the cluster's logs have the request, once it was accepted."""
        return self._stream.request_id

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> Delta:
        delta = self._client.wait(self._next())
        if delta is None:
            raise StopIteration
        return delta

    def close(self) -> None:
        """End the request if it has not ended; idempotent."""
        if not self._client.closed:
            self._client.wait(self._stream.aclose())

    def __enter__(self) -> "Stream":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def _next(self) -> Delta | None:
        # StopAsyncIteration must not cross from one thread's loop to another: None stands for it.
        return await anext(self._stream, None)
