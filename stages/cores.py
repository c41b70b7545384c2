"""How many cores this process may use; libraries that count the machine's instead crawl in a container."""

import ctypes
import os
from contextlib import suppress
from pathlib import Path

_QUOTA = Path("/sys/fs/cgroup/cpu.max")
_KEPT_BYTES = 1 << 30


def usable_cores() -> int:
    """Return the cores of this process's affinity mask, or fewer if its control group has a quota; at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = _QUOTA.read_text().split()
        return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):  # no control groups, or no quota ("max")
        return cores


def limit_threads() -> None:
    """Have numeric libraries that are loaded from now on use no more threads than that, unless the user says."""
    os.environ.setdefault("OMP_NUM_THREADS", str(usable_cores()))


def keep_freed_memory() -> None:
    """Have the C library, if it is glibc, give what is freed to who asks next, unless the user says otherwise.

    It would give large blocks back to the system, which clears their pages one by one whenever they are taken again:
    a tenth to a fourth of the time of a small target's forwards on a CPU.
    """
    with suppress(AttributeError, OSError):  # another library, or another system
        mallopt = ctypes.CDLL(None).mallopt
        for name, parameter in (("TRIM_THRESHOLD", -1), ("MMAP_THRESHOLD", -3)):
            if f"MALLOC_{name}_" not in os.environ:
                mallopt(parameter, _KEPT_BYTES)
