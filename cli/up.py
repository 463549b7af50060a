"""`pdengine up`: a whole cluster on this machine."""

import signal
from pathlib import Path
from threading import Event
from typing import Any

import click

from pdengine.cli.cluster import Cluster
from pdengine.cli.options import errors_in_one_line, model_option, worker_options
from pdengine.transport.messages import Role


@click.command()
@model_option
@click.option("--prefill", type=click.IntRange(0), default=1, show_default=True, help="Prefill workers.")
@click.option("--decode", type=click.IntRange(0), default=1, show_default=True, help="Decode workers.")
@click.option("--unified", type=click.IntRange(0), default=0, show_default=True, help="Unified workers.")
@click.option(
    "--client-address", default="tcp://127.0.0.1:5555", show_default=True, help="Where clients connect."
)
@worker_options
def up(
    model_directory: Path, prefill: int, decode: int, unified: int, client_address: str, **options: Any
) -> None:
    """A router and its workers on this machine, until Ctrl-C."""
    counts: dict[Role, int] = {"prefill": prefill, "decode": decode, "unified": unified}
    roles = [role for role, count in counts.items() for _ in range(count)]
    stop = Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    with (
        errors_in_one_line(),
        Cluster(
            model_directory,
            roles=roles,
            client_address=client_address,
            worker_arguments=worker_arguments(options),
        ) as cluster,
    ):
        if cluster.wait_ready(stop) is None:
            return
        workers = ", ".join(f"{count} {role}" for role, count in counts.items() if count)
        click.echo(f"ready: {workers} behind {cluster.client_address}")
        click.echo(f'try:   pdengine generate "Once upon a time" --router {cluster.client_address}')
        click.echo("stop:  Ctrl-C")
        cluster.supervise(stop)
    click.echo("stopped", err=True)


def worker_arguments(options: dict[str, Any]) -> list[str]:
    """The options of `worker_options` as arguments of a worker's command."""
    arguments: list[str] = []
    for name, value in options.items():
        if value is not None:
            arguments += [f"--{name.replace('_', '-')}", str(value)]
    return arguments
