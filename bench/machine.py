"""The machine that a benchmark ran on."""

import json
import os
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def describe_machine() -> dict[str, Any]:
    """Processor, cores and memory, as Linux tells them."""
    cpu_info = Path("/proc/cpuinfo").read_text()
    models = [
        line.split(":", 1)[1].strip() for line in cpu_info.splitlines() if line.startswith("model name")
    ]
    return {
        "processor": models[0] if models else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "python": platform.python_version(),
    }


def describe_gpu() -> dict[str, Any]:
    """torch and its GPU, `{}` without one. For benchmarks that have imported torch anyway."""
    import torch

    if not torch.cuda.is_available():
        return {}
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "gpu_memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }


def write_result(name: str, figures: dict[str, Any], path: Path | None = None) -> Path:
    """Write the figures and the machine as JSON, by default to `bench/results/<name>.json`; the path."""
    path = path or RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    taken_at = datetime.now(UTC).isoformat(timespec="seconds")
    result = {"name": name, "taken_at": taken_at, "machine": describe_machine(), **figures}
    path.write_text(json.dumps(result, indent=2) + "\n")
    return path
