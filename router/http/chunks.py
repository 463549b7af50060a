"""A shorter way out for the chunks of a streamed response, of which there is one per token."""

import asyncio
import weakref
from collections.abc import Mapping
from typing import Any, cast

from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

EXTENSION = "pdengine.chunks"  # in the extensions of an ASGI scope


class ChunkWriter:
    """Writes to a chunked response that has been begun over ASGI, and will be ended so.

    `send` passes all middleware as a coroutine, which costs more than the rest of a token's way; this is
    a call. What is written before the loop's next turn leaves in one chunk: of a router that is ahead, many
    tokens at once. Whoever uses it looks at `is_ready` before each write, and where it is not, flushes and
    sends, since only `send` waits for a client that reads slowly.
    """

    def __init__(self, cycle: RequestResponseCycle, unflushed: "list[ChunkWriter]") -> None:
        """unflushed: those of all connections that wait for the loop's next turn."""
        self._cycle = cycle
        self._waiting: list[bytes] = []
        self._unflushed = unflushed

    @property
    def is_ready(self) -> bool:
        """Whether the head has been sent and the client reads."""
        cycle = self._cycle
        return (
            cycle.chunked_encoding is True
            and not cycle.flow.write_paused
            and not cycle.disconnected
            and not cycle.response_complete
        )

    def write(self, body: bytes) -> None:
        """Have a part of the body, which may not be empty, sent in a moment."""
        if not self._waiting:
            if not self._unflushed:
                asyncio.get_running_loop().call_soon(_flush_all, self._unflushed)
            self._unflushed.append(self)
        self._waiting.append(body)

    def flush(self) -> None:
        """Give what waits to the connection, as one chunk (RFC 9112, section 7.1)."""
        body = b"".join(self._waiting)
        self._waiting.clear()
        transport = self._cycle.transport
        if body and not transport.is_closing():
            transport.write(b"%x\r\n%b\r\n" % (len(body), body))


def _flush_all(unflushed: list[ChunkWriter]) -> None:
    writers = unflushed.copy()
    unflushed.clear()
    for writer in writers:
        writer.flush()


def offer_chunks(cycle: RequestResponseCycle, unflushed: list[ChunkWriter]) -> None:
    """Let whoever answers this request write chunks. unflushed: one list for all requests of a loop."""
    extensions = cast(dict[str, Any], cycle.scope).setdefault("extensions", {})
    # Weakly, for the cycle has the scope: each request would wait for the garbage collection otherwise.
    extensions[EXTENSION] = weakref.ref(cycle), unflushed


def chunk_writer(scope: Mapping[str, Any]) -> ChunkWriter | None:
    """None where another server has made the scope."""
    found, unflushed = scope.get("extensions", {}).get(EXTENSION, (_nothing, []))
    cycle = found()
    return None if cycle is None else ChunkWriter(cycle, unflushed)


def _nothing() -> None:
    return None
