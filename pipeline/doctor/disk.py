"""What the disk under a folder does: free space, the speed of large files, and whether locks hold."""

import errno
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from dflash_offline.schemas.files import locked

TRIAL_BYTES = 256 << 20
"""Written and read, at most; less on a disk that is nearly full."""
_TRIAL_S = 5.0
"""Seconds after which no more is written, or read."""
_PIECE_BYTES = 4 << 20
_PIECES_A_SYNC = 8
"""Few enough that a slow disk is noticed in time."""
_TRY_LOCK = """
import sys
from pathlib import Path
from dflash_offline.schemas.files import locked
with locked(Path(sys.argv[1]), wait=False) as held:
    print(held)
"""


@dataclass(frozen=True, kw_only=True)
class Disk:
    """What was measured under one folder."""

    folder: Path
    """That exists: the one asked for, or the nearest above it."""
    free_bytes: int
    error: str | None
    """Why nothing could be written; the rest is None then."""
    trial_bytes: int | None = None
    write_bytes_per_s: float | None = None
    """Of one large file, until it is on the disk."""
    read_bytes_per_s: float | None = None
    """Of the same file, put out of the system's memory first where the system can do that."""
    locks: bool | None = None
    """Whether a lock keeps another process out."""


def try_disk(out: Path) -> Disk:
    """Write, read and lock a file beside where `out` is or will be, and remove it."""
    folder = next(path for path in (out.absolute(), *out.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(folder).free
    try:
        with tempfile.TemporaryFile(dir=folder) as file:  # has no name, so that nothing stays if this is killed
            size, written_s = _write(file.fileno(), min(TRIAL_BYTES, free // 4))
            read_s = _read(file.fileno(), size)
        with tempfile.NamedTemporaryFile(prefix=".dflash-doctor-", dir=folder) as file:
            locks = _locks_hold(Path(file.name))
    except OSError as error:
        return Disk(folder=folder, free_bytes=free, error=error.strerror or errno.errorcode.get(error.errno or 0, "?"))
    return Disk(
        folder=folder,
        free_bytes=free,
        error=None,
        trial_bytes=size,
        write_bytes_per_s=size / written_s,
        read_bytes_per_s=size / read_s,
        locks=locks,
    )


def _write(descriptor: int, most: int) -> tuple[int, float]:
    """Return the bytes written and synced, and the seconds; random ones, which no disk makes smaller."""
    piece, size, began = os.urandom(_PIECE_BYTES), 0, time.perf_counter()
    while size == 0 or (size < most and time.perf_counter() - began < _TRIAL_S):
        for _ in range(_PIECES_A_SYNC):
            size += os.write(descriptor, piece)
        os.fsync(descriptor)
    return size, time.perf_counter() - began


def _read(descriptor: int, size: int) -> float:
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.lseek(descriptor, 0, os.SEEK_SET)
    began = time.perf_counter()
    while size > 0 and (piece := os.read(descriptor, _PIECE_BYTES)):
        size -= len(piece)
    return time.perf_counter() - began


def _locks_hold(path: Path) -> bool:
    """Say whether another process is kept from a file that this one has locked."""
    with locked(path, wait=False) as held:
        other = subprocess.run([sys.executable, "-c", _TRY_LOCK, str(path)], capture_output=True, text=True)
        return held and other.stdout.strip() == "False"
