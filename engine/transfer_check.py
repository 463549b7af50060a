"""`python -m pdengine.engine.transfer_check HOST`: a trial of libucp by one pull between two ends.

Both are in this process, which is one of its own because a library that does not fit may take it down. Prints
a TransferReport as JSON.
"""

import os
import queue
import sys

import msgspec
import numpy as np
import numpy.typing as npt

from pdengine.engine.doctor import TransferReport
from pdengine.transport.regions import RegionDescriptor, Run, describe_region
from pdengine.transport.transfer import PeerConnected, PullCompleted, TransferError, TransferEvent
from pdengine.transport.ucx_library import load_ucx
from pdengine.transport.ucx_settings import ucx_settings
from pdengine.transport.ucx_transfer import UcxTransfer
from pdengine.transport.ucx_worker import UcxWorker

NUM_BLOCKS = 4
BLOCK_BYTES = 2**20
EVENT_SECONDS = 30.0


def try_transfer(host: str) -> TransferReport:
    """Pull a few blocks between two transfers that advertise `host`. Raises TransferError if that fails."""
    library = load_ucx()
    worker = UcxWorker(library, ucx_settings(library, host, os.environ))
    transports = worker.transports()
    worker.close()
    lanes = _pull(host)
    return TransferReport(version="{}.{}.{}".format(*library.version), transports=transports, lanes=lanes)


def _pull(host: str) -> str:
    """The lanes that carried the pull."""
    events: queue.SimpleQueue[TransferEvent] = queue.SimpleQueue()
    source = UcxTransfer(deliver=events.put, on_fatal=_exit, advertise_host=host)
    target = UcxTransfer(deliver=events.put, on_fatal=_exit, advertise_host=host)
    content = np.random.default_rng(0).integers(0, 256, (NUM_BLOCKS, BLOCK_BYTES), np.uint8)
    landed = np.zeros_like(content)
    try:
        region = source.register(_describe(content))
        target.register(_describe(landed))
        target.connect("source", source.worker_address, region)
        connected = _next(events)
        if not isinstance(connected, PeerConnected):
            raise TransferError(f"no connection: {connected}")
        target.pull(1, "source", [Run(0, 0, NUM_BLOCKS)])
        pulled = _next(events)
        if not isinstance(pulled, PullCompleted):
            raise TransferError(f"the pull failed: {pulled}")
        if not np.array_equal(content, landed):
            raise TransferError("the pull completed, but other bytes than were sent have landed")
    finally:
        target.close()
        source.close()
    return connected.lanes


def _next(events: "queue.SimpleQueue[TransferEvent]") -> TransferEvent:
    try:
        return events.get(timeout=EVENT_SECONDS)
    except queue.Empty:
        raise TransferError(f"nothing happened within {EVENT_SECONDS:g} s") from None


def _describe(pool: npt.NDArray[np.uint8]) -> RegionDescriptor:
    return describe_region(
        ("block", "byte"), pool.shape, item_size=1, dtype="uint8", base_address=pool.ctypes.data
    )


def _exit(error: BaseException) -> None:
    print(f"the UCX thread died: {error}", file=sys.stderr, flush=True)
    os._exit(1)


def main() -> None:
    try:
        report = try_transfer(sys.argv[1])
    except TransferError as error:
        report = TransferReport(error=str(error))
    print(msgspec.json.encode(report).decode(), flush=True)


if __name__ == "__main__":
    main()
