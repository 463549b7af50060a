"""A router and its workers as child processes of this one."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from threading import Event
from time import monotonic
from types import TracebackType

from pdengine.cli.parent_death import die_with_parent
from pdengine.client import Client
from pdengine.engine.cpu_threads import usable_cores
from pdengine.engine.worker_config import StartupError
from pdengine.transport.keys import KeysError
from pdengine.transport.messages import Role, Status

LOOPBACK = "tcp://127.0.0.1:0"  # any free port
READY_SECONDS = 600.0
POLL_SECONDS = 0.1
STOP_SECONDS = 10.0
RESTART_SECONDS = 10.0  # a worker that dies sooner than this after its start is not started again
LOG_LEVEL = "PDENGINE_LOG_LEVEL"
LISTENING = re.compile(r"listening for clients on (\S+), for workers on (\S+)")


class ChildDied(StartupError):
    """A child process ended by itself. has_said_why: it ended with its own sentence on stderr."""

    def __init__(self, name: str, exit_status: int) -> None:
        super().__init__(f"{name} ended with exit status {exit_status}")
        self.has_said_why = exit_status == 1


@dataclass(eq=False)
class Child:
    name: str
    arguments: list[str]
    process: subprocess.Popen[str]
    started_at: float


class Cluster:
    """Start with `with Cluster(...) as cluster`, then `wait_ready`; leaving the block stops every process.

    The children die with this process, however it dies. config: a file that they read, too. log_arguments:
    options of all of them. quiet: they log no requests, unless the environment says how much they log.
    router_arguments: options of the router. worker_arguments: of the workers of a role.
    metrics_addresses: per worker, in the order of `roles`; empty for none. keys: the directory that `pdengine
    keygen` made; None: no keys, which nobody beyond loopback is served without.
    """

    def __init__(
        self,
        model_directory: Path,
        *,
        roles: Sequence[Role],
        client_address: str = LOOPBACK,
        config: Path | None = None,
        log_arguments: Sequence[str] = (),
        quiet: bool = False,
        router_arguments: Sequence[str] = (),
        worker_arguments: Mapping[Role, Sequence[str]] | None = None,
        metrics_addresses: Sequence[str] | None = None,
        keys: Path | None = None,
    ) -> None:
        if not roles:
            raise StartupError("a cluster needs at least one worker")
        if keys is not None and not keys.is_dir():
            raise KeysError(f"{keys}: is no directory; a cluster needs all the files of pdengine keygen")
        # Those in the environment or the file are meant for one process.
        always = self.arguments_of(model_directory, config)
        self._arguments = [*always, "--keys", str(keys or ""), *log_arguments]
        self._quiet = quiet
        self._keys = keys
        self._roles = list(roles)
        self._client_address = client_address
        self._router_arguments = router_arguments
        self._worker_arguments = worker_arguments or {}
        self._metrics_addresses = metrics_addresses or [""] * len(roles)
        self._children: list[Child] = []
        self.client_address = ""

    def __enter__(self) -> "Cluster":
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _start(self) -> None:
        if find_spec("torch") is None:  # said once, not by each worker
            raise ModuleNotFoundError("No module named 'torch'", name="torch")
        addresses = ["--client-address", self._client_address, "--worker-address", LOOPBACK]
        router = self._spawn("router", ["router", *self._arguments, *addresses, *self._router_arguments])
        assert router.process.stdout is not None
        match = LISTENING.search(router.process.stdout.readline())
        if match is None:
            raise ChildDied("router", router.process.wait())
        self.client_address, worker_address = match.groups()
        for role, metrics_address in zip(self._roles, self._metrics_addresses, strict=True):
            # The addresses in the environment or the file are meant for workers on several machines.
            addresses = ["--router", worker_address, "--bind", LOOPBACK, "--advertise", LOOPBACK]
            options = self._worker_arguments.get(role, ())
            metrics = ["--metrics-address", metrics_address]
            self._spawn(role, [role, *self._arguments, *addresses, *options, *metrics])

    @staticmethod
    def arguments_of(model_directory: Path, config: Path | None) -> list[str]:
        """What every process is told. A directory has no revision, whatever the environment says."""
        arguments = ["--model", str(model_directory), "--revision", ""]
        return arguments if config is None else [*arguments, "--config", str(config)]

    def wait_ready(self, stop: Event | None = None) -> Status | None:
        """Wait until every worker has joined and every decode worker can pull from every prefill worker.

        None if `stop` is set before. Raises ChildDied, or StartupError after READY_SECONDS.
        """
        deadline = monotonic() + READY_SECONDS
        stop = stop or Event()
        with Client(self.client_address, keys=self._keys) as client:
            while monotonic() < deadline:
                for child in self._dead():
                    raise ChildDied(child.name, child.process.returncode)
                status = client.status()
                if self._is_ready(status):
                    return status
                if stop.wait(POLL_SECONDS):
                    return None
        raise StartupError(f"the workers have not joined within {READY_SECONDS:g} s")

    def supervise(self, stop: Event) -> None:
        """Until `stop` is set, start workers again that end by themselves.

        Raises ChildDied for the router, or for a worker that does not stay up.
        """
        while not stop.wait(POLL_SECONDS):
            for child in self._dead():
                died = ChildDied(child.name, child.process.returncode)
                if child.name == "router" or monotonic() - child.started_at < RESTART_SECONDS:
                    raise died
                print(f"{died}; starting it again", file=sys.stderr, flush=True)
                self._children.remove(child)
                self._spawn(child.name, child.arguments)

    def stop(self) -> None:
        """End every child: the router first, so that nothing is left for the workers to finish."""
        for child in self._children:
            child.process.send_signal(signal.SIGTERM)
            if child.name == "router":
                self._reap(child, STOP_SECONDS)
        deadline = monotonic() + STOP_SECONDS
        for child in self._children:
            self._reap(child, max(0.1, deadline - monotonic()))
        self._children.clear()

    def _is_ready(self, status: Status) -> bool:
        prefills = {worker.engine_id for worker in status.workers if worker.role == "prefill"}
        linked = all(prefills <= set(w.links) for w in status.workers if w.role == "decode")
        return linked and sorted(worker.role for worker in status.workers) == sorted(self._roles)

    def _dead(self) -> list[Child]:
        return [child for child in self._children if child.process.poll() is not None]

    def _spawn(self, name: str, arguments: list[str]) -> Child:
        # -P: no code of the working directory, which may have a folder called pdengine.
        # In a session of their own the children do not see the terminal's Ctrl-C: they are stopped in order.
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "pdengine.cli", *arguments],
            stdout=subprocess.PIPE if name == "router" else None,
            stdin=subprocess.DEVNULL,
            env=self._environment(),
            text=True,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
        child = Child(name, arguments, process, monotonic())
        self._children.append(child)
        return child

    def _environment(self) -> dict[str, str]:
        """Workers of one machine share its cores, instead of each starting a thread per core."""
        threads = max(1, usable_cores() // len(self._roles))
        environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
        if self._quiet and not environment.get(LOG_LEVEL):
            environment[LOG_LEVEL] = "warning"
        return environment

    @staticmethod
    def _reap(child: Child, seconds: float) -> None:
        try:
            child.process.wait(seconds)
        except subprocess.TimeoutExpired:
            child.process.kill()
            child.process.wait()
