"""The engine loop: take commands, schedule, start the step, report the one before, read the tokens.

It runs on a thread of its own and talks through queues only: commands come in by `post` from any thread,
events go out by the `emit` callable. It sleeps while there is nothing to do.

Between two steps only that happens which the second one depends on; the first one is reported while the
second one runs. Commands are handled while no step runs: they may free blocks that a step writes.
"""

import queue
from collections.abc import Callable
from time import monotonic
from typing import NamedTuple

from pdengine.engine.cache_news import CacheNews
from pdengine.engine.commands import (
    AbortAll,
    AbortRequest,
    AddRequest,
    Command,
    CoverLease,
    Event,
    FreeLease,
    LeaseUnneeded,
    LoseLease,
    Stop,
)
from pdengine.engine.leases import BorrowedLease
from pdengine.engine.metrics import PullFailure, WorkerMetrics
from pdengine.engine.pool_pages import PoolPages
from pdengine.engine.pulls import Pull, Pulls
from pdengine.engine.pushes import LoseWriter, Pushes, StartPushed
from pdengine.engine.runner import Runner
from pdengine.engine.scheduler import Scheduler
from pdengine.engine.sequence import Mode, Sequence
from pdengine.engine.step import Step
from pdengine.engine.step_extras import StepResult
from pdengine.engine.step_limit import StepLimit
from pdengine.engine.step_reports import StepReports
from pdengine.models.prefix_hashes import unpack_hashes
from pdengine.transport.messages import (
    EarlyPullDropped,
    EndPush,
    Load,
    PrefixHit,
    PullEarly,
    Pulled,
    PushEnded,
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
)


class _EndedStep(NamedTuple):
    """See WorkerMetrics.step_completed."""

    seconds: float
    num_tokens: int
    num_prompt_tokens: int
    num_generated: int


