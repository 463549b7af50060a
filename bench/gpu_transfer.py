"""`python -m pdengine.bench.gpu_transfer`: pulls between two processes on one GPU, beside a device copy.

What a decode worker does with the KV cache of a prefill worker: pools from cudaMalloc, one-sided reads by
UCX, which takes CUDA IPC. The ceiling is a copy within one process, by its payload: each byte is read and
written once, in a pull, too.
"""

import multiprocessing
import os
import queue
from multiprocessing.connection import Connection
from statistics import median

import torch
from torch import Tensor

from pdengine.bench.gpu_measure import Row, Setup, bench_command, report, share
from pdengine.engine.device_memory import CudaContext, DeviceMemory
from pdengine.transport.regions import RegionDescriptor, Run, block_runs, describe_region
from pdengine.transport.transfer import PeerConnected, PullCompleted, TransferEvent
from pdengine.transport.ucx_loop import WARM_UP_BYTES
from pdengine.transport.ucx_transfer import CudaPool, UcxTransfer

BLOCK_BYTES = 2 * 2**20  # of Llama-3-8B at 16 tokens
NUM_BLOCKS = 2048
RUN_BLOCKS = 16
REPEATS = 7
DEADLINE = 30.0  # s


def run(setup: Setup) -> None:
    """4 GiB in blocks of 2 MiB, pulled as one run, as runs of 16 blocks, and block by block."""
    sizes = (2 * RUN_BLOCKS, 4096) if setup.is_dry else (NUM_BLOCKS, BLOCK_BYTES)
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    source = context.Process(target=_serve, args=(there, str(setup.device), sizes))
    source.start()
    there.close()
    try:
        pool, transfer, events = _open(setup.device, sizes)
        transfer.register(_describe(pool))
        if not here.poll(DEADLINE):
            raise TimeoutError("the other process has not started")
        worker_address, region = here.recv()
        transfer.connect("source", worker_address, region)
        connected = events.get(timeout=DEADLINE)
        if not isinstance(connected, PeerConnected):
            raise RuntimeError(f"not connected: {connected}")
        rows = [
            _measure(setup, transfer, events, pool, name, runs) for name, runs in _patterns(sizes[0]).items()
        ]
        transfer.close()
    finally:
        here.close()  # ends the other process
        source.join(DEADLINE)
    figures = {"lanes": connected.lanes, "ucx": transfer.version, "rows": rows}
    report(setup, "transfer", f"Pulls between two processes, lanes {connected.lanes}", figures)


def _measure(
    setup: Setup,
    transfer: UcxTransfer,
    events: "queue.SimpleQueue[TransferEvent]",
    pool: Tensor,
    name: str,
    runs: list[Run],
) -> Row:
    seconds = []
    for pull_id in range(1 + REPEATS):
        pool.zero_()
        _synchronize(setup.device)
        transfer.pull(pull_id, "source", runs)
        completed = events.get(timeout=DEADLINE)
        if not isinstance(completed, PullCompleted):
            raise RuntimeError(f"{name}: {completed}")
        if pull_id > 0:  # the first opens what can be opened only once
            seconds.append(completed.seconds)
    _check_content(pool, runs)
    rate = pool.numel() / median(seconds)
    ceiling = setup.ceiling("copy_bytes_per_second")
    return {
        "pattern": name,
        "GETs": len(runs),
        "ms": median(seconds) * 1e3,
        "GB/s": rate / 1e9,
        "share of a copy": share(rate, None if ceiling is None else ceiling / 2),
    }


def _patterns(num_blocks: int) -> dict[str, list[Run]]:
    blocks = list(range(num_blocks))
    pieces = [blocks[first : first + RUN_BLOCKS] for first in range(0, num_blocks, RUN_BLOCKS)]
    reversed_pieces = [block for piece in reversed(pieces) for block in piece]
    return {
        "one run": block_runs(blocks, blocks),
        f"runs of {RUN_BLOCKS} blocks": block_runs(blocks, reversed_pieces),
        "single blocks": block_runs(blocks, blocks[::-1]),
    }


def _check_content(pool: Tensor, runs: list[Run]) -> None:
    expected = _content(pool)
    for run_ in runs:
        landed = pool[run_.local_block : run_.local_block + run_.count]
        if not torch.equal(landed, expected[run_.remote_block : run_.remote_block + run_.count]):
            raise RuntimeError(f"other bytes than were sent have landed in {run_}")


def _content(like: Tensor) -> Tensor:
    """The same random bytes in both processes."""
    generator = torch.Generator(like.device).manual_seed(1)
    return torch.randint(0, 256, like.shape, dtype=torch.uint8, device=like.device, generator=generator)


def _serve(connection: Connection, device_name: str, sizes: tuple[int, int]) -> None:
    """The process that is read from, until the other one closes the pipe."""
    device = torch.device(device_name)
    pool, transfer, _ = _open(device, sizes)
    pool.copy_(_content(pool))
    _synchronize(device)  # as after the step that computes a prompt, before its lease is granted
    connection.send((transfer.worker_address, transfer.register(_describe(pool))))
    try:
        connection.recv()
    except EOFError:
        transfer.close()


def _open(
    device: torch.device, sizes: tuple[int, int]
) -> tuple[Tensor, UcxTransfer, "queue.SimpleQueue[TransferEvent]"]:
    """A pool `[blocks, bytes of a block]` uint8 of these sizes, its transfer, and the events of that."""
    events: queue.SimpleQueue[TransferEvent] = queue.SimpleQueue()
    num_bytes = sizes[0] * sizes[1]
    if device.type == "cpu":
        pool, cuda = torch.zeros(num_bytes, dtype=torch.uint8), None
    else:
        context = CudaContext(device.index)
        pool = DeviceMemory(context, num_bytes).tensor(device)
        cuda = CudaPool(context.make_current, context.allocate(WARM_UP_BYTES))
    transfer = UcxTransfer(deliver=events.put, on_fatal=_exit, cuda=cuda)
    return pool.view(sizes), transfer, events


def _describe(pool: Tensor) -> RegionDescriptor:
    return describe_region(
        ("block", "byte"), tuple(pool.shape), item_size=1, dtype="uint8", base_address=pool.data_ptr()
    )


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _exit(error: BaseException) -> None:
    print(f"the UCX thread died: {error}", flush=True)
    os._exit(1)


main = bench_command(run)

if __name__ == "__main__":
    main()
