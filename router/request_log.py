"""The one line that the router writes in its log for each request."""

import logging
from time import monotonic

from pdengine.router.ledger import Request
from pdengine.transport.messages import Aborted, Failed, Outcome, Rejected

logger = logging.getLogger(__name__)


def log_end(request: Request, outcome: Outcome | None) -> None:
    """outcome: None if the client is gone."""
    usage = request.usage()
    logger.info(
        "request finished",
        extra={
            "request_id": request.request_id,
            **_of(outcome),
            "prompt_tokens": usage.prompt_tokens,
            "cached_tokens": usage.cached_tokens,
            "output_tokens": usage.completion_tokens,
            "seconds": round(monotonic() - request.began_at, 3),
            "attempts": request.attempt,
            "prefill_worker": request.prefill_worker,
            "decode_worker": request.decode_worker,
        },
    )


def log_refused(request_id: str, outcome: Rejected) -> None:
    """Of a request that was refused before its prompt was looked at."""
    logger.info("request finished", extra={"request_id": request_id, **_of(outcome)})


def _of(outcome: Outcome | None) -> dict[str, str]:
    match outcome:
        case None:
            return {"outcome": "client gone"}
        case Rejected(_, reason):
            return {"outcome": "rejected", "reason": reason}
        case Failed(_, reason):
            return {"outcome": "failed", "reason": reason}
        case Aborted(_, cause):
            return {"outcome": cause}
    return {"outcome": "finished"}
