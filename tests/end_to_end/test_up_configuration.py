"""`pdengine up`: its workers read the file and the environment, and must fit into memory together."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
from deployment import DEADLINE_SECONDS, wait_for

from pdengine.models.demo.facts import checkpoint_directory

COMMAND = [sys.executable, "-m", "pdengine.cli", "up", "--client-address", "tcp://127.0.0.1:0"]
CONFIG = f"""
model = "{checkpoint_directory()}"
[worker]
bind = "tcp://192.0.2.1:7000"
advertise = "tcp://192.0.2.1:7000"
kv-memory = "1MiB"
[decode]
kv-memory = "2MiB"
[up]
unified = 1
"""


def test_workers_take_their_own_values_but_loopback_addresses(tmp_path: Path) -> None:
    path, log = tmp_path / "pdengine.toml", tmp_path / "up.log"
    path.write_text(CONFIG)
    environment = {**os.environ, "PDENGINE_BLOCK_SIZE": "32", "PDENGINE_CONFIG": str(path)}
    with log.open("w") as output:
        command = [*COMMAND, "--http", "127.0.0.1:0"]
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
    try:
        wait_for(lambda: re.search(r"^ready", log.read_text(), re.MULTILINE), process)
        children = psutil.Process(process.pid).children(recursive=True)
    finally:
        process.send_signal(signal.SIGTERM)
        status = process.wait(DEADLINE_SECONDS)
    assert status == 0
    assert len(children) == 4
    _, alive = psutil.wait_procs(children, timeout=DEADLINE_SECONDS)
    assert not alive
    plans = re.findall(r"(\w+)\[\d+\]: weights \S+ MiB, KV cache (.*) =.*=", log.read_text())
    assert sorted(plans) == [("decode", "2.0 MiB"), ("prefill", "1.0 MiB"), ("unified", "1.0 MiB")]
    assert re.search(r"serving \S+ over HTTP on http://127.0.0.1:\d+", log.read_text())
    assert len(re.findall(r"blocks of 128.0 KiB", log.read_text())) == 3


def test_workers_that_do_not_fit_together_are_refused_before_they_start() -> None:
    # Each of two fits alone.
    arguments = [*COMMAND, "--model", str(checkpoint_directory()), "--kv-memory", "60%"]
    result = subprocess.run(arguments, capture_output=True, text=True, timeout=DEADLINE_SECONDS, check=False)
    assert result.returncode == 1
    [line] = result.stderr.splitlines()
    assert re.fullmatch(
        r"Error: 2 workers need \S+ MiB for weights and \S+ \wiB for the KV cache, \S+ \wiB together, but "
        r"\S+ \wiB of memory is available; --kv-memory can be at most \d+MiB",
        line,
    )
