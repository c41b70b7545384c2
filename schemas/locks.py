"""Locks, and folders that are built under one; what dead processes left is removed."""

import errno
import fcntl
import glob
import math
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dflash_offline.schemas.files import NO_ROOM, building_name, open_kept

LOCK = ".lock"
"""The file in a run's or a regeneration's folder whose lock holds the folder."""
ABANDONED_S = 3600.0
"""Seconds without a write after which a process of another machine counts as dead: writing pauses for minutes."""
_BUILDER = re.compile(r"(.+)-(\d+)-[^-]+")
"""End of the name of what is being built: machine, process and random letters, as `building_name` makes it."""
_NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK}
"""Error numbers of file systems without locks."""


@contextmanager
def locked(path: Path, *, wait: bool, unknown: bool = True) -> Iterator[bool]:
    """Hold an exclusive lock on a file or folder that exists; yields whether it was got. It ends with the process.

    Over a network the lock of a file reaches other machines; that of a folder does not. Where the file system has no
    locks, `unknown` is yielded: then an existing valid record decides.
    """
    try:  # over NFS an exclusive lock needs a file that is open for writing; a folder cannot be
        descriptor = os.open(path, (os.O_RDONLY if path.is_dir() else os.O_RDWR) | os.O_NOFOLLOW)
    except FileNotFoundError:
        yield False
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            yield unknown
            return
        yield True
    finally:
        os.close(descriptor)


def touch_lock(path: Path) -> None:
    """Make a lock's file if it is not there, and set its time to now; `DflashError` if its name is another thing's."""
    with open_kept(path, "r+") as file:
        os.utime(file.fileno())


@contextmanager
def locked_folder(folder: Path) -> Iterator[bool]:
    """Hold a folder against every other process, by the lock of a file in it; yields whether it was got."""
    lock = folder / LOCK
    with suppress(FileNotFoundError):  # the process that held it may be removing it
        touch_lock(lock)
    with locked(lock, wait=False) as held:
        yield held and lock.exists()


@contextmanager
def owner_is_dead(lock: Path, *, host: str, process: int, untouched_s: float) -> Iterator[bool]:
    """Hold the lock of something a process left unfinished; yields whether that process is known to be dead.

    If it ran on this machine, a free lock says so; where there are no locks, that no process of its number runs. If it
    ran on another machine, neither says so: then what it left must have been untouched for an hour.
    """
    here = host == socket.gethostname()
    with locked(lock, wait=False, unknown=not (here and is_running(process))) as free:
        yield free and (here or untouched_s > ABANDONED_S)


def is_running(process: int) -> bool:
    """Say whether a process of this machine runs; any number is allowed, for it may come from a file's name."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # it is another user's
    return True


@contextmanager
def building_folder(final: Path) -> Iterator[Path]:
    """Make a locked folder beside `final`, and remove it on leaving; first those of dead processes are removed.

    The folder itself is locked, for it is renamed with all that is in it: processes of this machine see the lock, and
    those of another go by its age.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    remove_unfinished(final)
    while True:
        folder = building_name(final)
        folder.mkdir()
        with locked(folder, wait=False) as held:
            if not held or not folder.exists():  # another process took it for a leftover before it was locked
                continue
            try:
                yield folder
            except OSError as error:
                if error.errno in NO_ROOM or str(error.filename).startswith(f"{folder}"):
                    error.filename = str(final)  # what it was to become, for this folder is about to go
                raise
            finally:
                shutil.rmtree(folder, ignore_errors=True)
            return


def being_built(final: Path) -> list[Path]:
    """Return what is becoming `final`, or was when the process died: files, and folders in which it is built."""
    return sorted(final.parent.glob(f".{glob.escape(final.name)}.building-*"))


def remove_unfinished(final: Path) -> list[Path]:
    """Remove what `being_built` returns whose processes are known to be dead; returns the rest.

    What has another name than this program gives, or is a link, stays.
    """
    found = being_built(final)
    try:
        with tempfile.TemporaryFile(dir=final.parent) as file:
            now = os.fstat(file.fileno()).st_mtime  # by the file system's clock
    except OSError:  # where nothing can be written, nothing can be removed
        return found
    for path in found:
        name = _BUILDER.fullmatch(path.name, len(f".{final.name}.building-"))
        if name is None or path.is_symlink():
            continue
        untouched_s = now - _last_touched(path)
        with (
            suppress(PermissionError),
            owner_is_dead(path, host=name[1], process=int(name[2]), untouched_s=untouched_s) as dead,
        ):
            if dead and path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif dead:
                path.unlink(missing_ok=True)
    return being_built(final)


def _last_touched(folder: Path) -> float:
    """Return when the file, or the folder or anything in it, was last written to; what vanishes is being touched."""
    try:
        return max(path.stat().st_mtime for path in (folder, *folder.rglob("*")))
    except FileNotFoundError:
        return math.inf
