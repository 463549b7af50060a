"""`pdengine install-units`: the systemd units of this version, for this program, on this machine."""

import os
import pwd
import re
import shutil
import sys
from importlib.resources import files
from pathlib import Path
from zipfile import is_zipfile

import click

UNITS = "pdengine.deploy"
PROGRAM = "/usr/local/bin/pdengine"  # as the units in the package have it
USER = "pdengine"
HIDDEN = ("/home", "/root", "/run/user")  # by ProtectHome=
PRIVATE = ("/tmp", "/var/tmp")  # by PrivateTmp=
PLAIN_PATH = re.compile(r"/[\w.+@:/-]*")  # needs no quotes in a unit
PLAIN_USER = re.compile(r"[a-z_][a-z0-9_-]{0,31}")


@click.command("install-units")
@click.option(
    "--prefix",
    metavar="DIR",
    type=click.Path(path_type=Path),
    default=Path("/etc/systemd/system"),
    show_default=True,
    help="Where the units go.",
)
@click.option(
    "--config-directory",
    metavar="DIR",
    type=click.Path(path_type=Path),
    default=Path("/etc/pdengine"),
    show_default=True,
    help="Where pdengine.toml and the environment files are. Examples are written if there are none.",
)
@click.option("--user", default=USER, show_default=True, help="The user that the services run as.")
@click.option(
    "--exec",
    "program",
    metavar="PATH",
    help="The pdengine program that they start; by default the one that runs now.",
)
@click.option("--dry-run", is_flag=True, help="Print the files instead.")
def install_units(
    prefix: Path, config_directory: Path, user: str, program: str | None, dry_run: bool
) -> None:
    """Write systemd units for a router, HTTP servers and workers, and an example of their configuration.

    Units that are there are replaced: changes of your own belong into drop-ins (systemctl edit). Files of
    the configuration are never replaced.
    """
    if not PLAIN_USER.fullmatch(user):
        raise click.UsageError(f"--user {user!r} is not the name of a user")
    for name, directory in (("--prefix", prefix), ("--config-directory", config_directory)):
        if not PLAIN_PATH.fullmatch(str(directory)):
            raise click.UsageError(f"{name} {str(directory)!r} must be an absolute path without blanks")
    is_this_one = program is None
    program = running_program() if program is None else program
    *python, _ = command = command_of(program)
    if python or is_this_one:
        _warn_if_hidden(program, sys.base_prefix, sys.prefix)
    else:
        _warn_if_hidden(program)
    if python and not PLAIN_PATH.fullmatch(python[0]):
        raise click.UsageError(
            f"{python[0]!r}, the Python that would run {program}, must be an absolute path without blanks"
        )
    if not PLAIN_PATH.fullmatch(program) or not os.access(program, os.X_OK) or Path(program).is_dir():
        raise click.UsageError(f"--exec {program} must be an absolute path, without blanks, of a program")
    replacements = {PROGRAM: " ".join(command), f"User={USER}\n": f"User={user}\n"}
    if str(config_directory) != "/etc/pdengine":
        replacements["/etc/pdengine"] = str(config_directory)
    texts = {name: _replaced(text, replacements) for name, text in packaged_files().items()}
    examples = {config_directory / name: texts.pop(name) for name in ("pdengine.toml", "worker.env")}
    units = {prefix / name: text for name, text in texts.items()}
    if dry_run:
        for path, text in (units | examples).items():
            click.echo(f"# --- {path}\n{text}")
        return
    try:
        for path, text in units.items():
            _write(path, text)
        new = {path: text for path, text in examples.items() if not path.exists()}
        for path, text in new.items():
            _write(path, text)
    except OSError as error:
        raise click.ClickException(f"{error.filename}: {error.strerror}") from error
    for path in [*units, *new]:
        click.echo(f"wrote {path}")
    click.echo(_what_next(user, config_directory))


def packaged_files() -> dict[str, str]:
    """The units, and the examples of their configuration, as they are in the package."""
    folder = files(UNITS) / "systemd"
    found = sorted((file.name, file.read_text()) for file in folder.iterdir() if file.is_file())
    return dict(found)


def running_program() -> str:
    """The absolute path of the pdengine that runs now. Raises click.UsageError if it cannot be told."""
    beside = Path(sys.executable).with_name("pdengine")  # this is python -m pdengine.cli
    for path in (os.path.abspath(sys.argv[0]), beside, shutil.which("pdengine")):
        if path and Path(path).name != "__main__.py" and os.access(path, os.X_OK) and Path(path).is_file():
            return str(path)
    raise click.UsageError("which program runs now cannot be told: give its path by --exec")


def command_of(program: str) -> list[str]:
    """What starts the program. One file is run by the Python that runs now, which has torch; the first one in
    a service's PATH may not."""
    return [os.path.abspath(sys.executable), program] if is_zipfile(program) else [program]


def _warn_if_hidden(program: str, *prefixes: str) -> None:
    """prefixes: of the Python that runs it."""
    for path in dict.fromkeys((program, str(Path(program).resolve()), *prefixes)):
        if any(path.startswith(f"{place}/") for place in (*HIDDEN, *PRIVATE)):
            click.echo(
                f"warning: the services will not find {path}, because the units hide such places from them "
                "(ProtectHome, PrivateTmp): install pdengine elsewhere, for instance in /opt",
                err=True,
            )


def _replaced(text: str, replacements: dict[str, str]) -> str:
    for old, new in replacements.items():
        text = text.replace(old, new)
    return text


def _write(path: Path, text: str) -> None:
    """All of it or nothing, also if the disk is full."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.new")
    unfinished.write_text(text)
    unfinished.chmod(0o644)
    unfinished.replace(path)


def _what_next(user: str, config_directory: Path) -> str:
    steps = [
        f"$EDITOR {config_directory}/pdengine.toml",
        f"cp {config_directory}/worker.env {config_directory}/prefill-0.env   # what differs, per worker",
        "systemctl daemon-reload",
        "systemctl enable --now pdengine-router pdengine-prefill@0 pdengine-decode@0 pdengine.target",
        "systemctl status 'pdengine*'",
    ]
    try:
        pwd.getpwnam(user)
    except KeyError:
        steps.insert(0, f"useradd --system --home-dir /var/lib/pdengine --shell /usr/sbin/nologin {user}")
    return "\n".join(["", "what is left to do:", *(f"  {step}" for step in steps)])
