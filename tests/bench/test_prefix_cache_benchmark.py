"""The arithmetic and the tables of the benchmark of prefix caches."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from pdengine.bench.load import Timing
from pdengine.bench.prefix_cache_report import (
    Answer,
    NextTurnWay,
    Others,
    Repeat,
    Turn,
    crossover,
    crossovers_of,
    merged,
    next_turn_figures,
    next_turn_table,
    others_during,
    repeat_figures,
    repeat_table,
)


def answer(ttft: float, token_ids: Sequence[int] = (1, 2), cached_tokens: int = 0) -> Answer:
    return Answer(Timing(5.0, (5.0 + ttft, 5.1 + ttft)), tuple(token_ids), cached_tokens, is_local=True)


def turn(
    computed_by: NextTurnWay, new_tokens: int, ttft: float, others: int = 0, longest_gap: float = 0.0
) -> Turn:
    meanwhile, alone = (Others(0.01, longest_gap), Others(0.005, 0.006)) if others else (None, None)
    return Turn(computed_by, others, new_tokens, answer(ttft, cached_tokens=992), meanwhile, alone)


REPEATS = [
    Repeat("unified", answer(1.0), answer(0.02, cached_tokens=1999)),
    Repeat("unified", answer(2.0), answer(0.06, cached_tokens=1990)),
    Repeat("unified", answer(4.0, (3, 4)), answer(2.0, (3, 5), cached_tokens=1999)),
    Repeat("prefill worker", answer(1.0), answer(0.5)),
    Repeat("prefill worker", answer(1.0, (1, 9)), answer(0.5, (1, 9))),
]


def test_gaps_of_others_count_when_they_overlap() -> None:
    arrivals = [[0.0, 1.0, 1.5, 4.0, 4.5, 9.0], [0.9, 1.2, 4.6, 4.7]]
    seen = others_during(arrivals, 1.0, 4.5)
    # 1 to 1.5, 1.5 to 4, 4 to 4.5, and of the other one 0.9 to 1.2, 1.2 to 4.6
    assert seen is not None
    assert seen.tpot == pytest.approx((0.5 + 2.5 + 0.5 + 0.3 + 3.4) / 5)
    assert seen.longest_gap == pytest.approx(3.4)


def test_there_may_be_no_others() -> None:
    assert others_during([], 0.0, 1.0) is None
    assert others_during([[0.5]], 0.0, 1.0) is None


def test_figures_of_repeated_prompts() -> None:
    unified, prefill = repeat_figures(REPEATS)
    assert (unified["computed_by"], unified["pairs"]) == ("unified", 3)
    assert unified["first_ttft_ms"] == pytest.approx(2000)
    assert unified["again_ttft_ms"] == pytest.approx(60)
    assert unified["share"] == pytest.approx(0.03)  # the median of 0.02, 0.03 and 0.5
    assert unified["cached_tokens"] == 1990
    assert (unified["identical"], prefill["identical"]) == (2, 2)
    assert unified["answers"] == [[1, 2], [1, 2], [3, 4]]


def test_the_table_says_whether_the_goal_is_reached_and_answers_agree() -> None:
    console = Console(width=150)
    with console.capture() as captured:
        console.print(repeat_table(repeat_figures(REPEATS)))
    unified, prefill = (line for line in captured.get().splitlines() if "reached" in line or "missed" in line)
    assert unified.split()[3:] == ["3.0%", "reached", "1,990", "2", "of", "3", "3", "of", "3"]
    # The second answer is not that of the first cluster.
    assert prefill.split()[4:] == ["50.0%", "missed", "0", "2", "of", "2", "1", "of", "2"]


def test_figures_of_next_turns_beside_others() -> None:
    turns = [turn("decode worker", 64, ttft, others=4, longest_gap=ttft / 2) for ttft in (0.1, 0.2, 0.9)]
    (result,) = next_turn_figures([*turns])
    assert (result["others"], result["new_tokens"], result["turns"]) == (4, 64, 3)
    assert result["ttft_ms"] == pytest.approx(200)
    assert result["latency_ms"] == pytest.approx(300)
    assert result["others_tpot_ms"] == pytest.approx(10)
    assert result["others_longest_gap_ms"] == pytest.approx(100)
    assert result["others_alone_longest_gap_ms"] == pytest.approx(6)
    assert result["wait_ms"] == pytest.approx(200 + 4 * 100)


def test_figures_of_next_turns_alone() -> None:
    (result,) = next_turn_figures([turn("decode worker", 64, 0.1)])
    assert not any(key.startswith("others_") for key in result)
    assert result["wait_ms"] == result["ttft_ms"] == pytest.approx(100)


def test_a_new_result_takes_the_place_of_the_old_one_of_the_same() -> None:
    old = [{"a": 1, "b": 2, "ms": 10}, {"a": 1, "b": 3, "ms": 20}]
    new = [{"a": 1, "b": 3, "ms": 21}, {"a": 2, "b": 3, "ms": 30}]
    assert [result["ms"] for result in merged(old, new, ("a", "b"))] == [10, 21, 30]


def test_lines_cross_between_two_points() -> None:
    assert crossover([(0, 1, 3), (10, 4, 2)]) == pytest.approx(5)
    assert crossover([(0, 1, 3), (10, 1, 3)]) is None
    assert crossover([(7, 3, 1), (10, 3, 1)]) == 7
    assert crossover([(0, 3, 1), (10, 1, 3)]) is None  # better again in the end
    assert crossover([(0, 9, 1), (10, 1, 3), (20, 3, 1)]) == pytest.approx(15)  # the last time counts
    assert crossover([(0, 1, 1), (10, 2, 1)]) == 0


@given(
    st.lists(st.integers(1, 1000), min_size=2, max_size=6, unique=True).map(sorted),
    st.integers(-50, 50),
    st.integers(1, 20),
)
def test_straight_lines_cross_where_they_do(xs: list[int], at: int, slope: int) -> None:
    crossing = crossover([(x, slope * (x - at), 0) for x in xs])
    if at < xs[0]:
        assert crossing == xs[0]
    elif at >= xs[-1]:
        assert crossing is None
    else:
        assert crossing == pytest.approx(at)


def test_crossovers_against_each_state_of_the_prefill_worker() -> None:
    turns = [
        turn("decode worker", 16, 0.01, others=4, longest_gap=0.01),
        turn("decode worker", 116, 0.11, others=4, longest_gap=0.11),
        turn("decode worker", 16, 0.01),
        turn("prefill worker", 16, 0.05, others=4, longest_gap=0.01),
        turn("prefill worker", 116, 0.15, others=4, longest_gap=0.01),
        turn("prefill worker, anew", 116, 0.5, others=4, longest_gap=0.01),
    ]
    results = next_turn_figures(turns)
    crossovers = crossovers_of(results)
    assert [(found["others"], found["against"]) for found in crossovers] == [
        (4, "prefill worker"),
        (4, "prefill worker, anew"),
    ]
    known, anew = crossovers
    assert known["ttft_ms"] is None
    assert known["wait_ms"] == pytest.approx(26)  # 10 + 40 and 90, 110 + 440 and 190: 40 under, 360 over
    assert anew["wait_ms"] == pytest.approx(116)
    console = Console(width=150)
    with console.capture() as captured:
        console.print(next_turn_table(results, crossovers))
    text = captured.get()
    assert text.count("prefill worker, anew") == 2
    assert (
        "beside 4: prefill worker is better by TTFT nowhere, by the wait of all from 26 new tokens on" in text
    )
