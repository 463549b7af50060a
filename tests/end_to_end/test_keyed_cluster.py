"""A cluster with keys, in real processes: who is served, who is not, and what hostile frames do to it."""

import random
import re
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
from click.testing import CliRunner
from deployment import DEADLINE_SECONDS, Deployment
from hostile_frames import OF_CLIENTS, OF_PEERS, OF_WORKERS, Attacker
from scenario import FLOAT32, GREEDY, ask, random_prompt

from pdengine.cli.main import main
from pdengine.client import Client, RouterUnavailable
from pdengine.transport.addresses import split_tcp_address
from pdengine.transport.keys import KeyFile, PeerKeys, read_key_file
from pdengine.transport.messages import (
    ClientToRouter,
    PeerRequest,
    WorkerToRouter,
)
from pdengine.transport.sockets import raise_file_limit

PROMPT = random_prompt(50)


class KeyedCluster:
    """deployment: a router, a prefill and a decode worker, with the keys of a directory."""

    def __init__(self, deployment: Deployment, keys: Path, peer_address: str) -> None:
        self.deployment = deployment
        self.keys = keys
        self.peer_address = peer_address
        self.router, self.prefill, _ = deployment.processes
        self.answer = self.ask()

    def ask(self) -> list[int]:
        with Client(self.deployment.client_address, keys=self.keys) as client:
            return ask(client, PROMPT, **GREEDY).token_ids

    def keys_of(self, role: str) -> KeyFile:
        return read_key_file(self.keys / f"{role}.toml", ["client", "operator", "worker", "router"])

    @property
    def ports(self) -> list[str]:
        return [self.deployment.client_address, self.deployment.worker_address, self.peer_address]


