"""Sequences for tests, without the router and the wire."""

from __future__ import annotations

from collections.abc import Sequence as Sequence_

from pdengine.engine.leases import BorrowedLease
from pdengine.engine.sequence import Mode, Sequence
from pdengine.transport.messages import SamplingParams, Work


def make_sequence(
    request_id: str,
    mode: Mode,
    prompt_ids: Sequence_[int],
    *,
    output_ids: Sequence_[int] = (),
    max_tokens: int = 4,
    attempt: int = 1,
    stop_token_ids: tuple[int, ...] = (),
    ignore_eos: bool = False,
    lease: BorrowedLease | None = None,
    may_wait: bool = True,
) -> Sequence:
    """A greedy sequence."""
    sampling = SamplingParams(
        max_tokens=max_tokens, temperature=0.0, stop_token_ids=stop_token_ids, ignore_eos=ignore_eos
    )
    work = Work(request_id, attempt, list(prompt_ids), list(output_ids), sampling)
    sequence = Sequence.from_work(work, mode, may_wait=may_wait)
    sequence.lease = lease
    return sequence
