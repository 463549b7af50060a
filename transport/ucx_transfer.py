"""The data plane between processes and hosts: one-sided reads by UCX, on a thread of their own."""

from __future__ import annotations

import atexit
import math
import os
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pdengine.transport import ucx_progress
from pdengine.transport.regions import RegionDescriptor, Run
from pdengine.transport.transfer import Deliver, PeerFailed, PullFailed, PushFailed, TransferError
from pdengine.transport.ucx_library import load_ucx
from pdengine.transport.ucx_loop import CLOSE_SECONDS, Command, UcxLoop
from pdengine.transport.ucx_settings import ucx_settings

START_SECONDS = 120.0  # the first start on a machine compiles the native loop
REGISTER_SECONDS = 120.0  # pinning hundreds of GB for RDMA takes long


class CudaPool(NamedTuple):
    """What the transfer of a pool in GPU memory must know."""

    attach_thread: Callable[[], None]  # makes the GPU's context current on the calling thread
    scratch_address: int  # WARM_UP_BYTES on the same GPU, which the first read from each peer overwrites


class UcxTransfer:
    """A `PushTransfer` over UCX. The thread "ucx" owns the library and runs without the GIL (`ucx_progress`).

    `deliver` is called on that thread. `on_fatal` is called there if the thread dies: nothing that is in
    flight will be reported any more, so the process should exit. UCX listens on the interface that owns
    `advertise_host` only. cuda: for a pool in GPU memory.

    A read into GPU memory has landed when its PullCompleted is delivered: UCX reports it once the copy's
    CUDA event has passed (the NIC's completion, over RDMA), and kernels launched after that see the bytes.

    Raises UcxNotFound, UcxError or TransferError if UCX cannot be started.
    """

    def __init__(
        self,
        *,
        deliver: Deliver,
        on_fatal: Callable[[BaseException], None],
        advertise_host: str = "127.0.0.1",
        library_path: Path | None = None,
        cuda: CudaPool | None = None,
    ) -> None:
        self._deliver = deliver
        self._on_fatal = on_fatal
        library = load_ucx(library_path, cuda=cuda is not None)
        settings = ucx_settings(library, advertise_host, os.environ, cuda=cuda is not None)
        self.version = "ucx {}.{}.{}".format(*library.version)
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._command_descriptor = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._control = np.zeros(ucx_progress.CONTROL_SIZE, np.int64)
        self._gaps = np.zeros(ucx_progress.NUM_GAP_BUCKETS, np.int64)
        self._lock = threading.Lock()  # guards _closed together with the descriptor
        self._closed = False

        def open_loop() -> UcxLoop:
            if cuda is not None:
                cuda.attach_thread()  # before UCX starts: it looks for GPUs only where there is a context
            return UcxLoop(
                library,
                settings,
                deliver=deliver,
                commands=self._commands,
                command_descriptor=self._command_descriptor,
                control=self._control,
                gaps=self._gaps,
                cuda_scratch=None if cuda is None else cuda.scratch_address,
            )

        started: Future[bytes] = Future()
        self._thread = threading.Thread(target=self._run, args=(open_loop, started), name="ucx", daemon=True)
        self._thread.start()
        try:
            self.worker_address = started.result(START_SECONDS)
        except TimeoutError:
            raise TransferError(f"UCX did not start within {START_SECONDS:g} s") from None
        atexit.register(self.close)  # a daemon thread must not be in UCX while the interpreter goes away

    def register(self, region: RegionDescriptor) -> RegionDescriptor:
        reply: Future[RegionDescriptor] = Future()
        if not self._submit(lambda loop: loop.register(region, reply)):
            raise TransferError("the transfer is closed")
        try:
            return reply.result(REGISTER_SECONDS)
        except TimeoutError:
            raise TransferError(f"the region was not registered within {REGISTER_SECONDS:g} s") from None

    def connect(self, engine_id: str, worker_address: bytes, region: RegionDescriptor) -> None:
        if not self._submit(lambda loop: loop.connect(engine_id, worker_address, region)):
            self._deliver(PeerFailed(engine_id, "the transfer is closed"))

    def pull(self, pull_id: int, engine_id: str, runs: Sequence[Run]) -> None:
        runs = tuple(runs)
        if not self._submit(lambda loop: loop.pull(pull_id, engine_id, runs)):
            self._deliver(PullFailed(pull_id, "the transfer is closed"))

    def connect_to_push(self, engine_id: str, worker_address: bytes, region: RegionDescriptor) -> None:
        self.connect(engine_id, worker_address, region)

    def push(self, push_id: int, engine_id: str, runs: Sequence[Run], layer: int) -> None:
        runs = tuple(runs)
        if not self._submit(lambda loop: loop.push(push_id, engine_id, runs, layer)):
            self._deliver(PushFailed(push_id, "the transfer is closed"))

    def disconnect(self, engine_id: str) -> None:
        self._submit(lambda loop: loop.disconnect(engine_id))

    def progress_gaps(self) -> list[tuple[float, int]]:
        """For how long UCX was left alone between two progress calls while its thread was not asleep.

        A histogram since the start: (upper bound in seconds, number of gaps up to it and above the bound
        before); the last bound is infinite. Where UCX emulates reads, our peers' reads wait for us meanwhile.
        """
        bounds = [*(nanoseconds / 1e9 for nanoseconds in ucx_progress.GAP_BOUNDS_NS), math.inf]
        return list(zip(bounds, self._gaps.tolist(), strict=True))

    def close(self) -> None:
        self._submit(lambda loop: loop.close(), last=True)
        self._thread.join(2 * CLOSE_SECONDS)
        atexit.unregister(self.close)

    def _submit(self, command: Command, *, last: bool = False) -> bool:
        """Hand a command to the UCX thread and wake it. False if the transfer is closed."""
        with self._lock:
            if self._closed:
                return False
            self._closed = last
            self._commands.put(command)
            self._control[ucx_progress.CONTROL_WAKE] = 1
            os.eventfd_write(self._command_descriptor, 1)
            return True

    def _run(self, open_loop: Callable[[], UcxLoop], started: Future[bytes]) -> None:
        try:
            loop = open_loop()
        except BaseException as error:
            self._shut()
            started.set_exception(error)
            return
        started.set_result(loop.worker_address)
        try:
            loop.run()
        except BaseException as error:
            self._shut()
            self._on_fatal(error)
            return
        self._shut()

    def _shut(self) -> None:
        with self._lock:
            self._closed = True
            os.close(self._command_descriptor)
