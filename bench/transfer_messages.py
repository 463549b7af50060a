"""What `pdengine bench transfer` says to its two processes and hears from them."""

from __future__ import annotations

import msgspec

from pdengine.bench.scatter import Scatter
from pdengine.transport.regions import RegionDescriptor

NIXL_PACKAGE = "nixl_cu12"


class Offer(msgspec.Struct, frozen=True):
    """The target's first message, which is the reader's first command, too: connect to it."""

    worker_address: bytes
    region: RegionDescriptor
    version: str


class Work(msgspec.Struct, frozen=True):
    """To the target: what its main thread does from now on: "idle", "torch" or "python"."""

    kind: str


class ProgressGaps(msgspec.Struct, frozen=True):
    """The target's answer: its gaps between calls of ucp_worker_progress since the last answer.

    p99_seconds: 99 % of them were no longer; the upper bound of a bucket, None if it is the unbounded one or
    there were no gaps.
    """

    count: int
    p99_seconds: float | None


class Connected(msgspec.Struct, frozen=True):
    lanes: str


class Measure(msgspec.Struct, frozen=True):
    """To the reader: pull such blocks so many times, each time others."""

    scatter: Scatter
    repetitions: int


class Measured(msgspec.Struct, frozen=True):
    """The reader's answer, by repetition; times in seconds.

    seconds: from the call of `pull` until its event has come. copy_seconds: of one memmove per run between
    two pools of the reader's own, with the same runs.
    """

    seconds: list[float]
    post_seconds: list[float]
    num_gets: list[int]
    copy_seconds: list[float]
