"""What this process may use of the machine. Imports nothing heavy."""

from __future__ import annotations

import os
from pathlib import Path


def usable_cores() -> int:
    """Cores this process may use: its affinity, cut to the cgroup's CPU quota."""
    cores = len(affinity())
    quota = cgroup_quota()
    return max(1, min(cores, quota) if quota else cores)


def affinity() -> set[int]:
    """Hardware threads that the calling thread may run on."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def cgroup_quota(path: Path = Path("/sys/fs/cgroup/cpu.max")) -> int | None:
    """Whole cores of a cgroup v2 quota, None without one."""
    try:
        quota, period = path.read_text().split()
    except (OSError, ValueError):
        return None
    return None if quota == "max" else max(1, int(quota) // int(period))
