"""Sockets with keys: who gets in, who does not, and that a change of the file needs no restart."""

import asyncio
import logging
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import zmq.asyncio
from fake_cluster import DEADLINE_SECONDS, on_event_loop

from pdengine.transport import bounded_log, doorkeeper, handshakes, sockets
from pdengine.transport.addresses import split_tcp_address
from pdengine.transport.doorkeeper import Doorkeeper
from pdengine.transport.handshakes import IN_VAIN, REFUSED, watch_handshakes
from pdengine.transport.keys import KeyFile, PeerKeys, new_key_file, write_key_file
from pdengine.transport.messages import Malformed, PeerReply, PeerRequest, ReleaseLeases
from pdengine.transport.sockets import (
    CURVE_BYTES,
    KEY_REVOKED,
    OTHERS_IDENTITY,
    PeerSocket,
    ServerSocket,
)

ROUTER = new_key_file("router")
CLIENT, OPERATOR, WORKER, STRANGER = (
    new_key_file(role, router_key=ROUTER.public_key) for role in ("client", "operator", "worker", "client")
)
ADMITTING = (
    ROUTER.admitting("client", "client", CLIENT.public_key)
    .admitting("operator", "operator", OPERATOR.public_key)
    .admitting("worker", "worker", WORKER.public_key)
)
ROLES = {"router": ROUTER, "client": CLIENT, "operator": OPERATOR, "worker": WORKER}


@pytest.fixture(autouse=True)
def no_last_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockets, "LINGER_MS", 0)


class Door:
    """A port for clients and one for workers, in a context, and peers that try them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        write_key_file(path, ADMITTING)
        self.context = zmq.asyncio.Context()
        self.peers: list[PeerSocket[Any]] = []
        ports = {"clients": ("client", "operator"), "workers": ("worker",)}
        self.doorkeeper = Doorkeeper(self.context, path, ADMITTING, ports)  # type: ignore[arg-type]
        self.servers = {
            port: ServerSocket[PeerRequest](
                self.context, PeerRequest, keys=self.doorkeeper.server_keys(port), max_message_bytes=1000
            )
            for port in ports
        }
        self.addresses = {port: server.bind("tcp://127.0.0.1:0") for port, server in self.servers.items()}
        self.others = zmq.asyncio.Context()
        self.changed = asyncio.Event()

    def knock(self, port: str, keys: PeerKeys | None, *, watched: bool = True) -> PeerSocket[PeerReply]:
        address = self.addresses[port]
        peer = PeerSocket[PeerReply](self.others, address, PeerReply, keys=keys, watched=watched)
        self.peers.append(peer)
        return peer

    async def gets_in(self, port: str, keys: PeerKeys | None) -> bool:
        """Whether a message arrives; if not, wait until the server has counted a refusal."""
        server = self.servers[port]
        refused = server.num_failed_handshakes
        peer = self.knock(port, keys)
        peer.send(ReleaseLeases([1]))
        receiving = asyncio.create_task(server.receive())
        while server.num_failed_handshakes == refused and not receiving.done():
            await asyncio.sleep(0.001)
        peer.close(linger_ms=0)
        self.peers.remove(peer)
        if receiving.done():
            return receiving.result()[1] == ReleaseLeases([1])
        receiving.cancel()
        return False

    def close(self) -> None:
        for peer in self.peers:
            peer.close(linger_ms=0)
        for server in self.servers.values():
            server.close()
        self.doorkeeper.close()
        self.context.destroy(linger=0)
        self.others.destroy(linger=0)


@asynccontextmanager
async def open_door(directory: Path) -> AsyncIterator[Door]:
    door = Door(directory / "router.toml")
    running = asyncio.create_task(door.doorkeeper.run(door.changed.set))
    try:
        async with asyncio.timeout(DEADLINE_SECONDS):
            yield door
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        door.close()


@pytest.mark.parametrize("port", ["clients", "workers"])
@on_event_loop
async def test_each_port_has_its_roles(port: str, tmp_path: Path) -> None:
    """The router's own key is that of a client in its process."""
    let_in = {"clients": ["router", "client", "operator"], "workers": ["worker"]}[port]
    async with open_door(tmp_path) as door:
        for role, keys in ROLES.items():
            assert await door.gets_in(port, keys.to_connect()) == (role in let_in), role
        assert door.doorkeeper.num_denied == len(ROLES) - len(let_in)


