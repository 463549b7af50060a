"""Leases from both sides, on clocks that the tests set."""

from __future__ import annotations

import copy

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pdengine.engine.leases import RENEWALS_PER_LEASE, BorrowedLease, BorrowedLeases, GrantedLeases
from pdengine.transport.messages import KVLease, LeasesRenewed, RenewLeases

DURATION = 30.0


def make_lease(lease_id: int, engine_id: str = "prefill") -> KVLease:
    return KVLease(lease_id, engine_id, block_ids=[lease_id], num_tokens=4, duration=DURATION)


# ---------------------------------------------------------------------------------------- granted


def test_a_granted_lease_expires_once_its_time_is_over() -> None:
    granted = GrantedLeases(DURATION)
    granted.grant(1, now=100.0)
    granted.grant(2, now=101.0)
    assert granted.expire(129.9) == []
    assert granted.expire(130.0) == [1]
    assert granted.expire(130.0) == []
    assert granted.held() == [2]


def test_a_renewal_counts_from_its_arrival() -> None:
    granted = GrantedLeases(DURATION)
    granted.grant(1, now=100.0)
    assert granted.renew([1], now=129.0) == ([1], [])
    assert granted.expire(158.9) == []
    assert granted.expire(159.0) == [1]


def test_a_late_renewal_is_lost_even_before_the_sweep() -> None:
    granted = GrantedLeases(DURATION)
    granted.grant(1, now=100.0)
    assert granted.renew([1], now=130.0) == ([], [1])
    assert granted.expire(130.0) == [1], "the refused renewal has not prolonged it"


def test_unknown_released_and_expired_leases_are_lost() -> None:
    granted = GrantedLeases(DURATION)
    for lease_id in (1, 2, 3):
        granted.grant(lease_id, now=0.0)
    granted.release([2])
    assert granted.renew([3], now=20.0) == ([3], [])
    granted.expire(30.0)
    assert granted.renew([1, 2, 3, 4], now=31.0) == ([3], [1, 2, 4])


def test_a_release_counts_once() -> None:
    granted = GrantedLeases(DURATION)
    granted.grant(1, now=0.0)
    assert granted.release([1, 1, 7]) == [1]
    assert granted.release([1]) == []
    assert granted.expire(1000.0) == []
    assert len(granted) == 0


# --------------------------------------------------------------------------------------- borrowed


def test_a_borrowed_lease_covers_nothing_before_the_first_answer() -> None:
    borrowed = BorrowedLeases().add(make_lease(1), "request")
    assert not borrowed.covers(float("-inf"))
    assert not borrowed.covers(0.0)


def test_an_acknowledged_renewal_counts_from_the_moment_it_was_sent() -> None:
    leases = BorrowedLeases()
    borrowed = leases.add(make_lease(1), "request")
    sequence = leases.sent(now=100.0)
    assert leases.acknowledge("prefill", sequence, renewed=[1], lost=[]) == ([borrowed], [])
    assert borrowed.covers(129.9)
    assert not borrowed.covers(130.0)


def test_a_renewal_without_an_answer_covers_nothing_more() -> None:
    leases = BorrowedLeases()
    borrowed = leases.add(make_lease(1), "request")
    leases.acknowledge("prefill", leases.sent(now=100.0), [1], [])
    leases.sent(now=110.0)
    assert not borrowed.covers(130.0)


def test_answers_out_of_order_keep_the_later_end() -> None:
    leases = BorrowedLeases()
    borrowed = leases.add(make_lease(1), "request")
    first, second = leases.sent(now=100.0), leases.sent(now=110.0)
    leases.acknowledge("prefill", second, [1], [])
    leases.acknowledge("prefill", first, [1], [])
    assert borrowed.covered_until == 140.0


def test_a_duplicate_or_invented_answer_covers_nothing() -> None:
    leases = BorrowedLeases()
    leases.add(make_lease(1), "request")
    sequence = leases.sent(now=100.0)
    leases.acknowledge("prefill", sequence, [], [])
    assert leases.acknowledge("prefill", sequence, [1], []) == ([], [])
    assert leases.acknowledge("prefill", 12345, [1], []) == ([], [])


def test_lost_leases_are_reported_once() -> None:
    leases = BorrowedLeases()
    borrowed = leases.add(make_lease(1), "request")
    assert leases.acknowledge("prefill", leases.sent(now=100.0), [], [1]) == ([], [borrowed])
    assert leases.acknowledge("prefill", leases.sent(now=101.0), [], [1]) == ([], [])
    assert len(leases) == 0


def test_an_answer_for_a_lease_that_is_gone_here_is_skipped() -> None:
    leases = BorrowedLeases()
    lease = make_lease(1)
    leases.add(lease, "request")
    sequence = leases.sent(now=100.0)
    assert leases.remove(lease)
    assert not leases.remove(lease)
    assert leases.acknowledge("prefill", sequence, [1], []) == ([], [])


