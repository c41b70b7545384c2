"""How many cores and how much memory this process may use; libraries that count the machine's crawl in a container."""

import os
from contextlib import suppress
from pathlib import Path

_QUOTA = Path("/sys/fs/cgroup/cpu.max")
_MEMORY_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def usable_cores() -> int:
    """Return the cores of this process's affinity mask, or fewer if its control group has a quota; at least 1."""
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
