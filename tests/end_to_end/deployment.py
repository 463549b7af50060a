"""Real processes, started as a person would in several shells."""

import contextlib
import re
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from threading import Event
from time import monotonic
from typing import TypeVar

import psutil
from fork_server import ForkedProcess, fork_server

from pdengine.client import Client, RouterUnavailable
from pdengine.transport.messages import Status

DEADLINE_SECONDS = 90.0
POLL_SECONDS = 0.05
T = TypeVar("T")
LISTENING = re.compile(r"listening for clients on (\S+), for workers on (\S+)")


class Deployment:
    """A router and workers of one model. `with Deployment(...)` kills whatever is left at the end.

    keys: a directory that `pdengine keygen` made; all processes and clients take theirs from it.
    """

    def __init__(self, model: Path, logs: Path, *, keys: Path | None = None) -> None:
        self.keys = keys
        self._key_options = ["--keys", str(keys)] if keys is not None else []
        self.model = model
        self.logs = logs
        self.processes: list[ForkedProcess] = []
        self._log_paths: dict[ForkedProcess, Path] = {}
        self.client_address = ""
        self.worker_address = ""

    def __enter__(self) -> "Deployment":
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()
        if error is not None:
            for log in sorted(self.logs.glob("*.log")):
                print(f"--- {log.name}\n{log.read_text()}")

    def start_router(
        self,
        client_address: str = "",
        worker_address: str = "",
        options: Sequence[str] = (),
        environment: dict[str, str] | None = None,
    ) -> ForkedProcess:
        clients = ["--client-address", client_address or "tcp://127.0.0.1:0"]
        workers = ["--worker-address", worker_address or "tcp://127.0.0.1:0"]
        # Workers report often, because tests wait for that; prompts go through both workers, also where a
        # decode worker has most of them. Of options given twice the last wins.
        own = ["--heartbeat-seconds", "0.2", "--local-prefill-tokens", "0"]
        arguments = [
            "router",
            "--model",
            str(self.model),
            *clients,
            *workers,
            *own,
            *self._key_options,
            *options,
        ]
        router = self._spawn("router", arguments, environment=environment)
        match = wait_for(lambda: LISTENING.search(self.log_of(router)), process=router)
        self.client_address, self.worker_address = match.groups()
        return router

    def start_http(
        self, *options: str, module: str = "pdengine.cli", environment: dict[str, str] | None = None
    ) -> ForkedProcess:
        """An HTTP server in a process of its own."""
        addresses = ["--router", self.client_address, "--http", "127.0.0.1:0"]
        arguments = ["http", "--model", str(self.model), *addresses, *options]
        return self._spawn("http", arguments, module, environment)

    def start_worker(
        self,
        role: str,
        *options: str,
        model: Path | None = None,
        module: str = "pdengine.cli",
        environment: dict[str, str] | None = None,
    ) -> ForkedProcess:
        arguments = [role, "--model", str(model or self.model), "--router", self.worker_address]
        sizes = [] if "--kv-memory" in options else ["--kv-memory", "64MiB"]
        return self._spawn(role, [*arguments, *sizes, *self._key_options, *options], module, environment)

    def wait_status(self, condition: Callable[[Status], object]) -> Status:
        """The first status for which `condition` holds; fails at once if a process has ended by itself."""

        def look() -> Status | None:
            assert all(process.poll() is None for process in self.processes), "a process has ended"
            with contextlib.suppress(RouterUnavailable):
                status = client.status()
                return status if condition(status) else None
            return None

        with Client(self.client_address, keys=self.keys) as client:
            return wait_for(look)

    def wait_workers(self, *roles: str) -> Status:
        """Wait until exactly these workers have joined, and decode workers can pull from prefill workers."""

        def complete(status: Status) -> bool:
            prefills = {worker.engine_id for worker in status.workers if worker.role == "prefill"}
            linked = all(prefills <= set(w.links) for w in status.workers if w.role == "decode")
            return linked and sorted(worker.role for worker in status.workers) == sorted(roles)

        return self.wait_status(complete)

    def wait_baseline(self) -> None:
        """Wait until the router has no request and no worker, by a heartbeat of later, holds a block."""
        done_at: list[float] = []

        def is_baseline(status: Status) -> bool:
            if status.requests:
                done_at.clear()
                return False
            done_at.append(monotonic())
            loads = [worker.load for worker in status.workers]
            return all(worker.heartbeat_age < monotonic() - done_at[0] for worker in status.workers) and all(
                (load.free_blocks, load.pinned_blocks, load.running, load.waiting)
                == (load.num_blocks, 0, 0, 0)
                for load in loads
            )

        self.wait_status(is_baseline)

    def wait_heartbeats(self) -> None:
        """Wait until every worker has been heard once more."""
        begun_at = monotonic()
        self.wait_status(
            lambda status: all(w.heartbeat_age < monotonic() - begun_at for w in status.workers) or None
        )

    def stop(self, process: ForkedProcess, number: int = signal.SIGTERM) -> int:
        """Signal a process and wait for its end; its exit status."""
        process.send_signal(number)
        status = process.wait(DEADLINE_SECONDS)
        self.processes.remove(process)
        return status

    def pause(self, process: ForkedProcess) -> None:
        """Stop a process by SIGSTOP; it returns when it stands still."""
        process.send_signal(signal.SIGSTOP)
        stopped = psutil.Process(process.pid)
        wait_for(lambda: stopped.status() == psutil.STATUS_STOPPED or None, process)

    def resume(self, process: ForkedProcess) -> None:
        process.send_signal(signal.SIGCONT)

    def wait_log(self, process: ForkedProcess, pattern: str, times: int = 1) -> None:
        """Wait until lines of the process's log match `pattern` at least so many times."""

        def is_there() -> bool | None:
            return len(re.findall(pattern, self.log_of(process), re.MULTILINE)) >= times or None

        wait_for(is_there, process)

    def log_of(self, process: ForkedProcess) -> str:
        return self._log_paths[process].read_text()

    def _spawn(
        self,
        name: str,
        arguments: Sequence[str],
        module: str = "pdengine.cli",
        environment: dict[str, str] | None = None,
    ) -> ForkedProcess:
        log = self.logs / f"{len(self._log_paths) + 1}-{name}.log"
        log.touch()  # somebody may look before the process writes
        process = fork_server().start(module, arguments, {"OMP_NUM_THREADS": "1", **(environment or {})}, log)
        self.processes.append(process)
        self._log_paths[process] = log
        return process


def wait_for(look: Callable[[], T | None], process: ForkedProcess | None = None) -> T:
    """The first result of `look` that is not None; fails after DEADLINE_SECONDS or when `process` ends."""
    deadline = monotonic() + DEADLINE_SECONDS
    pause = Event()
    while monotonic() < deadline:
        found = look()
        if found is not None:
            return found
        assert process is None or process.poll() is None, "the process has ended"
        pause.wait(POLL_SECONDS)
    raise AssertionError(f"it did not happen within {DEADLINE_SECONDS:g} s")


@contextlib.contextmanager
def disaggregated(model: Path, logs: Path, *options: str, router: Sequence[str] = ()) -> Iterator[Deployment]:
    """A router, a prefill and a decode worker, both with `options`; the pools are back at their baseline at
    the end."""
    with Deployment(model, logs) as deployment:
        deployment.start_router(options=router)
        deployment.start_worker("prefill", *options)
        deployment.start_worker("decode", *options)
        deployment.wait_workers("prefill", "decode")
        yield deployment
        deployment.wait_baseline()
