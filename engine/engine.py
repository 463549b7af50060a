"""The engine loop: take commands, schedule, run, postprocess, report.

It runs on a thread of its own and talks through queues only: commands come in by `post` from any thread,
events go out by the `emit` callable. It sleeps while there is nothing to do.
"""

import queue
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic

from pdengine.engine.leases import BorrowedLease
from pdengine.engine.pulls import Pulls
from pdengine.engine.runner import Runner
from pdengine.engine.scheduler import Scheduler
from pdengine.engine.sequence import Mode, Sequence
from pdengine.transport.messages import (
    KVLease,
    Load,
    Prefilled,
    Pulled,
    StepTokens,
    TokenUpdate,
    TransferStats,
    WorkFailed,
)
from pdengine.transport.transfer import PeerConnected, PeerFailed, PullCompleted, PullFailed, TransferEvent


@dataclass(frozen=True)
class AddSequence:
    sequence: Sequence


@dataclass(frozen=True)
class AbortRequest:
    request_id: str


@dataclass(frozen=True)
class AbortAll:
    """Drop every request: the router that gave them is gone. Granted leases stay until FreeLease."""


@dataclass(frozen=True)
class FreeLease:
    """A granted lease was released or has expired."""

    lease_id: int


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


Command = AddSequence | AbortRequest | AbortAll | FreeLease | LoseLease | Stop | TransferEvent
Event = Prefilled | Pulled | StepTokens | WorkFailed | LeaseUnneeded | PeerConnected | PeerFailed


