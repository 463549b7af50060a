"""What a worker is told at start-up, resolved and checked before anything is loaded."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from pdengine.transport.addresses import split_host_port
from pdengine.transport.messages import Role
from pdengine.transport.transfer import SameHost

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}  # of the dtypes that a worker computes in
KV_MEMORY_ON_CPU = 4 * 2**30  # bytes, where nothing is said
GPU_MEMORY_UTILIZATION = 0.9
GPU_BLOCK_SIZES = (16, 32, 64, 128, 256)  # tokens; what the attention kernels have tiles for


class StartupError(ValueError):
    """The process cannot start as asked; the message is one sentence for the person who asked."""


@dataclass(frozen=True)
class WorkerConfig:
    """bind_address: where other workers reach this one; port 0 is any free one. advertise_address: what they
    are told instead, where the two differ. device: cpu, cuda (the first GPU) or cuda:N. dtype: None is the
    checkpoint's own. kv_memory: bytes of the KV cache; None is 4 GiB on a CPU, and on a GPU what the weights
    and a step leave of gpu_memory_utilization, this worker's share of the GPU's memory. lease_seconds: how
    long a prompt's KV cache outlives its last renewal. pinned_share: of the pool, for prompts computed for
    other workers. pull_seconds: after that a pull is given up. drain_seconds: what SIGTERM leaves to requests
    in flight. metrics_address: HOST:PORT of metrics and probes, if any. same_host: how the KV cache moves to
    and from workers on this host. max_step_ms: prompts are computed in chunks so small that a step hardly
    takes longer, in milliseconds; None is no limit. threads: that compute on a CPU; None is OMP_NUM_THREADS,
    or else one for each core that the process may use. keys: the worker's file of keys, or a directory that
    has it (transport/keys.py); None: whoever can connect is taken for a worker, and the addresses must be on
    loopback unless `insecure`.
    """

    role: Role
    model_directory: Path
    router_address: str
    bind_address: str = "tcp://127.0.0.1:0"
    advertise_address: str | None = None
    device: str = "cpu"
    dtype: str | None = None
    kv_memory: int | None = None
    gpu_memory_utilization: float = GPU_MEMORY_UTILIZATION
    block_size: int = 16
    max_batch_tokens: int = 2048
    max_requests: int = 64
    threads: int | None = None
    lease_seconds: float = 30.0
    pinned_share: float = 0.9
    pull_seconds: float = 30.0
    drain_seconds: float = 30.0
    metrics_address: str | None = None
    same_host: SameHost = "mapping"
    max_step_ms: float | None = None
    keys: Path | None = None
    insecure: bool = False

    @property
    def is_on_gpu(self) -> bool:
        return self.device != "cpu"

    def __post_init__(self) -> None:
        if re.fullmatch(r"cpu|cuda(:\d{1,3})?", self.device) is None:
            raise StartupError(f"device {self.device!r} is none of cpu, cuda and cuda:N")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise StartupError(
                f"GPU memory utilization {self.gpu_memory_utilization:g} must be above 0 and at most 1"
            )
        if self.dtype is not None and self.dtype not in ITEM_BYTES:
            raise StartupError(f"dtype {self.dtype!r} is not supported; these are: {', '.join(ITEM_BYTES)}")
        if self.block_size < 1:
            raise StartupError(f"block size {self.block_size} must be at least 1")
        if self.is_on_gpu and self.block_size not in GPU_BLOCK_SIZES:
            sizes = ", ".join(map(str, GPU_BLOCK_SIZES))
            raise StartupError(f"block size {self.block_size} is not supported on a GPU; these are: {sizes}")
        if self.max_batch_tokens < 1:
            raise StartupError(f"max batch tokens {self.max_batch_tokens} must be at least 1")
        if self.max_requests < 1:
            raise StartupError(f"max requests {self.max_requests} must be at least 1")
        if self.max_step_ms is not None and not self.max_step_ms > 0:
            raise StartupError(f"max step of {self.max_step_ms:g} ms must be above 0")
        if self.threads is not None and self.threads < 1:
            raise StartupError(f"threads {self.threads} must be at least 1")
        if self.same_host not in get_args(SameHost):
            choices = ", ".join(get_args(SameHost))
            raise StartupError(f"same host {self.same_host!r} is not one of: {choices}")
        if self.metrics_address is not None:
            split_host_port("metrics address", self.metrics_address)