class Engine:
    """`run` belongs to the engine thread; `post`, `load` and `step_age` may be used from any thread.

    emit: takes the events since it was called last, in order, on the engine thread; must be quick and
        thread-safe. Usually it is called once a step.
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
        step_limit: StepLimit | None = None,
        pages: PoolPages | None = None,
    ) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._pulls = pulls
        self._pushes = pushes
        self._eos_token_ids = eos_token_ids
        self._metrics = metrics
        self._emit = emit
        self._step_limit = step_limit
        self._pages = pages
        self._reports = StepReports(
            engine_id=engine_id,
            scheduler=scheduler,
            pushes=pushes,
            lease_duration=lease_duration,
            metrics=metrics,
        )
        self._cache_news = CacheNews(scheduler.pool)
        self._inbox: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._events: list[Event] = []
        self._ended: _EndedStep | None = None  # one that is not counted yet
        self._lanes: dict[str, str] = {}
        self._turned_at = self._told_at = monotonic()
        self._is_asleep = True
        self.load = self._current_load()

    def post(self, command: Command) -> None:
        """Hand a command or a transfer's event to the engine thread."""
        self._inbox.put(command)

    def step_age(self) -> float:
        """Seconds since the loop last turned, while a sequence can run; 0 when the loop sleeps."""
        return 0.0 if self._is_asleep else monotonic() - self._turned_at

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
                self._populate_pages()
                self._is_asleep = True
                deadline = self._pulls.next_deadline()
                timeout = None if deadline is None else max(0.0, deadline - monotonic())
                commands.append(self._inbox.get(timeout=timeout))
            while True:
                commands.append(self._inbox.get_nowait())
        except queue.Empty:
            return commands
        finally:
            self._turned_at = monotonic()
            self._is_asleep = False

    def _populate_pages(self) -> None:
        """While there is nothing else to do."""
        if self._pages is not None:
            while self._inbox.empty() and self._pages.populate_ahead():
                pass

    def _step(self) -> bool:
        """Admit, run and report; whether there is more to do at once."""
        self._turned_at = monotonic()
        for pull in self._pulls.overdue(monotonic()):
            self._give_up(pull, "timeout", "the pull of the KV cache did not end in time")
        self._admit()
        num_preemptions = self._scheduler.num_preemptions
        early = self._pulls.all_early()
        step = self._scheduler.schedule(self._max_prompt_tokens(), may_preempt=not early)
        self._metrics.preempted(self._scheduler.num_preemptions - num_preemptions)
        makes_room = step.is_short and bool(early)
        if makes_room:  # nobody depends on it
            self._drop_early(early[-1])
            self._events.append(EarlyPullDropped(early[-1].request_id, early[-1].attempt))
        if step.chunks:
            self._run(step)
            return True
        self._tell(hurry=not makes_room)
        return makes_room

    def _max_prompt_tokens(self) -> int | None:
        if self._step_limit is None:
            return None
        num_decodes = sum(len(s.token_ids) - s.num_computed == 1 for s in self._scheduler.running)
        return self._step_limit.max_prompt_tokens(num_decodes)

    def _run(self, step: Step) -> None:
        if not self._runner.is_asynchronous:
            self._tell()  # what is known already does not wait for the step
        started_at = monotonic()
        if self._pages is not None:
            self._pages.use(step.chunks)
        read_step = self._runner.start(step.chunks, self._pushes.write_after_layer(step.chunks), step.copies)
        if self._runner.is_asynchronous:
            self._tell()  # the step does not wait for that either
        result = read_step()
        self._finish(step, result, monotonic() - started_at)

    def _finish(self, step: Step, result: StepResult, seconds: float) -> None:
        """The step is computed: record it. `_tell` makes it known."""
        num_tokens = sum(chunk.num_tokens for chunk in step.chunks)
        num_prompt_tokens = sum(chunk.num_prompt_tokens for chunk in step.chunks)
        num_decodes = sum(chunk.num_tokens == 1 and chunk.samples for chunk in step.chunks)
        unfinished = [chunk for chunk in step.chunks if not chunk.samples]
        advanced = self._scheduler.postprocess(step, result.token_ids, self._eos_token_ids)
        self._events += self._reports.events(step, result, advanced, unfinished)
        self._ended = _EndedStep(seconds, num_tokens, num_prompt_tokens, len(advanced))
        if self._step_limit is not None:
            self._step_limit.observe(
                num_prompt_tokens=num_tokens - num_decodes, num_decodes=num_decodes, seconds=seconds
            )

    def _admit(self) -> None:
        admitted = self._scheduler.admit()
        for sequence in admitted.runs:
            self._count_cached(sequence)
            if sequence.num_cached_blocks and not sequence.was_preempted:
                hit = PrefixHit(sequence.request_id, sequence.attempt, sequence.num_computed)
                self._events.append(hit)
        for sequence in admitted.pulls:
            if sequence.writer is not None:
                self._events.append(self._pushes.reserved(sequence))
                continue
            self._count_cached(sequence)
            pull = self._pulls.start(sequence)
            if pull.is_complete:
                self._finish_pull(pull)

    def _count_cached(self, sequence: Sequence) -> None:
        """Of each request once, and only if it could have used the prefix cache."""
        if sequence.prefix is not None and sequence.push is None and not sequence.was_preempted:
            self._metrics.prefix_looked_up(len(sequence.token_ids), num_cached=sequence.num_computed)

    def _tell(self, *, hurry: bool = False) -> None:
        """Publish the load and hand out the events so far. hurry: the loop is about to sleep."""
        now = monotonic()
        if self._ended is not None:
            self._metrics.step_completed(
                self._ended.seconds,
                num_tokens=self._ended.num_tokens,
                num_prompt_tokens=self._ended.num_prompt_tokens,
                num_generated=self._ended.num_generated,
            )
            self._ended = None
        self._metrics.blocks_held(self.load.num_blocks - self.load.free_blocks, now - self._told_at)
        self._told_at, self.load = now, self._current_load()
        news = self._cache_news.take(now, hurry=hurry)
        if news is not None:
            self._events.append(news)
        if self._events:
            events, self._events = self._events, []
            self._emit(events)

    def _handle(self, command: Command) -> None:
        match command:
            case AddRequest(sequences):
                self._add(sequences)
            case PullEarly():
                self._pull_early(command)
            case AbortRequest(request_id, choices):
                self._abort(request_id, choices)
            case AbortAll():
                self._abort_all()
                self._cache_news.start_anew()
            case FreeLease(lease_id):
                self._scheduler.free_lease(lease_id)
            case CoverLease(borrowed):
                self._finish_covered(borrowed)
            case LoseLease(borrowed, reason):
                loser = self._borrower(borrowed)
                if loser is not None:
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

    def _add(self, sequences: list[Sequence]) -> None:
        leader = sequences[0]
        here = self._scheduler.find(leader.request_id)
        if here and here[0].attempt >= leader.attempt:
            if here[0].attempt > leader.attempt:  # else it is a duplicate, and its lease is in use
                self._drop_lease(leader)
            return
        for older in here:
            self._remove(older)
        if self._pushes.has_ended(leader):
            return
        pull = self._pulls.early(leader.request_id)
        if pull is not None and self._is_for(pull, leader):
            self._complete_early(pull, leader)
            return
        if pull is not None:
            self._drop_early(pull)
        for sequence in sequences:
            refusal = self._scheduler.refusal(sequence)
            if refusal is not None:
                self._refuse(sequence, refusal)
                return
            self._scheduler.add(sequence)
            self._admit()  # now, so that the next one sees what is left

    def _refuse(self, sequence: Sequence, reason: str) -> None:
        """All of the request, or nothing: answers to it that were taken before are given up."""
        for taken in self._scheduler.find(sequence.request_id):
            self._remove(taken)
        self._metrics.request_ended("refused")
        self._events.append(WorkRefused(sequence.request_id, sequence.attempt, reason))

    def _abort(self, request_id: str, choices: frozenset[int] | None = None) -> None:
        sequences, pull = self._scheduler.find(request_id), self._pulls.early(request_id)
        if choices is not None:
            # What is pulled early is for all answers, and Decode names those that go on.
            sequences, pull = [s for s in sequences if not s.give_up(choices)], None
        if sequences:
            self._metrics.request_ended("aborted")
        for sequence in sequences:
            self._remove(sequence)
        if pull is not None:
            self._drop_early(pull)

    def _abort_all(self) -> None:
        for request_id in dict.fromkeys(sequence.request_id for sequence in self._scheduler):
            self._abort(request_id)
        for pull in self._pulls.all_early():
            self._drop_early(pull)

    def _fail(self, sequence: Sequence, reason: str) -> None:
        """One of its answers fails the whole request."""
        self._metrics.request_ended("failed")
        self._events.append(WorkFailed(sequence.request_id, sequence.attempt, reason, retry=True))
        for answer in self._scheduler.find(sequence.request_id):
            self._remove(answer)

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

    def _borrower(self, borrowed: BorrowedLease) -> Sequence | None:
        """Who waits for what this lease covers."""
        sequences = self._scheduler.find(borrowed.request_id)
        return next((sequence for sequence in sequences if sequence.lease is borrowed), None)

    def _drop_lease(self, sequence: Sequence) -> None:
        if sequence.lease is not None:
            self._events.append(LeaseUnneeded(sequence.lease))
            sequence.lease = None

    # ---------------------------------------------------------------------------------------- pulls

    def _pull_early(self, news: PullEarly) -> None:
        """Read what is done of a prompt that is still computed, if there is room; nobody depends on it."""
        if self._scheduler.find(news.request_id):
            return  # the prompt was faster than the news
        pull = self._pulls.early(news.request_id)
        if pull is not None and (pull.attempt, pull.lease.lease_id) != (news.attempt, news.lease.lease_id):
            if pull.attempt > news.attempt:
                return
            self._drop_early(pull)
            pull = None
        if pull is None:
            names = [] if news.prefix is None else unpack_hashes(news.prefix.blocks)
            reserved = self._scheduler.reserve(names, len(news.lease.block_ids))
            if reserved is None:
                self._events.append(EarlyPullDropped(news.request_id, news.attempt))
                return
            pull = self._pulls.start_early(
                news.request_id, news.attempt, news.lease, reserved.block_ids, reserved.num_cached
            )
        self._pulls.advance(pull, news.num_tokens)

    def _is_for(self, pull: Pull, sequence: Sequence) -> bool:
        """Whether an early pull has read what the lease of `sequence` covers, and all answers find room."""
        assert sequence.lease is not None or sequence.mode is not Mode.DECODE
        return (
            sequence.lease is not None
            and pull.attempt == sequence.attempt
            and pull.lease == sequence.lease.lease
            and self._scheduler.may_add_reserved(sequence)
        )

    def _complete_early(self, pull: Pull, sequence: Sequence) -> None:
        self._scheduler.add_reserved(sequence)
        sequence.num_cached_blocks = sequence.num_named = pull.num_cached
        sequence.num_computed = pull.num_cached * self._scheduler.config.block_size
        self._count_cached(sequence)
        self._pulls.complete(pull, sequence)
        if pull.is_complete:
            self._finish_pull(pull)

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
        sequence = self._borrower(borrowed)
        pull = None if sequence is None else self._pulls.of_sequence(sequence)
        if pull is not None and pull.is_complete:
            self._finish_pull(pull)

    def _finish_pull(self, pull: Pull) -> None:
        """All of the prompt is here: let its sequence run, if the bytes can be trusted.

        What was read while the prompt was being computed is covered, too: from then on its blocks were the
        request's and then the lease's without a gap, or the lease would not have been confirmed. Where
        nothing was read, because all of it was cached, the lease does not matter.
        """
        sequence = pull.sequence
        assert sequence is not None
        assert sequence.lease is not None
        if pull.reads and not sequence.lease.is_acknowledged:
            return  # CoverLease or LoseLease comes
        if pull.reads and not sequence.lease.covers(pull.completed_at):
            # The blocks may have been given to somebody else while they were read.
            self._metrics.pull_discarded()
            self._fail(sequence, "the lease ran out before the pull had ended")
            return
        self._pulls.remove(pull)
        stats = TransferStats(
            num_blocks=pull.num_landed - pull.num_cached,
            num_bytes=sum(read.num_bytes for read in pull.reads),
            num_gets=sum(read.num_gets for read in pull.reads),
            seconds=sum(read.seconds for read in pull.reads),
            lanes=self._lanes.get(pull.lease.engine_id, ""),
            num_early_blocks=pull.num_early,
            num_cached_blocks=pull.num_cached,
        )
        if pull.reads:
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
            idle_blocks=scheduler.pool.num_idle,
        )
