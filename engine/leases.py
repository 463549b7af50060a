"""KV leases, seen from both sides.

A prefill worker grants a lease on the blocks of a finished prompt; whoever needs them renews it, and a lease
that nobody renews expires, so that no crash of a peer can pin memory for good. A decode worker may trust what
it pulled only if the lease still covered the blocks when the pull ended, by its own clock: it counts from the
moment it *sent* its last acknowledged renewal, which is never later than the moment it was honoured.
(Gray and Cheriton, "Leases: an efficient fault-tolerant mechanism for distributed file cache consistency",
SOSP 1989.)
"""

from collections.abc import Iterable
from dataclasses import dataclass

from pdengine.transport.messages import KVLease

RENEWALS_PER_LEASE = 6


class GrantedLeases:
    """Leases on this worker's blocks. Belongs to the control thread; times are time.monotonic()."""

    def __init__(self, duration: float) -> None:
        self.duration = duration
        self._expires_at: dict[int, float] = {}

    def __len__(self) -> int:
        return len(self._expires_at)

    def held(self) -> list[int]:
        """Leases that have neither been released nor swept."""
        return list(self._expires_at)

    def grant(self, lease_id: int, now: float) -> None:
        self._expires_at[lease_id] = now + self.duration

    def renew(self, lease_ids: Iterable[int], now: float) -> tuple[list[int], list[int]]:
        """(renewed, lost): a lease that is past its time is lost, even if it was not swept yet."""
        renewed: list[int] = []
        lost: list[int] = []
        for lease_id in lease_ids:
            if self._expires_at.get(lease_id, now) > now:
                self._expires_at[lease_id] = now + self.duration
                renewed.append(lease_id)
            else:
                lost.append(lease_id)
        return renewed, lost

    def release(self, lease_ids: Iterable[int]) -> list[int]:
        """Those of `lease_ids` that were held and now are not; releasing twice is harmless."""
        return [lease_id for lease_id in lease_ids if self._expires_at.pop(lease_id, None) is not None]

    def expire(self, now: float) -> list[int]:
        """Drop and return the leases whose time is over."""
        expired = [lease_id for lease_id, expires_at in self._expires_at.items() if expires_at <= now]
        for lease_id in expired:
            del self._expires_at[lease_id]
        return expired


@dataclass(eq=False)
class BorrowedLease:
    """A lease on a peer's blocks that one request here depends on.

    covered_until: written by the control thread at each acknowledged renewal, read by the engine thread;
        time.monotonic(). What was read later than that may be somebody else's data.
    renew_at: when the next renewal is due.
    """

    lease: KVLease
    request_id: str
    covered_until: float = float("-inf")
    renew_at: float = float("-inf")

    @property
    def is_acknowledged(self) -> bool:
        """Whether its owner has confirmed it at least once since it was borrowed."""
        return self.covered_until > float("-inf")

    def covers(self, completed_at: float) -> bool:
        return completed_at < self.covered_until


class BorrowedLeases:
    """Leases that this worker keeps alive at its peers. Belongs to the control thread."""

    def __init__(self) -> None:
        self._leases: dict[tuple[str, int], BorrowedLease] = {}
        self._sent_at: dict[int, float] = {}  # renewal sequence -> when it was sent
        self._next_sequence = 0

    def __len__(self) -> int:
        return len(self._leases)

    def add(self, lease: KVLease, request_id: str) -> BorrowedLease:
        """Keep this lease alive; of a lease that is here already, the one that is in use."""
        return self._leases.setdefault((lease.engine_id, lease.lease_id), BorrowedLease(lease, request_id))

    def remove(self, lease: KVLease) -> bool:
        """Whether the lease was still there to be removed."""
        return self._leases.pop((lease.engine_id, lease.lease_id), None) is not None

    def due(self, now: float) -> dict[str, list[int]]:
        """engine id -> its leases to be renewed now; each comes up again after a part of its time."""
        lease_ids: dict[str, list[int]] = {}
        for (engine_id, lease_id), borrowed in self._leases.items():
            if borrowed.renew_at <= now:
                borrowed.renew_at = now + borrowed.lease.duration / RENEWALS_PER_LEASE
                lease_ids.setdefault(engine_id, []).append(lease_id)
        return lease_ids

    def sent(self, now: float) -> int:
        """Note that a renewal leaves now; returns its sequence number."""
        self._next_sequence += 1
        self._sent_at[self._next_sequence] = now
        for sequence in [s for s in self._sent_at if s <= self._next_sequence - 1_000]:
            del self._sent_at[sequence]  # never answered
        return self._next_sequence

    def acknowledge(
        self, engine_id: str, sequence: int, renewed: Iterable[int], lost: Iterable[int]
    ) -> tuple[list[BorrowedLease], list[BorrowedLease]]:
        """(covered, lost): apply a peer's answer. Leases that are gone here meanwhile are skipped."""
        sent_at = self._sent_at.pop(sequence, None)
        covered: list[BorrowedLease] = []
        for lease_id in renewed:
            borrowed = self._leases.get((engine_id, lease_id))
            if borrowed is not None and sent_at is not None:
                borrowed.covered_until = max(borrowed.covered_until, sent_at + borrowed.lease.duration)
                covered.append(borrowed)
        dropped = [self._leases.pop((engine_id, lease_id), None) for lease_id in lost]
        return covered, [borrowed for borrowed in dropped if borrowed is not None]

    def drop_owner(self, engine_id: str) -> list[BorrowedLease]:
        """Forget all leases of a peer that is gone, and return them."""
        lost = [borrowed for (owner, _), borrowed in self._leases.items() if owner == engine_id]
        for borrowed in lost:
            self.remove(borrowed.lease)
        return lost