@on_event_loop
async def test_no_key_a_strange_key_and_a_wrong_key_of_the_server(tmp_path: Path) -> None:
    wrong_server = CLIENT.to_connect(WORKER.public_key)
    stolen_public_key = PeerKeys(CLIENT.public_key, STRANGER.secret_key, ROUTER.public_key)
    async with open_door(tmp_path) as door:
        for keys in (None, STRANGER.to_connect(), wrong_server, stolen_public_key):
            assert not await door.gets_in("clients", keys)
        assert door.doorkeeper.num_denied == 1  # the others did not get so far as to be asked about
        assert await door.gets_in("clients", CLIENT.to_connect())


@on_event_loop
async def test_nobody_gets_in_while_nobody_answers(tmp_path: Path) -> None:
    door = Door(tmp_path / "router.toml")
    door.doorkeeper.close()
    try:
        peer = door.knock("clients", CLIENT.to_connect())
        peer.send(ReleaseLeases([1]))
        async with asyncio.timeout(DEADLINE_SECONDS):
            while not door.servers["clients"].num_failed_handshakes:
                await asyncio.sleep(0.001)
        with pytest.raises(zmq.Again):
            await door.servers["clients"]._socket.recv_multipart(zmq.NOBLOCK)
    finally:
        door.close()


@on_event_loop
async def test_the_file_is_read_again_when_it_has_changed(tmp_path: Path) -> None:
    """Several keys at once: add the new one, hand it out, take the old one away."""
    new = new_key_file("client", router_key=ROUTER.public_key)
    both = ADMITTING.admitting("client", "new", new.public_key)
    only_new = ROUTER.admitting("client", "new", new.public_key)
    async with open_door(tmp_path) as door:

        async def who_gets_in(content: KeyFile) -> list[bool]:
            write_key_file(door.path, content, overwrite=True)
            return [await door.gets_in("clients", keys.to_connect()) for keys in (CLIENT, new)]

        assert await who_gets_in(ADMITTING) == [True, False]
        assert await who_gets_in(both) == [True, True]
        assert await who_gets_in(only_new) == [False, True]


