"""An engine on its thread, as its worker sees it, and a model that shows what the KV cache really held."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from collections.abc import Sequence as Sequence_
from time import monotonic
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from sequences import make_sequence, make_work, names_of

from pdengine.engine.block_pool import BlockPool
from pdengine.engine.commands import AbortAll, AbortRequest, AddRequest, Event, LeaseUnneeded, Stop
from pdengine.engine.engine import Engine
from pdengine.engine.leases import BorrowedLease
from pdengine.engine.metrics import WorkerMetrics
from pdengine.engine.pool_pages import PoolPages
from pdengine.engine.pulls import Pulls
from pdengine.engine.pushes import Pushes
from pdengine.engine.runner import ReadStep, Runner
from pdengine.engine.scheduler import Scheduler, SchedulerConfig
from pdengine.engine.sequence import Mode, Sequence, sequences_of
from pdengine.engine.step import BlockCopy, Chunk
from pdengine.engine.step_extras import StepResult
from pdengine.transport.memory_transfer import Fabric, MemoryTransfer
from pdengine.transport.messages import (
    PREFIX_TAG_BYTES,
    CacheUpdate,
    Choice,
    EarlyPullDropped,
    KVLease,
    Prefilled,
    PrefixHit,
    PromptProgress,
    PullEarly,
    Pulled,
    StepTokens,
)
from pdengine.transport.regions import RegionDescriptor, describe_region
from pdengine.transport.transfer import PeerConnected

DEADLINE_SECONDS = 20.0
LEASE_SECONDS = 30.0
E = TypeVar("E")


def next_token(context: Sequence_[int], choice: int = 0) -> int:
    """The model: every token and its place matter, and which of the answers it is."""
    state = 17 + choice
    for token_id in context:
        state = (state * 31 + token_id + 1) % 9973
    return 1 + state % 997


def answer_to(prompt_ids: Sequence_[int], max_tokens: int, choice: int = 0) -> list[int]:
    """What the model writes after `prompt_ids`."""
    token_ids = list(prompt_ids)
    for _ in range(max_tokens):
        token_ids.append(next_token(token_ids, choice))
    return token_ids[len(prompt_ids) :]


def unfinished(prefilled: Prefilled) -> list[Choice]:
    """The answers that go on after `prefilled`."""
    tokens = [token for token in prefilled.tokens if token.finish_reason is None]
    return [Choice(token.choice, [token.token_id]) for token in tokens]


def tags(packed: bytes) -> list[bytes]:
    """Of a CacheUpdate."""
    return [packed[i : i + PREFIX_TAG_BYTES] for i in range(0, len(packed), PREFIX_TAG_BYTES)]


class TokenRunner(Runner):
    """Its keys and values are the tokens, and it computes the next token from what the pool holds.

    So a block that was not pulled, or pulled from the wrong place, changes the answer. After `hold` the
    engine thread stays inside the next step until `release`.
    """

    def __init__(self, num_blocks: int, block_size: int, *, is_asynchronous: bool = True) -> None:
        self.is_asynchronous = is_asynchronous
        self.pool: npt.NDArray[np.int64] = np.full((num_blocks, block_size), -1, np.int64)
        self._free_steps = 0
        self._may_run = threading.Event()
        self._may_run.set()
        self._is_held = threading.Event()

    def describe(self) -> RegionDescriptor:
        return describe_region(
            ("block", "layer", "token"),
            (len(self.pool), 1, self.pool.shape[1]),
            item_size=8,
            dtype="int64",
            base_address=self.pool.ctypes.data,
        )

    def hold(self, *, free_steps: int = 0) -> None:
        """Stay inside the next step, or that after `free_steps` more."""
        self._free_steps = free_steps
        self._is_held.clear()
        self._may_run.clear()

    def wait_until_held(self) -> None:
        assert self._is_held.wait(DEADLINE_SECONDS), "no step began"

    def release(self) -> None:
        self._may_run.set()

    def start(
        self,
        chunks: Sequence_[Chunk],
        after_layer: Callable[[int], None] | None = None,
        copies: Sequence_[BlockCopy] = (),
    ) -> ReadStep:
        """As on a GPU the pool is read and written between this and the reading of the tokens, unless a
        layer is waited for; what the engine does to the sequences in between makes no difference."""
        step = [_compute_later(self.pool, chunk) for chunk in chunks]
        held = not self._may_run.is_set()
        if held and self._free_steps:
            self._free_steps -= 1
            held = False

        def read_tokens() -> list[int]:
            if held:
                self._is_held.set()
                assert self._may_run.wait(DEADLINE_SECONDS), "the step was never released"
            if copies:
                sources, destinations = zip(*copies, strict=True)
                self.pool[list(destinations)] = self.pool[list(sources)]
            token_ids = [token_id for compute in step for token_id in compute()]
            if after_layer is not None:
                after_layer(0)
            return token_ids

        if self.is_asynchronous and after_layer is None:
            return lambda: StepResult(read_tokens())
        token_ids = read_tokens()
        return lambda: StepResult(token_ids)


def _compute_later(pool: npt.NDArray[np.int64], chunk: Chunk) -> Callable[[], list[int]]:
    sequence, end, block_size = chunk.sequence, chunk.sequence.num_computed + chunk.num_tokens, pool.shape[1]
    positions, block_ids = range(sequence.num_computed, end), list(sequence.block_ids)
    token_ids = sequence.token_ids[:end]
    choices = [answer.choice for answer in (sequence, *sequence.siblings)] if chunk.samples else []

    def compute() -> list[int]:
        for position in positions:
            pool[block_ids[position // block_size], position % block_size] = token_ids[position]
        context = pool[block_ids].flatten()[:end].tolist()
        return [next_token(context, choice) for choice in choices]

    return compute


class EngineWorker:
    """Drives one engine, in place of the control thread, and collects its events.

    `stop` checks that nothing was left behind: the pool is at its baseline, and every borrowed lease was
    given up exactly once.
    """

    def __init__(
        self,
        fabric: Fabric,
        engine_id: str,
        *,
        runner: Runner,
        region: RegionDescriptor,
        block_size: int,
        max_batch_tokens: int = 8,
        max_requests: int = 8,
        pull_seconds: float = DEADLINE_SECONDS,
        eos_token_ids: frozenset[int] = frozenset(),
        pages: PoolPages | None = None,
    ) -> None:
        self.engine_id = engine_id
        self.block_size = block_size
        self.pool = BlockPool(region.num_blocks)
        config = SchedulerConfig(block_size, max_batch_tokens, max_requests, region.num_blocks)
        self.scheduler = Scheduler(config, self.pool)
        self.transfer = MemoryTransfer(fabric, deliver=lambda event: self.engine.post(event))
        self.region = self.transfer.register(region)
        self.pulls = Pulls(self.transfer, self.pool, block_size=block_size, timeout=pull_seconds)
        self.metrics = WorkerMetrics()
        self.pushes = Pushes(self.transfer, self.scheduler, self.metrics)
        self.engine = Engine(
            engine_id=engine_id,
            scheduler=self.scheduler,
            runner=runner,
            pulls=self.pulls,
            pushes=self.pushes,
            eos_token_ids=eos_token_ids,
            lease_duration=LEASE_SECONDS,
            metrics=self.metrics,
            emit=self._take_events,
            pages=pages,
        )
        self.borrowed: list[BorrowedLease] = []
        self.unneeded: list[BorrowedLease] = []
        self._events: queue.SimpleQueue[Event | BaseException] = queue.SimpleQueue()
        self.progress: queue.SimpleQueue[PromptProgress] = (
            queue.SimpleQueue()
        )  # an offer: nobody must take it
        self.num_dropped = 0  # early pulls
        self.hits: list[PrefixHit] = []
        self.cached_tags: set[bytes] = set()  # of the prefix cache, as the engine has told
        self._num_settled = 0
        self._thread = threading.Thread(target=self._run, name=engine_id, daemon=True)
        self._thread.start()

    def connect(self, peer: EngineWorker) -> None:
        self.transfer.connect(peer.engine_id, peer.transfer.worker_address, peer.region)
        assert self.expect(PeerConnected).engine_id == peer.engine_id

    # ------------------------------------------------------------------------------- commands

    def add(self, *sequences: Sequence) -> None:
        """Of one request."""
        self.engine.post(AddRequest(list(sequences)))

    def prefill(
        self,
        request_id: str,
        prompt_ids: Sequence_[int],
        *,
        n: int = 1,
        max_tokens: int = 4,
        attempt: int = 1,
        salt: str | None = None,
    ) -> None:
        self.add(
            make_sequence(
                request_id,
                Mode.PREFILL,
                prompt_ids,
                n=n,
                max_tokens=max_tokens,
                attempt=attempt,
                salt=salt,
                block_size=self.block_size,
            )
        )

    def whole(
        self,
        request_id: str,
        prompt_ids: Sequence_[int],
        *,
        n: int = 1,
        max_tokens: int = 4,
        attempt: int = 1,
        priority: int = 0,
        salt: str | None = None,
    ) -> None:
        self.add(
            make_sequence(
                request_id,
                Mode.WHOLE,
                prompt_ids,
                n=n,
                max_tokens=max_tokens,
                attempt=attempt,
                priority=priority,
                salt=salt,
                block_size=self.block_size,
            )
        )

    def decode(
        self,
        request_id: str,
        prompt_ids: Sequence_[int],
        prefilled: Prefilled,
        *,
        max_tokens: int = 4,
        attempt: int = 1,
        covered_until: float | None = None,
        salt: str | None = None,
    ) -> BorrowedLease:
        """Go on after `prefilled`, under its lease; by default the lease outlasts the test."""
        assert prefilled.lease is not None
        until = monotonic() + LEASE_SECONDS if covered_until is None else covered_until
        borrowed = BorrowedLease(prefilled.lease, request_id, covered_until=until)
        self.borrowed.append(borrowed)
        work = make_work(
            request_id,
            prompt_ids,
            unfinished(prefilled),
            max_tokens=max_tokens,
            attempt=attempt,
            salt=salt,
            block_size=self.block_size,
        )
        [sequence] = sequences_of(work, Mode.DECODE, block_size=self.block_size)
        sequence.lease = borrowed
        self.add(sequence)
        return borrowed

    def pull_early(
        self, progress: PromptProgress, prompt_ids: Sequence_[int] = (), *, salt: str | None = None
    ) -> None:
        """Pull what is done of a prompt that a peer computes. prompt_ids, salt: for the prefix cache."""
        prefix = None if salt is None else names_of(prompt_ids, salt=salt, block_size=self.block_size)
        self.engine.post(
            PullEarly(progress.request_id, progress.attempt, progress.num_tokens, progress.lease, prefix)
        )

    def abort(self, request_id: str, *choices: int) -> None:
        """Without choices all of them."""
        self.engine.post(AbortRequest(request_id, frozenset(choices) or None))

    def abort_all(self) -> None:
        self.engine.post(AbortAll())

    # --------------------------------------------------------------------------------- events

    def expect(self, kind: type[E]) -> E:
        """The next event, which must be a `kind`."""
        event = self._next_event()
        assert isinstance(event, kind), f"expected {kind.__name__}, got {event}"
        return event

    def expect_progress(self) -> PromptProgress:
        """The next piece of news of a prompt in chunks."""
        return self.progress.get(timeout=DEADLINE_SECONDS)

    def expect_lease(self) -> KVLease:
        lease = self.expect(Prefilled).lease
        assert lease is not None
        return lease

    def collect(self, num_finished: int) -> dict[str, list[int]]:
        """Tokens by request, each with one answer, until so many have finished."""
        answers = self.collect_answers(num_finished)
        assert len({name for name, _ in answers}) == len(answers)
        return {name: token_ids for (name, _), token_ids in answers.items()}

    def collect_answers(self, num_finished: int) -> dict[tuple[str, int], list[int]]:
        """Tokens by request and choice, until so many answers have finished; their positions must be
        consecutive. Pulls may be reported in between, and nothing else."""
        token_ids: dict[tuple[str, int], list[int]] = {}
        positions: dict[tuple[str, int], int] = {}
        while num_finished:
            event = self._next_event()
            assert isinstance(event, StepTokens | Pulled), f"unexpected {event}"
            for update in event.updates if isinstance(event, StepTokens) else []:
                answer = update.request_id, update.choice
                expected = positions.get(answer, update.position)
                assert update.position == expected
                positions[answer] = expected + 1
                token_ids.setdefault(answer, []).append(update.token_id)
                num_finished -= update.finish_reason is not None
        return token_ids

    def settle(self) -> None:
        """Return once everything posted before was handled, a step was taken, and its events are here.

        Nothing else may be emitted meanwhile.
        """
        self._num_settled += 1
        marker = PeerConnected(f"settled-{self._num_settled}", "")
        self.engine.post(marker)
        assert self._next_event() == marker

    def stop(self) -> None:
        self.settle()
        self.engine.post(Stop())
        self._thread.join(DEADLINE_SECONDS)
        assert not self._thread.is_alive()
        if not self._events.empty():
            raise AssertionError(f"nobody expected {self._events.get_nowait()}")
        self.pool.check()
        assert not list(self.scheduler)
        assert not self.scheduler.leased
        assert len(self.pulls) == self.pulls.num_quarantined == self.scheduler.num_pinned == 0
        assert self.scheduler.num_reserved == self.pushes.num_quarantined == 0
        assert self.pool.num_free == self.pool.num_blocks
        assert self.cached_tags == {name[:PREFIX_TAG_BYTES] for name in self.pool.names()}
        assert sorted(map(id, self.unneeded)) == sorted(map(id, self.borrowed))

    def _next_event(self) -> Event:
        event = self._events.get(timeout=DEADLINE_SECONDS)
        if isinstance(event, BaseException):
            raise event
        return event

    def _run(self) -> None:
        try:
            self.engine.run()
        except BaseException as error:
            self._events.put(error)

    def _take_events(self, events: list[Event]) -> None:
        for event in events:
            if isinstance(event, LeaseUnneeded):
                self.unneeded.append(event.borrowed)
            elif isinstance(event, EarlyPullDropped):
                self.num_dropped += 1
            elif isinstance(event, PrefixHit):
                self.hits.append(event)
            elif isinstance(event, CacheUpdate):
                self._take_cache_update(event)
            elif isinstance(event, PromptProgress):
                self.progress.put(event)
            else:
                self._events.put(event)

    def _take_cache_update(self, update: CacheUpdate) -> None:
        """As the router does: removals first."""
        if update.reset:
            self.cached_tags.clear()
        self.cached_tags -= set(tags(update.removed))
        self.cached_tags |= set(tags(update.added))
