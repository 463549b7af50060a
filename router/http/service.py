"""What the endpoints share: the connection to the router, the tokenizer, and who may ask for how much."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http import HTTPStatus
from math import inf
from time import monotonic, time
from typing import TypeVar

from pdengine.client import AsyncClient, GenerateError, RouterUnavailable
from pdengine.models.config import load_config
from pdengine.models.generation_config import load_sampling_defaults
from pdengine.models.tokenizer import Tokenizer
from pdengine.router.admission import InvalidRequest, check_prompt_length
from pdengine.router.http.config import HttpConfig
from pdengine.router.http.errors import RETRY_SECONDS, ApiError, of_outcome, unavailable
from pdengine.router.http.logprobs import TokenNames
from pdengine.router.http.metrics import HttpMetrics
from pdengine.router.http.prompts import Asked, encode
from pdengine.transport.messages import Status, TokenPrompt

TOKENIZER_THREADS = 4
STATUS_SECONDS = 2.0  # for the router to say how it is
STATUS_AGE_SECONDS = 0.5  # what it has said is believed for so long

T = TypeVar("T")


class Service:
    """Make it on the loop that serves; `close` it there. Raises CheckpointError or AddressError."""

    def __init__(self, config: HttpConfig) -> None:
        self.config = config
        self.model = config.served_model_name
        self.created = int(time())
        self.metrics = HttpMetrics()
        self.tokenizer = Tokenizer.load(config.model_directory)
        self.sampling_defaults = load_sampling_defaults(config.model_directory)
        self.token_names = TokenNames(self.tokenizer)
        self.max_model_len = load_config(config.model_directory).max_position_embeddings
        self._threads = ThreadPoolExecutor(TOKENIZER_THREADS, thread_name_prefix="http-tokenizer")
        self.client = AsyncClient(
            config.router_addresses, keys=config.router_keys, connect_timeout=config.connect_seconds
        )
        self._num_answers = 0
        self._asking = asyncio.Lock()
        self._status: Status | str = ""  # or why there is none
        self._asked_at = -inf

    async def close(self) -> None:
        await self.client.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def check_model(self, name: str | None) -> None:
        """Raise ApiError unless `name` is the served model's; None is."""
        if name not in (None, self.model):
            raise ApiError(
                HTTPStatus.NOT_FOUND,
                f"model {name!r} is not served here, {self.model!r} is",
                param="model",
                code="model_not_found",
            )

    @contextmanager
    def admitted(self, num_prompts: int, n: int) -> Iterator[None]:
        """While n answers to each of these prompts are written. Raises ApiError if that is too many."""
        config = self.config
        if num_prompts > config.max_prompts:
            raise ApiError(
                HTTPStatus.BAD_REQUEST,
                f"prompt has {num_prompts} prompts in it, the limit is {config.max_prompts}",
                param="prompt",
            )
        num_answers = num_prompts * n
        if num_answers > config.max_in_flight:
            raise ApiError(
                HTTPStatus.BAD_REQUEST,
                f"{num_answers} answers are asked for, n to each prompt, the limit of all that are written "
                f"at once is {config.max_in_flight}",
                param="n" if n > 1 else "prompt",
            )
        if self._num_answers + num_answers > config.max_in_flight:
            raise ApiError(
                HTTPStatus.TOO_MANY_REQUESTS,
                f"{self._num_answers} answers are being written and {num_answers} more are asked for, "
                f"the limit is {config.max_in_flight}",
                code="too_many_requests",
                headers={"Retry-After": str(RETRY_SECONDS)},
            )
        self._num_answers += num_answers
        try:
            yield
        finally:
            self._num_answers -= num_answers

    async def to_tokens(
        self, prompt: Asked, field: str, *, add_special_tokens: bool | None = None
    ) -> TokenPrompt:
        """Tokenize here and not in the router: there may be several of these processes. Raises ApiError.

        field: what the client calls the prompt. add_special_tokens: None is what is right for this kind.
        """
        try:
            if not isinstance(prompt, TokenPrompt):
                token_ids = await self.on_thread(
                    lambda: encode(prompt, self.tokenizer, add_special_tokens=add_special_tokens)
                )
                prompt = TokenPrompt(token_ids)
            # What is far too long the router would take for no message at all, and not say whose it was.
            check_prompt_length(len(prompt.token_ids), self.max_model_len)
        except InvalidRequest as error:
            raise of_outcome(error, field) from error
        return prompt

    async def on_thread(self, function: Callable[[], T]) -> T:
        """Run what takes long, as tokenizing long text does, beside the loop."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, function)

    async def status(self) -> Status:
        """How the router is, or was a moment ago. Of several, one that has workers if any has, and of those
        the one whose workers take the shortest requests: any of them may get the next one. Raises ApiError if
        none answers."""
        async with self._asking:
            if monotonic() - self._asked_at > STATUS_AGE_SECONDS:
                self._status = await self._ask_routers()
                self._asked_at = monotonic()
            if isinstance(self._status, str):
                raise unavailable(self._status)
            return self._status

    async def _ask_routers(self) -> Status | str:
        addresses: Sequence[str | None] = self.client.usable_addresses or [None]
        replies = await asyncio.gather(*(self._status_of(address) for address in addresses))
        statuses = [reply for reply in replies if isinstance(reply, Status)]
        if not statuses:
            return "; ".join(reply for reply in replies if isinstance(reply, str))
        return min(
            [status for status in statuses if status.workers] or statuses,
            key=lambda status: inf if status.max_request_tokens is None else status.max_request_tokens,
        )

    async def _status_of(self, address: str | None) -> Status | str:
        """What the router there says, None being any; or why it says nothing."""
        try:
            async with asyncio.timeout(STATUS_SECONDS):
                return await self.client.status(address)
        except (TimeoutError, RouterUnavailable):
            return f"no router answers at {address or ', '.join(self.config.router_addresses)}"
        except GenerateError as error:
            return str(error)

    async def max_request_tokens(self) -> int:
        """Tokens of prompt and answer together that the workers take. Raises ApiError if there are none."""
        limit = (await self.ready_status()).max_request_tokens
        return self.max_model_len if limit is None else limit

    async def ready_status(self) -> Status:
        """The router's status. Raises ApiError also if there is no worker behind it."""
        status = await self.status()
        if not status.workers:
            raise unavailable("no worker has joined the router yet")
        return status
