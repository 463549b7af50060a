"""`/metrics`, `/live` and `/ready` of a process over HTTP, on a thread of their own.

Only what Prometheus and probes need: one GET per connection, no header that matters. It is an asyncio server,
where a client that dawdles costs no thread. A request has a limit of size and of time, and when there are too
many connections the oldest one makes room, so that nobody can keep the probes out by holding on.
"""

import asyncio
import contextlib
import logging
import socket
import threading
from http import HTTPStatus
from types import TracebackType
from typing import Protocol, Self

from pdengine.transport.addresses import AddressError, join_host_port, split_host_port

logger = logging.getLogger(__name__)

MAX_REQUEST_BYTES = 16 * 2**10  # request line and headers
MAX_CONNECTIONS = 32
CONNECTION_SECONDS = 5.0  # for the request and its answer
TEXT_FORMAT = "text/plain; version=0.0.4; charset=utf-8"  # of Prometheus
PLAIN_TEXT = "text/plain; charset=utf-8"


class Pages(Protocol):
    """What is served. Both are called on the server's thread."""

    def exposition(self) -> bytes:
        """All metrics, in TEXT_FORMAT."""

    def why_not_ready(self) -> str | None:
        """What keeps the process from serving requests, in one line."""


class MetricsServer:
    """Serves from the moment it is made until `close`, or as a context manager.

    Raises AddressError if it cannot listen on `address`. url: without a path, with the port that was taken.
    """

    def __init__(self, address: str, pages: Pages) -> None:
        self._pages = pages
        self._connections: dict[asyncio.StreamWriter, None] = {}  # in the order of their arrival
        host, port = split_host_port("metrics address", address)
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            self._socket = socket.create_server((host, port), family=family)
        except (OSError, UnicodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise AddressError(f"cannot serve metrics on {address}: {reason}") from error
        self.url = f"http://{join_host_port(host, self._socket.getsockname()[1])}"
        self._closing = asyncio.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop listening and drop all connections. Waits; idempotent."""
        with contextlib.suppress(RuntimeError):  # the loop is closed already
            self._loop.call_soon_threadsafe(self._closing.set)
        self._thread.join()

    def _run(self) -> None:
        try:
            with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
                runner.run(self._serve())
        except Exception:
            logger.exception("metrics are not served any more")

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._handle, sock=self._socket, limit=MAX_REQUEST_BYTES)
        try:
            await self._closing.wait()
        finally:
            server.close()
            for writer in self._connections:
                writer.transport.abort()

    async def _handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._connections) == MAX_CONNECTIONS:
            oldest = next(iter(self._connections))
            self._drop(oldest)
        self._connections[writer] = None
        try:
            async with asyncio.timeout(CONNECTION_SECONDS):
                writer.write(await self._answer(reader))
                await writer.drain()
                writer.close()
                await writer.wait_closed()
        except (TimeoutError, ConnectionError, asyncio.IncompleteReadError) as error:
            logger.debug("a request for metrics was dropped: %s", error)
        finally:
            self._drop(writer)

    def _drop(self, writer: asyncio.StreamWriter) -> None:
        """Close a connection at once; what was not sent is lost."""
        self._connections.pop(writer, None)
        writer.transport.abort()

    async def _answer(self, reader: asyncio.StreamReader) -> bytes:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.LimitOverrunError:
            reason = f"a request may have {MAX_REQUEST_BYTES} bytes"
            return _response(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, reason)
        words = head.partition(b"\r\n")[0].split(b" ")
        if len(words) != 3 or not words[2].startswith(b"HTTP/1."):
            return _response(HTTPStatus.BAD_REQUEST, "the request line must be: GET PATH HTTP/1.1")
        method, target, _ = words
        if method not in (b"GET", b"HEAD"):
            return _response(HTTPStatus.NOT_IMPLEMENTED, "only GET and HEAD are answered")
        answer = self._look_up(target.partition(b"?")[0])
        return answer.partition(b"\r\n\r\n")[0] + b"\r\n\r\n" if method == b"HEAD" else answer

    def _look_up(self, path: bytes) -> bytes:
        match path:
            case b"/metrics":
                return _response(HTTPStatus.OK, self._pages.exposition(), TEXT_FORMAT)
            case b"/live":
                return _response(HTTPStatus.OK, "live")
            case b"/ready":
                reason = self._pages.why_not_ready()
                if reason is None:
                    return _response(HTTPStatus.OK, "ready")
                return _response(HTTPStatus.SERVICE_UNAVAILABLE, reason)
        return _response(HTTPStatus.NOT_FOUND, "there are /metrics, /live and /ready")


def _response(status: HTTPStatus, body: str | bytes, content_type: str = PLAIN_TEXT) -> bytes:
    """body: as it is, or a line of text."""
    if isinstance(body, str):
        body = f"{body}\n".encode()
    head = (
        f"HTTP/1.1 {status} {status.phrase}\r\n"
        f"Content-Type: {content_type}\r\n"
        f"Content-Length: {len(body)}\r\n"
        "Connection: close\r\n\r\n"
    )
    return head.encode() + body
