"""The bound on prompt tokens: it finds what a step may have, and is not led astray by single steps."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdengine.engine.step_limit import INITIAL_BLOCKS, StepLimit

BLOCK_SIZE = 16
MAX_SECONDS = 0.05

bases = st.floats(0.0, 0.025)
rates = st.floats(1e-6, 5e-3)
decodes = st.integers(0, 300)


class Machine:
    """Steps whose cost is linear, with always more prompt tokens than the limit lets through."""

    def __init__(self, base: float, rate: float, num_decodes: int) -> None:
        self.limit = StepLimit(MAX_SECONDS, BLOCK_SIZE)
        self.base, self.rate, self.num_decodes = base, rate, num_decodes

    def step(self, slowdown: float = 1.0) -> None:
        self.observe(self.allowed, slowdown)

    def observe(self, num_prompt_tokens: int, slowdown: float = 1.0) -> None:
        seconds = slowdown * (self.base + self.rate * num_prompt_tokens)
        self.limit.observe(num_prompt_tokens=num_prompt_tokens, num_decodes=self.num_decodes, seconds=seconds)

    @property
    def allowed(self) -> int:
        allowed = self.limit.max_prompt_tokens(self.num_decodes)
        assert allowed is not None
        assert allowed >= BLOCK_SIZE
        return allowed

    def check_settled(self) -> None:
        """A full step takes what it may take, within a fifth, unless that is less than a block."""
        seconds = self.base + self.rate * self.allowed
        assert self.allowed == BLOCK_SIZE or seconds <= 1.2 * MAX_SECONDS
        assert self.allowed > (0.8 * MAX_SECONDS - self.base) / self.rate - 1


@given(bases, rates, decodes, st.booleans())
def test_it_converges(base: float, rate: float, num_decodes: int, decodes_alone: bool) -> None:
    machine = Machine(base, rate, num_decodes)
    if decodes_alone:
        machine.observe(0)
    for _ in range(40):
        machine.step()
    machine.check_settled()


@given(bases, rates, decodes, st.floats(1.0, 1e6), st.integers(0, 3))
def test_slow_steps_are_forgotten(
    base: float, rate: float, num_decodes: int, slowdown: float, num_before: int
) -> None:
    """Among the first ones (kernels are compiled, memory is touched for the first time), or later."""
    machine = Machine(base, rate, num_decodes)
    for _ in range(20 * num_before):
        machine.step()
    machine.step(slowdown)
    for _ in range(60 if num_before == 0 else 40):
        machine.step()
    machine.check_settled()


@pytest.mark.parametrize("num_prompt_tokens", [0, 1000])
def test_one_slow_step_halves_the_limit_at_most_and_four_others_bring_it_back(num_prompt_tokens: int) -> None:
    machine = Machine(0.01, 4e-5, 8)
    for _ in range(20):
        machine.observe(0)
        machine.step()
    settled = machine.allowed
    assert settled == pytest.approx(1000, rel=0.02)
    machine.observe(num_prompt_tokens, slowdown=1000.0)
    assert settled / 2 <= machine.allowed < settled
    for _ in range(4):
        machine.observe(0)
        machine.step()
    assert machine.allowed == pytest.approx(settled, rel=0.15)


@given(st.floats(0.0, 0.01), st.floats(1e-5, 2e-4), decodes, st.sampled_from([0.25, 4.0]))
def test_it_follows_a_machine_that_changes(base: float, rate: float, num_decodes: int, change: float) -> None:
    machine = Machine(base, rate, num_decodes)
    for _ in range(25):
        machine.step()
    machine.base, machine.rate = machine.base * change, machine.rate * change
    for _ in range(12):
        machine.step()
    machine.check_settled()


@given(
    st.lists(
        st.tuples(
            st.integers(0, 10_000),
            st.integers(0, 1000),
            st.one_of(st.floats(0.0, 10.0), st.sampled_from([0.0, 1e-300, 1e9])),
        ),
        max_size=60,
    ),
    decodes,
)
@settings(max_examples=200)
def test_whatever_is_observed_a_block_is_allowed(steps: list[tuple[int, int, float]], num: int) -> None:
    limit = StepLimit(MAX_SECONDS, BLOCK_SIZE)
    for num_prompt_tokens, num_decodes, seconds in steps:
        limit.observe(num_prompt_tokens=num_prompt_tokens, num_decodes=num_decodes, seconds=seconds)
        allowed = limit.max_prompt_tokens(num)
        assert allowed is not None
        assert allowed >= BLOCK_SIZE


def test_it_starts_small() -> None:
    assert StepLimit(MAX_SECONDS, BLOCK_SIZE).max_prompt_tokens(3) == INITIAL_BLOCKS * BLOCK_SIZE


def test_more_decoding_tokens_leave_less_to_prompts() -> None:
    limit = StepLimit(MAX_SECONDS, BLOCK_SIZE)
    for _ in range(20):
        limit.observe(num_prompt_tokens=0, num_decodes=1, seconds=0.01)
        limit.observe(num_prompt_tokens=0, num_decodes=256, seconds=0.03)
        limit.observe(num_prompt_tokens=200, num_decodes=1, seconds=0.03)
    assert limit.max_prompt_tokens(1) == pytest.approx(400, rel=0.02)
    assert limit.max_prompt_tokens(256) == pytest.approx(200, rel=0.02)
    assert limit.max_prompt_tokens(2) == limit.max_prompt_tokens(1), "of the nearest number known"


def test_short_prompts_do_not_change_the_rate() -> None:
    machine = Machine(0.01, 4e-5, 8)
    for _ in range(20):
        machine.observe(0)
        machine.step()
    settled = machine.allowed
    for _ in range(50):
        machine.limit.observe(num_prompt_tokens=1, num_decodes=8, seconds=0.011)
    assert machine.allowed == pytest.approx(settled, rel=0.05)


def test_without_a_limit_there_is_none() -> None:
    limit = StepLimit(None, BLOCK_SIZE)
    limit.observe(num_prompt_tokens=1000, num_decodes=0, seconds=1.0)
    assert limit.max_prompt_tokens(0) is None
