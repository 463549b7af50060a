"""Which requests a worker has not ended, and the line that it logs for each that ends."""

import logging
from typing import Any

import pytest

from pdengine.engine.open_answers import OpenAnswers
from pdengine.engine.request_log import RequestRecord
from pdengine.engine.sequence import Mode
from pdengine.transport.messages import (
    FinishReason,
    KVLease,
    Prefilled,
    PrefixHit,
    Pulled,
    StepTokens,
    TokenUpdate,
    TransferStats,
    WorkFailed,
    WorkRefused,
)

LEASE = KVLease(1, "engine", [0], 9, 30.0)
STATS = TransferStats(
    num_blocks=3, num_bytes=99, num_gets=1, seconds=0.0123456, lanes="mapping", num_cached_blocks=1
)


@pytest.fixture
def answers(caplog: pytest.LogCaptureFixture) -> OpenAnswers:
    caplog.set_level(logging.INFO, "pdengine.engine.request_log")
    return OpenAnswers()


def ended(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    """The fields of each line, without times."""
    assert all(record.getMessage() == "request finished" for record in caplog.records)
    fields = (
        "request_id",
        "attempt",
        "mode",
        "outcome",
        "reason",
        "prompt_tokens",
        "cached_tokens",
        "output_tokens",
        "pull_seconds",
        "pulled_blocks",
        "cached_blocks",
    )
    return [
        {name: vars(record)[name] for name in fields if vars(record).get(name) is not None}
        for record in caplog.records
    ]


def record(mode: Mode, attempt: int = 1) -> RequestRecord:
    return RequestRecord("a", attempt, mode, num_prompt_tokens=10)


def token(choice: int = 0, reason: FinishReason | None = None, attempt: int = 1) -> TokenUpdate:
    return TokenUpdate("a", attempt, choice, 0, 5, reason)


def test_a_decode_worker_counts_the_tokens_of_all_answers_and_its_pull(
    answers: OpenAnswers, caplog: pytest.LogCaptureFixture
) -> None:
    answers.begin(record(Mode.DECODE), [0, 1])
    answers.note(Pulled("a", 1, STATS))
    answers.note(StepTokens([token(0), token(1)]))
    answers.note(StepTokens([token(0, "stop"), token(1)]))
    assert (len(answers), ended(caplog)) == (1, [])
    answers.note(StepTokens([token(1, "length")]))
    assert len(answers) == 0
    assert ended(caplog) == [
        {
            "request_id": "a",
            "attempt": 1,
            "mode": "decode",
            "outcome": "finished",
            "prompt_tokens": 10,
            "output_tokens": 5,
            "pull_seconds": 0.0123,
            "pulled_blocks": 3,
            "cached_blocks": 1,
        }
    ]
    [of] = caplog.records
    assert 0 <= vars(of)["first_token_seconds"] <= vars(of)["seconds"]


@pytest.mark.parametrize(
    ("lease", "pushed", "outcomes"),
    [(LEASE, False, ["prefilled"]), (None, False, ["finished"]), (None, True, [])],
)
def test_a_prefill_worker_ends_with_the_first_tokens_unless_it_pushes(
    lease: KVLease | None,
    pushed: bool,
    outcomes: list[str],
    answers: OpenAnswers,
    caplog: pytest.LogCaptureFixture,
) -> None:
    answers.begin(record(Mode.PREFILL), [0, 1])
    answers.note(PrefixHit("a", 1, 8))
    answers.note(Prefilled("a", 1, [token(0), token(1)], lease, pushed))
    lines = ended(caplog)
    assert [line["outcome"] for line in lines] == outcomes
    for line in lines:
        assert (line["cached_tokens"], line["output_tokens"]) == (8, 2)
    assert len(answers) == (0 if outcomes else 1)


def test_what_goes_wrong_is_told_with_its_reason(
    answers: OpenAnswers, caplog: pytest.LogCaptureFixture
) -> None:
    answers.begin(record(Mode.DECODE), [0])
    answers.note(WorkFailed("a", 1, "the pull failed", True))
    answers.begin(record(Mode.WHOLE, 2), [0])
    answers.note(WorkRefused("a", 2, "no room"))
    answers.begin(record(Mode.WHOLE, 3), [0, 1])
    answers.give_up("a", [1])
    assert len(answers) == 1
    answers.give_up("a", None)
    answers.begin(record(Mode.WHOLE, 4), [0])
    answers.clear()
    outcomes = [(line["attempt"], line["outcome"], line.get("reason")) for line in ended(caplog)]
    assert outcomes == [
        (1, "failed", "the pull failed"),
        (2, "refused", "no room"),
        (3, "aborted", None),
        (4, "dropped", None),
    ]
    assert len(answers) == 0


def test_a_newer_attempt_ends_the_older_one(answers: OpenAnswers, caplog: pytest.LogCaptureFixture) -> None:
    answers.begin(record(Mode.WHOLE, 1), [0])
    answers.note(StepTokens([token()]))
    answers.begin(record(Mode.WHOLE, 3), [0])
    assert len(answers) == 1
    answers.note(StepTokens([token(0, "stop", attempt=3)]))
    outcomes = [(line["attempt"], line["outcome"], line["output_tokens"]) for line in ended(caplog)]
    assert outcomes == [(1, "dropped", 1), (3, "finished", 1)]
    assert len(answers) == 0


def test_an_attempt_that_is_begun_again_goes_on_with_its_answers(
    answers: OpenAnswers, caplog: pytest.LogCaptureFixture
) -> None:
    """Blocks are reserved for a request, and later it is decoded: one line, from the beginning on."""
    reserved = record(Mode.DECODE)
    reserved.began_at -= 1000
    answers.begin(reserved, [0, 1, 2])
    answers.note(PrefixHit("a", 1, 8))
    answers.begin(record(Mode.DECODE), [2])
    assert (len(answers), ended(caplog)) == (1, [])
    answers.note(StepTokens([token(2, "length")]))
    assert len(answers) == 0
    [line] = ended(caplog)
    assert (line["outcome"], line["cached_tokens"], line["output_tokens"]) == ("finished", 8, 1)
    assert vars(caplog.records[0])["seconds"] >= 1000


def test_what_belongs_to_an_older_attempt_changes_nothing(
    answers: OpenAnswers, caplog: pytest.LogCaptureFixture
) -> None:
    answers.begin(record(Mode.WHOLE, 2), [0])
    answers.begin(record(Mode.WHOLE, 1), [0, 1])
    answers.note(StepTokens([token(0, "stop", attempt=1)]))
    answers.note(WorkFailed("a", 1, "late", True))
    answers.note(StepTokens([TokenUpdate("unknown", 1, 0, 0, 5, "stop")]))
    assert (len(answers), ended(caplog)) == (1, [])
    answers.note(StepTokens([token(0, "stop", attempt=2)]))
    [line] = ended(caplog)
    assert (line["attempt"], line["output_tokens"]) == (2, 1)
