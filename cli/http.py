"""`pdengine http`, and what `pdengine router --http` shares with it."""

import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path
from threading import Event

import click

from pdengine.cli.garbage import spare_what_is_loaded
from pdengine.cli.logs import LogFormat, LogLevel, log_options, log_to_stderr
from pdengine.cli.options import (
    Function,
    errors_in_one_line,
    keys_option,
    model_options,
    option,
    seconds_option,
)
from pdengine.client.async_client import DEFAULT_ADDRESS
from pdengine.models.hub import resolve_model
from pdengine.router.http.config import (
    ApiKeysError,
    HttpConfig,
    default_model_name,
    read_api_keys,
)
from pdengine.transport.addresses import check_exposure, split_host_port
from pdengine.transport.keys import PeerKeys, client_keys
from pdengine.transport.service_manager import POLL_SECONDS, ServiceManager, Watchdog
from pdengine.transport.sockets import raise_file_limit

logger = logging.getLogger(__name__)


def http_address_option(*, default: str | None) -> Callable[[Function], Function]:
    """default: the address, or None for not at all."""
    return option(
        "--http",
        "http_address",
        metavar="HOST:PORT",
        default=default,
        help="Serve OpenAI's API over HTTP here; PORT alone is on loopback.",
    )


def http_options(*, default: str | None) -> Callable[[Function], Function]:
    """How HTTP is served. default: see `http_address_option`."""
    options = [
        http_address_option(default=default),
        option("--served-model-name", help="What requests call the model; by default its directory's name."),
        option(
            "--api-keys",
            metavar="FILE",
            type=click.Path(path_type=Path),
            help="Keys, one per line, of which HTTP requests need one.",
        ),
        option(
            "--insecure",
            is_flag=True,
            help="Serve other hosts without keys: only on a network that is trusted.",
        ),
        option(
            "--max-in-flight",
            type=click.IntRange(1),
            default=1024,
            help="Answers over HTTP (n to each prompt) that are written at once; more are told to come back.",
        ),
    ]

    def decorate(function: Function) -> Function:
        for add in reversed(options):
            function = add(function)
        return function

    return decorate


def http_config(
    directory: Path,
    *,
    http_address: str,
    router_addresses: tuple[str, ...],
    served_model_name: str | None,
    api_keys: Path | None,
    insecure: bool,
    max_in_flight: int,
    drain_seconds: float,
    router_keys: PeerKeys | None = None,
) -> HttpConfig:
    """What the options stand for. Raises AddressError, or a click.ClickException for a file of no keys."""
    try:
        keys = read_api_keys(api_keys) if api_keys is not None else ()
    except ApiKeysError as error:
        raise click.ClickException(str(error)) from error
    host, _ = split_host_port("HTTP address", http_address)
    check_exposure(
        f"HTTP address {http_address}",
        host,
        has_keys=bool(keys),
        insecure=insecure,
        keys_option="--api-keys",
    )
    return HttpConfig(
        address=http_address,
        router_addresses=router_addresses,
        model_directory=directory,
        served_model_name=served_model_name or default_model_name(directory),
        api_keys=keys,
        max_in_flight=max_in_flight,
        drain_seconds=drain_seconds,
        router_keys=router_keys,
    )


def address_list(text: str) -> tuple[str, ...]:
    """Addresses between commas, without blanks and empty parts. Raises BadParameter if there is none."""
    addresses = tuple(part.strip() for part in text.split(",") if part.strip())
    if not addresses:
        raise click.BadParameter("there is no address in it", param_hint="--router")
    return addresses


@click.command()
@model_options
@log_options
@keys_option
@option(
    "--router",
    "clients_address",
    envvar="PDENGINE_HTTP_ROUTER",  # PDENGINE_ROUTER is where its workers connect
    metavar="ADDRESS[,ADDRESS]...",
    default=DEFAULT_ADDRESS,
    help="Where the router takes clients, or several routers, of which each request gets one.",
)
@http_options(default="127.0.0.1:8000")
@seconds_option(
    "--drain-seconds", at_least=0, default=30.0, help="What SIGTERM leaves to requests in flight."
)
def http(
    model: str,
    revision: str | None,
    clients_address: str,
    http_address: str,
    served_model_name: str | None,
    api_keys: Path | None,
    insecure: bool,
    max_in_flight: int,
    drain_seconds: float,
    config: Path | None,
    log_format: LogFormat,
    log_level: LogLevel,
    keys: str | None,
) -> None:
    """An HTTP server in a process of its own; a router can have several."""
    from pdengine.router.http.server import HttpServer  # loads what only HTTP needs

    service = ServiceManager.from_environment(os.environ)
    log_to_stderr("http", log_format, log_level)
    raise_file_limit()
    stop = Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    with errors_in_one_line():
        settings = http_config(
            resolve_model(model, revision=revision or None),
            http_address=http_address,
            router_addresses=address_list(clients_address),
            served_model_name=served_model_name,
            api_keys=api_keys,
            insecure=insecure,
            max_in_flight=max_in_flight,
            drain_seconds=drain_seconds,
            router_keys=client_keys(keys or None),
        )
        with HttpServer(settings, on_failure=stop.set) as server:
            logger.info("serving %s over HTTP on %s", settings.served_model_name, server.url)
            spare_what_is_loaded()
            service.ready(f"HTTP on {server.url}")
            watchdog = Watchdog(service)
            while not stop.wait(POLL_SECONDS if service.listens else None):
                watchdog.look(server.loop_age())
            service.stopping()
        if server.error is not None:
            raise SystemExit(1)
