"""Frames that nobody should send, and somebody who sends them and counts the answers."""

import os
import pickle
import random
from collections.abc import Sequence
from pathlib import Path
from time import monotonic
from typing import Any

import msgspec
import zmq

from pdengine.transport.keys import PeerKeys
from pdengine.transport.messages import (
    Cancel,
    DecodeAccepted,
    EndPush,
    Generate,
    GetStatus,
    Heartbeat,
    Inquire,
    LeasesRenewed,
    Load,
    Malformed,
    Message,
    PeerLink,
    ReleaseLeases,
    RenewLeases,
    SamplingParams,
    StepTokens,
    TextPrompt,
    TokenUpdate,
    WorkFailed,
)

Frames = list[bytes]

OF_CLIENTS: Sequence[Message] = (
    Generate(1, TextPrompt("once"), SamplingParams(max_tokens=1, stop_token_ids=(3, 4)), stop=("x",)),
    Cancel(1),
    Inquire(2),
    GetStatus(3),
)
OF_WORKERS: Sequence[Message] = (
    Heartbeat(Load(10, 10)),
    PeerLink("nobody", lanes="mapping"),
    DecodeAccepted("request", 1),
    StepTokens([TokenUpdate("request", 1, 0, 0, 5, "stop")]),
    WorkFailed("request", 1, "no", retry=True),
    LeasesRenewed(1, [1], [2]),
)
OF_PEERS: Sequence[Message] = (RenewLeases(1, [1, 2]), ReleaseLeases([1]), EndPush("request", 1))


class Touch:
    """What unpickles it makes the file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.open, (str(self.path), os.O_CREAT, 0o600)


def hostile_frames(rng: random.Random, valid: Sequence[Message], touched: Path) -> Frames:
    """Random, truncated, changed, pickled, nested or replayed, at times in parts."""
    replayed = msgspec.msgpack.encode(rng.choice(valid))
    match rng.randrange(7):
        case 0:
            return [rng.randbytes(rng.randrange(300))]
        case 1:
            return [replayed[: rng.randrange(len(replayed))]]
        case 2:
            changed = bytearray(replayed)
            for _ in range(rng.randrange(1, 6)):
                changed[rng.randrange(len(changed))] = rng.randrange(256)
            return [bytes(changed)]
        case 3:
            return [pickle.dumps(Touch(touched), protocol=rng.randrange(6))]
        case 4:
            return [bytes([rng.choice([0x81, 0x91, 0xDC, 0xDD])]) * rng.randrange(1, 3000)]
        case 5:
            return [b"", replayed] if rng.randrange(2) else [replayed, replayed]
        case _:
            return [replayed]


class Attacker:
    """Sends frames to a port, and reads what is answered: only so are all answers sent."""

    def __init__(self, address: str, union: Any, valid: Sequence[Message], keys: PeerKeys | None) -> None:
        self.num_malformed = 0  # sent, by our own reading
        self.num_told = 0  # that a message was malformed
        self._valid = valid
        self._decoder = msgspec.msgpack.Decoder(union)
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        if keys is not None:
            self._socket.curve_serverkey = keys.server_key.encode()
            self._socket.curve_publickey = keys.public_key.encode()
            self._socket.curve_secretkey = keys.secret_key.encode()
        self._socket.connect(address)

    def send(self, rng: random.Random, touched: Path) -> None:
        frames = hostile_frames(rng, self._valid, touched)
        try:
            self._socket.send_multipart(frames, zmq.NOBLOCK)
        except zmq.Again:
            return  # refused at the handshake: libzmq has given the connection up, and would wait for ever
        try:
            if len(frames) != 1:
                raise msgspec.DecodeError("several parts")
            self._decoder.decode(frames[0])
        except (ValueError, RecursionError):
            self.num_malformed += 1
        while self._socket.poll(0):
            self._read()

    def replay_all(self) -> None:
        """Send what would be valid of somebody else."""
        for message in self._valid:
            self._socket.send(msgspec.msgpack.encode(message))

    def has_answer(self) -> bool:
        return bool(self._socket.poll(0))

    def read_answers(self, seconds: float) -> None:
        """Until each malformed message has been answered, or `seconds` are over."""
        deadline = monotonic() + seconds
        while self.num_told < self.num_malformed and monotonic() < deadline:
            if self._socket.poll(100):
                self._read()

    def close(self) -> None:
        self._socket.close(linger=0)
        self._context.term()

    def _read(self) -> None:
        answer = msgspec.msgpack.decode(self._socket.recv())
        self.num_told += answer["type"] == Malformed.__name__
