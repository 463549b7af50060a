"""What the engine is told, and what it tells."""

from dataclasses import dataclass

from pdengine.engine.leases import BorrowedLease
from pdengine.engine.pushes import PushCommand, UnwantedPush
from pdengine.engine.sequence import Sequence
from pdengine.transport.messages import (
    CacheUpdate,
    EarlyPullDropped,
    Prefilled,
    PrefixHit,
    PromptProgress,
    PromptScored,
    PullEarly,
    Pulled,
    Pushed,
    PushEnded,
    Reserved,
    StepTokens,
    WorkFailed,
    WorkRefused,
)
from pdengine.transport.transfer import PeerConnected, PeerFailed, TransferEvent


@dataclass(frozen=True)
class AddRequest:
    """sequences: all that were made of one Work, so of one request and one attempt; at least one."""

    sequences: list[Sequence]


@dataclass(frozen=True)
class AbortRequest:
    """choices: the answers to give up; None: all of them."""

    request_id: str
    choices: frozenset[int] | None = None


@dataclass(frozen=True)
class AbortAll:
    """Drop every request: the router that gave them is gone. Granted leases stay until FreeLease. A new
    router is told all that is in the prefix cache."""


@dataclass(frozen=True)
class FreeLease:
    """A granted lease was released or has expired."""

    lease_id: int


@dataclass(frozen=True)
class CoverLease:
    """A borrowed lease was confirmed for the first time since it was borrowed."""

    borrowed: BorrowedLease


@dataclass(frozen=True)
class LoseLease:
    """A borrowed lease is gone: what it covered cannot be pulled, or cannot be trusted."""

    borrowed: BorrowedLease
    reason: str


@dataclass(frozen=True)
class Stop:
    """Leave the loop."""


@dataclass(frozen=True)
class LeaseUnneeded:
    """Event: the engine will not read from this borrowed lease again."""

    borrowed: BorrowedLease


Command = (
    AddRequest
    | PullEarly
    | AbortRequest
    | AbortAll
    | FreeLease
    | CoverLease
    | LoseLease
    | PushCommand
    | Stop
    | TransferEvent
)
Report = (
    PromptProgress
    | EarlyPullDropped
    | PromptScored
    | Prefilled
    | PrefixHit
    | CacheUpdate
    | Pulled
    | Reserved
    | Pushed
    | StepTokens
    | WorkRefused
    | WorkFailed
)
Event = Report | LeaseUnneeded | UnwantedPush | PushEnded | PeerConnected | PeerFailed
