"""Stop strings: whatever the pieces of a text, it ends at the same place."""

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdengine.models.demo.facts import checkpoint_directory
from pdengine.models.tokenizer import IncrementalDetokenizer, Tokenizer
from pdengine.router.ledger import Answer
from pdengine.router.stop_strings import StopSearch, StopStrings

TOKENIZER = Tokenizer.load(checkpoint_directory())

# Few letters, so that strings overlap, contain each other and begin anew within themselves.
TEXTS = st.text("abé", max_size=60)
STOPS = st.lists(st.text("abé", min_size=1, max_size=5), min_size=1, max_size=5)


def cut(text: str, stops: Sequence[str], first: int = 0) -> tuple[str, bool]:
    """Up to the string that is complete first, after `first` characters, and of several then the longest."""
    for end in range(first + 1, len(text) + 1):
        lengths = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if lengths:
            return text[: end - max(lengths)], True
    return text, False


@given(TEXTS, STOPS, st.lists(st.integers(0, 60)), st.integers(0, 60))
def test_the_text_ends_before_the_first_stop_string(
    text: str, stops: list[str], cuts: list[int], num_unsearched: int
) -> None:
    """And nothing is withheld that no string can begin with."""
    num_unsearched = min(num_unsearched, len(text))
    bounds = sorted({0, num_unsearched, len(text), *(place for place in cuts if place <= len(text))})
    search, shown, has_stopped = StopSearch(StopStrings(stops)), "", False
    for start, end in pairwise(bounds):
        piece, has_stopped = search.push(text[start:end], may_stop=start >= num_unsearched)
        shown += piece
        if has_stopped:
            break
        withheld = text[len(shown) : end]
        assert text[:end] == shown + withheld
        starts = {stop[:length] for stop in stops for length in range(len(stop))}
        longest = max(length for length in range(end + 1) if text[end - length : end] in starts)
        assert withheld == text[end - longest : end]
    assert (shown + search.finish(), has_stopped) == cut(text, stops, num_unsearched)


@given(st.lists(st.integers(5, 560), min_size=1, max_size=30), st.data())
def test_an_answer_ends_before_the_first_stop_string(token_ids: list[int], data: st.DataObject) -> None:
    """Whatever characters its tokens are parts of."""
    whole = TOKENIZER.decode(token_ids)
    places = st.integers(0, max(0, len(whole) - 1))
    stops = [
        whole[place : place + length] or "x"
        for place, length in data.draw(st.lists(st.tuples(places, st.integers(1, 8)), min_size=1, max_size=3))
    ]
    finish_reason = data.draw(st.sampled_from(["length", None]))
    answer = Answer(0, detokenizer=IncrementalDetokenizer(TOKENIZER), search=StopSearch(StopStrings(stops)))
    text = ""
    for token_id in token_ids:
        is_last = len(answer.output_ids) + 1 == len(token_ids)
        text += answer.append(token_id, finish_reason if is_last else None)
        if answer.finish_reason is not None:
            break
    expected, has_stopped = cut(whole, stops)
    if finish_reason is None and not has_stopped:
        assert answer.finish_reason is None
        assert whole.startswith(text)  # the rest may be part of a character or of a stop string
    elif finish_reason is None:
        assert answer.finish_reason in ("stop", None)
        assert expected.startswith(text)
    else:
        assert (text, answer.finish_reason) == (expected, "stop" if has_stopped else "length")


@pytest.mark.parametrize(
    ("min_tokens", "expected"), [(0, "aab"), (2, "aab"), (3, "aabacbab"), (5, "aabacbab"), (6, "aabacbabacb")]
)
def test_a_string_that_comes_up_too_early_does_not_count(min_tokens: int, expected: str) -> None:
    """It counts with the first token after those that there must be; it may have begun before."""
    pieces = ["aa", "ba", "c", "ba", "ba", "c", "b"]

    class Spelled:
        def push(self, token_ids: list[int]) -> str:
            return pieces[token_ids[0]]

        def finish(self) -> str:
            return ""

    answer = Answer(0, min_tokens, detokenizer=Spelled(), search=StopSearch(StopStrings(["ac"])))  # type: ignore[arg-type]
    text = ""
    for token_id in range(len(pieces)):
        text += answer.append(token_id, None)
        if answer.finish_reason is not None:
            break
    assert text == expected


def test_the_cost_does_not_grow_with_the_text() -> None:
    """What is kept of a text is never longer than a stop string."""
    search = StopSearch(StopStrings(["ab" * 20 + "c"]))
    for _ in range(1000):
        search.push("ab" * 7)
        assert len(search._withheld) <= 40
