"""The control thread of a decode worker, between an engine that only remembers and a router that listens."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import zmq.asyncio

from pdengine.engine.metrics import WorkerMetrics
from pdengine.engine.pushes import LoseWriter
from pdengine.engine.worker import Worker, WorkerParts
from pdengine.engine.worker_keys import WorkerKeys
from pdengine.transport.messages import (
    Compatibility,
    Load,
    Message,
    PeerDescriptor,
    PeerRequest,
    Welcome,
)
from pdengine.transport.regions import describe_region
from pdengine.transport.sockets import ServerSocket

LEASE_SECONDS = 30.0
NUM_BLOCKS = 4
BLOCK_SIZE = 1


def descriptor(engine_id: str, role: Any, control_address: str) -> PeerDescriptor:
    region = describe_region(
        ("block", "byte"), (NUM_BLOCKS, 8), item_size=1, dtype="uint8", base_address=4096
    )
    return PeerDescriptor(engine_id, role, control_address, b"", region)


class Bench:
    """A worker on the loop, with an engine that only remembers, and the socket of a prefill worker. keys: the
    worker's file."""

    def __init__(self, keys: Path | None = None, *, drain_seconds: float = 0.0) -> None:
        self.context = zmq.asyncio.Context()
        self.keys = WorkerKeys(self.context, keys) if keys is not None else None
        self.writer = ServerSocket[PeerRequest](self.context, PeerRequest)
        self.writer_descriptor = descriptor("writer", "prefill", self.writer.bind("tcp://127.0.0.1:0"))
        self.posted: list[object] = []
        nothing = SimpleNamespace(connect=lambda *_: None, disconnect=lambda *_: None)
        parts = WorkerParts(
            descriptor=descriptor("decode", "decode", "tcp://127.0.0.1:1"),
            compatibility=Compatibility(1, "", "", "", 1, "", ""),
            max_context=100,
            block_size=BLOCK_SIZE,
            max_requests=4,
            lease_seconds=LEASE_SECONDS,
            drain_seconds=drain_seconds,
            router_address="tcp://127.0.0.1:1",
            context=self.context,
            peer_server=ServerSocket[PeerRequest](
                self.context,
                PeerRequest,
                keys=self.keys.to_serve() if self.keys is not None else None,
            ),
            transfer=cast(Any, nothing),
            engine=cast(Any, SimpleNamespace(post=self.posted.append, load=Load(4, 4), step_age=lambda: 0.0)),
            metrics=WorkerMetrics(),
            died=Future(),
            keys=self.keys,
        )
        self.worker = Worker(parts)
        self.sent: list[Message] = []  # to the router
        self.worker._router.send = self.sent.append  # type: ignore[method-assign]

    def join(self, *peers: PeerDescriptor) -> None:
        self.worker._join(Welcome("epoch", 1.0, list(peers), pushes=True))

    @property
    def has_lost_writer(self) -> bool:
        return LoseWriter("writer") in self.posted
