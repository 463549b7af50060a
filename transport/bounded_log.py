"""Warnings that a stranger can cause: told, but not as often as he likes."""

import logging
from time import monotonic

SECONDS = 5.0


class BoundedLog:
    """Logs one warning in SECONDS at most; the next one says how many were left out."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._next_at = 0.0
        self._num_left_out = 0

    def warning(self, text: str, *values: object) -> None:
        now = monotonic()
        if now < self._next_at:
            self._num_left_out += 1
            return
        if self._num_left_out:
            text, values = text + " (and %d more like it before)", (*values, self._num_left_out)
        self._logger.warning(text, *values)
        self._next_at, self._num_left_out = now + SECONDS, 0
