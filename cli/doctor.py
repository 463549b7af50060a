"""`pdengine doctor`: whether this machine can serve, and what to do where it cannot."""

import json
from dataclasses import asdict

import click

from pdengine.cli.options import errors_in_one_line
from pdengine.engine.doctor import Finding, examine
from pdengine.transport.addresses import split_tcp_address

COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}
NAME_WIDTH = 13


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
@click.option("--strict", is_flag=True, help="Fail also if serving would be slower than this machine can.")
@click.option(
    "--advertise",
    metavar="ADDRESS",
    default="tcp://127.0.0.1:0",
    show_default=True,
    envvar="PDENGINE_ADVERTISE",
    show_envvar=True,
    help="What a worker on this machine would advertise.",
)
def doctor(as_json: bool, strict: bool, advertise: str) -> None:
    """Check whether this machine can serve; ends with status 1 if not."""
    with errors_in_one_line():
        host, _ = split_tcp_address(advertise)
    findings = []
    for finding in examine(host):
        findings.append(finding)
        if not as_json:
            click.echo(_line(finding))
    serves = all(finding.verdict != "fail" for finding in findings)
    is_slow = any(finding.is_slow for finding in findings)
    if as_json:
        report = {"serves": serves, "is_slow": is_slow, "findings": [asdict(f) for f in findings]}
        click.echo(json.dumps(report, indent=2))
    if not serves or (strict and is_slow):
        raise SystemExit(1)


def _line(finding: Finding) -> str:
    verdict = click.style(f"{finding.verdict:<4}", fg=COLOURS[finding.verdict])
    advice = f"; {finding.advice}" if finding.advice else ""
    return f"{finding.name:<{NAME_WIDTH}}  {verdict}  {finding.detail}{advice}"
