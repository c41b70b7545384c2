"""Whole-file writes that survive a crash, and the checksums of files.

Every file that is written is made here as a new one, exclusively and with the rights that the umask leaves, and renamed
into place; what is appended to is opened here. No link is followed: a folder of ours may come from a stranger.
"""

import errno
import hashlib
import os
import secrets
import socket
import stat
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Any, TypeAlias

from dflash_offline.schemas.errors import DflashError

Piece: TypeAlias = Any
"""Some of a file's content: bytes, or an array of them."""
_SYNC_BYTES = 16 << 20
"""Written bytes from which a file is synced while it is still being written."""
_HASH_BYTES = 1 << 16
"""Bytes of a piece from which it is hashed while the next one is written."""
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""Error numbers of a write for which there was no room."""
NOT_THE_FILES = {
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
    errno.EACCES,
    errno.EPERM,
    errno.ESTALE,
    errno.ETIMEDOUT,
}
"""Error numbers of a read that failed because of this process or the way to the file, not because of its content."""


def sync_folder(folder: Path) -> None:
    """Make the folder's entries durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def building_name(final: Path) -> Path:
    """Return a name beside `final`, unlike any other, for what becomes it; it says whose it is if the process dies."""
    return final.with_name(
        f".{final.name}.building-{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"  # read by `locks`
    )


def open_kept(path: Path, mode: str) -> FileIO:
    """Open a file of ours that is written in place, a log or a lock, making it if it is not there.

    `mode` is a or r+. Raises `DflashError` if something else has its name: a link, a folder, a device; and for a
    log also if the file has a second name elsewhere, for that would be written to as well.
    """

    def opener(name: str, flags: int) -> int:
        try:
            descriptor = os.open(name, flags | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        except OSError as error:
            if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
                raise
            raise _not_ours(path) from error
        status = os.fstat(descriptor)
        if stat.S_ISREG(status.st_mode) and not (mode == "a" and status.st_nlink > 1):
            return descriptor
        os.close(descriptor)
        raise _not_ours(path)

    return FileIO(path, mode, opener=opener)


def _not_ours(path: Path) -> DflashError:
    what = f"is a link to {path.readlink()}" if path.is_symlink() else "is no plain file with this one name"
    return DflashError(
        f"{path} {what}, and would have to be written to; expected a file of this program's own, or none. See what it "
        f"is, move it away, and repeat the command."
    )


def refuse_links(root: Path, *names: str) -> None:
    """Raise `DflashError` if a folder within `root` that is written into is a link, or lies behind one.

    `names` are their paths within it; those that do not exist yet are no links.
    """
    for name in names:
        for folder in (root / name, *(root / name).parents):
            if folder == root:
                break
            if folder.is_symlink():
                raise DflashError(
                    f"{folder} is a link to {folder.readlink()}, and nothing is written outside {root}. Put the "
                    f"folder itself in its place; --out alone may be a link."
                )


def append(file: FileIO, content: bytes) -> None:
    """Add to a log that `open_kept` opened; if it fails, nothing of it stays there, and the error names the file."""
    end = file.seek(0, os.SEEK_END)
    try:
        while content:
            content = content[file.write(content) :]
    except OSError as error:
        with suppress(OSError):
            file.truncate(end)
        error.filename = str(file.name)
        raise


def remove_known(folder: Path, names: Sequence[str]) -> bool:
    """Remove a folder that holds nothing but files of these names, the last one last; returns whether it did."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    with os.scandir(folder) as entries:
        if not all(entry.name in names and entry.is_file(follow_symlinks=False) for entry in entries):
            return False
    for name in names:
        (folder / name).unlink(missing_ok=True)
    folder.rmdir()
    return True


def write_synced(path: Path, pieces: Iterable[Piece]) -> str:
    """Write a new file's pieces, make its content durable, and return its sha256; a crash may leave it half-written.

    Large pieces are hashed, and go to the disk, while the next ones are made: one must stay as it is until the second
    after it is asked for.
    """
    digest = hashlib.sha256()
    hashing: Future[None] | None = None
    syncing: Future[None] | None = None
    unsynced = 0
    try:
        with (
            path.open("xb") as file,  # never through a link, and never over what is there
            ThreadPoolExecutor(1, "hash") as hasher,
            ThreadPoolExecutor(1, "sync") as syncer,
        ):
            for piece in pieces:
                content = memoryview(piece).cast("B")
                file.write(content)
                if hashing is not None:
                    hashing.result()
                    hashing = None
                if len(content) < _HASH_BYTES:
                    digest.update(content)
                else:
                    hashing = hasher.submit(digest.update, content)
                unsynced += len(content)
                if unsynced >= _SYNC_BYTES and (syncing is None or syncing.done()):
                    if syncing is not None:
                        syncing.result()  # the system reports a failure once; a later sync would not know of it
                    syncing = syncer.submit(os.fdatasync, file.fileno())
                    unsynced = 0
            file.flush()
            os.fsync(file.fileno())
            for job in (hashing, syncing):
                if job is not None:
                    job.result()
    except FileExistsError as error:
        raise DflashError(
            f"{path} is there already, and nothing is written over it. See what it is, move it away, and repeat the "
            f"command."
        ) from error
    except OSError as error:
        error.filename = str(path)  # a full disk does not say which file it was
        raise
    return digest.hexdigest()


def publish(pieces: Iterable[Piece], *, path: Path, temporary: Path | None = None) -> str:
    """Make `path` hold the pieces, whole or not at all: write `temporary`, sync, rename, sync the folder.

    Returns their sha256. Without `temporary` it is a new name beside `path`, removed again if the write fails.
    """
    if temporary is not None:
        sha256 = write_synced(temporary, pieces)
        move_synced(temporary, path)
        return sha256
    temporary = building_name(path)
    try:
        return publish(pieces, path=path, temporary=temporary)
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_output(path: Path, content: bytes) -> None:
    """Make a file that the user named hold the content, whole or not at all; a device or a pipe is written into."""
    if path.exists() and not path.is_file():
        path.write_bytes(content)
        return
    publish([content], path=path.resolve())  # of a link, the file that it names


def move_synced(temporary: Path, path: Path) -> None:
    """Give a synced file its final name, durably."""
    fresh = [folder for folder in (path.parent, *path.parent.parents) if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    for folder in fresh:
        sync_folder(folder.parent)
    temporary.replace(path)
    sync_folder(path.parent)


def sha256_file(path: Path) -> str:
    """Return the hexadecimal sha256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_bytes(*parts: bytes) -> str:
    """Return the hexadecimal sha256 of the concatenated parts."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
