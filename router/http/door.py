"""What every request passes before any endpoint sees it: it is counted, its key checked, its body limited."""

import asyncio
import hmac
from collections.abc import Collection, Iterable
from hashlib import sha256
from http import HTTPStatus

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pdengine.router.http.errors import ApiError, error_response
from pdengine.router.http.metrics import HttpMetrics

OPEN_PATHS = frozenset({"/live", "/ready"})  # for probes, which have no key


class Door:
    """ASGI middleware. endpoints: the paths that are counted by name; all others are counted as one."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        api_keys: Iterable[str],
        max_body_bytes: int,
        body_seconds: float,
        metrics: HttpMetrics,
        endpoints: Collection[str],
    ) -> None:
        self._app = app
        self._keys = [_digest(key.encode()) for key in api_keys]
        self._max_body_bytes = max_body_bytes
        self._body_seconds = body_seconds
        self._metrics = metrics
        self._endpoints = endpoints

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        status = int(HTTPStatus.INTERNAL_SERVER_ERROR)  # if nothing is ever sent

        async def send_counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self._metrics.in_flight.inc()
        try:
            refusal = self._refusal(scope)
            if refusal is None:
                body = _LimitedBody(receive, self._max_body_bytes, self._body_seconds)
                await self._app(scope, body.receive, send_counted)
            else:
                await error_response(refusal)(scope, receive, send_counted)
        finally:
            self._metrics.in_flight.dec()
            self._metrics.requests.labels(self._label(scope["path"]), status).inc()

    def _label(self, path: str) -> str:
        if path.startswith("/v1/models/"):
            return "/v1/models"
        return path if path in self._endpoints else "other"

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers = {
            name: value for name, value in scope["headers"] if name in (b"authorization", b"content-length")
        }
        if (
            self._keys
            and scope["path"] not in OPEN_PATHS
            and not self._has_key(headers.get(b"authorization", b""))
        ):
            return ApiError(
                HTTPStatus.UNAUTHORIZED,
                "a key is needed: Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        # uvicorn has parsed it: it is a number.
        if int(headers.get(b"content-length", b"0")) > self._max_body_bytes:
            return _too_large(self._max_body_bytes)
        return None

    def _has_key(self, authorization: bytes) -> bool:
        scheme, _, key = authorization.partition(b" ")
        given = _digest(key.strip())
        # Digests are of one length, and all are compared: the time tells neither length nor place of a match.
        matches = [hmac.compare_digest(given, known) for known in self._keys]
        return scheme.lower() == b"bearer" and any(matches)


class _LimitedBody:
    """Receives a request's body, which has a limit of size and of time; and then only the client's end."""

    def __init__(self, receive: Receive, max_bytes: int, seconds: float) -> None:
        self._receive = receive
        self._max_bytes = max_bytes
        self._bytes_left = max_bytes
        self._seconds = seconds
        self._deadline = asyncio.get_running_loop().time() + seconds
        self._complete = False

    async def receive(self) -> Message:
        if self._complete:
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError:
            raise ApiError(
                HTTPStatus.REQUEST_TIMEOUT,
                f"the body has not arrived within {self._seconds:g} s",
                headers={"Connection": "close"},
            ) from None
        self._bytes_left -= len(message.get("body", b""))
        if self._bytes_left < 0:
            raise _too_large(self._max_bytes)
        self._complete = not message.get("more_body", False)
        return message


def _too_large(max_bytes: int) -> ApiError:
    # The rest of the body is not read, so the connection can serve no other request.
    return ApiError(
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        f"the body is larger than {max_bytes} bytes, the limit",
        headers={"Connection": "close"},
    )


def _digest(key: bytes) -> bytes:
    return sha256(key).digest()
