"""Options that several commands share, and how errors of start-up and of requests reach the user."""

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, get_args

import click

from pdengine.cli.cluster import ChildDied
from pdengine.cli.config_file import ENVIRONMENT_PREFIX, config_option
from pdengine.client import GenerateError
from pdengine.engine.memory import memory_bytes
from pdengine.engine.worker_config import GPU_MEMORY_UTILIZATION, StartupError
from pdengine.models.chat_template import ChatTemplateError
from pdengine.models.checkpoint import CheckpointError
from pdengine.transport.addresses import AddressError
from pdengine.transport.keys import KeysError
from pdengine.transport.transfer import SameHost, TransferError

EXPECTED_ERRORS = (
    AddressError,
    ChatTemplateError,
    CheckpointError,
    GenerateError,
    KeysError,
    StartupError,
    TransferError,
)

Function = TypeVar("Function", bound=Callable[..., Any])


def option(
    flag: str, *names: str, envvar: str | None = None, **settings: Any
) -> Callable[[Function], Function]:
    """A `click.option` that also reads PDENGINE_ and its name from the environment, or `envvar`."""
    envvar = envvar or ENVIRONMENT_PREFIX + flag.removeprefix("--").replace("-", "_").upper()
    return click.option(flag, *names, envvar=envvar, show_envvar=True, show_default=True, **settings)


def seconds_option(flag: str, *, at_least: float, **settings: Any) -> Callable[[Function], Function]:
    """An `option` that takes a duration."""
    return option(flag, metavar="SECONDS", type=click.FloatRange(at_least), **settings)


def memory_size(text: str) -> str:
    """A type of click's for sizes and shares of memory; they stay as written until the share is known."""
    try:
        memory_bytes(text, available=0)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error
    return text


def model_options(function: Function) -> Function:
    """--config, --model and --revision."""
    options = [
        config_option,
        option(
            "--model",
            required=True,
            metavar="NAME_OR_DIR",
            help="Checkpoint in the Hugging Face format: a directory, or the id of a model on the hub.",
        ),
        option("--revision", help="Branch, tag or commit of a model on the hub."),
    ]
    return _decorate(function, options)


keys_option = option(
    "--keys",
    metavar="FILE",
    help="The keys of this process, as pdengine keygen makes them, or the directory that they are in.",
)


client_address_option = option(
    "--client-address", metavar="ADDRESS", default="tcp://127.0.0.1:5555", help="Where clients connect."
)


local_prefill_option = option(
    "--local-prefill-tokens",
    type=click.IntRange(0),
    default=256,
    help="A decode worker that has all but so many tokens of a prompt in its prefix cache computes the rest "
    "itself; 0: never. The default is where that began to delay 4 other answers there by more than it saved "
    "the request, measured with a prefill worker that lacked 1000 tokens of the prompt besides.",
)


def worker_options(function: Function) -> Function:
    """What a worker can be told besides its role, its model and its addresses."""
    options = [
        option("--device", default="cpu", help="cpu, cuda (the first GPU) or cuda:N."),
        option("--dtype", help="float32, bfloat16 or float16; by default the checkpoint's."),
        option(
            "--kv-memory",
            metavar="SIZE",
            type=memory_size,
            help="KV cache of one worker: a size, or on a CPU a share such as 40% of the available memory. "
            "By default 4GiB on a CPU, and on a GPU what --gpu-memory-utilization leaves.",
        ),
        option(
            "--gpu-memory-utilization",
            type=click.FloatRange(0, 1, min_open=True),
            default=GPU_MEMORY_UTILIZATION,
            help="Share of the GPU's memory for one worker: its weights, its steps and its KV cache.",
        ),
        option("--block-size", type=int, default=16, help="Tokens per KV block."),
        option("--max-batch-tokens", type=int, default=2048, help="Tokens per engine step."),
        option("--max-requests", type=int, default=64, help="Answers that are written at once."),
        option(
            "--max-step-ms",
            metavar="MS",
            type=click.FloatRange(0, min_open=True),
            help="Compute prompts in chunks so small that an engine step hardly takes longer, so that the "
            "tokens of other answers come evenly. By default only --max-batch-tokens bounds a step.",
        ),
        option(
            "--threads",
            type=click.IntRange(1),
            help="Threads that compute on a CPU. By default OMP_NUM_THREADS, or else one for each core that "
            "the process may use; up divides the cores among its workers.",
        ),
        option(
            "--same-host",
            type=click.Choice(get_args(SameHost)),
            default="mapping",
            help="How the KV cache moves between workers on one host: mapped memory, or UCX.",
        ),
        option(
            "--metrics-address",
            metavar="HOST:PORT",
            help="Serve /metrics, /live and /ready over HTTP here; PORT alone is on loopback.",
        ),
        seconds_option(
            "--lease-seconds",
            at_least=1,
            default=30.0,
            help="How long the KV cache of a prompt is kept for a decode worker that is not heard of.",
        ),
        seconds_option(
            "--pull-seconds",
            at_least=0.1,
            default=30.0,
            help="A pull of a KV cache that takes longer is given up.",
        ),
        seconds_option(
            "--drain-seconds", at_least=0, default=30.0, help="What SIGTERM leaves to requests in flight."
        ),
    ]
    return _decorate(function, options)


def _decorate(function: Function, options: Sequence[Callable[[Function], Function]]) -> Function:
    return functools.reduce(lambda decorated, add: add(decorated), reversed(options), function)


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
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        advice = "pip install 'torch>=2.11' there, or run pdengine with a Python that has it"
        raise click.ClickException(f"{sys.executable} has no torch: {advice}") from error
