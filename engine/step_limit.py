"""How many prompt tokens a step may have, so that decoding sequences are not held up for long."""

INITIAL_BLOCKS = 4
ADAPTATION = 0.5  # part of the deviation of one step, as a logarithm, that the estimate takes up
MAX_SLOWER = 2.0  # a step can be slow by accident, so one alone changes little
MAX_FASTER = 8.0  # but never fast: what slow first steps have left is gone after a few others
SHORTEST_STEP = 1e-6  # seconds; keeps estimates above zero


class StepLimit:
    """Learns from the steps so far what a step costs: base(decoding tokens) + rate * prompt tokens.

    Both are exponentially weighted averages. base has one for each power of two of decoding tokens, because
    it is hardly linear. Estimates need not be right apart from each other: the limit depends on their sum at
    the limit itself, which is the point where steps are observed while there are prompts enough.
    """

    def __init__(self, max_step_seconds: float | None, block_size: int) -> None:
        """max_step_seconds: what a step shall take at most; None is no limit. block_size: in tokens."""
        self._max_step_seconds = max_step_seconds
        self._block_size = block_size
        self._base: dict[int, float] = {}  # bit length of the number of decoding tokens -> seconds
        self._rate: float | None = None  # seconds per prompt token

    def max_prompt_tokens(self, num_decodes: int) -> int | None:
        """The bound for a step with `num_decodes` decoding tokens: at least a block, so that prompts always
        go on; None is no bound."""
        if self._max_step_seconds is None:
            return None
        if self._rate is None:
            return INITIAL_BLOCKS * self._block_size
        seconds_left = self._max_step_seconds - self._base_seconds(num_decodes)
        return max(self._block_size, int(seconds_left / self._rate))

    def observe(self, *, num_prompt_tokens: int, num_decodes: int, seconds: float) -> None:
        """Take up what a step with so many tokens has cost."""
        seconds = max(seconds, SHORTEST_STEP)
        bucket, base = num_decodes.bit_length(), self._base_seconds(num_decodes)
        if num_prompt_tokens == 0:
            known = self._base.get(bucket, seconds)
            self._base[bucket] = known * _correction(seconds / known)
        elif self._rate is None:
            self._rate = max(seconds - base, SHORTEST_STEP) / num_prompt_tokens
        else:
            prompt_seconds = self._rate * num_prompt_tokens
            correction = _correction(seconds / (base + prompt_seconds))
            # Each part is corrected as it contributes: a short prompt says little about the rate.
            total = base**2 + prompt_seconds**2
            self._rate *= correction ** (prompt_seconds * (base + prompt_seconds) / total)
            if bucket in self._base:
                self._base[bucket] *= correction ** (base * (base + prompt_seconds) / total)

    def _base_seconds(self, num_decodes: int) -> float:
        """Of the nearest number that was observed alone; 0 before, which makes the rate too high, not too
        low."""
        if not self._base:
            return 0.0
        bucket = num_decodes.bit_length()
        return self._base[min(self._base, key=lambda known: abs(known - bucket))]


def _correction(ratio: float) -> float:
    """What to multiply an estimate with, where the truth was `ratio` of it."""
    return float(min(max(ratio, 1 / MAX_FASTER), MAX_SLOWER) ** ADAPTATION)
