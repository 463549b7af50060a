"""Which answers of which requests a worker has taken and not ended: until they have, it does not leave."""

from collections.abc import Iterable
from dataclasses import dataclass

from pdengine.engine.commands import Report
from pdengine.engine.request_log import RequestRecord
from pdengine.transport.messages import (
    Prefilled,
    PrefixHit,
    Pulled,
    Pushed,
    StepTokens,
    TokenUpdate,
    WorkFailed,
    WorkRefused,
)


@dataclass
class _Open:
    choices: set[int]
    record: RequestRecord


class OpenAnswers:
    """Belongs to the control thread. What is told of an older attempt ends nothing of a newer one.

    Each request that ends gets its line in the log.
    """

    def __init__(self) -> None:
        self._requests: dict[str, _Open] = {}

    def __len__(self) -> int:
        return len(self._requests)

    def begin(self, record: RequestRecord, choices: Iterable[int]) -> None:
        """An older attempt than the one that is here is not begun: the engine ignores it, too. A newer one
        takes its place, and of the same only the answers are replaced: it goes on with those."""
        known = self._requests.get(record.request_id)
        if known is not None and known.record.attempt == record.attempt:
            known.choices = set(choices)
            return
        if known is not None:
            if known.record.attempt > record.attempt:
                return
            self._end(known.record, "dropped")
        self._requests[record.request_id] = _Open(set(choices), record)

    def give_up(self, request_id: str, choices: Iterable[int] | None) -> None:
        """choices: None is all of them."""
        known = self._requests.get(request_id)
        if known is not None:
            self._end_answers(known, set(known.choices) if choices is None else choices, "aborted")

    def clear(self) -> None:
        """Nobody waits for any of them any more."""
        for known in list(self._requests.values()):
            self._end(known.record, "dropped")

    def note(self, event: Report) -> None:
        """Take what the engine tells."""
        match event:
            case StepTokens(updates):
                for update in updates:
                    self._take_token(update)
            case Prefilled(request_id, attempt, tokens, lease, pushed):
                known = self._find(request_id, attempt)
                if known is not None:
                    known.record.count_tokens(len(tokens))
                    if not pushed:  # else its blocks are still being written to another worker
                        self._end(known.record, "finished" if lease is None else "prefilled")
            case Pushed(request_id, attempt):
                self._end_request(request_id, attempt, "prefilled")
            case WorkFailed(request_id, attempt, reason):
                self._end_request(request_id, attempt, "failed", reason)
            case WorkRefused(request_id, attempt, reason):
                self._end_request(request_id, attempt, "refused", reason)
            case PrefixHit(request_id, attempt, cached_tokens):
                known = self._find(request_id, attempt)
                if known is not None:
                    known.record.num_cached_tokens = cached_tokens
            case Pulled(request_id, attempt, stats):
                known = self._find(request_id, attempt)
                if known is not None:
                    known.record.pull = stats

    def _find(self, request_id: str, attempt: int) -> _Open | None:
        known = self._requests.get(request_id)
        return None if known is None or known.record.attempt != attempt else known

    def _take_token(self, update: TokenUpdate) -> None:
        known = self._find(update.request_id, update.attempt)
        if known is not None:
            known.record.count_tokens()
            if update.finish_reason is not None:
                self._end_answers(known, [update.choice], "finished")

    def _end_answers(self, known: _Open, choices: Iterable[int], outcome: str) -> None:
        """A request has ended here when all of its answers have."""
        known.choices.difference_update(choices)
        if not known.choices:
            self._end(known.record, outcome)

    def _end_request(self, request_id: str, attempt: int, outcome: str, reason: str | None = None) -> None:
        known = self._find(request_id, attempt)
        if known is not None:
            self._end(known.record, outcome, reason)

    def _end(self, record: RequestRecord, outcome: str, reason: str | None = None) -> None:
        del self._requests[record.request_id]
        record.log_end(outcome, reason)
