"""Whatever arrives at the HTTP port: no crash, no 500, and the next request is served."""

import asyncio
import json
import pickle
import random
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

import pytest
from fake_cluster import DEADLINE_SECONDS, on_event_loop
from http_service import MODEL, TEXT, Served, served

from pdengine.transport.messages import PrefillAndDecode

STATUS = re.compile(rb"^HTTP/1\.[01] (\d{3}) ", re.MULTILINE)
ACCEPTABLE = {200, 400, 404, 405, 408, 413, 429}
JSON = b"Content-Type: application/json\r\n"
PATHS = ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize")
DEPTH = 30_000
PARALLEL = 20


def post(content: bytes, path: str = "/v1/completions", headers: bytes = JSON) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n".encode()
    return head + headers + b"\r\n" + content


def chunked(*chunks: bytes) -> bytes:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n" + JSON
    return head + b"\r\n" + b"".join(chunks)


def heads() -> Iterator[bytes]:
    """What is wrong before any body."""
    yield b"\x00" * 1000
    yield b"\r\n" * 1000
    yield b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    yield b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"  # TLS
    yield b"GET /live\r\n\r\n"  # HTTP/0.9
    yield b"GET /live HTTP/9.9\r\nHost: x\r\n\r\n"
    yield b"BREW /live HTTP/1.1\r\nHost: x\r\n\r\n"
    yield b"DELETE /live HTTP/1.1\r\nHost: x\r\n\r\n"
    for target in (b"*", b"http://x:y/live", b"//", b"/%ff%00%zz", b"/\xff\xfe", b"/v1/models/%ed%a0%80"):
        yield b"GET " + target + b" HTTP/1.1\r\nHost: x\r\n\r\n"
    yield b"GET /" + b"a" * 60_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n"
    yield b"GET /live?" + b"&".join([b"a=b"] * 10_000) + b" HTTP/1.1\r\nHost: x\r\n\r\n"
    yield b"GET /live HTTP/1.1\r\n" + b"X: y\r\n" * 9_000 + b"\r\n"
    yield b"GET /live HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 200_000 + b"\r\n\r\n"
    yield b"GET /live HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer \xff\xfe\r\n\r\n"
    yield b"GET /live HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"
    for length in (b"-1", b"1e3", b"99999999999999999999999", b"", b"0x10", b"5\r\nContent-Length: 6"):
        yield b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: " + length + b"\r\n\r\n{}"
    yield b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n{}"
    yield b"POST /tokenize HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip, gzip\r\n\r\n{}"
    for size in (b"-1", b"ffffffffffffffffff", b"zz", b"", b"10000000000"):
        yield chunked(size + b"\r\n{}\r\n0\r\n\r\n")
    yield chunked(b"2\r\n{}0\r\n\r\n")
    yield chunked(b"1\r\n{\r\n" * 5_000)
    yield chunked(b"2;" + b"x" * 1_000 + b"\r\n{}\r\n0\r\n\r\n")


def bodies() -> Iterator[bytes]:
    """What is wrong with a body, for every endpoint that takes one."""
    yield b""
    yield b"\xff\xfe{}"
    yield json.dumps({"prompt": "a"}).encode("utf-16")
    yield pickle.dumps({"prompt": "a"})
    yield b'{"prompt": "\xff\xfe\xed\xa0\x80"}'
    yield b'{"prompt": "\\ud800\\udfff\\u0000", "messages": [{"role": "\\udc00", "content": "\\ud800"}]}'
    yield b'{"model": "\\ud800", "prompt": "a"}'
    yield b'{"\\ud800": 1, "prompt": "a"}'
    for opening, closing in ((b"[", b"]"), (b'{"a":', b"}"), (b'{"prompt":', b"}")):
        yield opening * DEPTH
        yield opening * DEPTH + b"1" + closing * DEPTH
    for field in (b"prompt", b"messages", b"stop", b"logit_bias", b"metadata", b"tokens", b"unknown"):
        yield b'{"prompt": "a", "' + field + b'": ' + b"[" * DEPTH + b"]" * DEPTH + b"}"
    for number in (b"1e999", b"-1e999", b"NaN", b"Infinity", b"9" * 5_000, b"1" + b"0" * 400, b"-0", b"1.5"):
        for field in (b"temperature", b"max_tokens", b"seed", b"n", b"top_k", b"priority", b"prompt"):
            yield b'{"prompt": "a", "max_tokens": 1, "' + field + b'": ' + number + b"}"
        yield b'{"tokens": [' + number + b'], "prompt": [' + number + b"]}"
    yield b'{"prompt": "a", "prompt": ["b"], "max_tokens": 1}'
    yield b'{"prompt": [' + b",".join([b'""'] * 100_000) + b"]}"
    yield b'{"messages": [' + b",".join([b"{}"] * 100_000) + b"]}"
    yield b'{"prompt": "a", ' + b",".join(b'"f%d": 1' % number for number in range(50_000)) + b"}"
    yield b'{"prompt": "a", "logit_bias": {"-1": 1, "9999999999999999999999": 1, "x": 1, "1e1": 1}}'
    yield b'{"prompt": "a", "stop": ["", "\\ud800"], "max_tokens": 1}'


