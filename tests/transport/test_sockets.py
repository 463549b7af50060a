"""ZeroMQ sockets that say no when something cannot be sent, and survive what cannot be read."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
import zmq
import zmq.asyncio
from fake_cluster import DEADLINE_SECONDS, on_event_loop

from pdengine.transport.addresses import AddressError, check_address, split_tcp_address
from pdengine.transport.messages import (
    Cancel,
    LeasesRenewed,
    Malformed,
    PeerReply,
    PeerRequest,
    ReleaseLeases,
    RenewLeases,
)
from pdengine.transport.sockets import (
    CURVE_BYTES,
    HIGH_WATER_MARK,
    MAX_IN_A_ROW,
    MAX_MESSAGE_BYTES,
    PeerSocket,
    SendFailed,
    ServerSocket,
)

LOOPBACK = "tcp://127.0.0.1:0"


class Sockets:
    """Makes sockets and closes them all at the end."""

    def __init__(self) -> None:
        self.context = zmq.asyncio.Context()
        self._open: list[ServerSocket[Any] | PeerSocket[Any]] = []

    def server(self) -> ServerSocket[PeerRequest]:
        server = ServerSocket[PeerRequest](self.context, PeerRequest)
        self._open.append(server)
        return server

    def peer(self, address: str, **options: Any) -> PeerSocket[PeerReply]:
        peer = PeerSocket[PeerReply](self.context, address, PeerReply, watched=True, **options)
        self._open.append(peer)
        return peer

    def close(self, one: ServerSocket[Any] | PeerSocket[Any]) -> None:
        one.close()
        self._open.remove(one)

    def close_all(self) -> None:
        for one in self._open:
            one.close()
        self.context.destroy(linger=0)


@asynccontextmanager
async def open_sockets() -> AsyncIterator[Sockets]:
    sockets = Sockets()
    try:
        async with asyncio.timeout(DEADLINE_SECONDS):
            yield sockets
    finally:
        sockets.close_all()


@on_event_loop
async def test_there_and_back() -> None:
    async with open_sockets() as sockets:
        server = sockets.server()
        peers = [sockets.peer(server.bind(LOOPBACK))]
        peers[0].send(RenewLeases(1, [2, 3]))
        identity, message = await server.receive()
        assert message == RenewLeases(1, [2, 3])
        server.send(identity, LeasesRenewed(1, [2], [3]))
        assert await peers[0].receive() == LeasesRenewed(1, [2], [3])


@on_event_loop
async def test_messages_in_a_row_leave_turns_to_other_tasks() -> None:
    async with open_sockets() as sockets:
        server = sockets.server()
        peer = sockets.peer(server.bind(LOOPBACK))
        peer.send(RenewLeases(0, []))
        await server.receive()
        reply, num_turns = LeasesRenewed(1, [], []), 0

        async def count_turns() -> None:
            nonlocal num_turns
            while True:
                num_turns += 1
                await asyncio.sleep(0)

        def always_there(_flags: int) -> list[bytes]:
            return [msgspec.msgpack.encode(reply)]

        peer._waiting.recv_multipart = always_there  # type: ignore[method-assign, assignment]
        other = asyncio.create_task(count_turns())
        for _ in range(10 * MAX_IN_A_ROW):
            assert await peer.receive() == reply
        other.cancel()
        assert 9 <= num_turns <= 10


@on_event_loop
async def test_port_zero_takes_a_free_one() -> None:
    async with open_sockets() as sockets:
        addresses = [sockets.server().bind(LOOPBACK) for _ in range(2)]
        ports = [split_tcp_address(address)[1] for address in addresses]
        assert 0 not in ports
        assert ports[0] != ports[1]
        for address in addresses:
            check_address(address)


@on_event_loop
async def test_a_port_in_use_is_named() -> None:
    async with open_sockets() as sockets:
        address = sockets.server().bind(LOOPBACK)
        with pytest.raises(AddressError, match=f"cannot listen on {address}: Address already in use"):
            sockets.server().bind(address)


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("127.0.0.1:5555", "must be tcp://HOST:PORT"),
        ("ipc:///tmp/x", "must be tcp://HOST:PORT"),
        ("tcp://127.0.0.1", "must be tcp://HOST:PORT"),
        ("tcp://:5555", "must be tcp://HOST:PORT"),
        ("", "must be tcp://HOST:PORT"),
        ("tcp://host:port", "'port' must be a number from 0 to 65535"),
        ("tcp://host:65536", "'65536' must be a number"),
        ("tcp://host:-1", "'-1' must be a number"),
        ("tcp://host:٣", "must be a number"),
        ("tcp://host:", "'' must be a number"),
        ("tcp://host:0", "needs a port to connect to"),
    ],
)
def test_bad_addresses_say_what_is_wrong(address: str, reason: str) -> None:
    with pytest.raises(AddressError, match=reason) as caught:
        check_address(address)
    assert repr(address) in str(caught.value)


@pytest.mark.parametrize("address", ["tcp://no.such.host.invalid:5555", "tcp://192.0.2.1:0"])
@on_event_loop
async def test_an_address_of_another_machine_cannot_be_bound(address: str) -> None:
    async with open_sockets() as sockets:
        with pytest.raises(AddressError, match=address):
            sockets.server().bind(address)


@on_event_loop
async def test_malformed_frames_are_counted_and_answered() -> None:
    async with open_sockets() as sockets:
        server = sockets.server()
        peer = sockets.peer(server.bind(LOOPBACK))
        frames = [[b""], [b"\xc1"], [b"\x81\xa4type\xa1?"], [b"\x81" * 100_000], [b"\xa1\xff"], [b"", b"x"]]
        for frame in frames:
            peer._socket.send_multipart(frame)
        peer.send(ReleaseLeases([1]))
        _, message = await server.receive()
        assert message == ReleaseLeases([1])
        assert server.refused_messages["malformed"] == len(frames)
        answers = [await peer.receive() for _ in frames]
        assert all(isinstance(answer, Malformed) and answer.reason for answer in answers)


@on_event_loop
async def test_a_message_for_somebody_else_is_counted_as_such() -> None:
    """As when a client says what only workers may: it is told apart by what msgspec says."""
    async with open_sockets() as sockets:
        server = sockets.server()
        peer = sockets.peer(server.bind(LOOPBACK))
        peer.send(Cancel(1))
        peer._socket.send(msgspec.msgpack.encode({"type": "Nothing", "tag": 1}))
        peer.send(ReleaseLeases([1]))
        assert (await server.receive())[1] == ReleaseLeases([1])
        assert server.refused_messages == {"malformed": 1, "disallowed": 1, "revoked": 0}
        assert "Cancel" in (await peer.receive()).reason  # type: ignore[union-attr]


@on_event_loop
async def test_a_malformed_answer_is_dropped() -> None:
    async with open_sockets() as sockets:
        server = sockets.server()
        peer = sockets.peer(server.bind(LOOPBACK))
        peer.send(ReleaseLeases([1]))
        identity, _ = await server.receive()
        server._socket.send_multipart([identity, b"\xc1"])
        server.send(identity, LeasesRenewed(1, [], []))
        assert await peer.receive() == LeasesRenewed(1, [], [])


@on_event_loop
async def test_an_oversize_frame_costs_the_connection_and_nothing_else() -> None:
    async with open_sockets() as sockets:
        server = sockets.server()
        address = server.bind(LOOPBACK)
        giant = sockets.peer(address)
        assert await giant.connection_change()
        giant._socket.send(b"x" * (MAX_MESSAGE_BYTES + CURVE_BYTES + 1))
        assert not await giant.connection_change()
        other = sockets.peer(address)
        other.send(ReleaseLeases([1]))
        assert (await server.receive())[1] == ReleaseLeases([1])


@on_event_loop
async def test_sending_to_a_stranger_fails() -> None:
    async with open_sockets() as sockets:
        server = sockets.server()
        server.bind(LOOPBACK)
        with pytest.raises(SendFailed, match="the peer is gone"):
            server.send(b"nobody", LeasesRenewed(1, [], []))


@on_event_loop
async def test_sending_to_a_peer_that_does_not_read_fails() -> None:
    async with open_sockets() as sockets:
        server = sockets.server()
        address = server.bind(LOOPBACK)
        deaf = sockets.context.socket(zmq.DEALER)
        deaf.setsockopt(zmq.RCVHWM, 1)
        deaf.setsockopt(zmq.RCVBUF, 4096)
        deaf.connect(address)
        reading = sockets.peer(address)
        deaf.send(sockets.peer(address)._encoder.encode(ReleaseLeases([1])))
        deaf_identity, _ = await server.receive()
        with pytest.raises(SendFailed, match="does not read"):
            flood(server, deaf_identity)
        reading.send(ReleaseLeases([2]))  # the others are served as before
        identity, _ = await server.receive()
        server.send(identity, LeasesRenewed(1, [], []))
        assert await reading.receive() == LeasesRenewed(1, [], [])


def flood(server: ServerSocket[Any], identity: bytes) -> None:
    for _ in range(100 * HIGH_WATER_MARK):
        server.send(identity, Malformed("x" * 1000))


@on_event_loop
async def test_a_peer_that_wants_a_connection_does_not_queue() -> None:
    async with open_sockets() as sockets:
        address = sockets.server().bind(LOOPBACK)
        with socket.create_server(("127.0.0.1", 0)) as nobody:
            unconnected = f"tcp://127.0.0.1:{nobody.getsockname()[1]}"
        with pytest.raises(SendFailed, match="not connected"):
            sockets.peer(unconnected, only_when_connected=True).send(ReleaseLeases([1]))
        sockets.peer(unconnected).send(ReleaseLeases([1]))  # queued
        connected = sockets.peer(address, only_when_connected=True)
        assert await connected.connection_change()
        connected.send(ReleaseLeases([1]))


@on_event_loop
async def test_sending_on_a_closed_socket_fails() -> None:
    async with open_sockets() as sockets:
        server = sockets.server()
        peer = sockets.peer(server.bind(LOOPBACK))
        sockets.close(peer)
        with pytest.raises(SendFailed):
            peer.send(ReleaseLeases([1]))


@on_event_loop
async def test_connection_changes_over_a_restart_on_the_same_port() -> None:
    async with open_sockets() as sockets:
        server = sockets.server()
        address = server.bind(LOOPBACK)
        peer = sockets.peer(address)
        assert await peer.connection_change()
        sockets.close(server)
        assert not await peer.connection_change()
        restarted = await bind_again(sockets, address)
        assert await peer.connection_change()
        peer.send(RenewLeases(1, []))
        assert (await restarted.receive())[1] == RenewLeases(1, [])


async def bind_again(sockets: Sockets, address: str) -> ServerSocket[PeerRequest]:
    """A closed socket gives its port back a moment later."""
    while True:
        server = sockets.server()
        try:
            server.bind(address)
            return server
        except AddressError:
            sockets.close(server)
            await asyncio.sleep(0.01)


@on_event_loop
async def test_last_words_leave_before_a_socket_closes() -> None:
    async with open_sockets() as sockets:
        server = sockets.server()
        peer = sockets.peer(server.bind(LOOPBACK))
        for number in range(1000):
            peer.send(ReleaseLeases([number]))
        sockets.close(peer)
        received = [await server.receive() for _ in range(1000)]
        assert [message for _, message in received] == [ReleaseLeases([n]) for n in range(1000)]
