"""How many threads a worker computes with on a CPU. No torch: `pdengine up` divides the cores first."""

import os
from collections.abc import MutableMapping
from pathlib import Path

# About a millisecond of waiting for the next parallel region before a thread of GCC's OpenMP runtime sleeps:
# longer than what Python does between two of them. Measured on two cores with 4 requests in flight: a ninth
# more tokens per second than with the runtime's default of 300,000, with which a thread holds a core that the
# router and the control thread need, and than with 8,000, with which threads sleep in the middle of a step.
SPIN_COUNT = 60_000


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


def limit_spinning(environment: MutableMapping[str, str]) -> None:
    """Let threads that wait for work spin for a while only. `environment` is that of this process, before it
    loads torch; what it says of waiting already is left."""
    if "OMP_WAIT_POLICY" not in environment:
        environment.setdefault("GOMP_SPINCOUNT", str(SPIN_COUNT))


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