@pytest.fixture(scope="module")
def keyed(wandering_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[KeyedCluster]:
    directory = tmp_path_factory.mktemp("keyed")
    assert CliRunner().invoke(main, ["keygen", str(directory / "keys")]).exit_code == 0
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        peer_address = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    with Deployment(wandering_model, directory, keys=directory / "keys") as deployment:
        deployment.start_router()
        deployment.start_worker("prefill", *FLOAT32, "--bind", peer_address)
        deployment.start_worker("decode", *FLOAT32)
        deployment.wait_workers("prefill", "decode")
        yield KeyedCluster(deployment, directory / "keys", peer_address)
        deployment.wait_baseline()


def test_a_request_goes_through_both_workers(keyed: KeyedCluster) -> None:
    for name in ("client.toml", "operator.toml"):
        with Client(keyed.deployment.client_address, keys=keyed.keys / name) as client:
            completion = ask(client, random_prompt(40), **GREEDY)
            assert completion.transfer is not None
            assert completion.transfer.num_blocks > 0


def test_no_message_for_a_worker_is_taken_with_the_key_of_a_client(keyed: KeyedCluster) -> None:
    denied = "denied a connection from 127.0.0.1 to the port for workers: its key "
    deployment, client = keyed.deployment, keyed.keys_of("client")
    to_worker = keyed.keys_of("worker").public_key
    strangers = [
        Attacker(deployment.worker_address, WorkerToRouter, OF_WORKERS, client.to_connect()),
        Attacker(keyed.peer_address, PeerRequest, OF_PEERS, client.to_connect(to_worker)),
    ]
    for stranger in strangers:
        stranger.replay_all()
    for process in (keyed.router, keyed.prefill):
        deployment.wait_log(process, denied)
    assert keyed.ask() == keyed.answer
    for stranger in strangers:
        assert not stranger.has_answer()
        stranger.close()


@pytest.mark.parametrize(
    ("role", "reason"),
    [(None, "its keys and this client's do not go together"), ("worker", "no router answers")],
)
def test_who_is_no_client_is_not_served(role: str | None, reason: str, keyed: KeyedCluster) -> None:
    keys = keyed.keys_of(role).to_connect() if role is not None else None
    with (
        Client(keyed.deployment.client_address, keys=keys, connect_timeout=1) as client,
        pytest.raises(RouterUnavailable, match=reason),
    ):
        client.status()


def test_a_key_that_is_added_is_admitted_at_once(keyed: KeyedCluster) -> None:
    result = CliRunner().invoke(main, ["keygen", str(keyed.keys), "--add", "client", "second"])
    assert result.exit_code == 0
    with Client(keyed.deployment.client_address, keys=keyed.keys / "second.toml") as client:
        assert len(client.status().workers) == 2


@pytest.mark.parametrize("num_frames", [12_000, pytest.param(100_000, marks=pytest.mark.long)])
def test_hostile_frames_of_those_who_have_a_key(num_frames: int, keyed: KeyedCluster, tmp_path: Path) -> None:
    """Each port gets its share; whatever does not decode is answered so, and requests go on meanwhile."""
    client, worker = keyed.keys_of("client"), keyed.keys_of("worker")
    attackers = [
        Attacker(keyed.ports[0], ClientToRouter, OF_CLIENTS, client.to_connect()),
        Attacker(keyed.ports[1], WorkerToRouter, OF_WORKERS, worker.to_connect()),
        Attacker(keyed.ports[2], PeerRequest, OF_PEERS, worker.to_connect(worker.public_key)),
    ]
    rng, touched = random.Random(17), tmp_path / "touched"

    def attack() -> None:
        for number in range(num_frames):
            attackers[number % len(attackers)].send(rng, touched)
        for attacker in attackers:
            attacker.read_answers(DEADLINE_SECONDS)

    with ThreadPoolExecutor(1) as thread:
        attacking = thread.submit(attack)
        answers = [keyed.ask()]
        while not attacking.done():
            answers.append(keyed.ask())
        attacking.result()
    for attacker in attackers:
        attacker.close()
        assert attacker.num_told == attacker.num_malformed > num_frames // 6
    assert all(answer == keyed.answer for answer in answers)
    assert not touched.exists()
    assert "Traceback" not in keyed.deployment.log_of(keyed.router) + keyed.deployment.log_of(keyed.prefill)
    keyed.deployment.wait_log(keyed.router, "dropped a malformed message")
    keyed.deployment.wait_status(
        lambda status: sorted(w.role for w in status.workers) == ["decode", "prefill"]
    )


def test_hostile_frames_of_those_who_have_none(keyed: KeyedCluster, tmp_path: Path) -> None:
    """None is taken: nobody gets further than the handshake."""
    strange = PeerKeys(
        *(getattr(keyed.keys_of("client"), name) for name in ("public_key", "secret_key")),
        server_key=keyed.keys_of("operator").public_key,
    )
    attackers = [
        Attacker(address, ClientToRouter, OF_CLIENTS, keys)
        for address in keyed.ports
        for keys in (None, strange)
    ]
    lines = [
        (keyed.router, "refused .* connections to the port for clients"),
        (keyed.router, "refused .* connections to the port for workers"),
        (keyed.prefill, "refused .* connections to the port for workers"),
    ]
    before = [len(re.findall(line, keyed.deployment.log_of(process))) for process, line in lines]
    rng = random.Random(18)
    for number in range(600):
        attackers[number % len(attackers)].send(rng, tmp_path / "touched")
    for (process, line), times in zip(lines, before, strict=True):
        keyed.deployment.wait_log(process, line, times + 1)
    assert keyed.ask() == keyed.answer
    for attacker in attackers:
        attacker.read_answers(0)
        attacker.close()
        assert attacker.num_told == 0


GREETING = bytes([0xFF]) + 8 * b"\0" + bytes([0x7F, 3, 1])  # ZMTP 3.1, https://rfc.zeromq.org/spec/37


def test_bytes_that_are_not_zeromqs(keyed: KeyedCluster) -> None:
    rng = random.Random(19)
    for address in keyed.ports:
        for number in range(60):
            with socket.create_connection(split_tcp_address(address)) as connection:
                mechanism = rng.choice([b"NULL", b"CURVE", b"PLAIN", rng.randbytes(4)])
                greeting = GREETING + mechanism.ljust(20, b"\0") + bytes([number % 2]) + 31 * b"\0"
                start = (b"", GREETING, greeting, b"GET / HTTP/1.1\r\n\r\n")[number % 4]
                connection.sendall(start + rng.randbytes(rng.randrange(2000)))
    assert keyed.ask() == keyed.answer


def test_a_thousand_connections_that_say_nothing(keyed: KeyedCluster) -> None:
    raise_file_limit()
    with ExitStack() as stack:
        for address in keyed.ports:
            for _ in range(1_000):
                stack.enter_context(socket.create_connection(split_tcp_address(address)))
        assert keyed.ask() == keyed.answer
        with Client(keyed.deployment.client_address, keys=keyed.keys) as client:
            assert len(client.status().workers) == 2
