"""The two indices of the ledger always agree."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pdengine.router.ledger import EXPECTED_ANSWER_TOKENS, Ledger, Request
from pdengine.router.registry import Demand
from pdengine.transport.messages import Choice, SamplingParams, Usage

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
    request = Request("id", b"client", 1, SamplingParams(max_tokens=5), prompt_ids=[1, 2])
    request.attempt = 2
    request.choices[0].output_ids.append(3)
    work = request.work()
    request.choices[0].output_ids.append(4)
    assert (work.request_id, work.attempt, work.prompt_ids) == ("id", 2, [1, 2])
    assert work.choices == [Choice(0, [3])]
    assert request.demand() == Demand(num_tokens=4, longest=6, expected=6)
    assert request.usage() == Usage(prompt_tokens=2, completion_tokens=2)


def test_answers_are_not_expected_to_be_as_long_as_they_may_be() -> None:
    sampling = SamplingParams(max_tokens=100_000)
    request = Request("id", b"client", 1, sampling, n=2, prompt_ids=[1, 2])
    assert request.demand().expected == 2 + 2 * EXPECTED_ANSWER_TOKENS
    assert request.demand().longest == 2 + 99_999
    request.choices[0].output_ids = [3] * 600
    assert request.demand().expected == 2 + 600 + 2 * EXPECTED_ANSWER_TOKENS


def test_the_work_of_several_answers_is_that_of_the_unfinished_ones() -> None:
    request = Request("id", b"client", 1, SamplingParams(max_tokens=5), n=3, prompt_ids=[1, 2])
    assert request.work().choices == [Choice(0, []), Choice(1, []), Choice(2, [])]
    assert request.demand() == Demand(num_tokens=2, longest=6, expected=14)
    assert not request.has_diverged
    for choice, token_ids in zip(request.choices, ([3], [4, 5], [6]), strict=True):
        choice.output_ids += token_ids
    assert request.has_diverged
    request.choices[1].finish_reason = "stop"
    assert request.work().choices == [Choice(0, [3]), Choice(2, [6])]
    assert request.demand() == Demand(num_tokens=4, longest=6, expected=10)
    assert request.has_diverged
    request.choices[2].finish_reason = "length"
    assert request.work().choices == [Choice(0, [3])]
    assert not request.has_diverged  # a prefill worker can go on with one answer
    assert request.usage() == Usage(prompt_tokens=2, completion_tokens=4)
    assert [request.find_choice(index) for index in (-1, 0, 1, 2, 3)] == [
        None,
        request.choices[0],
        None,
        None,
        None,
    ]


def test_cached_tokens_are_those_of_the_attempt_that_wrote_the_first_token() -> None:
    request = Request("id", b"client", 1, SamplingParams(), prompt_ids=list(range(40)))
    request.prefill_worker = "P"
    request.note_cached("D", 32)  # what a decode worker finds saves nothing but a pull
    assert request.usage().cached_tokens == 0
    request.note_cached("P", 16)
    request.note_cached("P", 32)  # after a preemption: it has computed them itself
    assert request.usage().cached_tokens == 16
    request.cached_tokens = None
    request.choices[0].output_ids.append(1)
    request.note_cached("P", 32)
    assert request.usage().cached_tokens == 0
    request.choices[0].output_ids.clear()
    request.note_cached("P", 1000)
    assert request.usage().cached_tokens == 40
