"""A child process that reads one JSON message per line and answers each with one."""

from __future__ import annotations

import os
import selectors
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from time import monotonic
from typing import Any, TypeVar

import msgspec

from pdengine.cli.parent_death import die_with_parent

START_SECONDS = 150.0  # the first start on a machine compiles the native loops
STOP_SECONDS = 10.0

Answer = TypeVar("Answer")


class ChildFailed(RuntimeError):
    """A child process ended, or did not answer in time; what it had to say is on stderr."""


class ChildProcess:
    """Ask it with `ask`. It dies with this process, and leaves quietly when its stdin is closed."""

    def __init__(self, name: str, process: subprocess.Popen[bytes]) -> None:
        self.name = name
        self._process = process
        self._buffer = bytearray()

    def ask(self, message: Any, answer: type[Answer], seconds: float) -> Answer:
        """Send `message`, wait for its answer. Raises ChildFailed after `seconds` or if the process ends."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(msgspec.json.encode(message) + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise ChildFailed(f"the {self.name} process ended") from None
        return self.answer(answer, seconds)

    def answer(self, kind: type[Answer], seconds: float = START_SECONDS) -> Answer:
        """The next message from the process, which must be of type `kind`."""
        try:
            return msgspec.json.decode(self._line(monotonic() + seconds), type=kind)
        except msgspec.DecodeError as error:
            raise ChildFailed(f"the {self.name} process gave a wrong answer: {error}") from None

    def _line(self, deadline: float) -> bytes:
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                if not selector.select(max(0.0, deadline - monotonic())):
                    raise ChildFailed(f"the {self.name} process did not answer in time")
                received = os.read(self._process.stdout.fileno(), 65536)
                if not received:
                    raise ChildFailed(f"the {self.name} process ended")
                self._buffer += received
        line, _, rest = bytes(self._buffer).partition(b"\n")
        self._buffer = bytearray(rest)
        return line


@contextmanager
def child_process(
    name: str,
    arguments: Sequence[str],
    *,
    prefix: Sequence[str] = (),
    environ: Mapping[str, str] | None = None,
) -> Iterator[ChildProcess]:
    """Run `python -P -m ARGUMENTS`, in a network namespace for example if `prefix` enters one, until the end
    of the block. `environ` is added to the environment."""
    process = subprocess.Popen(
        [*prefix, sys.executable, "-P", "-m", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, **(environ or {})},
        start_new_session=True,  # the terminal's Ctrl-C is for the parent, which stops its children in order
        preexec_fn=die_with_parent,
    )
    try:
        yield ChildProcess(name, process)
    except BaseException:
        process.kill()
        raise
    finally:
        _stop(process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    with suppress(BrokenPipeError):
        process.stdin.close()
    try:
        process.wait(STOP_SECONDS)
    except BaseException:
        process.kill()
        process.wait()
        raise
    finally:
        process.stdout.close()


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listens on; for programs that cannot say which one they got."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])
