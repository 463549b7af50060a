"""Tokens on the short way out of the HTTP server; on the long one for a client that does not read."""

import asyncio
import gc
import json
import socket
import weakref
from collections.abc import Mapping
from io import BytesIO
from types import SimpleNamespace
from typing import Any

import pytest
from fake_cluster import DEADLINE_SECONDS, on_event_loop, token_update
from http_service import TEXT, error_of, events_of, served
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from pdengine.models.demo.facts import checkpoint_directory
from pdengine.models.tokenizer import Tokenizer
from pdengine.router.http import completions, server
from pdengine.router.http.answers import Answers
from pdengine.router.http.chunks import ChunkWriter, chunk_writer, offer_chunks
from pdengine.router.http.logprobs import TokenNames
from pdengine.router.http.metrics import LATENCY_BUCKETS, LatencyHistogram
from pdengine.router.http.shapes import ChatShape, CompletionShape
from pdengine.transport.messages import Delta, FinishReason, StepTokens, WorkFailed

NAMES = TokenNames(Tokenizer.load(checkpoint_directory()))
NUM_CHOICES, NUM_TOKENS = 32, 1000  # more bytes than the buffers of a connection hold


class Cycle:
    """What a ChunkWriter sees of a request that uvicorn answers: its head is sent, its client reads."""

    def __init__(self) -> None:
        self.scope: dict[str, Any] = {}
        self.written = b""
        self.chunked_encoding: bool | None = True
        self.disconnected = False
        self.response_complete = False
        self.flow = SimpleNamespace(write_paused=False)
        self.transport = self

    def is_closing(self) -> bool:
        return self.disconnected

    def write(self, data: bytes) -> None:
        self.written += data


@on_event_loop
async def test_what_is_written_in_one_turn_of_the_loop_is_one_chunk() -> None:
    unflushed: list[ChunkWriter] = []
    cycles = [Cycle(), Cycle()]
    for cycle in cycles:
        offer_chunks(cycle, unflushed)  # type: ignore[arg-type]
    writers = [found for cycle in cycles if (found := chunk_writer(cycle.scope)) is not None]
    assert [writer.is_ready for writer in writers] == [True, True]
    for cycle, writer in zip(cycles, writers, strict=True):
        for _ in range(2):
            writer.write(b"x" * 10)
        assert cycle.written == b""
    await asyncio.sleep(0)
    assert [cycle.written for cycle in cycles] == [b"14\r\n" + b"x" * 20 + b"\r\n"] * 2
    writer.write(b"y")
    writer.flush()
    await asyncio.sleep(0)
    assert cycles[1].written.endswith(b"1\r\ny\r\n"), "and in the next turn another one, once"
    writer.write(b"z")
    cycles[1].disconnected = True
    await asyncio.sleep(0)
    assert cycles[1].written.endswith(b"y\r\n")
    assert chunk_writer({"extensions": {}}) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"chunked_encoding": None},
        {"chunked_encoding": False},
        {"disconnected": True},
        {"response_complete": True},
        {"flow": SimpleNamespace(write_paused=True)},
    ],
)
def test_nothing_is_written_before_the_head_nor_to_who_does_not_read(changes: dict[str, Any]) -> None:
    cycle = Cycle()
    vars(cycle).update(changes)
    assert not ChunkWriter(cycle, []).is_ready  # type: ignore[arg-type]


@given(
    st.text(),
    st.integers(0, 200),
    st.booleans(),
    st.booleans(),
    st.sampled_from([ChatShape, CompletionShape]),
)
def test_events_from_prepared_parts_are_those_that_are_encoded_whole(
    text: str, index: int, includes: bool, counts: bool, kind: type[ChatShape | CompletionShape]
) -> None:
    shape = kind(
        'id "1"',
        "a/model",
        5,
        NAMES,
        includes_usage=includes,
        counts_usage=counts,
        returns_token_ids=False,
    )
    shape.opening(index, [1, 2], None)
    prepared = [shape.event(index, Delta(7, each, [], index)) for each in ("first", text)]
    for event, expected_text in zip(prepared, ("first", text), strict=True):
        whole = json.loads(
            shape.event(index, Delta(7, expected_text, [], index, "length")).removeprefix(b"data: ")
        )
        whole["choices"][0]["finish_reason"] = None
        assert event.endswith(b"}\n\n")
        assert event.count(b"\n") == 2, "one line"
        assert json.loads(event.removeprefix(b"data: ")) == whole


