"""What the engine does while a step runs, and what before."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Sequence_

import pytest
from engine_cluster import PROMPT, Cluster
from engine_worker import TokenRunner, answer_to

from pdengine.engine.commands import Event
from pdengine.engine.engine import Engine
from pdengine.engine.runner import ReadStep
from pdengine.engine.step import BlockCopy, Chunk
from pdengine.engine.step_extras import StepResult
from pdengine.transport.messages import StepTokens


@pytest.mark.parametrize("is_asynchronous", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 2, 3])
def test_tokens_are_out_before_the_next_step_has_ended(
    cluster: Cluster, is_asynchronous: bool, num_tokens: int
) -> None:
    worker, runner = cluster.start("worker")
    runner.is_asynchronous = is_asynchronous
    runner.hold(free_steps=1 + num_tokens)  # a step takes 8 tokens, and the prompt has more
    worker.whole("request", PROMPT, max_tokens=4)
    runner.wait_until_held()
    for position, token_id in enumerate(answer_to(PROMPT, num_tokens)):
        [update] = worker.expect(StepTokens).updates
        assert (update.position, update.token_id) == (position, token_id)
    runner.release()
    assert worker.collect(1) == {"request": answer_to(PROMPT, 4)[num_tokens:]}


@pytest.mark.parametrize(
    ("is_asynchronous", "order"),
    [
        (True, "start read start tell read start tell read tell"),
        (False, "start read tell start read tell start read tell"),
    ],
)
def test_a_gpu_gets_its_step_before_the_last_one_is_reported(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, is_asynchronous: bool, order: str
) -> None:
    """Where the engine thread runs the step itself, a report before it does not wait for it."""
    worker, runner = cluster.start("worker")
    notes = note_order(runner, worker.engine, monkeypatch)
    runner.is_asynchronous = is_asynchronous
    worker.whole("request", PROMPT[:8], max_tokens=3)
    assert worker.collect(1) == {"request": answer_to(PROMPT[:8], 3)}
    assert notes == order.split()


def note_order(runner: TokenRunner, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """start, read: of a step. tell: what was told."""
    notes: list[str] = []
    start_step: Callable[..., ReadStep] = runner.start
    emit = engine._emit

    def start(
        chunks: Sequence_[Chunk],
        after_layer: Callable[[int], None] | None = None,
        copies: Sequence_[BlockCopy] = (),
    ) -> ReadStep:
        notes.append("start")
        read_step = start_step(chunks, after_layer, copies)

        def read() -> StepResult:
            notes.append("read")
            return read_step()

        return read

    def tell(events: list[Event]) -> None:
        notes.append("tell")
        emit(events)

    monkeypatch.setattr(runner, "start", start)
    monkeypatch.setattr(engine, "_emit", tell)
    return notes
