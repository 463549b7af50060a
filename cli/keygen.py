"""`pdengine keygen`: the files of keys of a cluster."""

from pathlib import Path

import click

from pdengine.cli.options import errors_in_one_line
from pdengine.transport.keys import (
    KeyFile,
    KeyRole,
    KeysError,
    check_name,
    new_key_file,
    read_key_file,
    write_key_file,
)

ADDED_ROLES: tuple[KeyRole, ...] = ("worker", "client", "operator")


@click.command()
@click.argument("directory", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--add",
    nargs=2,
    type=(click.Choice(ADDED_ROLES), str),
    metavar="ROLE NAME",
    help="Make NAME.toml in a directory that has keys, and admit it: ROLE is worker, client or operator.",
)
def keygen(directory: Path, add: tuple[KeyRole, str] | None) -> None:
    """Make the keys of a cluster in DIRECTORY: router.toml, worker.toml, client.toml and operator.toml.

    Each process is given one of them, by --keys. Nothing is ever overwritten but the lists of admitted keys.
    """
    with errors_in_one_line():
        if add is None:
            _make_cluster(directory)
        else:
            _add(directory, *add)


def _make_cluster(directory: Path) -> None:
    """Raises KeysError before anything is written if one of the files is there."""
    files: dict[KeyRole, KeyFile] = {"router": new_key_file("router")}
    for role in ADDED_ROLES:
        files[role] = new_key_file(role, router_key=files["router"].public_key)
        files["router"] = files["router"].admitting(role, role, files[role].public_key)
    files["worker"] = files["worker"].admitting("worker", "worker", files["worker"].public_key)
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise KeysError(f"{directory}: cannot be made ({error.strerror})") from error
    for role in files:
        if (directory / f"{role}.toml").exists():
            raise KeysError(f"{directory / role}.toml: is there already; keys are not overwritten")
    for role, keys in files.items():
        _write(directory / f"{role}.toml", keys)


def _add(directory: Path, role: KeyRole, name: str) -> None:
    """One more process: the router admits it, and so do the other workers if it is one."""
    check_name(name)
    path = directory / f"{name}.toml"
    router = read_key_file(directory / "router.toml", ["router"])
    if name in router.admitted.get(role, {}):
        raise KeysError(f"{directory / 'router.toml'}: a {role} of the name {name} is admitted already")
    keys = new_key_file(role, router_key=router.public_key)
    changed = {directory / "router.toml": router.admitting(role, name, keys.public_key)}
    if role == "worker":
        for other, public_key in {**router.admitted.get("worker", {}), name: keys.public_key}.items():
            keys = keys.admitting("worker", other, public_key)
        for other_path, worker in _workers_in(directory).items():
            changed[other_path] = worker.admitting("worker", name, keys.public_key)
    _write(path, keys)
    for changed_path, content in changed.items():
        write_key_file(changed_path, content, overwrite=True)
        click.echo(f"{changed_path}: admits {name} now")


def _workers_in(directory: Path) -> dict[Path, KeyFile]:
    files = {path: read_key_file(path, ["router", *ADDED_ROLES]) for path in sorted(directory.glob("*.toml"))}
    return {path: keys for path, keys in files.items() if keys.role == "worker"}


def _write(path: Path, keys: KeyFile) -> None:
    write_key_file(path, keys)
    click.echo(f"{path}: keys of a {keys.role}")
