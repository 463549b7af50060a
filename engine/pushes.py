"""Pushes: the KV cache of a prompt written to a decode worker layer by layer, while it is computed.

This is KVDirect's mode of comparison (arXiv 2501.14743); docs/transfer.md, "Push", says what it costs. The
decode worker holds blocks for the request from before its prompt is begun, and a write cannot be called back:
blocks that a prefill worker may still write stay in quarantine until it says that it has ended, or is gone.
"""

from collections import deque
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Sequence_
from dataclasses import dataclass
from time import monotonic
from typing import Literal

import msgspec

from pdengine.engine.metrics import WorkerMetrics
from pdengine.engine.scheduler import Scheduler
from pdengine.engine.sequence import Mode, Push, Sequence, blocks_for, sequences_of
from pdengine.engine.step import Chunk
from pdengine.transport.messages import (
    EndPush,
    Prefilled,
    Pushed,
    PushEnded,
    Reserved,
    TransferStats,
    Work,
    WorkFailed,
)
from pdengine.transport.regions import block_runs
from pdengine.transport.transfer import PushCompleted, PushFailed, PushTransfer

NUM_ENDED = 4096  # attempts that are remembered as ended, so that work for them that comes late is not begun


@dataclass(frozen=True)
class StartPushed:
    """Command: the KV cache of this work lies in the blocks that are reserved for it here."""

    work: Work


@dataclass(frozen=True)
class LoseWriter:
    """Command: this worker is gone. Should it be alive after all, nothing keeps it from writing."""

    engine_id: str


@dataclass(frozen=True)
class UnwantedPush:
    """Event: blocks wait until `writer` says that it writes nothing more for this attempt."""

    writer: str
    order: EndPush


PushCommand = PushCompleted | PushFailed | StartPushed | EndPush | PushEnded | LoseWriter
PushEvent = Reserved | Pushed | WorkFailed | UnwantedPush | PushEnded


