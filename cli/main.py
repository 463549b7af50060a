"""`pdengine`: one program for every role."""

import click

from pdengine.cli.bench import bench
from pdengine.cli.config import config
from pdengine.cli.demo import demo
from pdengine.cli.doctor import doctor
from pdengine.cli.generate import generate
from pdengine.cli.http import http
from pdengine.cli.install_units import install_units
from pdengine.cli.keygen import keygen
from pdengine.cli.serve import decode, prefill, router, unified
from pdengine.cli.up import up


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="pdengine")
def main() -> None:
    """LLM inference with prefill and decode in separate processes."""


for command in (
    router,
    http,
    prefill,
    decode,
    unified,
    up,
    generate,
    demo,
    config,
    keygen,
    doctor,
    install_units,
    bench,
):
    main.add_command(command)
