"""Starts processes of pdengine as copies of one that has imported torch, numba and pdengine already.

The imports and the native code are most of what a process does before it serves, and the tests start
hundreds of them. What a copy runs is the program: its module as `__main__`, with its own arguments,
environment and output.
"""

import contextlib
import functools
import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Never

IMPORTS = ("pdengine.cli.main", "pdengine.engine.start_worker", "pdengine.router.http.server")
MAX_REQUEST_BYTES = 2**20


class ForkedProcess:
    """Like subprocess.Popen, as far as tests need it."""

    def __init__(self, server: "ForkServer", pid: int, arguments: Sequence[str]) -> None:
        self.pid = pid
        self.args = list(arguments)
        self.returncode: int | None = None
        self._server = server
        self._descriptor = os.pidfd_open(pid)

    def poll(self) -> int | None:
        """Its exit status, or minus the signal that killed it; None while it runs."""
        if self.returncode is None and select.select([self._descriptor], [], [], 0)[0]:
            self._take_status()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Raises subprocess.TimeoutExpired after `timeout` seconds."""
        if self.returncode is None:
            if not select.select([self._descriptor], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
            self._take_status()
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            signal.pidfd_send_signal(self._descriptor, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _take_status(self) -> None:
        self.returncode = self._server.ask({"wait": self.pid})
        os.close(self._descriptor)


class ForkServer:
    """Use it as a context manager: its processes are killed with it."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._lock = threading.Lock()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-u", __file__, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )

    def __enter__(self) -> "ForkServer":
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._socket.close()
        self._process.wait()

    def start(
        self,
        module: str,
        arguments: Sequence[str],
        environment: dict[str, str],
        output: Path,
        errors: Path | None = None,
    ) -> ForkedProcess:
        """Run `python -m module arguments` with `environment` beside this process's own.

        output: gets what it writes, and its errors too, if they have no file of their own.
        """
        start = {
            "module": module,
            "arguments": list(arguments),
            "environment": {**os.environ, **environment},
            "outputs": [str(output), str(errors or output)],
            "path": sys.path,
        }
        return ForkedProcess(self, self.ask({"start": start}), [module, *arguments])

    def run(
        self, module: str, arguments: Sequence[str], environment: dict[str, str], timeout: float
    ) -> subprocess.CompletedProcess[str]:
        """Like subprocess.run with its output captured."""
        with TemporaryDirectory() as directory:
            output, errors = Path(directory, "output"), Path(directory, "errors")
            process = self.start(module, arguments, environment, output, errors)
            try:
                status = process.wait(timeout)
            finally:
                process.kill()
            return subprocess.CompletedProcess(process.args, status, output.read_text(), errors.read_text())

    def ask(self, request: dict[str, Any]) -> int:
        with self._lock:
            self._socket.send(json.dumps(request).encode())
            answer = self._socket.recv(MAX_REQUEST_BYTES)
        assert answer, "the fork server has ended"
        return int(answer)


@functools.cache
def fork_server() -> ForkServer:
    """The one of this run of the tests. It ends with this process."""
    return ForkServer()


def serve(connection: socket.socket) -> dict[str, Any] | None:
    """Answer requests until the other side closes. In a copy: return what it shall run."""
    children: set[int] = set()
    while request := connection.recv(MAX_REQUEST_BYTES):
        match json.loads(request):
            case {"wait": pid}:
                _, status = os.waitpid(pid, 0)
                children.discard(pid)
                connection.send(str(os.waitstatus_to_exitcode(status)).encode())
            case {"start": start}:
                pid = os.fork()
                if pid == 0:
                    return dict(start)
                children.add(pid)
                connection.send(str(pid).encode())
    for pid in children:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return None


def become(start: dict[str, Any]) -> None:
    """Run a module as if this process had been started for it."""
    for descriptor, path in zip((1, 2), start["outputs"], strict=True):
        output = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.dup2(output, descriptor)
        os.close(output)
    os.environ.clear()
    os.environ.update(start["environment"])
    sys.path[:] = start["path"]
    sys.argv = [start["module"], *start["arguments"]]
    runpy.run_module(start["module"], run_name="__main__", alter_sys=True)


def load_native_code() -> None:
    """numba's functions, and libucs, which measures the CPU's clock for 0.4 s; none of it starts a thread."""
    from pdengine.transport.ucx_library import UcxNotFound, load_ucx
    from pdengine.triton_kernels.cpu_native import native_kernels

    native_kernels()
    with contextlib.suppress(UcxNotFound):  # that is for those to say that need it
        load_ucx()


def main() -> Never:
    connection = socket.socket(fileno=int(sys.argv[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests
    for name in IMPORTS:
        __import__(name)
    load_native_code()
    gc.freeze()  # else every copy would write to, and so copy, the pages of all objects to collect garbage
    start = serve(connection)
    connection.close()
    if start is not None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        become(start)
    sys.exit()


if __name__ == "__main__":
    main()
