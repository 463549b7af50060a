"""The engine loop: take commands, schedule, run, postprocess, report.

It runs on a thread of its own and talks through queues only: commands come in by `post` from any thread,
events go out by the `emit` callable. It sleeps while there is nothing to do.
"""

import queue
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic

from pdengine.engine.leases import BorrowedLease
from pdengine.engine.metrics import PullFailure, WorkerMetrics
from pdengine.engine.pulls import Pull, Pulls
from pdengine.engine.pushes import LoseWriter, PushCommand, Pushes, StartPushed, UnwantedPush
from pdengine.engine.runner import Runner
from pdengine.engine.scheduler import Chunk, Scheduler
from pdengine.engine.sequence import Mode, Sequence, blocks_for
from pdengine.transport.messages import (
    EarlyPullDropped,
    EndPush,
    KVLease,
    Load,
    Prefilled,
    PromptProgress,
    PullEarly,
    Pulled,
    Pushed,
    PushEnded,
    Reserved,
    StepTokens,
    TokenUpdate,
    TransferStats,
    WorkFailed,
    WorkRefused,
)
from pdengine.transport.transfer import (
    PeerConnected,
    PeerFailed,
    PullCompleted,
    PullFailed,
    PushCompleted,
    PushFailed,
    TransferEvent,
)


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
    AddSequence
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
    | Prefilled
    | Pulled
    | Reserved
    | Pushed
    | StepTokens
    | WorkRefused
    | WorkFailed
)
Event = Report | LeaseUnneeded | UnwantedPush | PushEnded | PeerConnected | PeerFailed


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
        pushes: Pushes,
        eos_token_ids: frozenset[int],
        lease_duration: float,
        metrics: WorkerMetrics,
        emit: Callable[[list[Event]], None],
    ) -> None:
        self._engine_id = engine_id
        self._scheduler = scheduler
        self._runner = runner
        self._pulls = pulls
        self._pushes = pushes
        self._eos_token_ids = eos_token_ids
        self._block_size = scheduler.config.block_size
        self._lease_duration = lease_duration
        self._metrics = metrics
        self._emit = emit
        self._inbox: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._events: list[Event] = []
        self._lanes: dict[str, str] = {}
        self._turned_at = self._told_at = monotonic()
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
        for pull in self._pulls.overdue(monotonic()):
            self._give_up(pull, "timeout", "the pull of the KV cache did not end in time")
        self._admit()
        chunks = self._scheduler.schedule()
        self._tell()  # what is known already does not wait for the step
        if chunks:
            self._run(chunks)
            self._tell()
        return bool(chunks)

    def _run(self, chunks: list[Chunk]) -> None:
        started_at = monotonic()
        num_prompt_tokens = sum(chunk.num_prompt_tokens for chunk in chunks)
        unfinished = [chunk for chunk in chunks if not chunk.samples]
        token_ids = self._runner.run(chunks, self._pushes.write_after_layer(chunks))
        self._report(self._scheduler.postprocess(chunks, token_ids, self._eos_token_ids))
        self._report_progress(unfinished)
        self._metrics.step_completed(
            monotonic() - started_at,
            num_tokens=sum(chunk.num_tokens for chunk in chunks),
            num_prompt_tokens=num_prompt_tokens,
            num_generated=len(token_ids),
        )

    def _admit(self) -> None:
        for sequence in self._scheduler.admit():
            if sequence.writer is None:
                self._pulls.start(sequence)
            else:
                self._events.append(self._pushes.reserved(sequence))

    def _tell(self) -> None:
        """Publish the load and hand out the events so far."""
        now = monotonic()
        self._metrics.blocks_held(self.load.num_blocks - self.load.free_blocks, now - self._told_at)
        self._told_at, self.load = now, self._current_load()
        if self._events:
            events, self._events = self._events, []
            self._emit(events)

    def _report(self, advanced: list[Sequence]) -> None:
        updates: list[TokenUpdate] = []
        for sequence in advanced:
            request_id, attempt, finish_reason = sequence.request_id, sequence.attempt, sequence.finish_reason
            position, token_id = sequence.num_output_tokens - 1, sequence.token_ids[-1]
            if finish_reason is not None:
                self._metrics.request_ended(finish_reason)
            if sequence.mode is Mode.PREFILL:
                lease = self._grant_lease(sequence) if finish_reason is None else None
                prefilled = Prefilled(request_id, attempt, position, token_id, finish_reason, lease)
                if sequence.push is not None:
                    prefilled = self._pushes.finish_prompt(sequence.push, prefilled)
                self._events.append(prefilled)
            else:
                updates.append(TokenUpdate(request_id, attempt, position, token_id, finish_reason))
        if updates:
            self._events.append(StepTokens(updates))

    def _report_progress(self, chunks: list[Chunk]) -> None:
        """Say which prompts for other workers have come further, so that they can be pulled early."""
        for sequence, _ in chunks:
            if sequence.mode is Mode.PREFILL and sequence.push is None:
                lease = self._lease_of(sequence, len(sequence.token_ids))
                self._events.append(
                    PromptProgress(sequence.request_id, sequence.attempt, sequence.num_computed, lease)
                )

    def _grant_lease(self, sequence: Sequence) -> KVLease:
        # Peers may read from here on: the runner has read the step's tokens, so all its kernels have ended.
        lease = self._lease_of(sequence, sequence.num_computed)
        self._scheduler.lease(sequence)
        self._metrics.request_ended("prefilled")
        return lease

    def _lease_of(self, sequence: Sequence, num_tokens: int) -> KVLease:
        lease_id = self._scheduler.lease_id(sequence)
        return KVLease(lease_id, self._engine_id, sequence.block_ids, num_tokens, self._lease_duration)

    def _handle(self, command: Command) -> None:
        match command:
            case AddSequence(sequence):
                self._add(sequence)
            case PullEarly():
                self._pull_early(command)
            case AbortRequest(request_id):
                self._abort(request_id)
            case AbortAll():
                self._abort_all()
            case FreeLease(lease_id):
                self._scheduler.free_lease(lease_id)
            case CoverLease(borrowed):
                self._finish_covered(borrowed)
            case LoseLease(borrowed, reason):
                loser = self._scheduler.find(borrowed.request_id)
                if loser is not None and loser.lease is borrowed:
                    self._lose_lease(loser, reason)
            case PullCompleted() | PullFailed():
                self._finish_read(command)
            case PushCompleted() | PushFailed() | StartPushed() | EndPush() | PushEnded() | LoseWriter():
                self._events.extend(self._pushes.handle(command, self._lanes))
            case PeerConnected(engine_id, lanes):
                self._lanes[engine_id] = lanes
                self._events.append(command)
            case PeerFailed(engine_id):
                self._lanes.pop(engine_id, None)
                self._events.append(command)
            case _:
                raise AssertionError(f"unknown command {command}")

    # ---------------------------------------------------------------------- requests that come and go

    def _add(self, sequence: Sequence) -> None:
        older = self._scheduler.find(sequence.request_id)
        if older is not None and older.attempt >= sequence.attempt:
            if older.attempt > sequence.attempt:  # else it is a duplicate, and its lease is in use
                self._drop_lease(sequence)
            return
        if older is not None:
            self._remove(older)
        if self._pushes.has_ended(sequence):
            return
        pull = self._pulls.early(sequence.request_id)
        if pull is not None and self._is_for(pull, sequence):
            self._scheduler.add_reserved(sequence)
            self._pulls.complete(pull, sequence)
            if pull.is_complete:
                self._finish_pull(pull)
            return
        if pull is not None:
            self._drop_early(pull)
        refusal = self._scheduler.refusal(sequence)
        if refusal is None:
            self._scheduler.add(sequence)
            self._admit()  # now, so that the next one sees what is left
        else:
            self._metrics.request_ended("refused")
            self._events.append(WorkRefused(sequence.request_id, sequence.attempt, refusal))

    def _abort(self, request_id: str) -> None:
        sequence, pull = self._scheduler.find(request_id), self._pulls.early(request_id)
        if sequence is not None:
            self._metrics.request_ended("aborted")
            self._remove(sequence)
        if pull is not None:
            self._drop_early(pull)

    def _abort_all(self) -> None:
        scheduler = self._scheduler
        for sequence in [*scheduler.waiting, *scheduler.pulling, *scheduler.running]:
            self._metrics.request_ended("aborted")
            self._remove(sequence)
        for pull in self._pulls.all_early():
            self._drop_early(pull)

    def _fail(self, sequence: Sequence, reason: str) -> None:
        self._metrics.request_ended("failed")
        self._events.append(WorkFailed(sequence.request_id, sequence.attempt, reason, retry=True))
        self._remove(sequence)

    def _remove(self, sequence: Sequence) -> None:
        """Take a sequence out for good; blocks that a pull may still write go into quarantine."""
        pull = self._pulls.of_sequence(sequence)
        if pull is not None:
            self._scheduler.detach(sequence)
            self._pulls.abandon(pull)
        elif sequence.is_reserved:
            self._events.append(self._pushes.drop_reserved(sequence))
        else:
            self._scheduler.remove(sequence)
        self._drop_lease(sequence)

    def _drop_lease(self, sequence: Sequence) -> None:
        if sequence.lease is not None:
            self._events.append(LeaseUnneeded(sequence.lease))
            sequence.lease = None

    # ---------------------------------------------------------------------------------------- pulls

    def _pull_early(self, news: PullEarly) -> None:
        """Read what is done of a prompt that is still computed, if there is room; nobody depends on it."""
        if self._scheduler.find(news.request_id) is not None:
            return  # the prompt was faster than the news
        pull = self._pulls.early(news.request_id)
        if pull is not None and (pull.attempt, pull.lease.lease_id) != (news.attempt, news.lease.lease_id):
            if pull.attempt > news.attempt:
                return
            self._drop_early(pull)
            pull = None
        if pull is None:
            block_ids = self._scheduler.reserve(blocks_for(news.num_cached_tokens, self._block_size))
            if block_ids is None:
                self._events.append(EarlyPullDropped(news.request_id, news.attempt))
                return
            pull = self._pulls.start_early(news.request_id, news.attempt, news.lease, block_ids)
        self._pulls.advance(pull, news.num_tokens)

    def _is_for(self, pull: Pull, sequence: Sequence) -> bool:
        """Whether an early pull has read what the lease of `sequence` covers."""
        assert sequence.lease is not None or sequence.mode is not Mode.DECODE
        return (
            sequence.lease is not None
            and pull.attempt == sequence.attempt
            and pull.lease == sequence.lease.lease
            and len(pull.block_ids) == blocks_for(sequence.max_cached_tokens, self._block_size)
        )

    def _drop_early(self, pull: Pull) -> None:
        self._scheduler.drop_reserved()
        self._pulls.abandon(pull)

    def _lose_lease(self, sequence: Sequence, reason: str) -> None:
        if self._pulls.of_sequence(sequence) is not None:
            self._metrics.pull_failed("lease_lost")
        self._fail(sequence, reason)

    def _give_up(self, pull: Pull, kind: PullFailure, reason: str) -> None:
        if pull.sequence is None:
            self._drop_early(pull)
            self._events.append(EarlyPullDropped(pull.request_id, pull.attempt))
        else:
            self._metrics.pull_failed(kind)
            self._fail(pull.sequence, reason)

    def _finish_read(self, event: PullCompleted | PullFailed) -> None:
        pull = self._pulls.finish_read(event)
        if pull.abandoned:
            return
        if isinstance(event, PullFailed):
            self._give_up(pull, "transfer", f"the pull of the KV cache failed: {event.reason}")
        elif pull.is_complete:
            self._finish_pull(pull)

    def _finish_covered(self, borrowed: BorrowedLease) -> None:
        sequence = self._scheduler.find(borrowed.request_id)
        pull = None if sequence is None else self._pulls.of_sequence(sequence)
        if pull is not None and pull.is_complete:
            self._finish_pull(pull)

    def _finish_pull(self, pull: Pull) -> None:
        """All of the prompt is here: let its sequence run, if the bytes can be trusted.

        What was read while the prompt was being computed is covered, too: from then on its blocks were the
        request's and then the lease's without a gap, or the lease would not have been confirmed.
        """
        sequence = pull.sequence
        assert sequence is not None
        assert sequence.lease is not None
        if not sequence.lease.is_acknowledged:
            return  # CoverLease or LoseLease comes
        if not sequence.lease.covers(pull.completed_at):
            # The blocks may have been given to somebody else while they were read.
            self._metrics.pull_discarded()
            self._fail(sequence, "the lease ran out before the pull had ended")
            return
        self._pulls.remove(pull)
        stats = TransferStats(
            num_blocks=pull.num_landed,
            num_bytes=sum(read.num_bytes for read in pull.reads),
            num_gets=sum(read.num_gets for read in pull.reads),
            seconds=sum(read.seconds for read in pull.reads),
            lanes=self._lanes.get(pull.lease.engine_id, ""),
            num_early_blocks=pull.num_early,
        )
        self._metrics.pull_completed(stats, post_seconds=sum(read.post_seconds for read in pull.reads))
        self._events.append(Pulled(sequence.request_id, sequence.attempt, stats))
        self._drop_lease(sequence)
        self._scheduler.start_decoding(sequence, pull.lease.num_tokens)

    def _current_load(self) -> Load:
        scheduler = self._scheduler
        return Load(
            num_blocks=scheduler.pool.num_blocks,
            free_blocks=scheduler.pool.num_free,
            pinned_blocks=scheduler.num_pinned,
            quarantined_blocks=self._pulls.num_quarantined + self._pushes.num_quarantined,
            running=len(scheduler.running) + len(scheduler.pulling) + scheduler.num_reserved,
            waiting=len(scheduler.waiting),
        )
