"""Where the values of options come from: the command line, the environment, a TOML file, their defaults.

click does the work: each option names its environment variable, and the file becomes the context's
`default_map`. What is here reads the file, and refuses what no option would ever read.
"""

import difflib
import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import click

ENVIRONMENT_PREFIX = "PDENGINE_"
NOT_OPTIONS = ("PDENGINE_UCX_LIB",)  # read by the transport, which has no command line
# Kubernetes gives every pod variables for every service, here for services called pdengine-something.
OF_KUBERNETES = re.compile(
    r"_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)$"
)

SHARED = ("model", "revision", "keys", "log-format", "log-level")  # keys at the top of the file
TABLES = {  # that a command reads; a later one wins
    "router": ("", "router"),
    "http": ("", "http"),
    "prefill": ("", "worker", "prefill"),
    "decode": ("", "worker", "decode"),
    "unified": ("", "worker", "unified"),
    "up": ("", "router", "worker", "up"),
}

Options = dict[str, click.Option]


class ConfigError(click.ClickException):
    """The file or the environment holds what cannot be used; the message names where and what."""


def config_option(function: click.decorators.FC) -> click.decorators.FC:
    """`--config FILE`, which is read before the other options take their values."""
    return click.option(
        "--config",
        metavar="FILE",
        type=click.Path(path_type=Path),
        envvar="PDENGINE_CONFIG",
        show_envvar=True,
        is_eager=True,
        callback=_configure,
        help="A TOML file with values of options.",
    )(function)


def origin(ctx: click.Context, option: click.Option) -> str:
    """Where the value of an option of this context comes from, for people."""
    assert option.name is not None
    match ctx.get_parameter_source(option.name):
        case click.core.ParameterSource.COMMANDLINE:
            return "command line"
        case click.core.ParameterSource.ENVIRONMENT:
            return f"environment {option.envvar}"
        case click.core.ParameterSource.DEFAULT_MAP:
            return str(ctx.obj[option.name])
    return "default"


def option_tables(root: click.Command) -> dict[str, Options]:
    """The keys of each table of a file, and the options that they set; "" is the top of the file.

    Every option has one home, except that one of [worker] may be given for a single role, too.
    """
    assert isinstance(root, click.Group)
    of_command = {name: _options(root.commands[name]) for name in TABLES}
    shared = {key: of_command["router"][key] for key in SHARED}
    router = _without(of_command["router"], shared)
    http = _without(of_command["http"], shared)
    worker = _without(of_command["prefill"], shared)
    up = _without(of_command["up"], {**shared, **router, **worker})
    roles = dict.fromkeys(("prefill", "decode", "unified"), worker)
    return {"": shared, "router": router, "http": http, "worker": worker, **roles, "up": up}


def check_environment(environ: Iterable[str], tables: Mapping[str, Options]) -> None:
    """Raise ConfigError for a variable that looks like one of ours and is read by nothing."""
    known = {str(option.envvar) for table in tables.values() for option in table.values()}
    known |= {*NOT_OPTIONS, f"{ENVIRONMENT_PREFIX}CONFIG"}
    for name in sorted(environ):
        if name.startswith(ENVIRONMENT_PREFIX) and name not in known and not OF_KUBERNETES.search(name):
            raise ConfigError(f"environment variable {name} is not known{_did_you_mean(name, known)}")


def read_config_file(path: Path, tables: Mapping[str, Options]) -> dict[str, dict[str, Any]]:
    """The values of a file by table, "" for its top, all of them checked. Raises ConfigError."""
    try:
        with path.open("rb") as file:
            content = tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid TOML ({error})") from error
    values: dict[str, dict[str, Any]] = {"": {}}
    for key, value in content.items():
        if key in tables:
            if not isinstance(value, dict):
                raise ConfigError(f"{path}: {key} must be a table, found {_shown(value)}")
            values[key] = value
        elif isinstance(value, dict):
            places = [_place(table) for table in tables if table]
            raise ConfigError(f"{path}: there is no table [{key}]{_did_you_mean(_place(key), places)}")
        else:
            values[""][key] = value
    for table, entries in values.items():
        for key, value in entries.items():
            if key not in tables[table]:
                raise ConfigError(f"{path}: {_place(table)} has no option {key}{_hint(key, table, tables)}")
            _check_value(f"{path}: {_place(table)} {key}", tables[table][key], value)
    return values


def _configure(ctx: click.Context, _parameter: click.Parameter, path: Path | None) -> Path | None:
    """The callback of --config: makes the file this command's source of defaults."""
    if ctx.resilient_parsing:
        return path
    assert ctx.command.name is not None
    tables = option_tables(ctx.find_root().command)
    check_environment(os.environ, tables)
    if path is None:
        return None
    values = read_config_file(path, tables)
    defaults: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for table in TABLES[ctx.command.name]:
        for key, value in values.get(table, {}).items():
            name = tables[table][key].name
            assert name is not None
            defaults[name], origins[name] = value, f"{path} {_place(table)}"
    ctx.default_map = defaults
    ctx.obj = origins  # of the values in default_map
    return path


def _check_value(where: str, option: click.Option, value: Any) -> None:
    """Raise ConfigError unless `value` has the type of the option and is one that it takes."""
    types, expected = _toml_types(option.type)
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        raise ConfigError(f"{where} must be {expected}, found {_shown(value)}")
    try:
        option.type.convert(value, option, None)
    except click.BadParameter as error:
        raise ConfigError(f"{where}: {error.message}") from error


def _toml_types(kind: Any) -> tuple[tuple[type, ...], str]:
    if isinstance(kind, click.types.BoolParamType):
        return (bool,), "true or false"
    if isinstance(kind, click.types.IntParamType):
        return (int,), "an integer"
    if isinstance(kind, click.types.FloatParamType):
        return (int, float), "a number"
    return (str,), "a string"


def _hint(key: str, table: str, tables: Mapping[str, Options]) -> str:
    for other, options in tables.items():
        if key in options:
            return f"; its place is {_place(other)}"
    return _did_you_mean(key, tables[table])


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    nearest = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {nearest[0]}?" if nearest else ""


def _place(table: str) -> str:
    return f"[{table}]" if table else "top level"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _options(command: click.Command) -> Options:
    """The options that a file may set, by their long names without dashes."""
    options = [option for option in command.params if isinstance(option, click.Option)]
    return {o.opts[0].removeprefix("--"): o for o in options if o.name != "config"}


def _without(options: Options, others: Mapping[str, Any]) -> Options:
    return {key: option for key, option in options.items() if key not in others}
