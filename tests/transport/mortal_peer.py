"""`python mortal_peer.py NUM_BYTES`: a process that offers memory over UCX and dies when it is told to.

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
import sys

from pdengine.transport.ucx_library import load_ucx
from pdengine.transport.ucx_settings import ucx_settings
from pdengine.transport.ucx_worker import UcxWorker

LONGEST_SLEEP_SECONDS = 0.1


def main() -> None:
    num_bytes = int(sys.argv[1])
    library = load_ucx()
    worker = UcxWorker(library, ucx_settings(library, "127.0.0.1", os.environ))
    memory = mmap.mmap(-1, num_bytes)
    address = int(library.ffi.cast("intptr_t", library.ffi.from_buffer(memory)))
    mapped = worker.map_memory(address, num_bytes)
    offer = {"worker_address": worker.address().hex(), "remote_key": mapped.remote_key.hex()}
    print(json.dumps({**offer, "base_address": address}), flush=True)
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
                print(remaining, flush=True)


if __name__ == "__main__":
    main()
