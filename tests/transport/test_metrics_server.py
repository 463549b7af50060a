"""The pages of a process over real sockets, and clients that are slow, silent, greedy or hostile."""

from __future__ import annotations

import http.client
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from time import monotonic
from urllib.parse import urlsplit

import pytest

from pdengine.transport import metrics_server
from pdengine.transport.addresses import AddressError, split_host_port
from pdengine.transport.metrics_server import MAX_CONNECTIONS, MAX_REQUEST_BYTES, MetricsServer

DEADLINE_SECONDS = 20.0
GET_LIVE = b"GET /live HTTP/1.1\r\nHost: a\r\n\r\n"


class Pages:
    """body: of `/metrics`. reasons: that `/ready` gives, one after the other."""

    def __init__(self) -> None:
        self.body = b"first\n"
        self.reasons: list[str | None] = ["it has just begun", None, "it is about to end"]

    def exposition(self) -> bytes:
        return self.body

    def why_not_ready(self) -> str | None:
        return self.reasons.pop(0)


@pytest.fixture
def pages() -> Pages:
    return Pages()


@pytest.fixture
def server(pages: Pages) -> Iterator[MetricsServer]:
    with MetricsServer("0", pages) as server:
        yield server


@pytest.fixture
def impatience(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Clients that connect before `undo` have a tenth of a second."""
    monkeypatch.setattr(metrics_server, "CONNECTION_SECONDS", 0.1)
    return monkeypatch


def ask(server: MetricsServer, path: str, method: str = "GET") -> tuple[int, str, str]:
    """(status, content type, body)"""
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=DEADLINE_SECONDS)
    try:
        connection.request(method, path)
        answer = connection.getresponse()
        return answer.status, answer.headers["Content-Type"], answer.read().decode()
    finally:
        connection.close()


def connect(server: MetricsServer) -> socket.socket:
    address = urlsplit(server.url)
    return socket.create_connection((address.hostname, address.port), timeout=DEADLINE_SECONDS)


def rest_of(connection: socket.socket) -> bytes:
    """All that still comes until the server closes; a reset is an end, too."""
    received = bytearray()
    try:
        while chunk := connection.recv(65536):
            received += chunk
    except ConnectionError:
        pass
    return bytes(received)


def is_live(server: MetricsServer) -> bool:
    return ask(server, "/live")[0] == 200


def test_metrics_are_served_as_they_are_now(server: MetricsServer, pages: Pages) -> None:
    assert ask(server, "/metrics") == (200, "text/plain; version=0.0.4; charset=utf-8", "first\n")
    pages.body = b"second\n"
    assert ask(server, "/metrics?x=1")[2] == "second\n"


def test_a_process_is_live_before_it_is_ready(server: MetricsServer) -> None:
    assert ask(server, "/ready")[::2] == (503, "it has just begun\n")
    assert ask(server, "/ready")[::2] == (200, "ready\n")
    assert ask(server, "/ready")[::2] == (503, "it is about to end\n")
    assert ask(server, "/live")[::2] == (200, "live\n")


def test_head_has_the_headers_without_the_body(server: MetricsServer) -> None:
    with connect(server) as connection:
        connection.sendall(GET_LIVE.replace(b"GET", b"HEAD"))
        answer = rest_of(connection)
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"Content-Length: 5\r\n" in answer
    assert answer.endswith(b"\r\n\r\n")


def test_other_pages_and_methods_are_refused(server: MetricsServer) -> None:
    assert ask(server, "/")[0] == 404
    assert ask(server, "/metrics/../live")[0] == 404
    assert ask(server, "/metrics", method="POST")[0] == 501


@pytest.mark.parametrize(
    "request_head",
    [b"\r\n\r\n", b"GET /live\r\n\r\n", b"GET  /live HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x00\xff\r\n\r\n"],
)
def test_what_is_not_http_is_refused(server: MetricsServer, request_head: bytes) -> None:
    with connect(server) as connection:
        connection.sendall(request_head)
        assert rest_of(connection).startswith(b"HTTP/1.1 400 Bad Request\r\n")
    assert is_live(server)


def test_a_request_has_a_limit_of_size(server: MetricsServer) -> None:
    with connect(server) as connection:
        connection.sendall(b"GET /" + b"a" * MAX_REQUEST_BYTES)
        assert rest_of(connection).startswith(b"HTTP/1.1 431 ")


def test_an_endless_request_line_is_cut_off(server: MetricsServer) -> None:
    with connect(server) as connection, pytest.raises(ConnectionError):
        connection.sendall(b"a" * 100 * 2**20)
    assert is_live(server)


def test_a_client_that_says_nothing_is_dropped(server: MetricsServer, impatience: pytest.MonkeyPatch) -> None:
    with connect(server) as connection:
        assert rest_of(connection) == b""
    impatience.undo()
    assert is_live(server)


def test_a_client_that_sends_byte_by_byte_is_dropped(
    server: MetricsServer, impatience: pytest.MonkeyPatch
) -> None:
    """Each byte comes soon after the one before; the deadline is that of the whole request."""
    give_up_at = monotonic() + DEADLINE_SECONDS
    with connect(server) as connection:
        connection.settimeout(0.01)
        while monotonic() < give_up_at:
            try:
                connection.send(b"a")
                if connection.recv(1) == b"":
                    break
            except TimeoutError:
                continue
            except ConnectionError:
                break
        else:
            pytest.fail("it was never dropped")
    impatience.undo()
    assert is_live(server)


def test_a_client_that_does_not_read_its_answer_is_dropped(
    server: MetricsServer, pages: Pages, impatience: pytest.MonkeyPatch
) -> None:
    size = 32 * 2**20  # more than the buffers of both ends hold
    pages.body = bytes(size)
    with connect(server) as connection, connect(server) as silent:
        connection.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
        assert rest_of(silent) == b""  # came later, so the deadline of the first one has passed
        assert len(rest_of(connection)) < size


def test_clients_that_hold_on_make_room_for_others(server: MetricsServer) -> None:
    with ExitStack() as stack:
        held = [stack.enter_context(connect(server)) for _ in range(MAX_CONNECTIONS)]
        assert is_live(server)
        assert rest_of(held[0]) == b"", "the oldest one is dropped"
        held[-1].sendall(GET_LIVE)
        assert rest_of(held[-1]).endswith(b"live\n"), "the others are still served"


def test_clients_that_leave_early_do_no_harm(server: MetricsServer) -> None:
    for request in (b"", b"GET /metr", GET_LIVE):
        with connect(server) as connection:
            connection.sendall(request)
    assert is_live(server)


def test_the_address_is_on_loopback_unless_told_otherwise() -> None:
    assert split_host_port("metrics address", "9100") == ("127.0.0.1", 9100)
    assert split_host_port("metrics address", "0.0.0.0:9100") == ("0.0.0.0", 9100)
    assert split_host_port("metrics address", "[::1]:9100") == ("::1", 9100)


@pytest.mark.parametrize("address", ["", ":9100", "host", "host:", "host:http", "host:70000", "host:-1"])
def test_an_address_that_cannot_be_is_refused(address: str) -> None:
    message = f"metrics address '{address}' must be HOST:PORT or PORT, and the port a number from 0 to 65535"
    with pytest.raises(AddressError) as caught:
        split_host_port("metrics address", address)
    assert str(caught.value) == message


def test_an_address_that_is_taken_or_not_ours_is_refused(server: MetricsServer, pages: Pages) -> None:
    taken = urlsplit(server.url).netloc
    with pytest.raises(AddressError, match=f"^cannot serve metrics on {taken}: Address already in use"):
        MetricsServer(taken, pages)
    with pytest.raises(AddressError, match=r"^cannot serve metrics on a\.\.b:1: "):
        MetricsServer("a..b:1", pages)


def test_closing_drops_the_clients_and_frees_the_address(pages: Pages) -> None:
    server = MetricsServer("0", pages)
    with connect(server) as held:
        assert is_live(server)  # so the connection before it was accepted, too
        server.close()
        assert rest_of(held) == b""
    server.close()
    with MetricsServer(urlsplit(server.url).netloc, pages) as successor:
        assert is_live(successor)


def test_ipv6(pages: Pages) -> None:
    try:
        server = MetricsServer("[::1]:0", pages)
    except AddressError as error:
        pytest.skip(f"no IPv6 here: {error}")
    with server:
        assert server.url.startswith("http://[::1]:")
        assert is_live(server)
