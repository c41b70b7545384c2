"""How much one row may hold, and how much memory a library may take while it reads one."""

import resource
from contextlib import suppress
from pathlib import Path

MOST_LINE_BYTES = 1 << 26
"""A longer line is no row but a file of another kind; it is named and passed over without being held."""
MOST_PASSED_BYTES = 1 << 30
"""A line that goes on beyond these ends the reading: a few bytes can decompress to one without end."""
MOST_VALUES = 1 << 22
"""Objects, lists and what is in them that one row may hold: four for each token of the longest rows."""
MOST_MEMORY = 1 << 31
"""Bytes that a process which reads Parquet and Arrow files may take beside its code."""
TOO_MUCH_MEMORY = f"takes more than {MOST_MEMORY >> 20:,} MiB of memory"
TOO_LONG_LINE = f"is longer than {MOST_LINE_BYTES >> 20} MiB"
TOO_MANY_VALUES = f"holds more than {MOST_VALUES:,} values"


def has_too_many_values(text: str | bytes) -> bool:
    """Say whether a text of JSON may hold more than `MOST_VALUES` values: each stands behind one of three signs."""
    if len(text) <= MOST_VALUES:
        return False
    if isinstance(text, str):
        return sum(text.count(sign) for sign in "[{,") > MOST_VALUES
    return sum(text.count(sign) for sign in b"[{,") > MOST_VALUES


def bound_memory() -> None:
    """Have this process fail with `MemoryError` once it takes `MOST_MEMORY` more than now; no bound but on Linux."""
    with suppress(OSError, ValueError):
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[5])
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        most = pages * resource.getpagesize() + MOST_MEMORY
        resource.setrlimit(resource.RLIMIT_DATA, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