class Pushes:
    """What this worker writes to others, and what they write here. Belongs to the engine thread."""

    def __init__(self, transfer: PushTransfer, scheduler: Scheduler, metrics: WorkerMetrics) -> None:
        self._transfer = transfer
        self._scheduler = scheduler
        self._metrics = metrics
        self._block_size = scheduler.config.block_size
        self._writes: dict[int, Push] = {}  # push id of the transfer -> whose write it is
        self._next_write_id = 0
        self._ended: deque[EndPush] = deque(maxlen=NUM_ENDED)
        self._quarantined: dict[EndPush, tuple[str, list[int]]] = {}  # -> writer, blocks

    @property
    def num_quarantined(self) -> int:
        return sum(len(block_ids) for _, block_ids in self._quarantined.values())

    def handle(self, command: PushCommand, lanes: Mapping[str, str]) -> list[PushEvent]:
        """lanes: of the connected peers, by engine id."""
        match command:
            case PushCompleted() | PushFailed():
                return self._finish_write(command, lanes)
            case StartPushed(work):
                return self._start_decoding(work)
            case EndPush():
                return self._end(command)
            case PushEnded(request_id, attempt):
                self._release(EndPush(request_id, attempt))
            case LoseWriter(engine_id):
                lost = [order for order, (writer, _) in self._quarantined.items() if writer == engine_id]
                for order in lost:
                    self._release(order)
        return []

    # ------------------------------------------------------------------------ as the prefill worker

    def write_after_layer(self, chunks: Sequence_[Chunk]) -> Callable[[int], None] | None:
        """What to call with each layer that a step has finished; None if nothing of the step is pushed.

        A block is written once, when all of it is computed, so that no write can overtake a newer one.
        """
        writes = []
        for chunk in chunks:
            sequence, push = chunk.sequence, chunk.sequence.push
            if push is None:
                continue
            end = sequence.num_computed + chunk.num_tokens
            last = blocks_for(end, self._block_size) if chunk.samples else end // self._block_size
            blocks = slice(sequence.num_computed // self._block_size, last)
            runs = block_runs(push.target.block_ids[blocks], sequence.block_ids[blocks])
            if runs:
                writes.append((push, runs))

        def write(layer: int) -> None:
            for push, runs in writes:
                self._next_write_id += 1
                self._writes[self._next_write_id] = push
                push.num_writing += 1
                push.started_at = min(push.started_at, monotonic())
                self._transfer.push(self._next_write_id, push.target.engine_id, runs, layer)

        return write if writes else None

    def finish_prompt(self, push: Push, prefilled: Prefilled) -> Prefilled:
        """The prompt is computed: the lease on its blocks is kept here, until all of them are written."""
        if prefilled.lease is None:
            return prefilled
        push.lease_id = prefilled.lease.lease_id
        return msgspec.structs.replace(prefilled, lease=None, pushed=True)

    def has_ended(self, sequence: Sequence) -> bool:
        """Whether nobody wants this attempt: EndPush can be faster than the work itself."""
        return EndPush(sequence.request_id, sequence.attempt) in self._ended

    def _finish_write(self, event: PushCompleted | PushFailed, lanes: Mapping[str, str]) -> list[PushEvent]:
        push = self._writes.pop(event.push_id)
        push.num_writing -= 1
        events: list[PushEvent] = []
        if isinstance(event, PushCompleted):
            push.num_bytes += event.num_bytes
            push.num_puts += event.num_puts
            push.completed_at = max(push.completed_at, event.completed_at)
        elif not push.has_failed:
            push.has_failed = True
            self._drop_prompt(push, "failed")
            reason = f"the push of its KV cache failed: {event.reason}"
            events.append(WorkFailed(push.request_id, push.attempt, reason, retry=True))
        if push.num_writing:
            return events
        if push.lease_id is not None:
            self._scheduler.free_lease(push.lease_id)
            if not push.has_failed:
                stats = TransferStats(
                    num_blocks=len(push.target.block_ids),
                    num_bytes=push.num_bytes,
                    num_gets=push.num_puts,
                    seconds=push.completed_at - push.started_at,
                    lanes=lanes.get(push.target.engine_id, ""),
                )
                events.append(Pushed(push.request_id, push.attempt, stats))
        if push.is_unwanted:
            events.append(PushEnded(push.request_id, push.attempt))
        return events

    def _drop_prompt(self, push: Push, outcome: Literal["aborted", "failed"]) -> None:
        """Stop to compute it, if it is not done. That writes go on reading its blocks does no harm."""
        for sequence in self._scheduler.find(push.request_id):
            if sequence.push is push:
                self._metrics.request_ended(outcome)
                self._scheduler.remove(sequence)

    def _end(self, order: EndPush) -> list[PushEvent]:
        if order not in self._ended:  # it is asked until it is answered
            self._ended.append(order)
        for sequence in self._scheduler.find(order.request_id):
            if sequence.push is not None and sequence.attempt == order.attempt:
                self._drop_prompt(sequence.push, "aborted")
        pending = [push for push in self._writes.values() if EndPush(push.request_id, push.attempt) == order]
        for push in pending:
            push.is_unwanted = True
        return [] if pending else [PushEnded(order.request_id, order.attempt)]

    # ------------------------------------------------------------------------- as the decode worker

    def reserved(self, sequence: Sequence) -> Reserved:
        """What to tell of a sequence that has got its blocks."""
        return Reserved(sequence.request_id, sequence.attempt, list(sequence.block_ids))

    def drop_reserved(self, sequence: Sequence) -> UnwantedPush:
        """Nobody wants `sequence` any more: its blocks are in quarantine until its writer has ended."""
        assert sequence.writer is not None
        order = EndPush(sequence.request_id, sequence.attempt)
        self._quarantined[order] = (sequence.writer, self._scheduler.detach(sequence))
        return UnwantedPush(sequence.writer, order)

    def _start_decoding(self, work: Work) -> list[PushEvent]:
        here = self._scheduler.find(work.request_id)
        reserved = [s for s in here if s.is_reserved and s.attempt == work.attempt]
        if not reserved:
            reason = "no blocks are reserved for it here"
            return [WorkFailed(work.request_id, work.attempt, reason, retry=True)]
        sequence = reserved[0]
        sequence.writer = None
        # Answers that have ended with their first token are not written here.
        [answer] = sequences_of(work, Mode.DECODE, block_size=self._block_size)
        sequence.choice, sequence.token_ids = answer.choice, answer.token_ids
        sequence.siblings = answer.siblings
        self._scheduler.start_decoding(sequence, len(sequence.token_ids) - 1)
        return []

    def _release(self, order: EndPush) -> None:
        _, block_ids = self._quarantined.pop(order, ("", []))
        self._scheduler.pool.free(block_ids)
