"""How a later rank of an array job waits for the plan that rank 0 makes."""

import time
from contextlib import suppress
from pathlib import Path

from dflash_offline.schemas.errors import DflashError
from dflash_offline.schemas.locks import being_built
from dflash_offline.schemas.manifest import MANIFEST
from dflash_offline.stages.buckets.mirror import mirror_of, with_urls
from dflash_offline.stages.buckets.publish import attempts, complete_static
from dflash_offline.stages.progress import Progress

POLL_S = 1.0
GONE_S = 60.0
"""How long nothing may be there of a plan that was being made: over a network, a rename is seen late."""


def wait_for_plan(out: Path, timeout_s: float, progress: Progress) -> None:
    """Return once another rank has published the plan of a cache.

    Raises `DflashError` if it began one and ended without it, or gave no sign of one for `timeout_s`. Signs are the
    files that planning makes beside the cache; no clock is compared with another machine's.
    """
    progress.say(with_urls(f"Waiting for rank 0 to plan {out}."))
    signs, silent_s = _signs(out), 0.0
    begun: set[Path] = set()  # the folders that changed: others were left by what was killed before
    while not _is_published(out):
        time.sleep(POLL_S)
        silent_s += POLL_S  # of looking: a machine that was asleep has missed no sign
        if (seen := _signs(out)) != signs:
            begun |= {folder for folder in seen.keys() | signs.keys() if seen.get(folder) != signs.get(folder)}
            signs, silent_s = seen, 0.0
        if begun and begun.isdisjoint(signs) and silent_s > GONE_S and not _is_published(out):
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


def _is_published(out: Path) -> bool:
    """Say whether a plan is there; in a bucket, one that was chosen is completed, whoever died over it."""
    if (mirror := mirror_of(out)) is not None:
        return complete_static(mirror.bucket) and mirror.pull()
    return (out / MANIFEST).exists()


def _signs(out: Path) -> dict[Path, list[tuple[Path, int, int]]]:
    """Return path, size and time of everything in each folder in which a plan of `out` is being made."""
    found: dict[Path, list[tuple[Path, int, int]]] = {}
    if (mirror := mirror_of(out)) is not None:
        for name, (size, changed, _) in attempts(mirror.bucket).items():
            found.setdefault(Path(*Path(name).parts[:2]), []).append((Path(name), size, int(changed)))
    for folder in being_built(out):
        with suppress(OSError):  # it may be renamed or removed meanwhile
            stats = [(path, path.stat()) for path in (folder, *folder.rglob("*"))]
            found[folder] = [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats]
    return found
