"""Chat templates: the jinja2 programs that ship with a checkpoint and turn messages into a prompt.

They get the environment that transformers gives them, in jinja2's immutable sandbox, because a checkpoint is
somebody else's code.
"""

import json
import traceback
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


class ChatTemplateError(ValueError):
    """A chat template that is missing, broken, or refuses the messages; the message names file and line."""


class ChatTemplate:
    """One compiled template. Raises ChatTemplateError when `source` does not compile.

    `origin` is the file it came from, for messages; `special_tokens` are `bos_token`, `eos_token` and so on.
    """

    def __init__(self, source: str, origin: Path, special_tokens: Mapping[str, str]) -> None:
        self._origin = origin
        self._special_tokens = special_tokens
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise self._error(error, error.lineno) from error

    def render(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True) -> str:
        """The prompt for `messages`. Raises ChatTemplateError, with the line, when the template fails."""
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            )
        except Exception as error:  # a template can fail in any way that Python can
            raise self._error(error, _template_line(error)) from error

    def _error(self, error: Exception, line: int | None) -> ChatTemplateError:
        place = f" at line {line}" if line is not None else ""
        reason = " ".join(str(error).split()) or type(error).__name__
        return ChatTemplateError(f"{self._origin}: chat template failed{place}: {reason}")


def _template_line(error: Exception) -> int | None:
    # jinja2 rewrites tracebacks, so that frames of the template carry its own line numbers.
    lines = [
        frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "<template>"
    ]
    return lines[-1] if lines else None


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Unlike jinja2's own filter, does not escape HTML, and keeps the order of keys."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


class _GenerationTag(Extension):
    """`{% generation %}` marks the assistant's text for training; here it only has to be understood."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)
