"""The one line that a worker writes in its log for each request it has taken."""

import logging
from dataclasses import dataclass, field
from time import monotonic

from pdengine.engine.sequence import Mode
from pdengine.transport.messages import TransferStats

logger = logging.getLogger(__name__)


@dataclass
class RequestRecord:
    """What this worker has done for one attempt at a request.

    num_output_tokens: written here, of all answers. num_cached_tokens: of the prompt, found in the prefix
    cache. Times are of time.monotonic().
    """

    request_id: str
    attempt: int
    mode: Mode
    num_prompt_tokens: int
    began_at: float = field(default_factory=monotonic)
    first_token_at: float | None = None
    num_output_tokens: int = 0
    num_cached_tokens: int | None = None
    pull: TransferStats | None = None

    def count_tokens(self, num_tokens: int = 1) -> None:
        if self.first_token_at is None:
            self.first_token_at = monotonic()
        self.num_output_tokens += num_tokens

    def log_end(self, outcome: str, reason: str | None = None) -> None:
        """first_token_seconds: with the time in the queue, and on a decode worker that of the pull.
        pull_seconds: while the KV cache was read; what was read before this worker had the request, too."""
        now = monotonic()
        fields: dict[str, str | int | float | None] = {
            "request_id": self.request_id,
            "attempt": self.attempt,
            "mode": self.mode.value,
            "outcome": outcome,
            "reason": reason,
            "prompt_tokens": self.num_prompt_tokens,
            "cached_tokens": self.num_cached_tokens,
            "output_tokens": self.num_output_tokens,
            "seconds": round(now - self.began_at, 3),
        }
        if self.first_token_at is not None:
            fields["first_token_seconds"] = round(self.first_token_at - self.began_at, 3)
            fields["decode_seconds"] = round(now - self.first_token_at, 3)
        if self.pull is not None:
            fields["pull_seconds"] = round(self.pull.seconds, 4)
            fields["pulled_blocks"] = self.pull.num_blocks
            fields["cached_blocks"] = self.pull.num_cached_blocks
        logger.info("request finished", extra=fields)
