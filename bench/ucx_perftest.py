"""`ucx_perftest`, UCX's own benchmark: the ceiling of a pull over a network."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import monotonic

from pdengine.bench.child_process import free_port

MESSAGE_BYTES = 4 * 1024 * 1024
WARM_UPS = 20
START_SECONDS = 10.0
RUN_SECONDS = 60.0
BYTES_PER_MB = 1024 * 1024  # what it prints as MB


class PerftestFailed(RuntimeError):
    """ucx_perftest ended with an error; the message is its last line."""


def find_perftest(libucp: Path) -> Path | None:
    """The program that came with this libucp (beside `lib` in the wheel), or the one on the path."""
    bundled = libucp.parent.parent / "bin" / "ucx_perftest"
    found = bundled if bundled.exists() else shutil.which("ucx_perftest")
    return None if found is None else Path(found)


def get_bandwidth(
    perftest: Path,
    libucp: Path,
    *,
    host: str,
    settings: Mapping[str, str],
    num_gets: int,
    outstanding: int,
    server_prefix: Sequence[str] = (),
    client_prefix: Sequence[str] = (),
) -> float:
    """Bytes per second of `ucx_perftest -t ucp_get -e` with messages of MESSAGE_BYTES, in error mode peer.

    host: where the server listens; settings: UCX_* variables of both sides; outstanding: GETs in flight; the
    prefixes enter network namespaces. Raises PerftestFailed.
    """
    # The program would find the system's libraries first.
    environ = {**os.environ, **settings, "LD_LIBRARY_PATH": str(libucp.parent)}
    test = ["-t", "ucp_get", "-e", "-f", "-v", "-s", str(MESSAGE_BYTES), "-O", str(outstanding)]
    test += ["-n", str(num_gets), "-w", str(WARM_UPS)]
    port = str(free_port())
    with _server([*server_prefix, str(perftest), "-p", port], environ) as server:
        deadline = monotonic() + START_SECONDS
        while True:
            client = subprocess.run(
                [*client_prefix, str(perftest), host, "-p", port, *test],
                env=environ,
                capture_output=True,
                text=True,
                timeout=RUN_SECONDS,
            )
            if client.returncode == 0:
                return _overall(client.stdout) * BYTES_PER_MB
            # Until the server listens, the connection is refused.
            if server.poll() is not None or monotonic() > deadline:
                lines = (client.stderr or client.stdout).strip().splitlines()
                raise PerftestFailed(f"ucx_perftest failed: {lines[-1] if lines else client.returncode}")


def _overall(output: str) -> float:
    """The column "overall_bw" of its comma-separated output, a header and a line of numbers."""
    rows = [line.strip().split(",") for line in output.splitlines() if "," in line]
    if len(rows) != 2:
        raise PerftestFailed("ucx_perftest has printed no result")
    return float(dict(zip(*rows, strict=True))["overall_bw"])


@contextmanager
def _server(command: Sequence[str], environ: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(command, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
