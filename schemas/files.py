"""Whole-file writes that survive a crash, and the checksums of files."""

import errno
import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias

Piece: TypeAlias = Any
"""Some of a file's content: bytes, or an array of them."""
_SYNC_BYTES = 16 << 20
"""Written bytes from which a file is synced while it is still being written."""
_HASH_BYTES = 1 << 16
"""Bytes of a piece from which it is hashed while the next one is written."""
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
            path.open("wb") as file,
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
    except OSError as error:
        error.filename = str(path)  # a full disk does not say which file it was
        raise
    return digest.hexdigest()


def publish(pieces: Iterable[Piece], *, temporary: Path, path: Path) -> str:
    """Make `path` hold the pieces, whole or not at all: write `temporary`, sync, rename, sync the folder.

    Returns their sha256.
    """
    sha256 = write_synced(temporary, pieces)
    move_synced(temporary, path)
    return sha256


def write_output(path: Path, content: bytes) -> None:
    """Make a file that the user named hold the content, whole or not at all; a device or a pipe is written into."""
    if path.exists() and not path.is_file():
        path.write_bytes(content)
        return
    final = path.resolve()  # of a link, the file that it names
    temporary = final.with_name(f".{final.name}.{os.getpid()}")
    try:
        publish([content], temporary=temporary, path=final)
    finally:
        temporary.unlink(missing_ok=True)


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