@pytest.mark.parametrize("damage", ["gone", "readable", "broken", "of another role"])
@on_event_loop
async def test_a_file_that_cannot_be_used_changes_nothing(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_door(tmp_path) as door:
        if damage == "gone":
            door.path.unlink()
        elif damage == "readable":
            door.path.chmod(0o644)
        elif damage == "broken":
            door.path.write_text("role = ")
        else:
            write_key_file(door.path, WORKER, overwrite=True)
        assert await door.gets_in("clients", CLIENT.to_connect())
        assert not await door.gets_in("clients", STRANGER.to_connect())
        assert caplog.text.count("the keys stay as they were") == 1
        write_key_file(door.path, ROUTER, overwrite=True)
        assert not await door.gets_in("clients", CLIENT.to_connect())


@on_event_loop
async def test_who_was_denied_gets_in_once_he_is_admitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """He need not connect again by himself."""
    monkeypatch.setattr(sockets, "HANDSHAKE_MS", 200)
    async with open_door(tmp_path) as door:
        server = door.servers["clients"]
        peer = door.knock("clients", STRANGER.to_connect(), watched=False)
        peer.send(ReleaseLeases([7]))
        while not door.doorkeeper.num_denied:
            await asyncio.sleep(0.001)
        while not peer.num_failed_handshakes:
            await asyncio.sleep(0.001)
        admitting = ADMITTING.admitting("client", "late", STRANGER.public_key)
        write_key_file(door.path, admitting, overwrite=True)
        assert (await server.receive())[1] == ReleaseLeases([7])


@on_event_loop
async def test_a_key_that_is_taken_away_is_not_heard_any_more(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the connection that it has; the others of that port go on."""
    monkeypatch.setattr(doorkeeper, "LOOK_SECONDS", 0.01)
    async with open_door(tmp_path) as door:
        server = door.servers["clients"]
        removed, stays = (door.knock("clients", keys.to_connect()) for keys in (CLIENT, OPERATOR))
        identities = {}
        for peer in (removed, stays):
            peer.send(ReleaseLeases([1]))
            identities[peer], _ = await server.receive()
        assert server.forget_revoked() == []
        write_key_file(
            door.path, replace(ADMITTING, admitted={"operator": {"o": OPERATOR.public_key}}), overwrite=True
        )
        await door.changed.wait()
        assert server.forget_revoked() == [identities[removed]]
        assert server.forget_revoked() == []
        receiving = asyncio.create_task(server.receive())
        removed.send(ReleaseLeases([2]))
        assert await removed.receive() == Malformed(KEY_REVOKED)
        stays.send(ReleaseLeases([3]))
        assert await receiving == (identities[stays], ReleaseLeases([3]))
        assert server.refused_messages == {"malformed": 0, "disallowed": 0, "revoked": 1}
        assert f"dropped a revoked message from {identities[removed].hex()}" in caplog.text
        write_key_file(door.path, ADMITTING, overwrite=True)  # it was a mistake
        door.changed.clear()
        await door.changed.wait()
        removed.send(ReleaseLeases([4]))
        assert (await server.receive())[1] == ReleaseLeases([4])


@on_event_loop
async def test_the_keys_of_those_who_were_here_take_a_bounded_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sockets, "MAX_KNOWN_PEERS", 2)
    async with open_door(tmp_path) as door:
        for _ in range(4):
            assert await door.gets_in("clients", CLIENT.to_connect())
        write_key_file(door.path, ROUTER, overwrite=True)
        assert not await door.gets_in("clients", CLIENT.to_connect())
        assert len(door.servers["clients"].forget_revoked()) == 2


@on_event_loop
async def test_the_keys_of_those_who_spoke_last_are_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not of those who came last: an old connection that is in use is found when its key is taken away."""
    monkeypatch.setattr(sockets, "MAX_KNOWN_PEERS", 2)
    async with open_door(tmp_path) as door:
        server, identities = door.servers["clients"], []
        peers = [door.knock("clients", CLIENT.to_connect()) for _ in range(3)]
        for number in (0, 1, 0, 2):
            peers[number].send(ReleaseLeases([number]))
            identities.append((await server.receive())[0])
        assert list(server._keys_of) == [identities[0], identities[3]]


@on_event_loop
async def test_nobody_is_heard_under_the_identity_of_another_key(tmp_path: Path) -> None:
    async with open_door(tmp_path) as door:
        server, peer = door.servers["clients"], door.knock("clients", CLIENT.to_connect())
        peer.send(ReleaseLeases([1]))
        identity, _ = await server.receive()
        server._keys_of[identity] = OPERATOR.public_key  # had that identity before
        receiving = asyncio.create_task(server.receive())
        peer.send(ReleaseLeases([2]))
        assert await peer.receive() == Malformed(OTHERS_IDENTITY)
        assert not receiving.done()
        assert server.refused_messages == {"malformed": 0, "disallowed": 1, "revoked": 0}
        del server._keys_of[identity]
        peer.send(ReleaseLeases([3]))
        assert await receiving == (identity, ReleaseLeases([3]))


@on_event_loop
async def test_refusals_are_counted_by_reason(tmp_path: Path) -> None:
    async with open_door(tmp_path) as door:
        server = door.servers["workers"]
        for keys in (CLIENT.to_connect(), None, WORKER.to_connect(STRANGER.public_key)):
            assert not await door.gets_in("workers", keys)
        with socket.create_connection(split_tcp_address(door.addresses["workers"])):
            pass
        while server.num_failed_handshakes < 4:
            await asyncio.sleep(0.001)
        # Who has no key ends the connection himself, if he is the first to see that they do not go together.
        assert server.failed_handshakes["not_admitted"] == 1
        assert server.failed_handshakes["protocol"] >= 1
        assert server.failed_handshakes["ended"] >= 1
        assert sum(server.failed_handshakes.values()) == 4
        assert sum(door.servers["clients"].failed_handshakes.values()) == 0


@on_event_loop
async def test_a_watched_peer_counts_handshakes_that_fail(tmp_path: Path) -> None:
    async with open_door(tmp_path) as door:
        peer = door.knock("clients", None)
        assert not await peer.connection_change()
        assert peer.num_failed_handshakes == 1


@on_event_loop
async def test_a_watched_peer_forgets_failed_handshakes_once_it_gets_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A later outage is not one of the keys."""
    monkeypatch.setattr(sockets, "HANDSHAKE_MS", 200)
    async with open_door(tmp_path) as door:
        peer = door.knock("clients", STRANGER.to_connect())
        watching = asyncio.create_task(peer.connection_change())
        while not peer.num_failed_handshakes and not watching.done():
            await asyncio.sleep(0.001)
        admitting = ADMITTING.admitting("client", "late", STRANGER.public_key)
        write_key_file(door.path, admitting, overwrite=True)
        while not await watching:
            watching = asyncio.create_task(peer.connection_change())
        assert peer.num_failed_handshakes == 0


@on_event_loop
async def test_the_limit_is_of_the_message_not_of_what_encryption_adds(tmp_path: Path) -> None:
    async with open_door(tmp_path) as door:
        server, peer = door.servers["clients"], door.knock("clients", CLIENT.to_connect())
        assert await peer.connection_change()
        receiving = asyncio.create_task(server.receive())
        peer._socket.send(b"\xc1" * 1000)
        assert isinstance(await peer.receive(), Malformed)
        peer._socket.send(b"\xc1" * (1000 + 2 * CURVE_BYTES))
        assert not await peer.connection_change()
        receiving.cancel()
        assert server.refused_messages["malformed"] == 1


@on_event_loop
async def test_denials_are_logged_by_name_and_not_as_often_as_a_stranger_likes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounded_log, "SECONDS", 1000.0)
    async with open_door(tmp_path) as door:
        for _ in range(5):
            assert not await door.gets_in("workers", CLIENT.to_connect())
    [line] = [record.message for record in caplog.records if "denied" in record.message]
    assert "127.0.0.1 to the port for workers" in line
    assert f"{CLIENT.public_key} (client client)" in line


@on_event_loop
async def test_a_number_of_refusals_that_falls_is_not_told(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a connection comes up, or a peer of the same name comes anew."""
    monkeypatch.setattr(handshakes, "REPORT_SECONDS", 0.0)
    looks = asyncio.Semaphore(0)
    numbers = iter([3, 1, 2])

    class Watched:
        @property
        def num_failed_handshakes(self) -> int:
            looks.release()
            return next(numbers, 2)

    watching = asyncio.create_task(watch_handshakes(lambda: {"router": Watched()}, IN_VAIN))
    async with asyncio.timeout(DEADLINE_SECONDS):
        for _ in range(5):
            await looks.acquire()
    watching.cancel()
    assert [record.args for record in caplog.records] == [(3, "router"), (1, "router")]


@on_event_loop
async def test_refusals_are_told_in_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handshakes, "REPORT_SECONDS", 0.001)
    caplog.set_level(logging.WARNING)
    async with open_door(tmp_path) as door:
        watching = asyncio.create_task(watch_handshakes(lambda: door.servers, REFUSED))
        door.knock("workers", None)
        while "connections to the port for workers" not in caplog.text:
            await asyncio.sleep(0.001)
        watching.cancel()
    assert "for clients" not in caplog.text
