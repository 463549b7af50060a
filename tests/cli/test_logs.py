"""One line per record, whatever is in it, as text and as JSON."""

import json
import logging
import os
import re
import subprocess
import sys
from typing import Any, TextIO

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from pdengine.cli.cluster import Cluster
from pdengine.cli.logs import MAX_WAITING_LINES, JsonFormatter, StreamWriter, TextFormatter
from pdengine.cli.main import main
from pdengine.engine.worker_config import StartupError
from pdengine.models.demo.facts import checkpoint_directory

TEXT_LINE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z (\w+) +decode\[7\]: (.*)")


def record(message: str, *arguments: object, level: int = logging.INFO, **extra: Any) -> logging.LogRecord:
    logger = logging.getLogger("pdengine.engine.worker")
    return logger.makeRecord(logger.name, level, __file__, 1, message, arguments, None, extra=extra)


def text(of: logging.LogRecord) -> str:
    line = TextFormatter("decode[7]").format(of)
    match = TEXT_LINE.fullmatch(line)
    assert match is not None, line
    return match[2]


def as_json(of: logging.LogRecord) -> dict[str, Any]:
    line = JsonFormatter("decode[7]").format(of)
    assert line.isprintable()
    fields: dict[str, Any] = json.loads(line)
    return fields


def test_text_has_the_fields_of_a_record_behind_its_message() -> None:
    of = record("request finished", request_id="a1", seconds=0.25, reason='it "ended" early', worker=None)
    assert text(of) == 'request finished request_id=a1 seconds=0.25 reason="it \\"ended\\" early"'


def test_json_has_the_fields_of_a_record_beside_its_own() -> None:
    fields = as_json(record("%d tokens", 3, level=logging.WARNING, request_id="a1", seconds=float("nan")))
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", fields.pop("time"))
    assert fields == {
        "level": "warning",
        "process": "decode[7]",
        "logger": "pdengine.engine.worker",
        "message": "3 tokens",
        "request_id": "a1",
        "seconds": "nan",
    }


@given(st.text(), st.text())
def test_nothing_that_is_logged_makes_a_line_of_its_own(message: str, value: str) -> None:
    of = record("%s", message, field=value)
    line = text(of)
    assert len(line.splitlines()) <= 1
    assert not re.search(r"[\x00-\x1f\x7f-\x9f]", line)
    fields = as_json(of)
    assert (fields["message"], fields["field"]) == (message, value)


@given(st.text(), st.sampled_from(["request_id=b2", "x y", ""]))
def test_a_value_cannot_pretend_to_be_another_field(value: str, forged: str) -> None:
    line = text(record("ended", field=value + " " + forged))
    [shown] = re.fullmatch(r"ended field=(\".*\")", line).groups()  # type: ignore[union-attr]
    assert json.loads(shown) == value + " " + forged


def test_an_exception_is_in_the_line() -> None:
    try:
        raise ValueError("first\nsecond")
    except ValueError:
        of = record("it broke")
        of.exc_info = sys.exc_info()
    shown = text(of).removeprefix("it broke exception=")
    for traceback in (json.loads(shown), as_json(of)["exception"]):
        assert traceback.startswith("Traceback")
        assert traceback.endswith("ValueError: first\nsecond")


def pipe() -> tuple[TextIO, TextIO]:
    reader, writer = os.pipe()
    return os.fdopen(reader), os.fdopen(writer, "w")


def test_a_reader_who_does_not_read_holds_up_nobody_and_is_told_what_was_dropped() -> None:
    reader, writer = pipe()
    handler = StreamWriter(writer)
    handler.setFormatter(TextFormatter("decode[7]"))
    count = 2 * MAX_WAITING_LINES
    for index in range(count):
        handler.emit(record("line", index=index))
    received = []
    for line in reader:
        received.append(line)
        if "dropped" in line:
            break
    handler.close()
    dropped = re.search(r": (\d+) lines of the log were dropped", received[-1])
    assert dropped is not None
    assert len(received) - 1 + int(dropped[1]) == count
    assert received[0].endswith("line index=0\n")
    reader.close()
    writer.close()


def test_what_was_logged_is_written_before_the_process_ends_even_if_nobody_reads_the_rest() -> None:
    reader, writer = pipe()
    handler = StreamWriter(writer)
    handler.emit(record("the last word"))
    handler.close()
    assert reader.readline() == "the last word\n"
    reader.close()
    handler.emit(record("nobody hears this"))
    handler.close()


PROGRAM = """
import logging
from pdengine.cli.logs import log_to_stderr
log_to_stderr("router", "{log_format}", "{level}")
logger = logging.getLogger("pdengine.router")
logger.debug("for developers")
logger.info("served", extra={{"request_id": "a1"}})
logging.getLogger("library").debug("chatter")
logger.error("broken")
"""


def lines_of(log_format: str, level: str) -> list[str]:
    program = PROGRAM.format(log_format=log_format, level=level)
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return result.stderr.splitlines()


def test_a_process_logs_from_its_level_on() -> None:
    messages = [json.loads(line)["message"] for line in lines_of("json", "debug")]
    assert messages == ["for developers", "served", "broken"]
    [line] = lines_of("text", "error")
    assert line.endswith("ERROR   router: broken")


@pytest.mark.parametrize("command", ["router", "http", "prefill", "decode", "unified", "up"])
def test_every_command_that_serves_can_be_told_how_to_log(command: str) -> None:
    result = CliRunner().invoke(main, ["config", command], env={"PDENGINE_LOG_FORMAT": "json"})
    assert re.search(r"--log-format +json +environment PDENGINE_LOG_FORMAT", result.output), result.output
    assert re.search(r"--log-level +info +default", result.output)


def test_up_hands_on_what_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in the environment or a file its children read themselves."""

    def no_cluster(*_: object, log_arguments: list[str], **__: object) -> None:
        told.append(log_arguments)
        raise StartupError("that is all")

    monkeypatch.setattr("pdengine.cli.up.Cluster.__init__", no_cluster)
    told: list[list[str]] = []
    command = ["up", "--model", str(checkpoint_directory()), "--kv-memory", "16MiB", "--log-level", "warning"]
    environment = {"PDENGINE_LOG_FORMAT": "json"}
    assert "that is all" in CliRunner().invoke(main, command, env=environment).output
    assert told == [["--log-level", "warning"]]


@pytest.mark.parametrize(("level", "expected"), [(None, "warning"), ("", "warning"), ("debug", "debug")])
@pytest.mark.parametrize(
    "command",
    [["demo"], ["generate", "The", "--model", str(checkpoint_directory())]],
    ids=lambda words: words[0],
)
def test_a_command_that_prints_answers_has_no_requests_in_between_unless_that_is_wanted(
    command: list[str], level: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[list[str], str]] = []

    def no_start(cluster: Cluster) -> None:
        told.append((cluster._arguments, cluster._environment()["PDENGINE_LOG_LEVEL"]))
        raise StartupError("that is all")

    monkeypatch.setattr(Cluster, "_start", no_start)
    result = CliRunner().invoke(main, command, env={"PDENGINE_LOG_LEVEL": level})
    assert "that is all" in result.output
    [(arguments, told_level)] = told
    assert told_level == expected
    assert "--log-level" not in arguments
