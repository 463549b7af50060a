"""A process that offers zeroed memory over UCX and dies when it is told to.

It starts faster than a whole transfer: no loop is compiled, UCX is driven from Python. It prints its worker
address, remote key and memory address as a line of JSON. A number on its stdin, which it repeats, makes it
kill itself after so many more progress calls that did something.
"""

from __future__ import annotations

import json
import mmap
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from pdengine.transport.regions import RegionDescriptor, describe_region
from pdengine.transport.ucx_library import load_ucx
from pdengine.transport.ucx_settings import ucx_settings
from pdengine.transport.ucx_worker import UcxWorker

NUM_BLOCKS, BLOCK_BYTES = 1024, 64 * 1024
LONGEST_SLEEP_SECONDS = 0.1


@contextmanager
def mortal_peer(
    prefix: Sequence[str] = (),
) -> Iterator[tuple[subprocess.Popen[str], bytes, RegionDescriptor]]:
    """The process, its worker address and its region. prefix: a command that runs it somewhere else."""
    with subprocess.Popen(
        [*prefix, sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            offer = json.loads(process.stdout.readline())
            region = describe_region(
                ("block", "byte"),
                (NUM_BLOCKS, BLOCK_BYTES),
                item_size=1,
                dtype="uint8",
                base_address=offer["base_address"],
                remote_key=bytes.fromhex(offer["remote_key"]),
            )
            yield process, bytes.fromhex(offer["worker_address"]), region
        finally:
            process.kill()


def main() -> None:
    num_bytes = NUM_BLOCKS * BLOCK_BYTES
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what UCX prints must not come between them
    library = load_ucx()
    worker = UcxWorker(library, ucx_settings(library, "127.0.0.1", os.environ))
    memory = mmap.mmap(-1, num_bytes)
    address = int(library.ffi.cast("intptr_t", library.ffi.from_buffer(memory)))
    mapped = worker.map_memory(address, num_bytes)
    offer = {"worker_address": worker.address().hex(), "remote_key": mapped.remote_key.hex()}
    print(json.dumps({**offer, "base_address": address}), file=answers, flush=True)
    handle = library.ffi.cast("void *", worker.handle)
    events = [sys.stdin, worker.event_descriptor()]
    remaining = None
    while True:
        if library.ucp.ucp_worker_progress(handle):
            remaining = None if remaining is None else remaining - 1
            if remaining is not None and remaining <= 0:
                os.kill(os.getpid(), signal.SIGKILL)
        elif library.ucp.ucp_worker_arm(handle) == 0:
            ready, _, _ = select.select(events, [], [], LONGEST_SLEEP_SECONDS)
            if sys.stdin in ready:
                line = sys.stdin.readline()
                if not line:
                    return  # the test has ended
                remaining = int(line)
                print(remaining, file=answers, flush=True)


if __name__ == "__main__":
    main()
