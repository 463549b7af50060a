"""What a body may cost, answers that do not wait for one, and the lines that refusals leave in the log."""

import asyncio
import json
import logging
import re
from collections.abc import Iterable
from contextlib import suppress
from itertools import pairwise
from typing import Any
from urllib.parse import urlsplit

import pytest
from fake_cluster import DEADLINE_SECONDS, on_event_loop
from http_service import error_of, served
from hypothesis import given
from hypothesis import strategies as st
from starlette.types import Message, Receive

from pdengine.router.http.body import SMALL_BODY, Arriving, Body, BodyLimits
from pdengine.router.http.errors import ApiError
from pdengine.transport import bounded_log

LIMITS = BodyLimits(max_bytes=2**20, max_arriving_bytes=2**18, seconds=DEADLINE_SECONDS, rest_seconds=0.2)
PIECE = 2**16
MAX_READ = 32 * 2**20  # with what socket buffers hold


def receiving(pieces: Iterable[bytes], *, ends: bool = True) -> Receive:
    """A body of these pieces."""
    left = list(pieces)

    async def receive() -> Message:
        body = left.pop(0)
        return {"type": "http.request", "body": body, "more_body": bool(left) or not ends}

    return receive


@on_event_loop
async def test_large_bodies_that_are_on_their_way_have_a_limit_together() -> None:
    arriving = Arriving()

    def body(num_pieces: int) -> Body:
        receive = receiving([b"x" * PIECE] * num_pieces, ends=False)
        return Body(receive, LIMITS, arriving, is_empty=False)

    first, second = body(4), body(4)
    for _ in range(4):
        await first.receive()
    assert arriving.num_bytes == 4 * PIECE - SMALL_BODY
    for _ in range(2):
        await second.receive()
    assert arriving.num_bytes == LIMITS.max_arriving_bytes
    with pytest.raises(ApiError) as refused:
        await second.receive()
    assert refused.value.status_code == 503
    assert refused.value.headers is not None
    assert refused.value.headers["Retry-After"] == "1"
    await body(1).receive()  # a small one is let in
    second.close()
    second.close()
    third = body(2)
    await third.receive()
    await third.receive()
    first.close()
    third.close()
    assert arriving.num_bytes == 0


@given(st.lists(st.binary(max_size=2 * SMALL_BODY), min_size=1, max_size=5))
def test_a_body_that_has_arrived_counts_no_more(pieces: list[bytes]) -> None:
    async def run() -> None:
        arriving = Arriving()
        body = Body(receiving(pieces), LIMITS, arriving, is_empty=False)
        with suppress(ApiError):  # it is large
            while not body.is_complete:
                await body.receive()
        body.close()
        assert arriving.num_bytes == 0

    asyncio.run(run())


JSON = st.recursive(
    st.none() | st.text(max_size=9), lambda values: st.lists(values) | st.dictionaries(st.text(), values)
)


@given(JSON, st.data())
def test_what_stands_in_strings_is_not_counted(value: Any, data: st.DataObject) -> None:
    """However the body is cut into pieces: as if all strings had been written as numbers."""
    text = json.dumps(value, ensure_ascii=data.draw(st.booleans()))
    bare = re.sub(r'"([^"\\]|\\.)*"', "0", text)
    whole = text.encode()
    cuts = sorted(data.draw(st.sets(st.integers(0, len(whole)), max_size=6)) | {0, len(whole)})

    async def run() -> None:
        pieces = [whole[start:end] for start, end in pairwise(cuts)]
        body = Body(receiving(pieces), LIMITS, Arriving(), is_empty=False)
        while not body.is_complete:
            await body.receive()
        assert body.num_commas == bare.count(",")
        assert body.num_openings == sum(bare.count(opening) for opening in "[{:")

    asyncio.run(run())


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32"])
@on_event_loop
async def test_a_body_that_is_not_utf_8_is_refused(encoding: str) -> None:
    """What it costs could not be counted."""
    content = json.dumps({"prompt": "a"}).encode(encoding)
    with pytest.raises(ApiError, match="must be UTF-8") as refused:
        await Body(receiving([content]), LIMITS, Arriving(), is_empty=False).receive()
    assert refused.value.status_code == 400


