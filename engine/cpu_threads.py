"""How many threads a worker computes with on a CPU. No torch: `pdengine up` divides the cores first."""

import os
from pathlib import Path


def usable_cores(root: Path = Path("/")) -> int:
    """The cores that this process may use: its affinity, or what a cgroup's quota pays for if that is less.

    A quota of 2.5 cores counts as 2, because threads above it would all be stopped in the middle of a step.
    root: of a file system with /proc and /sys/fs/cgroup.
    """
    return max(1, min([len(os.sched_getaffinity(0)), *_quotas(root)]))


def compute_threads(threads: int | None) -> int | None:
    """What `--threads` says, else None where OMP_NUM_THREADS says it, else one for each usable core."""
    if threads is not None:
        return threads
    return None if os.environ.get("OMP_NUM_THREADS") else usable_cores()


def _quotas(root: Path) -> list[int]:
    """Whole cores that the CPU quotas of this process's cgroups pay for, in version 1 or 2 (cgroups(7))."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    quotas = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers != "" and "cpu" not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / ("" if controllers == "" else "cpu")
        # In a container the path may be the host's, and only the mount itself is ours.
        relative = Path(path.lstrip("/"))
        for folder in (relative, *relative.parents):
            quota = _quota(mount / folder)
            if quota is not None:
                quotas.append(int(quota))
    return quotas


def _quota(folder: Path) -> float | None:
    """In cores; None without a limit."""
    for names in (["cpu.max"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"]):
        try:
            quota, period = " ".join((folder / name).read_text() for name in names).split()
        except (OSError, ValueError):
            continue
        return None if quota in ("max", "-1") else int(quota) / int(period)
    return None
