"""The leases that this worker depends on: they are renewed in time, and the engine is told which hold."""

from collections.abc import Callable
from time import monotonic

from pdengine.engine.commands import Command, CoverLease, LoseLease
from pdengine.engine.leases import BorrowedLease, BorrowedLeases
from pdengine.transport.messages import KVLease, LeasesRenewed, ReleaseLeases, RenewLeases


class LeaseKeeper:
    """Belongs to the control thread. send: takes an engine id and what is for it. post: of the engine."""

    def __init__(
        self,
        *,
        send: Callable[[str, RenewLeases | ReleaseLeases], None],
        post: Callable[[Command], None],
    ) -> None:
        self._send = send
        self._post = post
        self._leases = BorrowedLeases()
        self._unconfirmed: dict[BorrowedLease, float] = {}  # -> when that is given up

    def __len__(self) -> int:
        return len(self._leases)

    def borrow(self, lease: KVLease, request_id: str) -> BorrowedLease:
        """Keep this lease alive from the next `renew` on, until `give_back`; it may turn out to be lost."""
        borrowed = self._leases.add(lease, request_id)
        if not borrowed.is_acknowledged:
            self._unconfirmed.setdefault(borrowed, monotonic() + lease.duration)
        return borrowed

    def renew(self) -> None:
        """Renew what is due. Call it often: each comes up several times within its duration."""
        now = monotonic()
        for engine_id, lease_ids in self._leases.due(now).items():
            self._send(engine_id, RenewLeases(self._leases.sent(now), lease_ids))

    def take_answer(self, engine_id: str, answer: LeasesRenewed) -> None:
        covered, lost = self._leases.acknowledge(engine_id, answer.sequence, answer.renewed, answer.lost)
        for borrowed in covered:
            if self._unconfirmed.pop(borrowed, None) is not None:
                self._post(CoverLease(borrowed))
        for borrowed in lost:
            self._lose(borrowed, "the lease on its KV cache has expired")

    def give_back(self, borrowed: BorrowedLease) -> None:
        """The lease is not needed any more: tell its owner, once."""
        self._unconfirmed.pop(borrowed, None)
        if self._leases.remove(borrowed.lease):
            self._send(borrowed.lease.engine_id, ReleaseLeases([borrowed.lease.lease_id]))

    def give_up_unconfirmed(self, now: float) -> None:
        """Lose those that their owner has not confirmed within their duration."""
        for borrowed in [b for b, deadline in self._unconfirmed.items() if deadline <= now]:
            self._leases.remove(borrowed.lease)
            self._lose(borrowed, "the prefill worker did not confirm the lease on its KV cache")

    def lose_owner(self, engine_id: str) -> None:
        """Everything of this worker's is lost: it is gone."""
        for borrowed in self._leases.drop_owner(engine_id):
            self._lose(borrowed, "the prefill worker is gone")

    def _lose(self, borrowed: BorrowedLease, reason: str) -> None:
        self._unconfirmed.pop(borrowed, None)
        self._post(LoseLease(borrowed, reason))