@pytest.mark.parametrize(
    "head",
    [
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: 1000000000\r\n",  # 413
        b"POST /v1/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n",  # 413 when it is long enough
        b"POST /nowhere HTTP/1.1\r\nTransfer-Encoding: chunked\r\n",  # 404
        b"POST /nowhere HTTP/1.1\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n",
        b"GET /live HTTP/1.1\r\nTransfer-Encoding: chunked\r\n",  # 200
    ],
)
@on_event_loop
async def test_of_a_body_without_end_little_is_read_and_the_answer_is_seen(head: bytes) -> None:
    num_sent = 0

    async def send_for_ever(writer: asyncio.StreamWriter) -> None:
        nonlocal num_sent
        with suppress(ConnectionError):
            while True:
                writer.write(b"%x\r\n%b\r\n" % (PIECE, b"x" * PIECE))
                await writer.drain()
                num_sent += PIECE

    async with served(rest_seconds=0.2, max_body_bytes=2**20) as service:
        address = urlsplit(service.url)
        reader, writer = await asyncio.open_connection(address.hostname, address.port)
        writer.write(head + b"Host: x\r\nContent-Type: application/json\r\n\r\n")
        async with asyncio.timeout(DEADLINE_SECONDS):
            sending = asyncio.create_task(send_for_ever(writer))
            status = (await reader.readline()).split()[1]
            await sending  # until the server closes the connection
        writer.close()
        assert status == (b"413" if b"completions" in head else b"404" if b"nowhere" in head else b"200")
        assert num_sent < MAX_READ
        text = (await service.client.get("/metrics")).text
        assert "pdengine_http_requests_in_flight 1.0" in text.splitlines(), "only the one that asks"


def lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    """The fields of all lines about HTTP requests; the router, in the same process, has lines of its own."""
    return [
        vars(record)
        for record in caplog.records
        if record.getMessage() == "request finished" and record.name != "pdengine.router.request_log"
    ]


@on_event_loop
async def test_a_request_that_is_refused_has_one_line_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with served(api_keys=["key"], max_body_bytes=1000) as service:
        service.client.headers["Authorization"] = "Bearer key"
        error_of(await service.complete(temperature=-1), 400)
        error_of(await service.complete(model="other"), 404)
        error_of(await service.client.get("/nowhere"), 404)
        error_of(await service.complete(prompt="x" * 1000), 413)
        error_of(await service.client.get("/v1/models", headers={"Authorization": "Bearer other"}), 401)
        error_of(await service.complete(max_tokens=10**6), 400)  # the router says so
        assert (await service.client.get("/live")).status_code == 200
    told = [(line["outcome"], line.get("status"), line.get("endpoint")) for line in lines(caplog)]
    assert told == [
        ("refused", 400, "/v1/completions"),
        ("refused", 404, "/v1/completions"),
        ("refused", 413, "/v1/completions"),
        ("refused", 401, "/v1/models"),
        ("failed", None, None),  # a line of its own, with the router's reason
    ]


@on_event_loop
async def test_refusals_do_not_fill_the_log(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounded_log, "SECONDS", 1000.0)
    caplog.set_level(logging.INFO)
    async with served() as service:
        for _ in range(20):
            error_of(await service.complete(temperature=-1), 400)
        address = urlsplit(service.url)
        for noise in [b"\x00\x01 no HTTP\r\n\r\n", b"GET /live HTTP/1.1\r\nHost: \x00\r\n\r\n"] * 10:
            reader, writer = await asyncio.open_connection(address.hostname, address.port)
            writer.write(noise)
            assert (await reader.read()).startswith(b"HTTP/1.1 400 ")
            writer.close()
        headers = {"Connection": "Upgrade", "Upgrade": "websocket"}
        for _ in range(10):
            assert (await service.client.get("/live", headers=headers)).status_code == 200
    assert len(lines(caplog)) == 1
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert warnings == ["a client at 127.0.0.1 is disconnected: this is no HTTP: Invalid method encountered"]


@on_event_loop
async def test_the_log_says_how_many_refusals_were_left_out(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(bounded_log, "SECONDS", 1000.0)
    log = bounded_log.BoundedLog(logging.getLogger(__name__))
    for _ in range(3):
        log.info("request finished", status=400)
    monkeypatch.setattr(bounded_log, "monotonic", lambda: 1e12)
    log.info("request finished", status=400)
    log.warning("left out")
    first, second = lines(caplog)
    assert "left_out" not in first
    assert (second["status"], second["left_out"]) == (400, 2)
