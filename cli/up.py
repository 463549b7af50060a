"""`pdengine up`: a whole cluster on this machine."""

import signal
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from threading import Event
from typing import Any

import click

from pdengine.cli.cluster import LOOPBACK, Cluster
from pdengine.cli.config_file import Options, option_tables
from pdengine.cli.http import http_address_option
from pdengine.cli.logs import log_options
from pdengine.cli.options import (
    Function,
    client_address_option,
    errors_in_one_line,
    keys_option,
    local_prefill_option,
    model_options,
    option,
    worker_options,
)
from pdengine.cli.serve import worker_config
from pdengine.engine.memory import available_memory, check_memory, plan_memory
from pdengine.engine.worker_config import WorkerConfig
from pdengine.models.config import load_config
from pdengine.models.hub import resolve_model
from pdengine.transport.addresses import join_host_port, split_host_port
from pdengine.transport.messages import Role


def _count_option(role: Role, default: int) -> Callable[[Function], Function]:
    # The names without UP would be taken for what a worker of that role is told.
    envvar, help_text = f"PDENGINE_UP_{role.upper()}", f"{role.capitalize()} workers."
    return option(f"--{role}", envvar=envvar, type=click.IntRange(0), default=default, help=help_text)


@click.command()
@model_options
@log_options
@keys_option
@_count_option("prefill", 1)
@_count_option("decode", 1)
@_count_option("unified", 0)
@client_address_option
@http_address_option(default=None)
@local_prefill_option
@option(
    "--insecure",
    is_flag=True,
    help="Serve clients and HTTP on other hosts without keys: only on a network that is trusted.",
)
@worker_options
@click.pass_context
def up(
    ctx: click.Context,
    /,
    model: str,
    revision: str | None,
    client_address: str,
    http_address: str | None,
    local_prefill_tokens: int,
    keys: str | None,
    **_options: Any,
) -> None:
    """A router and its workers on this machine, until Ctrl-C.

    The options of workers hold for all of them. What is not given here they take from the environment and the
    file, as if started by hand.
    """
    counts = worker_counts(ctx)
    log_arguments = _given(ctx, {"log-format": "log_format", "log-level": "log_level"})
    with errors_in_one_line():
        directory = resolve_model(model, revision=revision or None)
        configs = _configs(ctx, directory, counts)
        cluster = Cluster(
            directory,
            roles=[config.role for config in configs],
            client_address=client_address,
            config=ctx.params["config"],
            log_arguments=log_arguments,
            # If they are not here, the router looks into the environment and the file itself.
            router_arguments=[
                *("--local-prefill-tokens", str(local_prefill_tokens)),
                *_given(ctx, {"http": "http_address", "insecure": "insecure"}),
            ],
            worker_arguments=_planned_arguments(ctx, configs),
            metrics_addresses=metrics_addresses(configs),
            keys=Path(keys) if keys else None,
        )
        stop = Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop.set())
        with cluster:
            if cluster.wait_ready(stop) is None:
                return
            workers = ", ".join(f"{count} {role}" for role, count in counts.items() if count)
            click.echo(f"ready: {workers} behind {cluster.client_address}")
            with_keys = f" --keys {keys}" if keys else ""
            click.echo(
                f'try:   pdengine generate "Once upon a time" --router {cluster.client_address}{with_keys}'
            )
            if http_address:
                url = join_host_port(*split_host_port("HTTP address", http_address))
                click.echo(f"HTTP:  OpenAI's API on http://{url}/v1")
            click.echo("stop:  Ctrl-C")
            cluster.supervise(stop)
    click.echo("stopped", err=True)


def worker_counts(ctx: click.Context) -> dict[Role, int]:
    """How many workers of each role this context of `up` asks for."""
    roles: tuple[Role, ...] = ("prefill", "decode", "unified")
    return {role: ctx.params[role] for role in roles}


def worker_arguments(ctx: click.Context) -> list[str]:
    """The options of workers on the command line of `up`, as arguments of a worker's command."""
    return _given(ctx, {key: option.name or "" for key, option in options_of_workers(ctx).items()})


def options_of_workers(ctx: click.Context) -> Options:
    """Those of `up` that are for its workers: of an option that the router has, too, it is the router's."""
    tables = option_tables(ctx.find_root().command)
    of_router = {option.name for option in tables["router"].values()}
    return {key: option for key, option in tables["worker"].items() if option.name not in of_router}


def _given(ctx: click.Context, options: Mapping[str, str]) -> list[str]:
    """Those that are on the command line, as arguments of another one. options: names of their parameters."""
    arguments = []
    for key, name in options.items():
        if ctx.get_parameter_source(name) == click.core.ParameterSource.COMMANDLINE:
            value = ctx.params[name]
            arguments += [f"--{key}"] if value is True else [f"--{key}", str(value)]
    return arguments


def _configs(ctx: click.Context, directory: Path, counts: dict[Role, int]) -> list[WorkerConfig]:
    """What each worker will make of its arguments, the environment and the file."""
    root, configs = ctx.find_root(), []
    assert isinstance(root.command, click.Group)
    for role, count in counts.items():
        if count:
            arguments = [*Cluster.arguments_of(directory, ctx.params["config"]), "--router", LOOPBACK]
            arguments += worker_arguments(ctx)
            with root.command.commands[role].make_context(role, arguments, parent=root) as worker:
                configs += [worker_config(role, **worker.params)] * count
    return configs


def _planned_arguments(ctx: click.Context, configs: Sequence[WorkerConfig]) -> dict[Role, list[str]]:
    """The arguments of the workers of each role, with their KV memory in bytes.

    A share of the host's memory is turned into bytes once, because what is available changes while other
    workers load. Raises StartupError if the workers do not fit into it together.
    """
    available = available_memory()
    on_host = [config for config in configs if not config.is_on_gpu]
    if on_host:
        model = load_config(on_host[0].model_directory)
        check_memory([plan_memory(config, model) for config in on_host], available)
    arguments = {}
    for config in configs:
        arguments[config.role] = worker_arguments(ctx)
        if config.kv_memory is not None:
            arguments[config.role] += ["--kv-memory", f"{config.kv_memory}B"]
        if config.is_on_gpu:
            arguments[config.role] += ["--gpu-memory-utilization", str(gpu_share(config, configs))]
    return arguments


def gpu_share(config: WorkerConfig, configs: Sequence[WorkerConfig]) -> float:
    """The share of its GPU for this worker: what it would take alone, unless those on that GPU ask for more
    than the whole; then that is divided by their number."""
    device = config.device.removesuffix(":0")
    neighbours = [other for other in configs if other.device.removesuffix(":0") == device]
    asked = sum(other.gpu_memory_utilization for other in neighbours)
    share = config.gpu_memory_utilization
    return share if asked <= 1 else share / len(neighbours)


def metrics_addresses(configs: Iterable[WorkerConfig]) -> list[str]:
    """One per worker, empty for none: where several are told the same, each takes the next port."""
    addresses: list[str] = []
    taken: Counter[tuple[str, int]] = Counter()
    for config in configs:
        if config.metrics_address is None:
            addresses.append("")
        else:
            host, port = split_host_port("metrics address", config.metrics_address)
            addresses.append(join_host_port(host, port + taken[host, port] if port else 0))
            taken[host, port] += 1
    return addresses
