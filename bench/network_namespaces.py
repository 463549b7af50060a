"""Two hosts on one machine: network namespaces joined by a veth pair (network_namespaces(7), veth(4)).

Each has a /sys of its own that lists its own interfaces, from which UCX learns them.
"""

import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from pdengine.cli.parent_death import die_with_parent

INTERFACE = "eth0"
ADDRESSES = ("192.0.2.1", "192.0.2.2")  # reserved for documentation (RFC 5737): never a real host's
COMMAND_SECONDS = 10.0
# Prints a line once the namespaces are there, then keeps them until it is killed.
KEEP_NAMESPACES = "mount -t sysfs sysfs /sys && echo ready && exec sleep infinity"
# The kernel announces a new link up to a second late, and UCX takes no interface that is not running.
WAIT_FOR_LINK = f"until grep -q up /sys/class/net/{INTERFACE}/operstate; do sleep 0.01; done"
# Known to every kernel. BBR, the default of some, makes what is measured here vary by a factor of four.
CHOOSE_RENO = "echo reno > /proc/sys/net/ipv4/tcp_congestion_control"


class NamespacesUnavailable(RuntimeError):
    """This machine or user cannot make network namespaces; the message says what is missing."""


@dataclass(frozen=True)
class NetworkNamespace:
    """One of the two hosts. `address` belongs to `interface`, and loopback is up as well."""

    address: str
    process_id: int  # of the process that keeps it
    interface: str = INTERFACE

    def command(self, arguments: Sequence[str]) -> list[str]:
        """The command that runs `arguments` here. It becomes that program, so signals and waits reach it."""
        enter = ["nsenter", f"--target={self.process_id}", "--net", "--mount", "--"]
        return [*enter, "env", f"--chdir={os.getcwd()}", *arguments]


@contextmanager
def network_namespaces(*, rate: str | None = None) -> Iterator[tuple[NetworkNamespace, NetworkNamespace]]:
    """Two hosts with one link between them; `rate` limits both directions, in tc's words ("1gbit").

    They are gone when the block ends, or when this process does, however that happens; processes that still
    run in them are the caller's to end. Raises NamespacesUnavailable.
    """
    if os.geteuid() != 0:
        raise NamespacesUnavailable("network namespaces need root")
    with ExitStack() as stack:
        keepers = [stack.enter_context(_keeper()) for _ in ADDRESSES]
        first, second = hosts = [
            NetworkNamespace(address, keeper) for address, keeper in zip(ADDRESSES, keepers, strict=True)
        ]
        link = ["ip", "link", "add", INTERFACE, "type", "veth", "peer", "name", INTERFACE]
        _run(first.command([*link, "netns", str(second.process_id)]))
        for host in hosts:
            _run(host.command(["ip", "link", "set", "lo", "up"]))
            _run(host.command(["ip", "address", "add", f"{host.address}/24", "dev", INTERFACE]))
            _run(host.command(["ip", "link", "set", INTERFACE, "up"]))
            if rate is not None:
                # The burst must hold the largest segment that the interface takes at once (64 KiB).
                shaping = ["root", "tbf", "rate", rate, "burst", "256kb", "latency", "50ms"]
                _run(host.command(["tc", "qdisc", "add", "dev", INTERFACE, *shaping]))
        for host in hosts:
            _run(host.command(["sh", "-c", f"{WAIT_FOR_LINK}; {CHOOSE_RENO}"]))
        yield first, second


@contextmanager
def _keeper() -> Iterator[int]:
    """A process in new namespaces that does nothing and dies with this one; its id."""
    command = ["unshare", "--net", "--mount", "sh", "-c", KEEP_NAMESPACES]
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # the terminal's Ctrl-C must not end it before its users
            preexec_fn=die_with_parent,
        )
    except FileNotFoundError:
        raise NamespacesUnavailable("network namespaces need the program unshare (util-linux)") from None
    with process:
        try:
            assert process.stdout is not None
            assert process.stderr is not None
            if not process.stdout.readline():
                reason = process.stderr.read().strip()
                raise NamespacesUnavailable(f"network namespaces cannot be made here: {reason}")
            yield process.pid
        finally:
            process.kill()


def _run(command: Sequence[str]) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=COMMAND_SECONDS)
    except FileNotFoundError as error:
        raise NamespacesUnavailable(f"network namespaces need the program {error.filename}") from None
    except subprocess.CalledProcessError as error:
        raise NamespacesUnavailable(f"network namespaces cannot be set up: {error.stderr.strip()}") from None
