"""What a stranger can have written into the log: it is told, but not as often as he likes."""

import logging
from time import monotonic

SECONDS = 5.0


class BoundedLog:
    """Logs one line in SECONDS at most; the next one says how many were left out."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._next_at = 0.0
        self._num_left_out = 0

    def warning(self, text: str, *values: object) -> None:
        num_left_out = self._turn()
        if num_left_out:
            text, values = text + " (and %d more like it before)", (*values, num_left_out)
        if num_left_out is not None:
            self._logger.warning(text, *values)

    def info(self, text: str, **fields: object) -> None:
        """How many were left out is one more field, `left_out`."""
        num_left_out = self._turn()
        if num_left_out:
            fields["left_out"] = num_left_out
        if num_left_out is not None:
            self._logger.info(text, extra=fields)

    def _turn(self) -> int | None:
        """How many were left out before this one; None if it must be left out, too."""
        now = monotonic()
        if now < self._next_at:
            self._num_left_out += 1
            return None
        num_left_out, self._num_left_out = self._num_left_out, 0
        self._next_at = now + SECONDS
        return num_left_out
