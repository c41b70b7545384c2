"""Bounds of time and memory for what strangers wrote and this process runs: chat templates.

A sandbox keeps a template from files and attributes, not from endless loops, `'x' * 10**10` or a width of a billion.
"""

import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from dflash_offline.schemas.errors import DflashError
from dflash_offline.stages.progress import readable_bytes

MOST_SECONDS = 20
"""Processor time for one row, a thousand times what a long one takes."""
MOST_BYTES = 1 << 30
"""Memory beyond what the process has before."""
_KILL_SECONDS = 20
"""Processor time after that until the system ends what no exception can, such as one endless comparison."""
_AGAIN_SECONDS = 1.0
_STATM = Path("/proc/self/statm")


class OutOfBoundsError(DflashError):
    """A row takes more time or memory to render than any should; `row` counts from 0 among those rendered together."""

    def __init__(self, message: str, row: int = 0) -> None:
        super().__init__(message, row)
        self.row = row

    def __str__(self) -> str:
        return str(self.args[0])

    def at(self, place: str) -> DflashError:
        """Return the error with the row's file and line."""
        return DflashError(f"{place}: {self}")


class _TimeIsUp(BaseException):
    """Raised amid the work; no handler of errors may take it for one of the row's."""


@contextmanager
def bounded(what: str, place: str = "") -> Iterator[Callable[[], None]]:
    """Run rows of work within `MOST_SECONDS` each and `MOST_BYTES`; yields what is called as each row begins.

    Raises `OutOfBoundsError` that names `what`, and the place of the row if it is known. Only a process's main thread
    can be interrupted and is bounded, as it is the one in which commands render. Limits that are already lower stay.
    """
    rows, armed = -1, -_AGAIN_SECONDS
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    memory, processor = resource.getrlimit(resource.RLIMIT_AS), resource.getrlimit(resource.RLIMIT_CPU)

    def begin() -> None:
        nonlocal rows, armed
        rows += 1
        if (now := time.process_time()) - armed < _AGAIN_SECONDS:  # cheap for rows by the thousand
            return
        armed = now
        signal.setitimer(signal.ITIMER_PROF, MOST_SECONDS, _AGAIN_SECONDS)
        _lower(resource.RLIMIT_CPU, processor, int(now) + MOST_SECONDS + _KILL_SECONDS)

    before = signal.signal(signal.SIGPROF, _raise)
    exceeded = ""
    try:
        if _STATM.is_file():
            held = int(_STATM.read_text().split()[0]) * resource.getpagesize()
            _lower(resource.RLIMIT_AS, memory, held + MOST_BYTES)
        begin()
        rows = -1
        yield begin
    except _TimeIsUp:
        exceeded = f"{MOST_SECONDS} s of processor time"
    except MemoryError:
        exceeded = f"{readable_bytes(MOST_BYTES)} of memory"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
        resource.setrlimit(resource.RLIMIT_AS, memory)
        resource.setrlimit(resource.RLIMIT_CPU, processor)
    if exceeded:
        said = out_of_bounds(what, exceeded)
        raise OutOfBoundsError(f"{place}: {said}" if place else said, max(rows, 0))


def out_of_bounds(what: str, exceeded: str) -> str:
    """Return what to say of work that took too much."""
    return (
        f"{what} takes more than {exceeded} for one row: it loops without end, or makes far more text than the row "
        f"holds. Mend the template, or give another: --chat-template-kwargs "
        f'\'{{"chat_template": "..."}}\'.'
    )


def _raise(_number: int, _frame: object) -> None:
    raise _TimeIsUp


def _lower(kind: int, limits: tuple[int, int], most: int) -> None:
    """Set the soft limit, which can be raised again, unless the process's own is lower."""
    known = [limit for limit in limits if limit != resource.RLIM_INFINITY]
    resource.setrlimit(kind, (min([most, *known]), limits[1]))
