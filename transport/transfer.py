"""The data plane as the engine sees it: register a KV pool, connect to peers, pull blocks, receive events.

A worker uses `TwoPathTransfer`: it maps the memory of peers on its host (`MappingTransfer`) and reaches the
others through UCX (`UcxTransfer`). `MemoryTransfer` is the in-process fake for tests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

from pdengine.transport.regions import RegionDescriptor, Run


class TransferError(RuntimeError):
    """The data plane cannot be used as asked: not found, misconfigured, registered twice, or closed."""


@dataclass(frozen=True)
class PullCompleted:
    """All blocks of a pull have landed in local memory."""

    pull_id: int
    num_bytes: int
    num_gets: int
    seconds: float  # from the first post to the last completion
    completed_at: float  # time.monotonic()
    post_seconds: float = 0.0  # spent in posting the reads; 0 where they are not posted


@dataclass(frozen=True)
class PullFailed:
    """The pull has ended and nothing writes to its local blocks any more; their contents are undefined."""

    pull_id: int
    reason: str


@dataclass(frozen=True)
class PushCompleted:
    """All bytes of a push lie in the peer's memory."""

    push_id: int
    num_bytes: int
    num_puts: int
    completed_at: float  # time.monotonic()


@dataclass(frozen=True)
class PushFailed:
    """The push has ended and nothing more is written for it; what the peer's blocks hold is undefined."""

    push_id: int
    reason: str


@dataclass(frozen=True)
class PeerConnected:
    """The peer answered; `lanes` names what carries its reads, e.g. "mapping" or UCX's "sysv, posix"."""

    engine_id: str
    lanes: str


@dataclass(frozen=True)
class PeerFailed:
    """The peer could not be connected, or its connection broke. It is forgotten and its pulls have failed."""

    engine_id: str
    reason: str


TransferEvent: TypeAlias = (
    PullCompleted | PullFailed | PushCompleted | PushFailed | PeerConnected | PeerFailed
)
Deliver: TypeAlias = Callable[[TransferEvent], None]
"""Takes an event on any thread; must be thread-safe and quick, e.g. `SimpleQueue.put`."""

SameHost: TypeAlias = Literal["mapping", "ucx"]
"""How the KV cache moves between workers on one host."""


class Transfer(Protocol):
    """One worker's side of the data plane. Every method may be called from any thread."""

    @property
    def worker_address(self) -> bytes:
        """What a peer passes to `connect`. For authenticated peers only: it opens this process's memory."""
        ...

    @property
    def version(self) -> str:
        """The implementation and its version, e.g. "ucx 1.22.0"; peers should have the same."""
        ...

    def register(self, region: RegionDescriptor) -> RegionDescriptor:
        """Make the local KV pool readable by peers and the destination of pulls; once, before `connect`.

        Returns `region` with its remote key, ready to publish. The memory must stay until `close`. Raises
        TransferError if a region is registered already, or the memory cannot be registered.
        """
        ...

    def connect(self, engine_id: str, worker_address: bytes, region: RegionDescriptor) -> None:
        """Connect to the worker that published `worker_address` and `region`, without waiting.

        Ends in exactly one PeerConnected or PeerFailed (regions that do not match, no answer in time,
        `disconnect` or `close` meanwhile). If the connection of a connected peer breaks later, that gives one
        PeerFailed. Connecting an engine id again disconnects it first.
        """
        ...

    def pull(self, pull_id: int, engine_id: str, runs: Sequence[Run]) -> None:
        """Copy `runs` of blocks from the peer's pool into ours with one read per run, without waiting.

        Ends in exactly one PullCompleted or PullFailed (unknown or failed peer, a block outside a pool,
        `disconnect`, `close`); a pull of no runs completes at once. It has no deadline of its own: a read
        from a peer that died silently ends only by `disconnect`. The caller chooses `pull_id`, which must be
        unique while it is in flight.
        """
        ...

    def disconnect(self, engine_id: str) -> None:
        """Close the connection by force: pulls in flight on it fail at once, except a copy out of mapped
        memory that runs already, which completes. Idempotent, does not wait.

        The peer is not told. If it reads from us, too, its reads may stall until it connects again.
        """
        ...

    def close(self) -> None:
        """Fail what is in flight, disconnect all peers and release everything. Waits; idempotent."""
        ...


class PushTransfer(Transfer, Protocol):
    """A Transfer that can write to its peers, too, for comparison with pulls: docs/transfer.md, "Push"."""

    def connect_to_push(self, engine_id: str, worker_address: bytes, region: RegionDescriptor) -> None:
        """Like `connect`, by a path that can write."""
        ...

    def push(self, push_id: int, engine_id: str, runs: Sequence[Run], layer: int) -> None:
        """Copy one layer of `runs` of blocks from our pool into the peer's, without waiting.

        That is one write per block and KV head. Ends in exactly one PushCompleted or PushFailed, in the cases
        of `pull`. Our blocks must not change before. The caller chooses `push_id`, unique while in flight.
        """
        ...
