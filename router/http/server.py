"""The HTTP server on a thread of its own, with its own event loop.

So it can share the process of a router: what is parsed here, and slow clients, do not wait on the router's
loop. Both still share the interpreter's lock; a process of its own shares nothing.
"""

import asyncio
import logging
import socket
import threading
from collections.abc import Callable
from time import monotonic
from types import TracebackType
from typing import Self

import httptools
import uvicorn
import uvloop
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from pdengine.router.http.app import make_app
from pdengine.router.http.chunks import ChunkWriter, offer_chunks
from pdengine.router.http.config import HttpConfig
from pdengine.router.http.service import Service
from pdengine.transport.addresses import AddressError, split_host_port
from pdengine.transport.bounded_log import BoundedLog

logger = logging.getLogger(__name__)

BACKLOG = 2048
KEEP_ALIVE_SECONDS = 75  # longer than the 60 s for which proxies usually keep connections
MAX_HEAD_BYTES = 64 * 2**10
MAX_PIPELINED = 16
TURN_SECONDS = 0.25


class HttpServer:
    """Listens when it is made, serves after `start` until `close`; or as a context manager.

    Raises AddressError if it cannot listen. url: without a path, with the port that was taken. on_failure: is
    called on the server's thread if it ends by itself; `error` says why.
    """

    def __init__(self, config: HttpConfig, on_failure: Callable[[], None] = lambda: None) -> None:
        self._config = config
        self._on_failure = on_failure
        host, port = split_host_port("HTTP address", config.address)
        self._socket = _listen(config.address, host, port, config.write_seconds)
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{self._socket.getsockname()[1]}"
        self.error: BaseException | None = None
        self._server: uvicorn.Server | None = None
        self._closing = False
        self._turned_at = monotonic()
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, name="http", daemon=True)

    def start(self) -> None:
        """Serve. Returns when requests are answered; raises what prevents it, such as CheckpointError."""
        self._thread.start()
        self._started.wait()
        if self.error is not None:
            self._thread.join()
            raise self.error

    def close(self) -> None:
        """Stop listening, and end when all requests have ended or have had their time. Waits; idempotent."""
        self._closing = True
        if self._server is not None:
            self._server.should_exit = True
        if self._thread.ident is not None:
            self._thread.join()
        self._socket.close()

    def loop_age(self) -> float:
        """Seconds since the server's loop last turned: well under a second unless it hangs."""
        return monotonic() - self._turned_at

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self) -> None:
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(self._serve())
        except BaseException as error:
            self.error = error
            if self._started.is_set():
                logger.exception("HTTP is not served any more")
        finally:
            self._started.set()
            if not self._closing:
                self._on_failure()

    async def _serve(self) -> None:
        service = Service(self._config)
        turning = asyncio.create_task(self._turn())
        try:
            self._server = _Server(self._uvicorn_config(service), self._started)
            if not self._closing:
                await self._server.serve(sockets=[self._socket])
        finally:
            turning.cancel()
            await service.close()

    async def _turn(self) -> None:
        while True:
            self._turned_at = monotonic()
            await asyncio.sleep(TURN_SECONDS)

    def _uvicorn_config(self, service: Service) -> uvicorn.Config:
        return uvicorn.Config(
            make_app(service),
            http=_protocol(self._config.head_seconds),
            ws="none",
            lifespan="off",
            log_config=None,
            log_level=logging.WARNING,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            backlog=BACKLOG,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=max(1, round(self._config.drain_seconds)),
        )


class _Server(uvicorn.Server):
    """Says when it has started."""

    def __init__(self, config: uvicorn.Config, has_started: threading.Event) -> None:
        super().__init__(config)
        self._has_started = has_started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._has_started.set()


def _protocol(head_seconds: float) -> type[HttpToolsProtocol]:
    """uvicorn's protocol, with limits of time and of size that it lacks: for the head of a request, for what
    is in a body but no part of it (trailers), and for a body that is not complete when its response is. A
    client that sends several requests at once and leaves ends the one that is being answered. What is no HTTP
    is told in a line every few seconds, not in one each.
    """
    refused = BoundedLog(logger)
    unflushed: list[ChunkWriter] = []

    class Protocol(HttpToolsProtocol):
        _head_bytes = 0  # or of trailers and chunk extensions, since the body last went on
        _head_deadline: asyncio.TimerHandle | None = None
        _answered: RequestResponseCycle | None = None  # now; `cycle` is the one that came last

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._expect_head()

        def connection_lost(self, exc: Exception | None) -> None:
            self._end_head()
            if self._answered is not None and not self._answered.response_complete:
                self._answered.disconnected = True
                self._answered.message_event.set()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            self._unset_keepalive_if_required()
            self._head_bytes += len(data)
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade:
                pass  # to a protocol that is not spoken here: the request is answered as it is
            except httptools.HttpParserError as error:
                self._refuse(f"this is no HTTP: {error}")
                return
            # Of the bytes since the head began, those that came with its end may be of the body.
            if self._head_bytes <= MAX_HEAD_BYTES:
                return
            if self._head_deadline is not None:
                self._refuse(f"the head of a request may have {MAX_HEAD_BYTES} bytes")
            elif self.cycle is not None and self.cycle.more_body:
                self.transport.close()  # the parser would keep one long trailer whole

        def on_message_begin(self) -> None:
            if self._head_deadline is None:
                self._expect_head()
            super().on_message_begin()

        def on_header(self, name: bytes, value: bytes) -> None:
            if self._head_deadline is not None:  # else it is a trailer, which nobody reads
                super().on_header(name, value)

        def on_headers_complete(self) -> None:
            self._end_head()
            super().on_headers_complete()
            offer_chunks(self.cycle, unflushed)
            if not self.pipeline:
                self._answered = self.cycle
            elif len(self.pipeline) <= MAX_PIPELINED:
                self.flow.resume_reading()  # or nobody would notice that the client leaves

        def on_body(self, body: bytes) -> None:
            self._head_bytes = 0
            super().on_body(body)

        def on_response_complete(self) -> None:
            is_last = not self.pipeline  # pipelined requests follow a complete one
            if self.pipeline:
                self._answered, _ = self.pipeline[-1]
            super().on_response_complete()
            if is_last and self.cycle.more_body:
                self.transport.close()  # the body has had its time

        def _refuse(self, reason: str) -> None:
            host, *_ = self.client or ("nobody",)
            refused.warning("a client at %s is disconnected: %s", host, reason)
            self.send_400_response(reason)

        def _expect_head(self) -> None:
            self._head_bytes = 0
            self._head_deadline = self.loop.call_later(head_seconds, self.transport.close)

        def _end_head(self) -> None:
            if self._head_deadline is not None:
                self._head_deadline.cancel()
                self._head_deadline = None
            self._head_bytes = 0

    return Protocol


def _listen(address: str, host: str, port: int, write_seconds: float) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family, backlog=BACKLOG)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise AddressError(f"cannot serve HTTP on {address}: {reason}") from error
    # Accepted connections inherit it: the kernel drops one whose peer acknowledges, or reads, nothing for so
    # long (RFC 5482; Linux counts a closed window too), and what it asked for is cancelled.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(write_seconds * 1000))
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener
