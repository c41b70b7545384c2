"""How many cores and how much memory this process may use; libraries that count the machine's crawl in a container."""

import os
from contextlib import suppress
from pathlib import Path

_QUOTA = Path("/sys/fs/cgroup/cpu.max")
_MEMORY_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
_sharing = 1
"""Worker processes of a command, of which this is one."""


def share_cores(num_workers: int) -> None:
    """Let this process take its share of the cores from now on, as one of so many workers of a command."""
    global _sharing
    _sharing = num_workers


def usable_cores() -> int:
    """Return this process's share, at least 1, of the cores that it may use.

    Those are the cores of its affinity mask, or fewer if its control group has a quota. They are shared among the
    workers of a command, and among the ranks that torchrun starts on a machine (LOCAL_WORLD_SIZE).
    """
    ranks = os.environ.get("LOCAL_WORLD_SIZE", "")
    return max(1, _cores() // (_sharing * max(1, int(ranks) if ranks.isdecimal() else 1)))


def _cores() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = _QUOTA.read_text().split()
        return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):  # no control groups, or no quota ("max")
        return cores


def usable_memory_bytes() -> int:
    """Return the memory that this process may fill: the machine's, or what its control group allows."""
    most = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in _MEMORY_LIMITS:
        with suppress(OSError, ValueError):  # no control groups, or no limit ("max")
            most = min(most, int(path.read_text()))
    return most


def limit_threads() -> None:
    """Limit numeric libraries that are loaded from now on to one thread a usable core, unless the user set a number."""
    os.environ.setdefault("OMP_NUM_THREADS", str(usable_cores()))
