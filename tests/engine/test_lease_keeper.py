"""What the keeper of borrowed leases says to their owners and to the engine."""

from __future__ import annotations

from time import monotonic

import pytest

from pdengine.engine.commands import Command, CoverLease, LoseLease
from pdengine.engine.lease_keeper import LeaseKeeper
from pdengine.transport.messages import KVLease, LeasesRenewed, ReleaseLeases, RenewLeases

OWNER = "prefill"
DURATION = 30.0
LEASE = KVLease(7, OWNER, [0, 1], 20, DURATION)


class Keeper(LeaseKeeper):
    """With what it has sent and posted."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, RenewLeases | ReleaseLeases]] = []
        self.posted: list[Command] = []
        super().__init__(
            send=lambda engine_id, message: self.sent.append((engine_id, message)), post=self.posted.append
        )


@pytest.fixture
def keeper() -> Keeper:
    return Keeper()


def renewed(keeper: Keeper) -> int:
    """Have it ask for a renewal; the number of the question."""
    keeper.renew()
    owner, message = keeper.sent.pop()
    assert owner == OWNER
    assert isinstance(message, RenewLeases)
    assert message.lease_ids == [LEASE.lease_id]
    return message.sequence


def test_the_engine_is_told_once_that_a_lease_holds(keeper: Keeper) -> None:
    borrowed = keeper.borrow(LEASE, "request")
    sequence = renewed(keeper)
    assert keeper.posted == []
    keeper.take_answer(OWNER, LeasesRenewed(sequence, [LEASE.lease_id], []))
    assert keeper.posted == [CoverLease(borrowed)]
    assert borrowed.covers(monotonic())
    borrowed.renew_at = monotonic()
    keeper.take_answer(OWNER, LeasesRenewed(renewed(keeper), [LEASE.lease_id], []))
    assert len(keeper.posted) == 1


def test_a_lease_is_not_renewed_again_at_once(keeper: Keeper) -> None:
    keeper.borrow(LEASE, "request")
    renewed(keeper)
    keeper.renew()
    assert keeper.sent == []


def test_a_lease_that_its_owner_has_not_is_lost(keeper: Keeper) -> None:
    borrowed = keeper.borrow(LEASE, "request")
    keeper.take_answer(OWNER, LeasesRenewed(renewed(keeper), [], [LEASE.lease_id]))
    assert keeper.posted == [LoseLease(borrowed, "the lease on its KV cache has expired")]
    assert len(keeper) == 0
    keeper.give_up_unconfirmed(monotonic() + 2 * DURATION)
    assert len(keeper.posted) == 1, "it is lost once"


def test_a_lease_that_is_never_confirmed_is_given_up(keeper: Keeper) -> None:
    borrowed = keeper.borrow(LEASE, "request")
    keeper.give_up_unconfirmed(monotonic())
    assert keeper.posted == []
    keeper.give_up_unconfirmed(monotonic() + DURATION)
    assert keeper.posted == [
        LoseLease(borrowed, "the prefill worker did not confirm the lease on its KV cache")
    ]
    assert len(keeper) == 0


def test_the_leases_of_an_owner_that_is_gone_are_lost(keeper: Keeper) -> None:
    borrowed = keeper.borrow(LEASE, "request")
    other = keeper.borrow(KVLease(8, "another", [0], 10, DURATION), "other")
    keeper.lose_owner(OWNER)
    assert keeper.posted == [LoseLease(borrowed, "the prefill worker is gone")]
    assert len(keeper) == 1
    keeper.give_back(other)
    assert keeper.sent == [("another", ReleaseLeases([8]))]


def test_a_lease_is_given_back_once(keeper: Keeper) -> None:
    borrowed = keeper.borrow(LEASE, "request")
    keeper.give_back(borrowed)
    keeper.give_back(borrowed)
    assert keeper.sent == [(OWNER, ReleaseLeases([LEASE.lease_id]))]
    keeper.give_up_unconfirmed(monotonic() + 2 * DURATION)
    assert keeper.posted == []


def test_a_lease_that_is_borrowed_twice_is_the_same_one(keeper: Keeper) -> None:
    """The router may send `Decode` again."""
    first = keeper.borrow(LEASE, "request")
    assert keeper.borrow(LEASE, "request") is first
    assert len(keeper) == 1
