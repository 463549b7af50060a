"""Sequences for tests, without the router and the wire."""

from __future__ import annotations

from collections.abc import Sequence as Sequence_

from pdengine.engine.leases import BorrowedLease
from pdengine.engine.sequence import Mode, Sequence, sequences_of
from pdengine.models.prefix_hashes import PrefixHashes, prefix_root
from pdengine.transport.messages import Choice, PrefixNames, SamplingParams, Work

BLOCK_SIZE = 4


def names_of(prompt_ids: Sequence_[int], *, salt: str = "", block_size: int = BLOCK_SIZE) -> PrefixNames:
    """The names of the prompt's full blocks, as the router gives them."""
    hashes = PrefixHashes(prefix_root("model", salt), block_size)
    hashes.extend(prompt_ids)
    return PrefixNames(hashes.root, hashes.packed())


def make_work(
    request_id: str,
    prompt_ids: Sequence_[int],
    choices: Sequence_[Choice] = (Choice(0, []),),
    *,
    max_tokens: int = 4,
    attempt: int = 1,
    stop_token_ids: tuple[int, ...] = (),
    ignore_eos: bool = False,
    priority: int = 0,
    salt: str | None = None,
    block_size: int = BLOCK_SIZE,
    sampling: SamplingParams | None = None,
) -> Work:
    """Greedy, unless `sampling` is given. salt: of the prefix cache; None is without it."""
    if sampling is None:
        sampling = SamplingParams(
            max_tokens=max_tokens, temperature=0.0, stop_token_ids=stop_token_ids, ignore_eos=ignore_eos
        )
    prefix = None if salt is None else names_of(prompt_ids, salt=salt, block_size=block_size)
    return Work(request_id, attempt, list(prompt_ids), list(choices), sampling, priority, prefix)


def make_sequence(
    request_id: str,
    mode: Mode,
    prompt_ids: Sequence_[int],
    *,
    output_ids: Sequence_[int] = (),
    n: int = 1,
    max_tokens: int = 4,
    attempt: int = 1,
    stop_token_ids: tuple[int, ...] = (),
    ignore_eos: bool = False,
    lease: BorrowedLease | None = None,
    may_wait: bool = True,
    priority: int = 0,
    salt: str | None = None,
    block_size: int = BLOCK_SIZE,
    sampling: SamplingParams | None = None,
) -> Sequence:
    """Greedy unless `sampling` is given, with `n` - 1 siblings that begin with the same tokens."""
    work = make_work(
        request_id,
        prompt_ids,
        [Choice(index, list(output_ids)) for index in range(n)],
        max_tokens=max_tokens,
        attempt=attempt,
        stop_token_ids=stop_token_ids,
        ignore_eos=ignore_eos,
        priority=priority,
        salt=salt,
        block_size=block_size,
        sampling=sampling,
    )
    sequence = sequences_of(work, mode, block_size=block_size, may_wait=may_wait)[0]
    sequence.lease = lease
    return sequence
