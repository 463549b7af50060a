"""What every request passes before any endpoint sees it: it is counted, its key checked, its body limited."""

import hmac
import logging
import re
from collections import defaultdict
from collections.abc import Collection, Iterable
from hashlib import sha256
from http import HTTPStatus
from time import monotonic

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pdengine.router.http.body import Arriving, Body, BodyLimits, too_large
from pdengine.router.http.errors import LOGGED, ApiError, error_response
from pdengine.router.http.metrics import HttpMetrics
from pdengine.transport.bounded_log import BoundedLog

logger = logging.getLogger(__name__)

OPEN_PATHS = frozenset({"/live", "/ready"})  # for probes, which have no key

REQUEST_ID = b"x-request-id"
OWN_REQUEST_ID = re.compile(rb"[!-~]{1,128}")  # of a client; what can stand in logs and answers
OWN_ID = "pdengine.own_request_id"  # in an ASGI scope: the header's value, or None without one that is taken


class Door:
    """ASGI middleware. endpoints: the paths that are counted by name; all others are counted as one."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        api_keys: Iterable[str],
        limits: BodyLimits,
        metrics: HttpMetrics,
        endpoints: Collection[str],
    ) -> None:
        self._app = app
        self._keys = [_digest(key.encode()) for key in api_keys]
        self._limits = limits
        self._arriving = Arriving()
        self._metrics = metrics
        self._endpoints = endpoints
        self._refused: dict[int, BoundedLog] = defaultdict(lambda: BoundedLog(logger))  # by status

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        began_at = monotonic()
        status = int(HTTPStatus.INTERNAL_SERVER_ERROR)  # if nothing is ever sent
        is_early = False
        headers = dict(scope["headers"])
        given_id = headers.get(REQUEST_ID, b"")
        own_id = scope[OWN_ID] = given_id if OWN_REQUEST_ID.fullmatch(given_id) else None
        is_empty = b"content-length" not in headers and b"transfer-encoding" not in headers
        body = Body(receive, self._limits, self._arriving, is_empty=is_empty)

        async def send_counted(message: Message) -> None:
            nonlocal status, is_early
            if message["type"] == "http.response.start":
                status = message["status"]
                if own_id is not None:
                    others = [header for header in message.get("headers", ()) if header[0] != REQUEST_ID]
                    message = {**message, "headers": [*others, (REQUEST_ID, own_id)]}
            elif not body.is_complete and not message.get("more_body", False):
                is_early = True
                message = {**message, "more_body": True}
            await send(message)

        self._metrics.in_flight.inc()
        try:
            refusal = self._refusal(scope["path"], headers)
            if refusal is None:
                await self._app(scope, body.receive, send_counted)
            else:
                await error_response(refusal)(scope, receive, send_counted)
        finally:
            body.close()
            label = self._label(scope["path"])
            self._metrics.in_flight.dec()
            self._metrics.requests.labels(label, status).inc()
            self._log(scope, label, status, monotonic() - began_at)
        if is_early:
            await body.read_rest()
            await send({"type": "http.response.body", "body": b""})

    def _log(self, scope: Scope, endpoint: str, status: int, seconds: float) -> None:
        """The line of a request that was refused before anything was asked of the router for it."""
        if LOGGED in scope or not HTTPStatus.BAD_REQUEST <= status < HTTPStatus.INTERNAL_SERVER_ERROR:
            return
        host, *_ = scope["client"] or ("",)
        self._refused[status].info(
            "request finished",
            outcome="refused",
            status=status,
            endpoint=endpoint,
            client=host,
            seconds=round(seconds, 3),
        )

    def _label(self, path: str) -> str:
        if path.startswith("/v1/models/"):
            return "/v1/models"
        return path if path in self._endpoints else "other"

    def _refusal(self, path: str, headers: dict[bytes, bytes]) -> ApiError | None:
        if self._keys and path not in OPEN_PATHS and not self._has_key(headers.get(b"authorization", b"")):
            return ApiError(
                HTTPStatus.UNAUTHORIZED,
                "a key is needed: Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        # uvicorn has parsed it: it is a number.
        if int(headers.get(b"content-length", b"0")) > self._limits.max_bytes:
            return too_large(self._limits.max_bytes)
        return None

    def _has_key(self, authorization: bytes) -> bool:
        scheme, _, key = authorization.partition(b" ")
        given = _digest(key.strip())
        # Digests are of one length, and all are compared: the time tells neither length nor place of a match.
        matches = [hmac.compare_digest(given, known) for known in self._keys]
        return scheme.lower() == b"bearer" and any(matches)


def _digest(key: bytes) -> bytes:
    return sha256(key).digest()
