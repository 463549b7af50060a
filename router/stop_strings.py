"""Where a text ends because a string comes up that it shall stop before, found while it is written."""

from collections import deque
from collections.abc import Sequence


class StopStrings:
    """The automaton of Aho and Corasick (CACM 18(6), 1975) for a few strings, none of them empty.

    A state stands for the longest end of the text that is the start of a string. Making it takes about a
    microsecond per character of the strings.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self._children: list[dict[str, int]] = [{}]
        self._fallback: list[int] = []
        # By state: characters of the longest string that the text ends with, and those at its end that a
        # string may go on from.
        self._matched: list[int] = [0]
        self._undecided: list[int] = [0]
        for string in strings:
            self._add(string)
        self._link()

    def step(self, state: int, character: str) -> int:
        """The state after one more character; the first one is 0."""
        while state and character not in self._children[state]:
            state = self._fallback[state]
        return self._children[state].get(character, 0)

    def matched(self, state: int) -> int:
        """Characters of the longest string that the text ends with; 0 if there is none."""
        return self._matched[state]

    def undecided(self, state: int) -> int:
        """Characters at the end of the text that a string may begin with."""
        return self._undecided[state]

    def _add(self, string: str) -> None:
        state = 0
        for depth, character in enumerate(string, 1):
            child = self._children[state].get(character)
            if child is None:
                child = self._children[state][character] = len(self._children)
                self._children.append({})
                self._matched.append(0)
                self._undecided.append(depth)
            state = child
        self._matched[state] = len(string)

    def _link(self) -> None:
        """Where each state falls back to: that of the next shorter end of the text, if none goes on."""
        self._fallback = [0] * len(self._children)
        states = deque(self._children[0].values())
        while states:
            state = states.popleft()
            fallback = self._fallback[state]
            self._matched[state] = self._matched[state] or self._matched[fallback]
            if not self._children[state]:
                self._undecided[state] = self._undecided[fallback]
            for character, child in self._children[state].items():
                self._fallback[child] = self.step(fallback, character)
                states.append(child)


class StopSearch:
    """The search in one text, as it is written; its cost does not grow with the text.

    The string that is complete first ends the text, and of those that are complete at once the longest: so it
    does not matter in which pieces the text comes. shows_match: the text ends after that string.
    """

    def __init__(self, stops: StopStrings, *, shows_match: bool = False) -> None:
        self._stops = stops
        self._shows_match = shows_match
        self._state = 0
        self._withheld = ""

    def push(self, text: str, *, may_stop: bool = True) -> tuple[str, bool]:
        """What is certain to be shown now, and whether a string came up; then the text has ended.

        may_stop: whether one that is complete within this piece counts.
        """
        stops, state = self._stops, self._state
        pending = self._withheld + text
        for end, character in enumerate(text, len(self._withheld) + 1):
            state = stops.step(state, character)
            if may_stop and (length := stops.matched(state)):
                self._withheld = ""
                return pending[: end if self._shows_match else end - length], True
        self._state = state
        certain = len(pending) - stops.undecided(state)
        self._withheld = pending[certain:]
        return pending[:certain], False

    def finish(self) -> str:
        """What was withheld, when no more text comes."""
        rest, self._withheld = self._withheld, ""
        return rest
