"""`pdengine config`: which values the options of a command have, and where they come from."""

from copy import copy
from dataclasses import dataclass

import click

from pdengine.cli.config_file import TABLES, origin
from pdengine.cli.up import options_of_workers, worker_arguments, worker_counts


@dataclass(frozen=True)
class Row:
    """One option of a command, its value and where that comes from, all for people."""

    option: str
    value: str
    origin: str


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="[COMMAND] [OPTIONS]...")
@click.pass_context
def config(ctx: click.Context, arguments: tuple[str, ...]) -> None:
    """Print the values that COMMAND would have with OPTIONS, and where each comes from.

    Without COMMAND: those of router, http, prefill, decode, unified and up. `up` is followed by what its
    workers get.
    """
    names = list(TABLES)
    if arguments and not arguments[0].startswith("-"):
        name, *arguments_left = arguments
        if name not in TABLES:
            raise click.UsageError(f"{name!r} is not one of {', '.join(TABLES)}")
        names, arguments = [name], tuple(arguments_left)
    sections = [section for name in names for section in _sections(ctx.find_root(), name, list(arguments))]
    widths = [
        max(len(getattr(row, column)) for _, rows in sections for row in rows)
        for column in ("option", "value")
    ]
    for index, (title, rows) in enumerate(sections):
        click.echo(("\n" if index else "") + click.style(f"pdengine {title}", bold=True))
        for row in rows:
            click.echo(f"  {row.option:<{widths[0]}}  {row.value:<{widths[1]}}  {row.origin}")


def _sections(root: click.Context, name: str, arguments: list[str]) -> list[tuple[str, list[Row]]]:
    """The title and the rows of one command; of `up`, also those of the workers that it would start."""
    with _context(root, name, arguments) as ctx:
        rows = _rows(ctx)
        if name != "up":
            return [(name, rows)]
        of_workers = {f"--{key}" for key in options_of_workers(ctx)}
        sections = [(name, [row for row in rows if row.option not in of_workers])]
        shared_with_up = [row.option for row in rows if row.option in of_workers]
        given = worker_arguments(ctx)
        if ctx.params["config"] is not None:
            given += ["--config", str(ctx.params["config"])]
        for role, count in worker_counts(ctx).items():
            if count:
                with _context(root, role, given) as worker:
                    worker_rows = [row for row in _rows(worker) if row.option in shared_with_up]
                sections.append((f"up, each of {count} {role}", worker_rows))
        return sections


def _context(root: click.Context, name: str, arguments: list[str]) -> click.Context:
    """The context of a command, parsed; what it requires may be missing."""
    assert isinstance(root.command, click.Group)
    command = copy(root.command.commands[name])
    command.params = [copy(parameter) for parameter in command.params]
    for parameter in command.params:
        parameter.required = False
    return command.make_context(name, list(arguments), parent=root)


def _rows(ctx: click.Context) -> list[Row]:
    """One row per option; "-" stands for no value."""
    group = ctx.find_root().command
    assert isinstance(group, click.Group)
    assert ctx.info_name is not None
    required = {option.name for option in group.commands[ctx.info_name].params if option.required}
    rows = []
    for option in ctx.command.params:
        assert isinstance(option, click.Option)
        value = ctx.params[option.name or ""]
        if value is None and option.name in required:
            rows.append(Row(option.opts[0], "-", "not set, but required"))
        else:
            rows.append(Row(option.opts[0], "-" if value is None else str(value), origin(ctx, option)))
    return rows
