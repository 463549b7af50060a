"""The one line that the router writes in its log for each request, and how many ended how."""

import logging
from time import monotonic
from typing import Literal, get_args

from pdengine.router.ledger import Request
from pdengine.transport.messages import Aborted, Failed, Outcome, Rejected

logger = logging.getLogger(__name__)

Ending = Literal["finished", "rejected", "failed", "cancelled", "timeout", "client gone"]


class RequestLog:
    """num_ended: since the start of the router."""

    def __init__(self) -> None:
        self.num_ended: dict[Ending, int] = dict.fromkeys(get_args(Ending), 0)

    def end(self, request: Request, outcome: Outcome | None) -> None:
        """outcome: None if the client is gone."""
        usage = request.usage()
        logger.info(
            "request finished",
            extra={
                "request_id": request.request_id,
                **self._count(outcome),
                "prompt_tokens": usage.prompt_tokens,
                "cached_tokens": usage.cached_tokens,
                "output_tokens": usage.completion_tokens,
                "seconds": round(monotonic() - request.began_at, 3),
                "attempts": request.attempt,
                "prefill_worker": request.prefill_worker,
                "decode_worker": request.decode_worker,
            },
        )

    def refuse(self, request_id: str, outcome: Rejected) -> None:
        """A request was refused before its prompt was looked at."""
        logger.info("request finished", extra={"request_id": request_id, **self._count(outcome)})

    def _count(self, outcome: Outcome | None) -> dict[str, str]:
        ending = _ending(outcome)
        self.num_ended[ending] += 1
        reason = {"reason": outcome.reason} if isinstance(outcome, Rejected | Failed) else {}
        return {"outcome": ending, **reason}


def _ending(outcome: Outcome | None) -> Ending:
    match outcome:
        case None:
            return "client gone"
        case Rejected():
            return "rejected"
        case Failed():
            return "failed"
        case Aborted(cause=cause):
            return cause
    return "finished"
