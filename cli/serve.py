"""`pdengine router` and the three worker roles."""

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import Any, get_args

import click
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from pdengine.cli.garbage import spare_what_is_loaded
from pdengine.cli.http import http_config, http_options
from pdengine.cli.logs import LogFormat, LogLevel, log_options, log_to_stderr
from pdengine.cli.options import (
    client_address_option,
    errors_in_one_line,
    keys_option,
    local_prefill_option,
    model_options,
    option,
    seconds_option,
    worker_options,
)
from pdengine.engine.cpu_threads import limit_spinning
from pdengine.engine.memory import available_memory, memory_bytes
from pdengine.engine.worker_config import StartupError, WorkerConfig
from pdengine.models.hub import resolve_model
from pdengine.router.config import OnFailure, RouterConfig, TransferMode
from pdengine.router.http.config import address_to_connect
from pdengine.router.router import Router
from pdengine.transport.addresses import AddressError
from pdengine.transport.messages import Role
from pdengine.transport.metrics_server import MetricsServer
from pdengine.transport.service_manager import ServiceManager, serving
from pdengine.transport.sockets import raise_file_limit

LINE_SECONDS = 5.0
HTTP_DRAIN_SECONDS = 5.0  # the router ends all requests before; they only have to hear of it

logger = logging.getLogger(__name__)


@click.command()
@model_options
@log_options
@keys_option
@client_address_option
@option("--worker-address", metavar="ADDRESS", default="tcp://127.0.0.1:5556", help="Where workers connect.")
@seconds_option(
    "--heartbeat-seconds", at_least=0.05, default=1.0, help="How often workers are asked to report."
)
@seconds_option(
    "--silence-seconds",
    at_least=1,
    default=5.0,
    help="A worker that is not heard of for so long is given up.",
)
@option(
    "--on-failure",
    type=click.Choice(get_args(OnFailure)),
    default="recompute",
    help="Of a request's worker: compute it anew on another one, and go on with the answer; or fail it.",
)
@option(
    "--max-attempts",
    type=click.IntRange(1),
    default=3,
    help="Workers that a request is given to before it fails.",
)
@option(
    "--transfer",
    type=click.Choice(get_args(TransferMode)),
    default="early-pull",
    help="Pull a KV cache while its prompt is computed, where a decode worker has room, or when it is done; "
    "or push it, for comparison, on a trusted network.",
)
@local_prefill_option
@option(
    "--metrics-address",
    "router_metrics_address",
    envvar="PDENGINE_ROUTER_METRICS_ADDRESS",  # the name without ROUTER is for workers, also those of up
    metavar="HOST:PORT",
    help="Serve the router's /metrics, /live and /ready over HTTP here; PORT alone is on loopback.",
)
@http_options(default=None)
def router(
    model: str,
    revision: str | None,
    client_address: str,
    worker_address: str,
    heartbeat_seconds: float,
    silence_seconds: float,
    on_failure: OnFailure,
    max_attempts: int,
    transfer: TransferMode,
    local_prefill_tokens: int,
    router_metrics_address: str | None,
    http_address: str | None,
    config: Path | None,
    log_format: LogFormat,
    log_level: LogLevel,
    keys: str | None,
    insecure: bool,
    **http: Any,
) -> None:
    """The front door: takes requests and gives them to workers."""
    service = ServiceManager.from_environment(os.environ)

    async def serve(directory: Path) -> None:
        settings = RouterConfig(
            directory,
            client_address,
            worker_address,
            heartbeat_seconds=heartbeat_seconds,
            silence_seconds=silence_seconds,
            on_failure=on_failure,
            max_attempts=max_attempts,
            transfer=transfer,
            local_prefill_tokens=local_prefill_tokens,
            keys=Path(keys) if keys else None,
            insecure=insecure,
        )
        server = Router(settings)
        if router_metrics_address:
            try:
                url = MetricsServer(router_metrics_address, server.metrics).url
            except AddressError:
                server.close()
                raise
            logger.info("metrics on %s/metrics", url)
        click.echo(
            f"listening for clients on {server.client_address}, for workers on {server.worker_address}"
        )
        running = asyncio.create_task(server.run())

        def stop() -> None:
            service.stopping()
            running.cancel()

        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop)
        if http_address:
            await _serve_http(
                directory, http_address, server, running, service, {**http, "insecure": insecure}
            )
        else:
            spare_what_is_loaded()
            async with serving(service, status=lambda: f"clients on {server.client_address}"):
                await asyncio.wait([running])
        if not running.cancelled():
            running.result()

    if not silence_seconds > heartbeat_seconds:
        raise click.UsageError(
            f"--silence-seconds is {silence_seconds:g}, it must be more than --heartbeat-seconds, "
            f"which is {heartbeat_seconds:g}"
        )
    log_to_stderr("router", log_format, log_level)
    raise_file_limit()
    with errors_in_one_line():
        # Outside the loop, where Ctrl-C ends a download at once.
        asyncio.run(serve(resolve_model(model, revision=revision or None)))