class Engine:
    """`run` belongs to the engine thread; `post`, `load` and `step_age` may be used from any thread.

    emit: takes the events of one turn, on the engine thread; must be quick and thread-safe.
    """

    def __init__(
        self,
        *,
        engine_id: str,
        scheduler: Scheduler,
        runner: Runner,
        pulls: Pulls,
        eos_token_ids: frozenset[int],
        lease_duration: float,
        emit: Callable[[list[Event]], None],
    ) -> None:
        self._engine_id = engine_id
        self._scheduler = scheduler
        self._runner = runner
        self._pulls = pulls
        self._eos_token_ids = eos_token_ids
        self._lease_duration = lease_duration
        self._emit = emit
        self._inbox: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._events: list[Event] = []
        self._lanes: dict[str, str] = {}
        self._turned_at = monotonic()
        self.load = self._current_load()

    def post(self, command: Command) -> None:
        """Hand a command or a transfer's event to the engine thread."""
        self._inbox.put(command)

    def step_age(self) -> float:
        """Seconds since the loop last turned, while a sequence can run; 0 when the loop sleeps."""
        return monotonic() - self._turned_at if self._scheduler.running else 0.0

    def run(self) -> None:
        """Turn until Stop."""
        ran = False
        while True:
            # After a step that ran there is always another turn: what it finished may have made room.
            for command in self._take_commands(wait=not ran):
                if isinstance(command, Stop):
                    return
                self._handle(command)
            ran = self._step()

    def _take_commands(self, *, wait: bool) -> list[Command]:
        """All commands that are there. `wait`: sleep until there is one or a pull has its deadline."""
        commands: list[Command] = []
        try:
            if wait:
                deadline = self._pulls.next_deadline()
                timeout = None if deadline is None else max(0.0, deadline - monotonic())
                commands.append(self._inbox.get(timeout=timeout))
            while True:
                commands.append(self._inbox.get_nowait())
        except queue.Empty:
            return commands

    def _step(self) -> bool:
        """Admit, run and report; whether any sequence ran."""
        self._turned_at = monotonic()
        for sequence in self._pulls.overdue(monotonic()):
            self._fail(sequence, "the pull of the KV cache did not end in time")
        for sequence in self._scheduler.admit():
            self._pulls.start(sequence)
        chunks = self._scheduler.schedule()
        self._tell()  # what is known already does not wait for the step
        if chunks:
            token_ids = self._runner.run(chunks)
            self._report(self._scheduler.postprocess(chunks, token_ids, self._eos_token_ids))
            self._tell()
        return bool(chunks)

    def _tell(self) -> None:
        """Publish the load and hand out the events so far."""
        self.load = self._current_load()
        if self._events:
            events, self._events = self._events, []
            self._emit(events)

    def _report(self, advanced: list[Sequence]) -> None:
        updates: list[TokenUpdate] = []
        for sequence in advanced:
            request_id, attempt, finish_reason = sequence.request_id, sequence.attempt, sequence.finish_reason
            position, token_id = sequence.num_output_tokens - 1, sequence.token_ids[-1]
            if sequence.mode is Mode.PREFILL:
                lease = self._grant_lease(sequence) if finish_reason is None else None
                prefilled = Prefilled(request_id, attempt, position, token_id, finish_reason, lease)
                self._events.append(prefilled)
            else:
                updates.append(TokenUpdate(request_id, attempt, position, token_id, finish_reason))
        if updates:
            self._events.append(StepTokens(updates))

    def _grant_lease(self, sequence: Sequence) -> KVLease:
        # Peers may read from here on: the runner has read the step's tokens, so all its kernels have ended.
        block_ids, num_tokens = sequence.block_ids, sequence.num_computed
        lease_id = self._scheduler.lease(sequence)
        return KVLease(lease_id, self._engine_id, block_ids, num_tokens, self._lease_duration)

    def _handle(self, command: Command) -> None:
        match command:
            case AddSequence(sequence):
                self._add(sequence)
            case AbortRequest(request_id):
                aborted = self._scheduler.find(request_id)
                if aborted is not None:
                    self._remove(aborted)
            case AbortAll():
                scheduler = self._scheduler
                for sequence in [*scheduler.waiting, *scheduler.pulling, *scheduler.running]:
                    self._remove(sequence)
            case FreeLease(lease_id):
                self._scheduler.free_lease(lease_id)
            case LoseLease(borrowed, reason):
                loser = self._scheduler.find(borrowed.request_id)
                if loser is not None and loser.lease is borrowed:
                    self._fail(loser, reason)
            case PullCompleted() | PullFailed():
                self._finish_pull(command)
            case PeerConnected(engine_id, lanes):
                self._lanes[engine_id] = lanes
                self._events.append(command)
            case PeerFailed(engine_id):
                self._lanes.pop(engine_id, None)
                self._events.append(command)
            case _:
                raise AssertionError(f"unknown command {command}")

    def _add(self, sequence: Sequence) -> None:
        older = self._scheduler.find(sequence.request_id)
        if older is not None and older.attempt >= sequence.attempt:
            if older.attempt > sequence.attempt:  # else it is a duplicate, and its lease is in use
                self._drop_lease(sequence)
            return
        if older is not None:
            self._remove(older)
        self._scheduler.add(sequence)

    def _finish_pull(self, event: PullCompleted | PullFailed) -> None:
        pull = self._pulls.finish(event)
        sequence = pull.sequence
        if sequence is None:
            return  # nobody waits any more
        assert sequence.lease is not None
        if isinstance(event, PullFailed):
            self._fail(sequence, f"the pull of the KV cache failed: {event.reason}")
        elif not sequence.lease.covers(event.completed_at):
            # The blocks may have been given to somebody else while they were read.
            self._fail(sequence, "the lease ran out before the pull had ended")
        else:
            lease = sequence.lease.lease
            lanes = self._lanes.get(lease.engine_id, "")
            stats = TransferStats(pull.num_blocks, event.num_bytes, event.num_gets, event.seconds, lanes)
            self._events.append(Pulled(sequence.request_id, sequence.attempt, stats))
            self._drop_lease(sequence)
            self._scheduler.start_decoding(sequence, lease.num_tokens)

    def _fail(self, sequence: Sequence, reason: str) -> None:
        self._events.append(WorkFailed(sequence.request_id, sequence.attempt, reason, retry=True))
        self._remove(sequence)

    def _remove(self, sequence: Sequence) -> None:
        """Take a sequence out for good; blocks that a pull may still write go into quarantine."""
        pull = self._pulls.pull_of(sequence)
        if pull is None:
            self._scheduler.remove(sequence)
        else:
            self._pulls.abandon(pull, self._scheduler.detach(sequence))
        self._drop_lease(sequence)

    def _drop_lease(self, sequence: Sequence) -> None:
        if sequence.lease is not None:
            self._events.append(LeaseUnneeded(sequence.lease))
            sequence.lease = None

    def _current_load(self) -> Load:
        scheduler = self._scheduler
        return Load(
            num_blocks=scheduler.pool.num_blocks,
            free_blocks=scheduler.pool.num_free,
            pinned_blocks=scheduler.num_pinned,
            quarantined_blocks=self._pulls.num_quarantined,
            running=len(scheduler.running) + len(scheduler.pulling),
            waiting=len(scheduler.waiting),
        )
