"""`pdengine bench transfer`: how fast the KV cache moves between two processes, against what the link can do.

Every path of a worker's transfer is measured between two processes with the worker's own pool and settings:
the mapping, UCX over shared memory, UCX over TCP on loopback, and UCX between two network namespaces; NIXL,
where it is installed, in the same way. The ceiling within a host is a memmove over the same runs, taken in
turns with the pulls; over TCP it is UCX's own benchmark in the same places.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Literal, TypeAlias

from pdengine.bench.child_process import ChildProcess, child_process
from pdengine.bench.network_namespaces import NamespacesUnavailable, network_namespaces
from pdengine.bench.scatter import PIECES_PER_BLOCK, UNIT_BYTES, Scatter
from pdengine.bench.transfer_messages import (
    NIXL_PACKAGE,
    Connected,
    Measure,
    Measured,
    Offer,
    ProgressGaps,
    Work,
)
from pdengine.bench.ucx_perftest import PerftestFailed, find_perftest, get_bandwidth
from pdengine.transport.ucx_library import find_ucx

PathName: TypeAlias = Literal["mapping", "shm", "tcp", "nixl", "network"]
METHODS: Mapping[PathName, str] = {
    "mapping": "mapping",
    "nixl": "nixl",
}  # of `transfer_peers`; others use "ucx"
NETWORK_PATHS = ("tcp", "network")
WORK: tuple[str, ...] = ("idle", "torch", "python")

LOOPBACK = "127.0.0.1"
SECONDS_PER_STEP = 300.0
BLOCKS_FACTOR = 16  # from one number of blocks to the next
LONGEST_RUN = 8
BUSY_REPETITIONS = 15
BUSY_BYTES, BUSY_GETS = 16 * 2**20, 32
PERFTEST_GETS = 200
PERFTEST_OUTSTANDING = (1, 8)
SEGMENT_SETTINGS = ("UCX_TCP_TX_SEG_SIZE", "UCX_TCP_RX_SEG_SIZE")  # as ucx_settings.py sets them


class PlanError(ValueError):
    """A benchmark that cannot be run as asked; the message names the option."""


@dataclass(frozen=True)
class Plan:
    """What to measure. Raises PlanError."""

    paths: tuple[PathName, ...] = ("mapping", "shm", "tcp")
    pool_bytes: int = 128 * 2**20
    block_sizes: tuple[int, ...] = (64 * 2**10, 256 * 2**10, 2 * 2**20)
    repetitions: int = 5
    busy: bool = False

    def __post_init__(self) -> None:
        if not self.paths or not self.block_sizes:
            raise PlanError("there must be at least one path and one size of blocks")
        if self.repetitions < 1:
            raise PlanError(f"repetitions must be at least 1, got {self.repetitions}")
        for block_bytes in self.block_sizes:
            if block_bytes < UNIT_BYTES or block_bytes % UNIT_BYTES:
                raise PlanError(f"the size of a block must be a multiple of {UNIT_BYTES}, got {block_bytes}")
            if self.pool_bytes < block_bytes or self.pool_bytes % block_bytes:
                raise PlanError(
                    f"the pool of {self.pool_bytes} bytes does not divide into blocks of {block_bytes}"
                )
        if self.busy and self.pool_bytes < BUSY_BYTES:
            raise PlanError(f"the busy target needs a pool of at least {BUSY_BYTES} bytes")

    @property
    def scatters(self) -> list[Scatter]:
        """Every size of block, from one block to the whole pool; then the layout with pieces per layer."""
        scatters: list[Scatter] = []
        for block_bytes in self.block_sizes:
            for num_blocks in _numbers_of_blocks(self.pool_bytes // block_bytes):
                scatters += self._places(block_bytes, num_blocks, pieces=1)
        for block_bytes in self.block_sizes:
            if block_bytes == PIECES_PER_BLOCK * UNIT_BYTES:
                for num_blocks in _numbers_of_blocks(self.pool_bytes // block_bytes):
                    scatters += self._places(block_bytes, num_blocks, pieces=PIECES_PER_BLOCK)
        return scatters

    @property
    def num_steps(self) -> int:
        """How often `run_plan` reports a step."""
        perftests = sum(path in NETWORK_PATHS for path in self.paths)
        return perftests + len(self.paths) * (len(self.scatters) + (len(WORK) if self.busy else 0))

    def _places(self, block_bytes: int, num_blocks: int, pieces: int) -> Iterator[Scatter]:
        for longest_run in (0, LONGEST_RUN) if num_blocks > 1 else (0,):
            yield Scatter(self.pool_bytes, block_bytes, num_blocks, longest_run, pieces)


@dataclass(frozen=True)
class Figure:
    """One kind of pull over one path: medians over the repetitions.

    longest_run: 0 where the blocks are consecutive; pieces: regions that a block is spread over; ceiling: of
    the path, in bytes per second, None if unknown.
    """

    path: PathName
    block_bytes: int
    num_blocks: int
    longest_run: int
    pieces: int
    num_gets: int
    seconds: float
    best_seconds: float
    post_seconds: float
    copy_seconds: float  # of a memmove over the same runs
    ceiling: float | None

    @property
    def num_bytes(self) -> int:
        return self.num_blocks * self.block_bytes

    @property
    def bandwidth(self) -> float:
        """Bytes per second."""
        return self.num_bytes / self.seconds

    @property
    def share_of_ceiling(self) -> float | None:
        return None if self.ceiling is None else self.bandwidth / self.ceiling


@dataclass(frozen=True)
class BusyFigure:
    """Pulls of BUSY_BYTES in BUSY_GETS reads from a target whose main thread works.

    p99_gap_seconds: 99 % of the target's gaps between progress calls were no longer; None if it made none.
    """

    path: PathName
    work: str
    seconds: float
    worst_seconds: float
    p99_gap_seconds: float | None


@dataclass
class TransferResult:
    """versions, lanes: by path; perftest: bytes per second by path; notes: what was left out."""

    versions: dict[str, str] = field(default_factory=dict)
    lanes: dict[str, str] = field(default_factory=dict)
    perftest: dict[str, float] = field(default_factory=dict)
    figures: list[Figure] = field(default_factory=list)
    busy: list[BusyFigure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


Report: TypeAlias = Callable[[str], None]
"""Is told of every step when it begins."""


def has_nixl() -> bool:
    return importlib.util.find_spec(NIXL_PACKAGE) is not None


def run_plan(plan: Plan, report: Report) -> TransferResult:
    """Measure one path after the other. A path that this machine lacks becomes a note.

    Raises ChildFailed if a process of the benchmark dies.
    """
    result = TransferResult()
    for path in plan.paths:
        try:
            with _places(path) as places:
                _measure_path(plan, places, result, report)
        except NamespacesUnavailable as error:
            result.notes.append(f"{path} was left out: {error}")
    return result


@dataclass(frozen=True)
class _Places:
    """Where and how the target and the reader of a path run."""

    path: PathName
    hosts: tuple[str, str] = (LOOPBACK, LOOPBACK)
    prefixes: tuple[Sequence[str], Sequence[str]] = ((), ())
    environ: Mapping[str, str] = field(default_factory=dict)

    @contextmanager
    def processes(self, pool_bytes: int) -> Iterator[tuple[ChildProcess, ChildProcess]]:
        method = METHODS.get(self.path, "ucx")
        with ExitStack() as stack:
            target, reader = (
                stack.enter_context(
                    child_process(
                        name,
                        ["pdengine.bench.transfer_peers", name, str(pool_bytes), host, method],
                        prefix=prefix,
                        environ=self.environ,
                    )
                )
                for name, host, prefix in zip(("target", "reader"), self.hosts, self.prefixes, strict=True)
            )
            yield target, reader


@contextmanager
def _places(path: PathName) -> Iterator[_Places]:
    if path == "network":
        with network_namespaces() as (first, second):
            prefixes = (first.command([]), second.command([]))
            yield _Places(path, (first.address, second.address), prefixes)
    else:
        yield _Places(path, environ={"UCX_TLS": "tcp"} if path == "tcp" else {})


def _measure_path(plan: Plan, places: _Places, result: TransferResult, report: Report) -> None:
    if places.path in NETWORK_PATHS:
        report(f"{places.path}: ucx_perftest")
        _run_perftest(places, result)
    with places.processes(plan.pool_bytes) as (target, reader):
        offer = target.answer(Offer)
        connected = reader.ask(offer, Connected, SECONDS_PER_STEP)
        result.versions[places.path] = offer.version
        result.lanes[places.path] = connected.lanes
        for scatter in plan.scatters:
            report(f"{places.path}: {scatter.num_blocks} blocks of {scatter.block_bytes // 2**10} KiB")
            measured = reader.ask(Measure(scatter, plan.repetitions), Measured, SECONDS_PER_STEP)
            result.figures.append(_figure(places.path, scatter, measured, result.perftest))
        for work in WORK if plan.busy else ():
            report(f"{places.path}: target busy with {work}")
            result.busy.append(_busy_figure(plan, places.path, work, target, reader))


def _figure(path: PathName, scatter: Scatter, measured: Measured, perftest: Mapping[str, float]) -> Figure:
    copy_seconds = median(measured.copy_seconds)
    num_bytes = scatter.num_blocks * scatter.block_bytes
    by_memory = path not in NETWORK_PATHS
    return Figure(
        path,
        scatter.block_bytes,
        scatter.num_blocks,
        scatter.longest_run,
        scatter.pieces,
        num_gets=int(median(measured.num_gets)),
        seconds=median(measured.seconds),
        best_seconds=min(measured.seconds),
        post_seconds=median(measured.post_seconds),
        copy_seconds=copy_seconds,
        ceiling=num_bytes / copy_seconds if by_memory else perftest.get(path),
    )


def _busy_figure(
    plan: Plan, path: PathName, work: str, target: ChildProcess, reader: ChildProcess
) -> BusyFigure:
    scatter = Scatter(plan.pool_bytes, BUSY_BYTES // BUSY_GETS, BUSY_GETS, longest_run=1)
    target.ask(Work(work), ProgressGaps, SECONDS_PER_STEP)
    measured = reader.ask(Measure(scatter, BUSY_REPETITIONS), Measured, SECONDS_PER_STEP)
    gaps = target.ask(Work("idle"), ProgressGaps, SECONDS_PER_STEP)
    return BusyFigure(path, work, median(measured.seconds), max(measured.seconds), gaps.p99_seconds)


def _run_perftest(places: _Places, result: TransferResult) -> None:
    libucp = find_ucx(os.environ)
    perftest = find_perftest(libucp)
    if perftest is None:
        result.notes.append(
            f"{places.path} has no ceiling: ucx_perftest is not installed (Debian: ucx-utils)"
        )
        return
    settings = {"UCX_TLS": "tcp", **{name: os.environ.get(name, "64k") for name in SEGMENT_SETTINGS}}
    try:
        result.perftest[places.path] = max(
            get_bandwidth(
                perftest,
                libucp,
                host=places.hosts[0],
                settings=settings,
                num_gets=PERFTEST_GETS,
                outstanding=outstanding,
                server_prefix=places.prefixes[0],
                client_prefix=places.prefixes[1],
            )
            for outstanding in PERFTEST_OUTSTANDING
        )
    except PerftestFailed as error:
        result.notes.append(f"{places.path} has no ceiling: {error}")


def _numbers_of_blocks(limit: int) -> list[int]:
    """1, BLOCKS_FACTOR, BLOCKS_FACTOR squared, ..., limit"""
    numbers = [1]
    while numbers[-1] * BLOCKS_FACTOR < limit:
        numbers.append(numbers[-1] * BLOCKS_FACTOR)
    return numbers if limit == 1 else [*numbers, limit]