async def _serve_http(
    directory: Path,
    http_address: str,
    router: Router,
    running: asyncio.Task[None],
    service: ServiceManager,
    options: dict[str, Any],
) -> None:
    """Serve HTTP until the router has ended; if that fails, end the router. options: of http_config."""
    from pdengine.router.http.server import HttpServer  # loads what only HTTP needs

    loop = asyncio.get_running_loop()

    def end_router() -> None:
        loop.call_soon_threadsafe(running.cancel)

    await asyncio.sleep(
        0
    )  # a task that is cancelled before it has begun would leave the router's sockets open
    try:
        config = http_config(
            directory,
            http_address=http_address,
            router_addresses=(address_to_connect(router.client_address),),
            drain_seconds=HTTP_DRAIN_SECONDS,
            router_keys=router.client_keys,
            **options,
        )
        server = HttpServer(config, on_failure=end_router)
    except BaseException:
        running.cancel()
        await asyncio.wait([running])
        raise
    try:
        await asyncio.to_thread(server.start)
        spare_what_is_loaded()
        logger.info("serving %s over HTTP on %s", config.served_model_name, server.url)
        status = f"clients on {router.client_address}, HTTP on {server.url}"
        async with serving(service, status=lambda: status, loop_age=server.loop_age):
            await asyncio.wait([running])
    finally:
        running.cancel()
        await asyncio.wait([running])
        await asyncio.to_thread(server.close)
    if server.error is not None:
        raise SystemExit(1)


def worker_config(
    role: Role,
    *,
    model: str,
    revision: str | None,
    device: str,
    kv_memory: str | None,
    metrics_address: str | None,
    config: Path | None,
    log_format: LogFormat,
    log_level: LogLevel,
    keys: str | None,
    **options: Any,
) -> WorkerConfig:
    """The configuration that the options of a worker's command stand for.

    Raises CheckpointError if there is no such model, StartupError or AddressError for options that do not go.
    """
    if kv_memory is not None and kv_memory.endswith("%") and device != "cpu":
        raise StartupError(
            f"--kv-memory {kv_memory} is a share of the host's memory; on device {device} give a size, or a "
            f"share by --gpu-memory-utilization"
        )
    return WorkerConfig(
        role=role,
        model_directory=resolve_model(model, revision=revision or None),
        device=device,
        kv_memory=None if kv_memory is None else memory_bytes(kv_memory, available_memory()),
        metrics_address=metrics_address or None,
        keys=Path(keys) if keys else None,
        **options,
    )


def _worker_command(role: Role, help_text: str) -> click.Command:
    @click.command(name=role, help=help_text)
    @model_options
    @log_options
    @keys_option
    @option("--router", "router_address", required=True, metavar="ADDRESS", help="tcp://HOST:5556")
    @option(
        "--bind",
        "bind_address",
        metavar="ADDRESS",
        default="tcp://127.0.0.1:0",
        help="Where other workers reach this one; port 0 is any free one.",
    )
    @option(
        "--advertise",
        "advertise_address",
        metavar="ADDRESS",
        help="What other workers are told instead of --bind. Its interface carries the KV cache.",
    )
    @option(
        "--insecure",
        is_flag=True,
        help="Serve workers on other hosts without keys: only on a network that is trusted.",
    )
    @worker_options
    def command(**options: Any) -> None:
        service = ServiceManager.from_environment(os.environ)
        log_to_stderr(f"{role}[{os.getpid()}]", options["log_format"], options["log_level"])
        with errors_in_one_line():
            config = worker_config(role, **options)
            raise_file_limit()
            limit_spinning(os.environ)
            from pdengine.engine.start_worker import run_worker  # loads torch, which takes seconds

            with _weights_progress() as progress:
                run_worker(config, progress=progress, service=service)

    return command


prefill = _worker_command("prefill", "A worker that computes prompts and hands their KV cache on.")
decode = _worker_command("decode", "A worker that pulls the KV cache of prompts and writes the answers.")
unified = _worker_command("unified", "A worker that does both for each of its requests.")


@contextmanager
def _weights_progress() -> Iterator[Callable[[int, int], None]]:
    """A bar on the terminal of this process, a line now and then elsewhere; gives f(done, total) in bytes."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True))
    console = Console(stderr=True)
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not _has_terminal()) as bar:
        task = bar.add_task("loading weights", total=None)
        next_line_at = monotonic() + LINE_SECONDS

        def progress(done: int, total: int) -> None:
            nonlocal next_line_at
            bar.update(task, completed=done, total=total)
            if done == total:
                bar.stop()
                logger.info("loaded %.1f MiB of weights", total / 2**20)
            elif bar.disable and monotonic() > next_line_at:
                next_line_at = monotonic() + LINE_SECONDS
                logger.info("loading weights: %.0f of %.0f MiB", done / 2**20, total / 2**20)

        yield progress


def _has_terminal() -> bool:
    """Whether stderr is a terminal that belongs to this process: those of `pdengine up` share its own."""
    try:
        return os.tcgetpgrp(sys.stderr.fileno()) == os.getpgrp()
    except OSError:
        return False
