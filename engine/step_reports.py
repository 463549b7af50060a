"""What a worker tells of a step that was recorded: tokens, log probabilities, prompts that came further."""

from itertools import islice

from pdengine.engine.commands import Event
from pdengine.engine.metrics import WorkerMetrics
from pdengine.engine.pushes import Pushes
from pdengine.engine.scheduler import Scheduler
from pdengine.engine.sequence import Mode, Sequence
from pdengine.engine.step import Chunk, Step
from pdengine.engine.step_extras import StepResult
from pdengine.transport.messages import (
    KVLease,
    Prefilled,
    PromptProgress,
    PromptScored,
    StepTokens,
    TokenLogprobs,
    TokenUpdate,
)


class StepReports:
    """Grants leases on prompts that are done. Belongs to the engine thread."""

    def __init__(
        self,
        *,
        engine_id: str,
        scheduler: Scheduler,
        pushes: Pushes,
        lease_duration: float,
        metrics: WorkerMetrics,
    ) -> None:
        self._engine_id = engine_id
        self._scheduler = scheduler
        self._pushes = pushes
        self._lease_duration = lease_duration
        self._metrics = metrics

    def events(
        self, step: Step, result: StepResult, advanced: list[Sequence], unfinished: list[Chunk]
    ) -> list[Event]:
        """advanced: what the scheduler returned for `step`, a sequence for each token of `result`.
        unfinished: chunks that did not sample."""
        events = self._scores(step, result)
        tokens = [_last_token(sequence) for sequence in advanced]
        if result.logprobs is not None:
            scored = zip(advanced, result.logprobs, strict=True)
            tokens = [_last_token(sequence, logprobs) for sequence, logprobs in scored]
        for token in tokens:
            if token.finish_reason is not None:
                self._metrics.request_ended(token.finish_reason)
        updates: list[TokenUpdate] = []
        rest = iter(zip(advanced, tokens, strict=True))
        for sequence, token in rest:
            if sequence.mode is Mode.PREFILL:
                others = [other for _, other in islice(rest, len(sequence.siblings))]
                events.append(self._prefilled(sequence, [token, *others]))
            else:
                updates.append(token)
        if updates:
            events.append(StepTokens(updates))
        return events + self._progress(unfinished)

    def _scores(self, step: Step, result: StepResult) -> list[Event]:
        """Before the first token. `num_scored` counts what was told, so a preempted prompt tells the rest."""
        events: list[Event] = []
        for index, logprobs in result.prompt_logprobs.items():
            sequence = step.chunks[index].sequence
            events.append(PromptScored(sequence.request_id, sequence.attempt, sequence.num_scored, logprobs))
            sequence.num_scored += len(logprobs)
        return events

    def _prefilled(self, sequence: Sequence, tokens: list[TokenUpdate]) -> Prefilled:
        lease = None
        if any(token.finish_reason is None for token in tokens):
            lease = self._grant_lease(sequence)
        prefilled = Prefilled(sequence.request_id, sequence.attempt, tokens, lease)
        return prefilled if sequence.push is None else self._pushes.finish_prompt(sequence.push, prefilled)

    def _progress(self, chunks: list[Chunk]) -> list[Event]:
        """Say which prompts for other workers have come further, so that they can be pulled early."""
        return [
            PromptProgress(
                sequence.request_id,
                sequence.attempt,
                sequence.num_computed,
                self._lease_of(sequence, len(sequence.token_ids)),
            )
            for sequence, _ in chunks
            if sequence.mode is Mode.PREFILL and sequence.push is None
        ]

    def _grant_lease(self, sequence: Sequence) -> KVLease:
        # Peers may read from here on: the step's tokens were read, so all its kernels have ended.
        lease = self._lease_of(sequence, sequence.num_computed)
        self._scheduler.lease(sequence)
        self._metrics.request_ended("prefilled")
        return lease

    def _lease_of(self, sequence: Sequence, num_tokens: int) -> KVLease:
        lease_id = self._scheduler.lease_id(sequence)
        block_ids = list(sequence.block_ids)
        return KVLease(lease_id, self._engine_id, block_ids, num_tokens, self._lease_duration)


def _last_token(sequence: Sequence, logprobs: TokenLogprobs | None = None) -> TokenUpdate:
    return TokenUpdate(
        sequence.request_id,
        sequence.attempt,
        sequence.choice,
        sequence.num_output_tokens - 1,
        sequence.token_ids[-1],
        sequence.finish_reason,
        logprobs,
    )
