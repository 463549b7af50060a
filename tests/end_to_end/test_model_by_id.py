"""`pdengine up --model NAME`, fetched from a hub on the loopback interface."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from checkpoints import write_checkpoint
from deployment import DEADLINE_SECONDS, wait_for
from hub_server import HubServer

from pdengine.client import Client

NAME = "pdengine/wide"
WEIGHTS = "model.safetensors"
HELD_AT = 24 * 2**20


@contextmanager
def up(hub: HubServer, home: Path, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """`pdengine up` with a cache of its own; its output goes to `log`."""
    environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
    options = ["--client-address", "tcp://127.0.0.1:0", "--kv-memory", "64MiB"]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-u", "-m", "pdengine.cli", "up", "--model", NAME, *options],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment,
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_a_killed_download_goes_on_where_it_was_and_the_model_serves(tmp_path: Path) -> None:
    write_checkpoint("llama-gqa", tmp_path / "model", overrides={"intermediate_size": 20_000})
    home, log = tmp_path / "home", tmp_path / "up.log"
    with HubServer() as hub:
        hub.add_directory(NAME, tmp_path / "model")
        size = (tmp_path / "model" / WEIGHTS).stat().st_size
        hold = hub.hold(WEIGHTS, HELD_AT)
        with up(hub, home, log) as process:
            assert hold.reached.wait(DEADLINE_SECONDS), "the download never came so far"
            process.send_signal(signal.SIGKILL)
            process.wait(DEADLINE_SECONDS)
        (partial,) = home.rglob("*.incomplete")
        kept = partial.stat().st_size
        assert kept > 0
        hold.resume.set()
        hub.holds.clear()
        hub.count_anew()

        with up(hub, home, log) as process:
            ready = wait_for(lambda: re.search(r"^ready: .* behind (\S+)", log.read_text(), re.M), process)
            assert hub.bytes_served[WEIGHTS] == size - kept
            with Client(ready[1]) as client:
                answer = client.generate("the cat", max_tokens=5, temperature=0, ignore_eos=True)
            assert len(answer.token_ids) == 5
            process.send_signal(signal.SIGTERM)
            assert process.wait(DEADLINE_SECONDS) == 0
