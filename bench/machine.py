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


def write_result(name: str, figures: dict[str, Any], path: Path | None = None) -> Path:
    """Write the figures and the machine as JSON, by default to `bench/results/<name>.json`; the path."""
    if path is None:
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"{name}.json"
    taken_at = datetime.now(UTC).isoformat(timespec="seconds")
    result = {"name": name, "taken_at": taken_at, "machine": describe_machine(), **figures}
    path.write_text(json.dumps(result, indent=2) + "\n")
    return path
