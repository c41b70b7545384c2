"""Half-written shard files in a cache's tmp/: counted by anyone, removed where the worker is known to be dead.

A worker's lock keeps others of its file system from its shard. Where locks do not reach, a file may be in use though
its lock is free: one of this machine goes when its process has ended; one of another machine only when its shard is
finished, for then its owner, if there is one, throws it away too, or when nothing was written to it for an hour by the
file system's own clock.
"""

import math
import os
import re
import secrets
import socket
import stat
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dflash_offline.schemas.files import refuse_links
from dflash_offline.schemas.locks import owner_is_dead, touch_lock
from dflash_offline.schemas.manifest import COMMITS, FINAL, TMP, shard_files
from dflash_offline.stages.progress import readable_bytes

SKIPPED_LOCK = f"{TMP}/skipped.lock"
"""The file whose lock a worker holds while it counts and records a shard with skipped samples."""
_HOSTS_SHOWN = 3
_NAME = re.compile(r"(\d{6,})\.(.+)-(\d+)(?:\.[0-9a-f]{8})?\.part")
_LOCK = re.compile(r"\d{6,}\.lock|" + re.escape(Path(SKIPPED_LOCK).name))


def lock_path(cache: Path, shard: int) -> Path:
    """Return the file whose lock a worker holds while a shard is its own."""
    return cache / TMP / f"{shard:06d}.lock"


def claimed_lock(cache: Path, shard: int) -> Path:
    """Return the file of `lock_path`, made if need be; `DflashError` if the shard would be written through a link."""
    names = [*shard_files(shard), *shard_files(shard, FINAL)]
    refuse_links(cache, TMP, COMMITS, *(os.path.dirname(name) for name in names))  # noqa: PTH120
    lock = lock_path(cache, shard)
    lock.parent.mkdir(exist_ok=True)  # copies of a cache may lack empty folders
    touch_lock(lock)
    return lock


def part_path(cache: Path, shard: int) -> Path:
    """Return a new name for what is written of a shard: where locks do not reach, two may be writing the same one."""
    return cache / TMP / f"{shard:06d}.{socket.gethostname()}-{os.getpid()}.{secrets.token_hex(4)}.part"


@dataclass(frozen=True, kw_only=True)
class HalfWritten:
    """One file in tmp/ that a worker is writing, or was when it died."""

    path: Path
    shard: int
    host: str
    process: int
    num_bytes: int
    changed: float
    """When it was last written to, in seconds of the file system's clock."""


@dataclass(frozen=True, kw_only=True)
class Leftovers:
    """The half-written files of a cache together."""

    files: int
    bytes: int
    hosts: list[str]
    untouched_s: float
    """How long the oldest is untouched."""

    def __str__(self) -> str:
        files = "1 half-written file" if self.files == 1 else f"{self.files:,} half-written files"
        hosts = ", ".join(self.hosts[:_HOSTS_SHOWN]) + (", ..." if len(self.hosts) > _HOSTS_SHOWN else "")
        size, minutes = readable_bytes(self.bytes), self.untouched_s / 60
        return f"{files}, {size}, of {hosts}, untouched for up to {minutes:,.0f} min"


def half_written(cache: Path) -> list[HalfWritten]:
    """Return the half-written files of a cache, by shard."""
    found = []
    for path in sorted((cache / TMP).glob("*.part")):
        with suppress(FileNotFoundError):  # its worker finished it meanwhile
            if name := _NAME.fullmatch(path.name):
                status = path.lstat()
                if not stat.S_ISREG(status.st_mode):
                    continue
                found.append(
                    HalfWritten(
                        path=path,
                        shard=int(name[1]),
                        host=name[2],
                        process=int(name[3]),
                        num_bytes=status.st_size,
                        changed=status.st_mtime,
                    )
                )
    return found


def remove_abandoned(cache: Path, is_done: Callable[[int], bool]) -> list[HalfWritten]:
    """Remove the half-written files whose workers are known to be dead; returns them."""
    refuse_links(cache, TMP)
    removed = []
    for one in half_written(cache):
        lock = lock_path(cache, one.shard)
        touch_lock(lock)
        untouched_s = lock.stat().st_mtime - one.changed
        untouched_s = math.inf if is_done(one.shard) else untouched_s
        with owner_is_dead(lock, host=one.host, process=one.process, untouched_s=untouched_s) as is_dead:
            if is_dead:
                one.path.unlink(missing_ok=True)
                removed.append(one)
    return removed


def remove_locks(cache: Path) -> None:
    """Remove the files of locks, which a complete cache needs no more."""
    refuse_links(cache, TMP)
    for path in (cache / TMP).glob("*.lock"):
        if _LOCK.fullmatch(path.name) and path.is_file() and not path.is_symlink():
            path.unlink(missing_ok=True)


def summarize(cache: Path) -> Leftovers:
    """Return what is half written in a cache's tmp/."""
    files = half_written(cache)
    return Leftovers(
        files=len(files),
        bytes=sum(file.num_bytes for file in files),
        hosts=sorted({file.host for file in files}),
        untouched_s=max((max(0.0, time.time() - file.changed) for file in files), default=0.0),
    )