def test_the_same_lease_id_of_two_owners_is_two_leases() -> None:
    leases = BorrowedLeases()
    ours = leases.add(make_lease(1, "one"), "request-1")
    theirs = leases.add(make_lease(1, "two"), "request-2")
    assert leases.due(now=0.0) == {"one": [1], "two": [1]}
    assert leases.acknowledge("one", leases.sent(now=0.0), [1], []) == ([ours], [])
    assert not theirs.covers(0.0)
    assert leases.drop_owner("one") == [ours]
    assert leases.drop_owner("one") == []
    assert leases.due(now=1000.0) == {"two": [1]}


def test_a_lease_comes_up_for_renewal_at_once_and_then_several_times_per_lease() -> None:
    leases = BorrowedLeases()
    leases.add(make_lease(1), "request")
    times = [now for now in range(int(DURATION)) if leases.due(float(now))]
    assert times[0] == 0
    assert len(times) == RENEWALS_PER_LEASE


def test_unanswered_renewals_are_forgotten_in_the_end() -> None:
    leases = BorrowedLeases()
    leases.add(make_lease(1), "request")
    oldest = leases.sent(now=0.0)
    sequences = [leases.sent(now=float(now)) for now in range(1, 1001)]
    assert leases.acknowledge("prefill", oldest, [1], []) == ([], [])
    covered, _ = leases.acknowledge("prefill", sequences[0], [1], [])
    assert len(covered) == 1


# ------------------------------------------------------------------------------------ both at once


class LossyLink(RuleBasedStateMachine):
    """An owner and a borrower whose clocks differ, and a network that delays, loses, repeats and reorders.

    What must always hold: while the borrower believes that it is covered, the owner keeps the blocks.
    """

    @initialize(skew=st.floats(-1e4, 1e4))
    def build(self, skew: float) -> None:
        self.now = 1e5  # by the owner's clock
        self.skew = skew
        self.granted = GrantedLeases(DURATION)
        self.borrowed_leases = BorrowedLeases()
        self.borrowed: list[BorrowedLease] = []
        self.requests: list[RenewLeases] = []
        self.answers: list[LeasesRenewed] = []
        self.num_leases = 0

    @rule()
    def grant(self) -> None:
        self.num_leases += 1
        self.granted.grant(self.num_leases, self.now)
        self.borrowed.append(self.borrowed_leases.add(make_lease(self.num_leases), "request"))

    @rule(seconds=st.floats(0.0, DURATION / 2))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def sweep(self) -> None:
        self.granted.expire(self.now)

    @rule()
    def renew(self) -> None:
        lease_ids = self.borrowed_leases.due(self.now + self.skew).get("prefill", [])
        self.requests.append(RenewLeases(self.borrowed_leases.sent(self.now + self.skew), lease_ids))

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), lost=st.booleans())
    def request_arrives(self, data: st.DataObject, lost: bool) -> None:
        request = self.requests.pop(data.draw(st.integers(0, len(self.requests) - 1)))
        if not lost:
            self.answers.append(
                LeasesRenewed(request.sequence, *self.granted.renew(request.lease_ids, self.now))
            )

    @precondition(lambda self: self.answers)
    @rule(data=st.data(), repeated=st.booleans())
    def answer_arrives(self, data: st.DataObject, repeated: bool) -> None:
        index = data.draw(st.integers(0, len(self.answers) - 1))
        answer = self.answers[index] if repeated else self.answers.pop(index)
        _, lost = self.borrowed_leases.acknowledge("prefill", answer.sequence, answer.renewed, answer.lost)
        for borrowed in lost:
            self.borrowed.remove(borrowed)

    @precondition(lambda self: self.borrowed)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        borrowed = self.borrowed.pop(data.draw(st.integers(0, len(self.borrowed) - 1)))
        assert self.borrowed_leases.remove(borrowed.lease)
        self.granted.release([borrowed.lease.lease_id])

    @invariant()
    def covered_blocks_are_held(self) -> None:
        after_a_sweep = copy.deepcopy(self.granted)
        after_a_sweep.expire(self.now)
        # Adding the skew rounds, and never by more than this.
        by_borrowers_clock = self.now + self.skew + 1e-6
        covered = {b.lease.lease_id for b in self.borrowed if b.covers(by_borrowers_clock)}
        assert covered <= set(after_a_sweep.held())

    @invariant()
    def the_borrower_keeps_nothing_else(self) -> None:
        assert len(self.borrowed_leases) == len(self.borrowed)


TestLossyLink = LossyLink.TestCase
TestLossyLink.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
