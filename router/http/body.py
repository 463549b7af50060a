"""The body of a request as it arrives, and what it may cost the others: bytes, memory, time, and the loop."""

import asyncio
import re
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus

from starlette.types import Message, Receive

from pdengine.router.http.errors import RETRY_SECONDS, ApiError

# Nothing else goes on while a body is parsed and validated: up to 0.1 s for as many values as these allow,
# where 16 MiB of brackets take ten. What stands in strings is not counted.
MAX_COMMAS = 2**19
MAX_OPENINGS = 2**16
OPENINGS = (b"[", b"{", b":")
STRING = re.compile(
    rb'"(?:[^"\\]++|\\.)*+("|\\?\Z)', re.DOTALL
)  # of JSON; and how it ends, or goes on in the next piece
SMALL_BODY = 64 * 2**10
REST_PAUSE_SECONDS = 0.02  # after at most 320 KiB


@dataclass(frozen=True)
class BodyLimits:
    """max_bytes: of one body. max_arriving_bytes: in memory of all that have not come to their end, without
    what is SMALL_BODY of each: small ones are always let in. seconds: for a body to arrive. rest_seconds: for
    what is left of it after its answer.
    """

    max_bytes: int
    max_arriving_bytes: int
    seconds: float
    rest_seconds: float


@dataclass
class Arriving:
    """Bytes of all bodies that have not come to their end."""

    num_bytes: int = 0


class Body:
    """Receives a request's body, and then only the client's end. `close` it when nobody wants it any more.

    is_complete: all of it has been received, or there is none. num_commas, num_openings: so far, those that
    separate, or begin, values.
    """

    def __init__(self, receive: Receive, limits: BodyLimits, arriving: Arriving, *, is_empty: bool) -> None:
        self._receive = receive
        self._limits = limits
        self._arriving = arriving
        self._deadline = asyncio.get_running_loop().time() + limits.seconds
        self._num_bytes = 0
        self._num_counted = 0  # in `arriving`
        self._open_string = b""  # the quote of one that goes on in the next piece, and half an escape
        self.num_commas = 0
        self.num_openings = 0
        self.is_complete = is_empty

    async def receive(self) -> Message:
        """Of ASGI. Raises ApiError for a body beyond the limits."""
        if self.is_complete:
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError:
            raise _refusal(
                HTTPStatus.REQUEST_TIMEOUT, f"the body has not arrived within {self._limits.seconds:g} s"
            ) from None
        self.is_complete = not message.get("more_body", False)
        self._check(message.get("body", b""))
        if self.is_complete:
            self.close()
        return message

    async def read_rest(self) -> None:
        """After an answer that did not wait for the body: until that is complete, or the client is gone, or
        the time is over.

        Closing while bytes arrive resets the connection, and most clients would lose the answer with it. So
        the rest is read, but slowly: the client waits for that, and nobody else does.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(self._limits.rest_seconds):
                while not self.is_complete:
                    message = await self._receive()
                    self.is_complete = not message.get("more_body", False)
                    if not self.is_complete:
                        await asyncio.sleep(REST_PAUSE_SECONDS)

    def close(self) -> None:
        """It does not count as arriving any more; idempotent."""
        self._arriving.num_bytes -= self._num_counted
        self._num_counted = 0

    def _check(self, piece: bytes) -> None:
        limits = self._limits
        self._num_bytes += len(piece)
        if self._num_bytes > limits.max_bytes:
            raise too_large(limits.max_bytes)
        if b"\0" in piece:  # it would be parsed as UTF-16 or UTF-32, of which nothing can be counted here
            raise _refusal(HTTPStatus.BAD_REQUEST, "the body must be UTF-8, and there is a zero byte in it")
        values = self._without_strings(piece)
        self.num_commas += values.count(b",")
        self.num_openings += sum(values.count(opening) for opening in OPENINGS)
        if self.num_commas > MAX_COMMAS:
            raise _refusal(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                f"the body has more than {MAX_COMMAS} commas between values, the limit",
            )
        if self.num_openings > MAX_OPENINGS:
            raise _refusal(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                f"the body has more than {MAX_OPENINGS} brackets, braces and colons that open a list, an "
                f"object or a field, the limit",
            )
        if self.is_complete or self._num_bytes <= SMALL_BODY:
            return
        self._arriving.num_bytes += self._num_bytes - SMALL_BODY - self._num_counted
        self._num_counted = self._num_bytes - SMALL_BODY
        if self._arriving.num_bytes > limits.max_arriving_bytes:
            raise _refusal(
                HTTPStatus.SERVICE_UNAVAILABLE,
                f"bodies of more than {limits.max_arriving_bytes} bytes together, the limit, are arriving",
                {"Retry-After": str(RETRY_SECONDS)},
            )

    def _without_strings(self, piece: bytes) -> bytes:
        parts = STRING.split(self._open_string + piece)
        string_ends = parts[1::2]
        is_open = bool(string_ends) and string_ends[-1] != b'"'
        self._open_string = b'"' + string_ends[-1] if is_open else b""
        return b"".join(parts[::2])


def too_large(max_bytes: int) -> ApiError:
    """The error of a body of more bytes than that."""
    return _refusal(
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"the body is larger than {max_bytes} bytes, the limit"
    )


def _refusal(status: int, message: str, headers: dict[str, str] | None = None) -> ApiError:
    # The rest of the body is not read, so the connection can serve no other request.
    return ApiError(status, message, headers={"Connection": "close", **(headers or {})})
