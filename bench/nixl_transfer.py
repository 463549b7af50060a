"""NIXL (https://github.com/ai-dynamo/nixl) behind the interface of our transfers, for comparison."""

from __future__ import annotations

import importlib.metadata
import uuid
from collections.abc import Sequence
from time import monotonic, perf_counter

import msgspec

from pdengine.bench.transfer_messages import NIXL_PACKAGE
from pdengine.transport.regions import RegionDescriptor, Run, copy_ranges
from pdengine.transport.shared_memory import SharedMemory
from pdengine.transport.transfer import Deliver, PeerConnected, PullCompleted, PullFailed

DEVICE = 0


class NixlTransfer:
    """Reads by a NIXL agent with its UCX backend and its defaults, one descriptor per run.

    NIXL reports the end of a transfer only to who asks, so `pull` asks until it has ended, on the caller's
    thread. ImportError if the package is not installed.
    """

    def __init__(self, *, deliver: Deliver) -> None:
        from nixl_cu12._api import nixl_agent, nixl_agent_config

        self._deliver = deliver
        self._agent = nixl_agent(uuid.uuid4().hex, nixl_agent_config(backends=["UCX"]))
        self.version = f"{NIXL_PACKAGE} {importlib.metadata.version(NIXL_PACKAGE.replace('_', '-'))}"

    @property
    def worker_address(self) -> bytes:
        """The agent's metadata, which includes what is registered."""
        metadata: bytes = self._agent.get_agent_metadata()
        return metadata

    def register(self, region: RegionDescriptor, memory: SharedMemory) -> RegionDescriptor:
        self._agent.register_memory([(region.base_address, region.nbytes, DEVICE, "")], "DRAM")
        self._region = region
        return msgspec.structs.replace(region, remote_key=NIXL_PACKAGE.encode())

    def connect(self, engine_id: str, worker_address: bytes, region: RegionDescriptor) -> None:
        self._remote_agent = self._agent.add_remote_agent(worker_address)
        self._remote_region = region
        self._deliver(PeerConnected(engine_id, "nixl"))

    def pull(self, pull_id: int, engine_id: str, runs: Sequence[Run]) -> None:
        ranges = copy_ranges(self._remote_region, self._region, runs).tolist()
        started_at = perf_counter()
        local = self._agent.get_xfer_descs([(local, size, DEVICE) for local, _, size in ranges], "DRAM")
        remote = self._agent.get_xfer_descs([(remote, size, DEVICE) for _, remote, size in ranges], "DRAM")
        handle = self._agent.initialize_xfer("READ", local, remote, self._remote_agent)
        state = self._agent.transfer(handle)
        posted_at = perf_counter()
        while state == "PROC":
            state = self._agent.check_xfer_state(handle)
        seconds = perf_counter() - started_at
        self._agent.release_xfer_handle(handle)
        if state == "DONE":
            num_bytes = sum(size for _, _, size in ranges)
            self._deliver(
                PullCompleted(pull_id, num_bytes, len(ranges), seconds, monotonic(), posted_at - started_at)
            )
        else:
            self._deliver(PullFailed(pull_id, f"NIXL reports {state}"))

    def progress_gaps(self) -> list[tuple[float, int]]:
        """NIXL's progress thread does not tell."""
        return []

    def close(self) -> None:
        """The agent releases what it holds when it goes."""
        del self._agent