def mutations(source: random.Random, number: int) -> Iterator[bytes]:
    """Good requests that are cut, spliced, repeated, or have bytes changed; and noise."""
    chat = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
    good = [
        post(json.dumps({"model": MODEL, "prompt": TEXT, "max_tokens": 2}).encode()),
        post(json.dumps({"prompt": [[1, 2], [3]], "n": 2, "stream": True, "max_tokens": 2}).encode()),
        post(json.dumps(chat).encode(), "/v1/chat/completions"),
        post(json.dumps({"prompt": TEXT}).encode(), "/tokenize"),
        chunked(b'f\r\n{"prompt": "a"}\r\n0\r\n\r\n'),
        b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n",
    ]
    for _ in range(number):
        request = source.choice(good)
        match source.randrange(6):
            case 0:
                yield source.randbytes(source.randrange(1, 300))
            case 1:
                yield request[: source.randrange(len(request))]
            case 2:
                changed = bytearray(request)
                for _ in range(source.randrange(1, 8)):
                    changed[source.randrange(len(changed))] = source.randrange(256)
                yield bytes(changed)
            case 3:
                yield request * source.randrange(2, 5)  # replayed, and pipelined
            case 4:
                other = source.choice(good)
                yield request[: source.randrange(len(request))] + other[source.randrange(len(other)) :]
            case _:
                yield post(source.randbytes(source.randrange(100)), source.choice(PATHS))


async def statuses(service: Served, data: bytes) -> set[int]:
    """Send on a connection of its own, and end the sending side; the statuses of what comes back."""
    address = urlsplit(service.url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    try:
        writer.write(data)
        writer.write_eof()
        answer = await reader.read()
    except OSError:  # refused with bytes on the way, and perhaps gone before the end of them
        return set()
    finally:
        writer.close()
    return {int(status) for status in STATUS.findall(answer)}


@asynccontextmanager
async def answering() -> AsyncIterator[Served]:
    """A server whose worker answers everything with one token."""
    async with served(head_seconds=2, body_seconds=2) as service:

        async def work() -> None:
            while True:
                asked = (await service.worker.wait_for(PrefillAndDecode)).work
                for choice in asked.choices:
                    service.worker.send_tokens(asked, 400, choice=choice.index, finish_reason="stop")

        worker = asyncio.create_task(work())
        try:
            yield service
            assert (await service.complete()).status_code == 200, "after all of that it serves"
        finally:
            worker.cancel()


async def check_all(service: Served, requests: Iterator[bytes]) -> set[int]:
    """Send all, several at a time; no status but the documented ones comes back. All that came."""
    seen: set[int] = set()

    async def send_some() -> None:
        for request in requests:
            async with asyncio.timeout(DEADLINE_SECONDS):
                found = await statuses(service, request)
            assert found <= ACCEPTABLE, (found, request[:500])
            seen.update(found)

    await asyncio.gather(*(send_some() for _ in range(PARALLEL)))
    return seen


@on_event_loop
async def test_heads_that_are_wrong() -> None:
    async with answering() as service:
        assert {200, 400, 404, 405} <= await check_all(service, heads())


@on_event_loop
async def test_bodies_that_are_wrong(caplog: pytest.LogCaptureFixture) -> None:
    async with answering() as service:
        requests = (post(body, path) for body in bodies() for path in PATHS)
        assert 400 in await check_all(service, requests)
    assert "Traceback" not in caplog.text


@on_event_loop
async def test_noise_and_broken_requests(caplog: pytest.LogCaptureFixture) -> None:
    async with answering() as service:
        assert {200, 400} <= await check_all(service, mutations(random.Random(5), 600))
    assert "Traceback" not in caplog.text


@on_event_loop
async def test_a_client_that_sends_two_requests_at_once_and_leaves() -> None:
    """The one that is answered is cancelled, the other one never begins."""
    async with served() as service:
        address = urlsplit(service.url)
        request = post(json.dumps({"prompt": TEXT, "max_tokens": 1500}).encode())
        _, writer = await asyncio.open_connection(address.hostname, address.port)
        writer.write(request * 2)
        work = await service.work()
        writer.close()
        await service.expect_abort(work)
        answer = service.start(max_tokens=1)
        service.worker.send_tokens(await service.work(), 400, finish_reason="length")
        assert (await answer).status_code == 200


@pytest.mark.long
@pytest.mark.timeout(600)
def test_noise_and_broken_requests_for_long() -> None:
    async def run() -> None:
        async with answering() as service:
            assert {200, 400} <= await check_all(service, mutations(random.Random(6), 100_000))

    asyncio.run(run())
