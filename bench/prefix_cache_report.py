"""The arithmetic and the tables of the benchmark of prefix caches. Results are in ms, medians."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from statistics import fmean, median
from typing import Any, Literal, get_args

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table

from pdengine.bench.load import Timing

GOAL = 0.1  # TTFT of a prompt that is cached / of the same one that is not
CROSSOVER_FIGURES = {"ttft_ms": "TTFT", "wait_ms": "the wait of all"}  # key of a result -> heading
NextTurnWay = Literal["decode worker", "prefill worker", "prefill worker, anew"]
NEXT_TURN_WAYS: tuple[NextTurnWay, ...] = get_args(NextTurnWay)


@dataclass(frozen=True)
class Answer:
    """cached_tokens: of its prompt. is_local: one worker has computed the prompt and written the answer."""

    timing: Timing
    token_ids: tuple[int, ...]
    cached_tokens: int
    is_local: bool


@dataclass(frozen=True)
class Repeat:
    """The same request twice."""

    computed_by: str
    first: Answer
    again: Answer


@dataclass(frozen=True)
class Others:
    """Answers that were written meanwhile: mean and longest time between two tokens of one, in seconds."""

    tpot: float
    longest_gap: float


@dataclass(frozen=True)
class Turn:
    """The next turn of a conversation beside `others` answers; what became of those meanwhile, and what they
    were like before; None where there are none."""

    computed_by: NextTurnWay
    others: int
    new_tokens: int
    answer: Answer
    meanwhile: Others | None
    alone: Others | None


def others_during(arrivals: Sequence[Sequence[float]], begin: float, end: float) -> Others | None:
    """Of all gaps between two tokens that lie at least partly between `begin` and `end`; None without any."""
    gaps = [b - a for times in arrivals for a, b in pairwise(times) if b > begin and a < end]
    return Others(fmean(gaps), max(gaps)) if gaps else None


def repeat_figures(repeats: Iterable[Repeat]) -> list[dict[str, Any]]:
    """A result for each that computed prompts again. identical: pairs with the same answer twice; answers:
    the first ones, in the order of the prompts."""
    results = []
    for computed_by, pairs in _grouped(repeats, lambda repeat: repeat.computed_by).items():
        first = [pair.first.timing.ttft for pair in pairs]
        again = [pair.again.timing.ttft for pair in pairs]
        results.append(
            {
                "computed_by": computed_by,
                "pairs": len(pairs),
                "first_ttft_ms": median(first) * 1e3,
                "again_ttft_ms": median(again) * 1e3,
                "share": median(b / a for a, b in zip(first, again, strict=True)),
                "cached_tokens": min(pair.again.cached_tokens for pair in pairs),
                "identical": sum(pair.first.token_ids == pair.again.token_ids for pair in pairs),
                "answers": [list(pair.first.token_ids) for pair in pairs],
            }
        )
    return results


def next_turn_figures(turns: Iterable[Turn]) -> list[dict[str, Any]]:
    """A result for each number of other answers, of new tokens, and each that computed them."""
    results = []
    grouped = _grouped(turns, lambda turn: (turn.others, turn.new_tokens, turn.computed_by))
    for (others, new_tokens, computed_by), group in grouped.items():
        result = {
            "others": others,
            "new_tokens": new_tokens,
            "computed_by": computed_by,
            "turns": len(group),
            "cached_tokens": min(turn.answer.cached_tokens for turn in group),
            "ttft_ms": median(turn.answer.timing.ttft for turn in group) * 1e3,
            "latency_ms": median(turn.answer.timing.latency for turn in group) * 1e3,
        }
        for name, seen in (
            ("others", [turn.meanwhile for turn in group if turn.meanwhile is not None]),
            ("others_alone", [turn.alone for turn in group if turn.alone is not None]),
        ):
            if seen:
                result[f"{name}_tpot_ms"] = median(other.tpot for other in seen) * 1e3
                result[f"{name}_longest_gap_ms"] = median(other.longest_gap for other in seen) * 1e3
        # How long everybody waits: the turn for its first token, each other answer for its next one.
        result["wait_ms"] = result["ttft_ms"] + others * result.get("others_longest_gap_ms", 0.0)
        results.append(result)
    return results


def merged(
    old: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]], keys: Sequence[str]
) -> list[dict[str, Any]]:
    """`new`, and what `old` has besides: results are of the same thing if they agree in all of `keys`."""
    results = {tuple(result[key] for key in keys): result for result in [*old, *new]}
    return list(results.values())


def crossovers_of(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """From how many new tokens on the prefill worker is better by each of CROSSOVER_FIGURES, as `crossover`
    has it: in each of its states, and for each number of other answers."""
    lines: dict[tuple[int, str], dict[int, dict[str, Any]]] = {}
    for result in results:
        line = lines.setdefault((result["others"], result["computed_by"]), {})
        line[result["new_tokens"]] = result
    crossovers = []
    for (others, computed_by), remote in lines.items():
        local = lines.get((others, "decode worker"), {})
        both = sorted(local.keys() & remote.keys())
        if computed_by == "decode worker" or not both:
            continue
        found: dict[str, Any] = {"others": others, "against": computed_by}
        for figure in CROSSOVER_FIGURES:
            points = [(tokens, local[tokens][figure], remote[tokens][figure]) for tokens in both]
            found[figure] = crossover(points)
        crossovers.append(found)
    return crossovers


def crossover(points: Sequence[tuple[float, float, float]]) -> float | None:
    """Where the first of two lines through (x, y1), (x, y2) comes to lie above the second one.

    points: (x, y1, y2), ascending; between them the lines are straight. The first x where y1 is larger from
    the beginning; None where it is not larger in the end.
    """
    above = [y1 > y2 for _, y1, y2 in points]
    if not above[-1]:
        return None
    begin = len(above) - next((i for i, is_above in enumerate(reversed(above)) if not is_above), len(above))
    if begin == 0:
        return points[0][0]
    (x, y1, y2), (next_x, next_y1, next_y2) = points[begin - 1], points[begin]
    difference, next_difference = y2 - y1, next_y1 - next_y2
    return x + (next_x - x) * difference / (difference + next_difference)


def repeat_table(results: Sequence[dict[str, Any]]) -> Table:
    title = f"The same prompt twice: TTFT in ms, medians; goal: {GOAL:.0%} of the first"
    table = Table("computed again by", title=title, box=SIMPLE_HEAD)
    headings = ("first", "again", "share", "goal", "cached tokens", "same answer", "as first row's")
    for heading in headings:
        table.add_column(heading, justify="right")
    for result in results:
        pairs = list(zip(result["answers"], results[0]["answers"], strict=False))
        table.add_row(
            result["computed_by"],
            f"{result['first_ttft_ms']:,.1f}",
            f"{result['again_ttft_ms']:,.1f}",
            f"{result['share']:.1%}",
            "reached" if result["share"] <= GOAL else "missed",
            f"{result['cached_tokens']:,}",
            f"{result['identical']} of {result['pairs']}",
            f"{sum(ours == theirs for ours, theirs in pairs)} of {len(pairs)}",
        )
    return table


def next_turn_table(results: Sequence[dict[str, Any]], crossovers: Sequence[dict[str, Any]]) -> Group:
    table = Table(title="The next turn of a conversation of 1000 tokens: ms, medians", box=SIMPLE_HEAD)
    for heading in ("others", "new tokens"):
        table.add_column(heading, justify="right")
    table.add_column("computed by")
    for heading in (
        "cached",
        "TTFT",
        "latency",
        "others' TPOT",
        "alone",
        "others' longest gap",
        "alone",
        "wait of all",
    ):
        table.add_column(heading, justify="right")
    ordered = sorted(results, key=lambda result: (result["others"], result["new_tokens"]))
    for others, group in groupby(ordered, key=lambda result: result["others"]):
        for result in group:
            cells = [
                f"{result[key]:,.1f}" if key in result else "-"
                for key in (
                    "ttft_ms",
                    "latency_ms",
                    "others_tpot_ms",
                    "others_alone_tpot_ms",
                    "others_longest_gap_ms",
                    "others_alone_longest_gap_ms",
                    "wait_ms",
                )
            ]
            new_tokens, cached = f"{result['new_tokens']:,}", f"{result['cached_tokens']:,}"
            table.add_row(f"{others}", new_tokens, result["computed_by"], cached, *cells)
        table.add_section()
    return Group(table, *(_sentence(found) for found in crossovers))


def _sentence(found: dict[str, Any]) -> str:
    figures = [
        f"{heading} {'nowhere' if found[key] is None else f'from {found[key]:,.0f} new tokens on'}"
        for key, heading in CROSSOVER_FIGURES.items()
    ]
    return f"beside {found['others']}: {found['against']} is better by {', by '.join(figures)}"


def _grouped(items: Iterable[Any], key: Any) -> dict[Any, list[Any]]:
    groups: dict[Any, list[Any]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups
