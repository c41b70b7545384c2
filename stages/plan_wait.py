"""How a later rank of an array job waits for the plan that rank 0 makes."""

import glob
import time
from contextlib import suppress
from pathlib import Path

from dflash_offline.schemas.errors import DflashError
from dflash_offline.schemas.manifest import MANIFEST
from dflash_offline.stages.progress import Progress

POLL_S = 1.0
GONE_S = 60.0
"""How long nothing may be there of a plan that was being made: over a network, a rename is seen late."""


def wait_for_plan(out: Path, timeout_s: float, progress: Progress) -> None:
    """Return once another rank has published the plan of a cache.

    Raises `DflashError` if it began one and ended without it, or gave no sign of one for `timeout_s`. Signs are the
    files that planning makes beside the cache; no clock is compared with another machine's.
    """
    progress.say(f"Waiting for rank 0 to plan {out}.")
    signs, silent_s, begun = _signs(out), 0.0, False
    while not (out / MANIFEST).exists():
        time.sleep(POLL_S)
        silent_s += POLL_S  # of looking: a machine that was asleep has missed no sign
        if (seen := _signs(out)) != signs:
            signs, silent_s, begun = seen, 0.0, True
        if begun and not signs and silent_s > GONE_S and not (out / MANIFEST).exists():
            raise DflashError(
                f"Rank 0 began to plan {out} and ended without a plan; what it said tells why. Mend that, and start "
                f"all ranks again."
            )
        if silent_s > timeout_s:
            raise DflashError(
                f"For {silent_s:.0f} s there was no sign of a plan of {out}, which rank 0 makes. See whether it was "
                f"started, with the same --out on a file system that both see, and what it said; then repeat this "
                f"command. --plan-timeout-s waits longer."
            )


def _signs(out: Path) -> dict[str, tuple[int, int]]:
    """Return size and time of every file of the folders in which a plan of `out` is being made."""
    found = {}
    for folder in out.parent.glob(f".{glob.escape(out.name)}.building-*"):
        with suppress(OSError):  # it may be renamed or removed meanwhile
            for path in (folder, *folder.rglob("*")):
                stat = path.stat()
                found[str(path)] = (stat.st_size, stat.st_mtime_ns)
    return found