@given(st.lists(st.sampled_from([0.0, 7.0, *LATENCY_BUCKETS]) | st.floats(0, 10)))
def test_the_histogram_is_exposed_as_that_of_the_library(values: list[float]) -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    histogram = LatencyHistogram("latency", "Of it.", buckets=LATENCY_BUCKETS, registry=ours)
    reference = Histogram("latency", "Of it.", buckets=LATENCY_BUCKETS, registry=theirs)
    for value in values:
        histogram.observe(value)
        reference.observe(value)
    lines = generate_latest(theirs).decode().splitlines()
    assert generate_latest(ours).decode().splitlines() == [line for line in lines if "_created" not in line]


@on_event_loop
async def test_what_a_request_needed_is_gone_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the garbage collection, which is rare; also what a connection's next request replaces."""
    kept: list[weakref.ref[object]] = []
    cycles: list[weakref.ref[object]] = []

    class KeptAnswers(Answers):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            kept.append(weakref.ref(self))

    def offer_kept(cycle: RequestResponseCycle, unflushed: list[ChunkWriter]) -> None:
        cycles.append(weakref.ref(cycle))
        offer_chunks(cycle, unflushed)

    def kept_writer(scope: Mapping[str, Any]) -> ChunkWriter | None:
        writer = chunk_writer(scope)
        assert writer is not None
        kept.append(weakref.ref(writer))
        return writer

    monkeypatch.setattr(completions, "Answers", KeptAnswers)
    monkeypatch.setattr(completions, "chunk_writer", kept_writer)
    monkeypatch.setattr(server, "offer_chunks", offer_kept)
    async with served() as service:
        gc.disable()
        try:
            for stream in (False, True):
                answer = service.start(max_tokens=2, stream=stream)
                work = await service.work()
                service.worker.send_tokens(work, 300, 301, finish_reason="length")
                assert (await answer).status_code == 200
                answer = service.start(stream=stream)
                work = await service.work()
                service.worker.send(WorkFailed(work.request_id, work.attempt, "out of luck", retry=False))
                error_of(await answer, 503)
            for _ in range(2):
                assert (await service.client.get("/live")).status_code == 200
            assert len(kept) >= 8
            assert len(cycles) == 6
            async with asyncio.timeout(DEADLINE_SECONDS):
                while any(ref() is not None for ref in [*kept, *cycles[:-1]]):
                    await asyncio.sleep(0.001)  # the server's thread may not be through
        finally:
            gc.enable()


async def read_all(connection: socket.socket) -> bytes:
    """What is left to read of a connection whose server closes it."""
    loop = asyncio.get_running_loop()
    parts = []
    async with asyncio.timeout(DEADLINE_SECONDS):
        while part := await loop.sock_recv(connection, 2**20):
            parts.append(part)
    return b"".join(parts)


def dechunked(response: bytes) -> bytes:
    """The body of a chunked response (RFC 9112, section 7.1)."""
    rest = BytesIO(response)
    while rest.readline() != b"\r\n":
        pass  # the head
    body = []
    while size := rest.readline():
        body.append(rest.read(int(size, 16)))
        assert rest.read(2) == b"\r\n"
    return b"".join(body)


@on_event_loop
async def test_a_client_that_does_not_read_has_all_in_its_order_when_it_does() -> None:
    async with served() as service:
        host, port = service.url.removeprefix("http://").split(":")
        fields = {"prompt": TEXT, "stream": True, "max_tokens": NUM_TOKENS, "n": NUM_CHOICES}
        content = json.dumps({**fields, "ignore_eos": True}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\nContent-Type: "
        head += f"application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**14)
            connection.setblocking(False)
            await asyncio.get_running_loop().sock_connect(connection, (host, int(port)))
            await asyncio.get_running_loop().sock_sendall(connection, head.encode() + content)
            work = await service.work()
            for position in range(NUM_TOKENS):
                reason: FinishReason | None = "length" if position == NUM_TOKENS - 1 else None
                service.worker.send(
                    StepTokens(
                        [
                            token_update(work, c.index, position, 300 + position % 400, reason)
                            for c in work.choices
                        ]
                    )
                )
            other = service.start(max_tokens=1)
            service.worker.send_tokens(await service.work(), 300, finish_reason="length")
            assert (await other).status_code == 200, "others do not wait for it"
            response = await read_all(connection)
    *events, done = events_of(dechunked(response).decode())
    assert done == "[DONE]"
    choices = [event["choices"][0] for event in events]
    assert len(choices) == NUM_CHOICES * NUM_TOKENS
    tokenizer = Tokenizer.load(checkpoint_directory())
    expected = tokenizer.decode([300 + position % 400 for position in range(NUM_TOKENS)])
    for index in range(NUM_CHOICES):
        own = [choice for choice in choices if choice["index"] == index]
        assert [choice["finish_reason"] for choice in own] == [None] * (NUM_TOKENS - 1) + ["length"]
        assert "".join(choice["text"] for choice in own).strip() == expected.strip()
