"""Options that several commands share, and how errors of start-up and of requests reach the user."""

import functools
import logging
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click

from pdengine.cli.cluster import ChildDied
from pdengine.client import GenerateError
from pdengine.engine.worker_config import StartupError
from pdengine.models.chat_template import ChatTemplateError
from pdengine.models.checkpoint import CheckpointError
from pdengine.transport.sockets import AddressError
from pdengine.transport.transfer import TransferError

EXPECTED_ERRORS = (
    AddressError,
    ChatTemplateError,
    CheckpointError,
    GenerateError,
    StartupError,
    TransferError,
)
UNITS = {"": 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}

Function = TypeVar("Function", bound=Callable[..., Any])


class ByteSize(click.ParamType[int]):
    """`512MiB`, `4GiB`, `1.5TiB`, or a plain number of bytes."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]iB|B|)", value)
        if match is None:
            self.fail(f"{value!r} is not a size such as 512MiB or 4GiB", param, ctx)
        return int(float(match[1]) * UNITS[match[2]])


model_option = click.option(
    "--model",
    "model_directory",
    required=True,
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Checkpoint in the Hugging Face format.",
)


def worker_options(function: Function) -> Function:
    """What a worker can be told besides its role, its model and its router."""
    options = [
        click.option("--device", default="cpu", show_default=True, help="cpu; cuda:N is not supported yet."),
        click.option("--dtype", help="float32, bfloat16 or float16; by default the checkpoint's."),
        click.option(
            "--kv-memory", type=ByteSize(), default="4GiB", show_default=True, help="Size of the KV cache."
        ),
        click.option("--block-size", type=int, default=16, show_default=True, help="Tokens per KV block."),
        click.option(
            "--max-batch-tokens", type=int, default=2048, show_default=True, help="Tokens per engine step."
        ),
        click.option(
            "--max-requests", type=int, default=64, show_default=True, help="Requests that run at once."
        ),
    ]
    return functools.reduce(lambda decorated, option: option(decorated), reversed(options), function)


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Errors that the user can do something about end the command with their sentence, not a traceback."""
    try:
        yield
    except ChildDied as error:
        if error.has_said_why:
            raise SystemExit(1) from error
        raise click.ClickException(str(error)) from error
    except EXPECTED_ERRORS as error:
        raise click.ClickException(str(error)) from error


def log_to_stderr(name: str) -> None:
    """Log lines of this process carry `name`, so that several can share a terminal."""
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.INFO,
        format=f"%(asctime)s %(levelname)-7s {name}: %(message)s",
        datefmt="%H:%M:%S",
    )
