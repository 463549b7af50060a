"""Chat templates: the jinja2 programs that ship with a checkpoint and turn messages into a prompt.

They get the environment that transformers gives them, in jinja2's immutable sandbox, because a checkpoint is
somebody else's code; and a bounded time, because the sandbox does not end endless loops.
"""

import json
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from time import monotonic
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.lexer import (
    TOKEN_BLOCK_BEGIN,
    TOKEN_BLOCK_END,
    TOKEN_LPAREN,
    TOKEN_NAME,
    TOKEN_RPAREN,
    TOKEN_VARIABLE_BEGIN,
    TOKEN_VARIABLE_END,
    Token,
    TokenStream,
)
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from pdengine.models.checkpoint import CheckpointError, JsonFields, read_json

DEFAULT_TEMPLATE = "default"
RENDER_SECONDS = 10.0  # a prompt of a million tokens takes less than one
CONTINUE_HERE = "CONTINUE_FINAL_MESSAGE_TAG "  # transformers' own: what follows it in the prompt is cut off
SPECIAL_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "pad_token",
    "sep_token",
    "cls_token",
    "mask_token",
)


class ChatTemplateError(ValueError):
    """A chat template that is missing, broken, or refuses the messages; the message names file and line."""


class ChatTemplate:
    """One compiled template. Raises ChatTemplateError when `source` does not compile.

    `origin` is the file it came from, for messages; `special_tokens` are `bos_token`, `eos_token` and so on.
    """

    def __init__(self, source: str, origin: Path, special_tokens: Mapping[str, str]) -> None:
        self._origin = origin
        self._special_tokens = special_tokens
        self._knows_developers = "'developer'" in source or '"developer"' in source
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise self._error(error, error.lineno) from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt for `messages`; `add_generation_prompt` opens the assistant's answer at its end.

        continue_final_message: the prompt ends with the last message, which is not closed, so that the answer
        goes on with it. variables: more that the template may look at; those in OWN_VARIABLES are not taken
        from there. A template that does not know the role "developer" is told "system", the older name of it.
        Raises ChatTemplateError, with the line, when the template fails or takes longer than RENDER_SECONDS.
        """
        turns = [self._turn(message) for message in messages]
        if continue_final_message:
            turns[-1]["content"] += CONTINUE_HERE
        own = {
            "messages": turns,
            "tools": tools,
            "documents": documents,
            "add_generation_prompt": add_generation_prompt,
            **self._special_tokens,
            _Deadline.function: _deadline(RENDER_SECONDS),
        }
        try:
            prompt = self._template.render({**(variables or {}), **own})
        except Exception as error:  # a template can fail in any way that Python can
            raise self._error(error, _template_line(error)) from error
        return self._cut(prompt, messages[-1]["content"]) if continue_final_message else prompt

    def _turn(self, message: Mapping[str, Any]) -> dict[str, Any]:
        is_unknown = message.get("role") == "developer" and not self._knows_developers
        return {**message, "role": "system"} if is_unknown else dict(message)

    def _cut(self, prompt: str, final: str) -> str:
        """The prompt up to the end of the final message, as transformers cuts it."""
        end = prompt.rfind(CONTINUE_HERE.strip())
        if end < 0 or final.strip() not in prompt:
            raise ChatTemplateError(f"{self._origin}: chat template does not show the final message as it is")
        # A template that strips messages would have stripped the end of this one.
        return prompt[:end] if prompt.startswith(CONTINUE_HERE, end) else prompt[:end].rstrip()

    def _error(self, error: Exception, line: int | None) -> ChatTemplateError:
        place = f" at line {line}" if line is not None else ""
        reason = " ".join(str(error).split()) or type(error).__name__
        return ChatTemplateError(f"{self._origin}: chat template failed{place}: {reason}")


def load_chat_templates(directory: Path) -> dict[str, ChatTemplate]:
    """The chat templates of a checkpoint by name; a single one is named "default".

    They are in `chat_template.jinja` and `additional_chat_templates/NAME.jinja`; else in `chat_template` of
    `tokenizer_config.json`, one or a list of named ones; else in `chat_template.json`, as processors have it.
    Raises CheckpointError for a broken file, ChatTemplateError for a template that does not compile.
    """
    config_path = directory / "tokenizer_config.json"
    config = read_json(config_path) if config_path.exists() else JsonFields(config_path, {})
    older_path = directory / "special_tokens_map.json"
    special_tokens = _special_tokens(read_json(older_path)) if older_path.exists() else {}
    special_tokens |= _special_tokens(config)
    origins = {DEFAULT_TEMPLATE: directory / "chat_template.jinja"}
    origins |= {path.stem: path for path in sorted(directory.glob("additional_chat_templates/*.jinja"))}
    sources = {name: _read_text(path) for name, path in origins.items() if path.exists()}
    if not sources:
        legacy_path = directory / "chat_template.json"
        fields = config
        if config.values.get("chat_template") is None and legacy_path.exists():
            fields = read_json(legacy_path)
        sources = _templates_in(fields)
        origins = dict.fromkeys(sources, fields.path)
    return {name: ChatTemplate(sources[name], origins[name], special_tokens) for name in sources}


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error


def _templates_in(fields: JsonFields) -> dict[str, str]:
    """The field `chat_template`: a string, or a list of objects with `name` and `template`."""
    value = fields.values.get("chat_template")
    if value is None:
        return {}
    if isinstance(value, str):
        return {DEFAULT_TEMPLATE: value}
    if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        named = {entry.get("name"): entry.get("template") for entry in value}
        if all(isinstance(text, str) for text in [*named.keys(), *named.values()]):
            return named
    raise fields.error("chat_template", "must be a string, or a list of objects with name and template")


def _special_tokens(fields: JsonFields) -> dict[str, str]:
    """`bos_token` and its like: each a string, or an object whose `content` is one."""
    tokens = {}
    for name in SPECIAL_TOKENS:
        value = fields.values.get(name)
        content = value.get("content") if isinstance(value, dict) else value
        if content is None:
            continue
        if not isinstance(content, str):
            raise fields.error(name, "must be a string, or an object with a string content")
        tokens[name] = content
    return tokens


def _template_line(error: Exception) -> int | None:
    # jinja2 rewrites tracebacks, so that frames of the template carry its own line numbers.
    lines = [
        frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "<template>"
    ]
    return lines[-1] if lines else None


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, _Deadline, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["namespace"] = _PublicNamespace
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


class _PublicNamespace(Namespace):
    """jinja2's own takes names such as `__class__`, through which a template could leave the sandbox."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # without `self`, so that a template may use that name
        self, *rest = args
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _refuse_private(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot have the attribute {name!r}")


def _deadline(seconds: float) -> Callable[[], str]:
    """A function that renders as nothing until `seconds` have passed, and fails from then on."""
    end = monotonic() + seconds

    def check() -> str:
        if monotonic() > end:
            raise jinja2.TemplateError(f"it takes longer than {seconds:g} s")
        return ""

    return check


class _Deadline(Extension):
    """Inserts a call of the deadline's check at the start of whatever can be run again and again."""

    function = "_check_deadline"
    repeated_tags = ("for", "macro", "call")

    def filter_stream(self, stream: TokenStream) -> Iterable[Token]:
        is_repeated = False
        for token in stream:
            yield token
            if token.type == TOKEN_BLOCK_BEGIN:
                is_repeated = stream.current.value in self.repeated_tags
            elif token.type == TOKEN_BLOCK_END and is_repeated:
                yield Token(token.lineno, TOKEN_VARIABLE_BEGIN, "{{")
                yield Token(token.lineno, TOKEN_NAME, self.function)
                yield Token(token.lineno, TOKEN_LPAREN, "(")
                yield Token(token.lineno, TOKEN_RPAREN, ")")
                yield Token(token.lineno, TOKEN_VARIABLE_END, "}}")


OWN_VARIABLES = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", *SPECIAL_TOKENS, _Deadline.function}
)
"""What a template is told by `render` itself."""


class _GenerationTag(Extension):
    """`{% generation %}` marks the assistant's text for training; here it only has to be understood."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)
