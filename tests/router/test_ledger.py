"""The two indices of the ledger always agree."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pdengine.router.ledger import Ledger, Request
from pdengine.transport.messages import SamplingParams, Usage

clients = st.sampled_from([b"a", b"b"])
tags = st.integers(0, 4)
workers = st.sampled_from([None, "P", "D"])


class LedgerMachine(RuleBasedStateMachine):
    """A ledger beside a plain list of its requests."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger()
        self.requests: list[Request] = []
        self.num_made = 0

    @rule(client=clients, tag=tags, worker=workers, attempt=st.integers(0, 3))
    def add(self, client: bytes, tag: int, worker: str | None, attempt: int) -> None:
        if self.ledger.find(client, tag) is None:
            self.num_made += 1
            request = Request(f"request {self.num_made}", client, tag, SamplingParams())
            request.worker, request.attempt = worker, attempt
            self.ledger.add(request)
            self.requests.append(request)

    @rule(client=clients, tag=tags)
    def remove(self, client: bytes, tag: int) -> None:
        request = self.ledger.find(client, tag)
        if request is not None:
            self.ledger.remove(request)
            self.requests.remove(request)
            assert request not in self.ledger
            assert self.ledger.current(request.request_id, request.attempt) is None

    @invariant()
    def both_indices_agree(self) -> None:
        assert list(self.ledger) == self.requests
        assert len(self.ledger) == len(self.requests)
        for request in self.requests:
            assert request in self.ledger
            assert self.ledger.find(request.client, request.tag) is request
            assert self.ledger.current(request.request_id, request.attempt) is request
            assert self.ledger.current(request.request_id, request.attempt + 1) is None
            assert self.ledger.current(request.request_id, request.attempt - 1) is None
        for client in (b"a", b"b"):
            assert self.ledger.of_client(client) == [r for r in self.requests if r.client == client]
        for worker in ("P", "D"):
            assert self.ledger.of_worker(worker) == [r for r in self.requests if r.worker == worker]


TestLedger = LedgerMachine.TestCase
TestLedger.settings = settings(max_examples=50, stateful_step_count=20)


def test_removing_while_iterating() -> None:
    ledger = Ledger()
    for tag in range(3):
        ledger.add(Request(str(tag), b"client", tag, SamplingParams()))
    for request in ledger:
        ledger.remove(request)
    assert len(ledger) == 0


def test_the_work_of_an_attempt_is_a_snapshot() -> None:
    request = Request("id", b"client", 1, SamplingParams(max_tokens=5), prompt_ids=[1, 2], output_ids=[3])
    request.attempt = 2
    work = request.work()
    request.output_ids.append(4)
    assert (work.request_id, work.attempt, work.prompt_ids, work.output_ids) == ("id", 2, [1, 2], [3])
    assert (request.num_tokens, request.max_total_tokens) == (4, 7)
    assert request.usage() == Usage(prompt_tokens=2, completion_tokens=2)
