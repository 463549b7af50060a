"""How much memory a worker will take, and whether it is there; found out before anything is loaded.

The KV pool is mapped lazily, so one that is too large would start well and meet the OOM killer under load. No
torch: `pdengine up` adds up the plans of all its workers before it starts them.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path, PurePosixPath

from pdengine.engine.worker_config import ITEM_BYTES, KV_MEMORY_ON_CPU, StartupError, WorkerConfig
from pdengine.models.checkpoint import open_regular_file, weight_files
from pdengine.models.config import ModelConfig
from pdengine.models.safetensors_header import read_header

UNITS = {"": 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
LARGEST_BYTES = 2**62  # above it, cgroups mean "no limit"


@dataclass(frozen=True)
class MemoryPlan:
    """What one worker takes. block_size: tokens per block."""

    weight_bytes: int
    block_bytes: int
    num_blocks: int
    block_size: int

    @property
    def pool_bytes(self) -> int:
        return self.num_blocks * self.block_bytes

    def describe(self) -> str:
        return (
            f"weights {format_bytes(self.weight_bytes)}, KV cache {format_bytes(self.pool_bytes)} = "
            f"{self.num_blocks} blocks of {format_bytes(self.block_bytes)} = "
            f"{self.num_blocks * self.block_size} tokens"
        )


def memory_bytes(text: str, available: int) -> int:
    """`512MiB`, `1.5GiB`, a plain number of bytes, or a share of `available` such as `40%`.

    Raises ValueError with a sentence for anything else.
    """
    match = re.fullmatch(r"(\d{1,18}(?:\.\d{1,18})?)\s*([KMGT]iB|B|%|)", text)
    if match is None:
        raise ValueError(f"{text!r} is not a size such as 512MiB or 4GiB, nor a share such as 40%")
    number, unit = float(match[1]), match[2]
    if unit == "%":
        if not 0 < number <= 100:
            raise ValueError(f"{text!r} is not a share of more than 0% and at most 100%")
        return int(available * number / 100)
    if number * UNITS[unit] > LARGEST_BYTES:
        raise ValueError(f"{text!r} is more than any machine has")
    return int(number * UNITS[unit])


def format_bytes(num_bytes: int) -> str:
    """`1536` -> `"1.5 KiB"`."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if num_bytes >= UNITS[unit]:
            return f"{num_bytes / UNITS[unit]:.1f} {unit}"
    return f"{num_bytes} bytes"


def plan_memory(config: WorkerConfig, model: ModelConfig) -> MemoryPlan:
    """What a worker on a CPU will take, from its checkpoint's headers alone.

    Raises StartupError if the KV memory has no room for one block, CheckpointError for damaged headers.
    """
    item_bytes = ITEM_BYTES[config.dtype or model.dtype]
    kv_memory = KV_MEMORY_ON_CPU if config.kv_memory is None else config.kv_memory
    one = kv_block_bytes(model, block_size=config.block_size, item_bytes=item_bytes)
    plan = MemoryPlan(
        weight_bytes=weight_bytes(config.model_directory, model, item_bytes=item_bytes)
        + packed_embedding_bytes(model, item_bytes=item_bytes),
        block_bytes=one,
        num_blocks=kv_memory // one,
        block_size=config.block_size,
    )
    if plan.num_blocks < 1:
        raise StartupError(
            f"KV memory of {kv_memory} bytes is too small for one block of {config.block_size} "
            f"tokens, which takes {one} bytes"
        )
    return plan


def check_memory(plans: Sequence[MemoryPlan], available: int) -> None:
    """Raise StartupError, with the arithmetic, unless workers of these plans fit into `available` bytes."""
    weights, pools = sum(plan.weight_bytes for plan in plans), sum(plan.pool_bytes for plan in plans)
    if weights + pools <= available:
        return
    room = (available - weights) // len(plans)
    fits = room >= max(plan.block_bytes for plan in plans)
    who = "the worker needs" if len(plans) == 1 else f"{len(plans)} workers need"
    raise StartupError(
        f"{who} {format_bytes(weights)} for weights and {format_bytes(pools)} for the KV cache, "
        f"{format_bytes(weights + pools)} together, but {format_bytes(available)} of memory is available; "
        + (f"--kv-memory can be at most {room // 2**20}MiB" if fits else "no --kv-memory is small enough")
    )


def check_weights(config: WorkerConfig, model: ModelConfig, available: int) -> None:
    """Raise StartupError unless the weights alone fit into `available` bytes of a GPU."""
    item_bytes = ITEM_BYTES[config.dtype or model.dtype]
    weights = weight_bytes(config.model_directory, model, item_bytes=item_bytes)
    if weights > available:
        raise StartupError(
            f"the weights take {format_bytes(weights)}, but only {format_bytes(available)} are free on "
            f"{config.device}"
        )


def kv_block_bytes(model: ModelConfig, *, block_size: int, item_bytes: int) -> int:
    """Bytes of one block: keys and values of `block_size` tokens in all layers."""
    return model.num_kv_heads * model.num_layers * 2 * block_size * model.head_dim * item_bytes


def weight_bytes(directory: Path, model: ModelConfig, *, item_bytes: int) -> int:
    """Bytes of the weights with `item_bytes` per number, whatever dtype they are stored in.

    The vectors of norms, which stay in float32, are counted like the rest. Raises CheckpointError.
    """
    num_numbers = 0
    for path in weight_files(directory):
        with open_regular_file(path) as file:
            _, tensors = read_header(file, path)
        for name, tensor in tensors.items():
            is_tied_copy = name == "lm_head.weight" and model.tie_word_embeddings
            num_numbers += 0 if is_tied_copy else prod(tensor.shape)
    return num_numbers * item_bytes


def packed_embedding_bytes(model: ModelConfig, *, item_bytes: int) -> int:
    """Bytes of the second copy of a tied model's embeddings that a CPU computes the logits from."""
    return model.vocab_size * model.hidden_size * item_bytes if model.tie_word_embeddings else 0


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that can be used without swapping: MemAvailable, or what a cgroup's limit leaves if that is less.

    root: of a file system with /proc and /sys/fs/cgroup.
    """
    meminfo = dict(line.split(":", 1) for line in (root / "proc/meminfo").read_text().splitlines())
    available = int(meminfo["MemAvailable"].split()[0]) * 1024
    return max(0, min([available, *_left_by_cgroups(root)]))


def _left_by_cgroups(root: Path) -> Iterator[int]:
    """What the memory limits of this process's cgroups leave, in version 1 or 2 (cgroups(7))."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mount, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            mount = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        # In a container the path may be the host's, and only the mount itself is ours.
        relative = PurePosixPath(path.lstrip("/"))
        for folder in (relative, *relative.parents):
            left = _left_by_cgroup(mount / folder, *names)
            if left is not None:
                yield left


def _left_by_cgroup(folder: Path, limit_name: str, usage_name: str, cache_name: str) -> int | None:
    """None without a limit. Inactive file pages count as free: the kernel drops them first."""
    try:
        limit = (folder / limit_name).read_text().strip()
        if limit == "max" or int(limit) >= LARGEST_BYTES:
            return None
        usage = int((folder / usage_name).read_text())
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except OSError:
        return None
    return int(limit) - usage + int(statistics.get(cache_name, 0))
