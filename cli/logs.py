"""The log of a process on stderr: one line per record, as text or JSON, written by a thread of its own."""

import contextlib
import faulthandler
import json
import logging
import os
import re
import sys
import threading
from datetime import UTC, datetime
from math import isfinite
from queue import SimpleQueue
from typing import Any, Literal, TextIO, get_args

import click

from pdengine.cli.options import Function, option

LogFormat = Literal["text", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]

MAX_WAITING_LINES = 10_000
FLUSH_SECONDS = 2.0
# What ends a line, moves a cursor or reorders text on somebody's terminal, and the escape character itself.
UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\\]")
PLAIN_VALUE = re.compile(r"[^\s\"=\\]+")
# Of sd-daemon(3): journald takes "<3>" at the start of a line for its priority.
PRIORITIES = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}
OF_EVERY_RECORD = {*vars(logging.makeLogRecord({})), "message", "asctime", "taskName"}


def log_options(function: Function) -> Function:
    """--log-format and --log-level."""
    add_format = option(
        "--log-format",
        type=click.Choice(get_args(LogFormat)),
        default="text",
        help="Each line of the log: text for people, or a JSON object.",
    )
    add_level = option(
        "--log-level",
        type=click.Choice(get_args(LogLevel)),
        default="info",
        help="The least severe records that are logged; info has one line per request.",
    )
    return add_format(add_level(function))


def log_to_stderr(process: str, log_format: LogFormat = "text", log_level: LogLevel = "info") -> None:
    """Log what is at least of this level, of libraries at least info. Call it once, first of all.

    process: its name, in every line. A crash, or SIGABRT (of systemd's watchdog), says where each thread is.
    """
    handler = StreamWriter(sys.stderr)
    formatter = JsonFormatter(process) if log_format == "json" else TextFormatter(process)
    handler.setFormatter(_WithPriority(formatter) if _is_journal(sys.stderr) else formatter)
    level = logging.getLevelNamesMapping()[log_level.upper()]
    logging.basicConfig(handlers=[handler], level=max(level, logging.INFO))
    logging.getLogger("pdengine").setLevel(level)
    logging.captureWarnings(True)
    with contextlib.suppress(OSError, ValueError):  # stderr is no file
        faulthandler.enable()


class TextFormatter(logging.Formatter):
    """TIME LEVEL PROCESS: MESSAGE KEY=VALUE ..., the time in UTC; values with blanks are JSON strings."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        fields = "".join(f" {key}={_shown(value)}" for key, value in _extras(record, self).items())
        line = f"{record.levelname:<7} {self._process}: {record.getMessage()}"
        return f"{_time(record)} {_escaped(line)}{fields}"


class JsonFormatter(logging.Formatter):
    """An object of time (ISO 8601, UTC), level, process, logger, message, and the record's own fields."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "process": self._process,
            "logger": record.name,
            "message": record.getMessage(),
        }
        extras = {key: _finite(value) for key, value in _extras(record, self).items()}
        return json.dumps({**extras, **fields}, default=str)


class StreamWriter(logging.Handler):
    """Writes on a thread of its own, so that a reader who does not read holds up nobody.

    While MAX_WAITING_LINES wait, further ones are dropped, and the next one that is written says how many.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream = stream
        self._lines: SimpleQueue[str | None] = SimpleQueue()
        self._num_dropped = 0
        self._thread = threading.Thread(target=self._write, name="log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            if self._lines.qsize() >= MAX_WAITING_LINES:
                self._num_dropped += 1
            else:
                self._lines.put(self.format(record))
        except Exception:
            self.handleError(record)

    def close(self) -> None:
        """Write what is left, as far as somebody reads it within FLUSH_SECONDS."""
        self._lines.put(None)
        self._thread.join(FLUSH_SECONDS)
        super().close()

    def _write(self) -> None:
        for line in iter(self._lines.get, None):
            with contextlib.suppress(OSError, ValueError):  # nobody will ever read it
                self._stream.write(f"{line}\n")
                if self._num_dropped and self._lines.empty():
                    self._stream.write(f"{self.format(self._dropped())}\n")
                self._stream.flush()

    def _dropped(self) -> logging.LogRecord:
        num_dropped, self._num_dropped = self._num_dropped, 0
        text = "%d lines of the log were dropped: nobody read them in time"
        return logging.LogRecord(__name__, logging.WARNING, __file__, 0, text, (num_dropped,), None)


class _WithPriority(logging.Formatter):
    """Another formatter's lines, with their priority for journald in front."""

    def __init__(self, formatter: logging.Formatter) -> None:
        super().__init__()
        self._formatter = formatter

    def format(self, record: logging.LogRecord) -> str:
        return f"<{PRIORITIES.get(record.levelno, 6)}>{self._formatter.format(record)}"


def _is_journal(stream: TextIO) -> bool:
    """Whether it goes to journald, which says so in JOURNAL_STREAM (systemd.exec(5))."""
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def _time(record: logging.LogRecord) -> str:
    return (
        datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    )


def _extras(record: logging.LogRecord, formatter: logging.Formatter) -> dict[str, Any]:
    """The fields that were given as extra=, except those that are None, and the traceback if there is one."""
    fields = {
        key: value for key, value in vars(record).items() if key not in OF_EVERY_RECORD and value is not None
    }
    if record.exc_info:
        fields["exception"] = formatter.formatException(record.exc_info)
    return fields


def _shown(value: Any) -> str:
    text = str(value)
    return text if PLAIN_VALUE.fullmatch(text) and not UNPRINTABLE.search(text) else json.dumps(text)


def _escaped(text: str) -> str:
    return UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def _finite(value: Any) -> Any:
    """JSON has no infinity, and no NaN."""
    return str(value) if isinstance(value, float) and not isfinite(value) else value
