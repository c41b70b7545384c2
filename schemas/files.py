"""Whole-file writes that survive a crash, checksums, and sealed JSON documents."""

import errno
import fcntl
import glob
import hashlib
import json
import math
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeAlias

from dflash_offline.schemas.errors import CacheError, DflashError

Piece: TypeAlias = Any
"""Some of a file's content: bytes, or an array of them."""
_SYNC_BYTES = 16 << 20
"""Written bytes from which a file is synced while it is still being written."""
_HASH_BYTES = 1 << 16
"""From which a piece is hashed while the next one is written."""
ABANDONED_S = 3600.0
"""What is written touches its files all the time: seconds or minutes pass between two pieces."""
_BUILDER = re.compile(r"(.+)-(\d+)-[^-]+")
"""What ends the name of a folder in which something is built: machine, process and chance."""
_NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK}
"""Of file systems that know no locks."""
NOT_THE_FILES = {
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
    errno.EACCES,
    errno.EPERM,
    errno.ESTALE,
    errno.ETIMEDOUT,
}
"""What reading a file fails with where this process, or the way to the file, is at fault and not its content."""


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
                        syncing.result()  # the system tells a failure once; a later sync would not know of it
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


def canonical_json(document: Any) -> bytes:
    """Return the one byte string that stands for a JSON document: sorted keys, no spaces, no NaN."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def seal(document: dict[str, Any]) -> dict[str, Any]:
    """Return the document with the checksum of its canonical content added."""
    return {**document, "checksum": sha256_bytes(canonical_json(document))}


def sealed_bytes(document: dict[str, Any]) -> bytes:
    """Return the readable file content of a sealed document."""
    return (json.dumps(seal(document), indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


_CHECKSUM_FIRST = b'{\n "checksum": "'
_STRING = rb'"[^"\\\s]*+"'
_LAID_OUT = re.compile(
    rb"\{\n"
    rb"(?:( *) "  # what a line is indented by, but for one space
    rb"(?:(?:" + _STRING + rb": )?+(?:" + _STRING + rb"|[-+.\w]++|\{\}|\[\]|[{\[](?=\n\1  [^ }\]]))|[}\]])"
    rb"(?:,\n(?=\1 [^ }\]])|\n(?:(?<=[{\[]\n)|(?=\1[}\]]))))+"  # the next line's indent follows from how this one ends
    rb"\}\n"
)
"""A document line by line as `sealed_bytes` lays it out, if no string in it holds a space or a backslash."""


def _holds(content: bytes) -> bool:
    """Say whether a sealed document's checksum holds, from its text alone: a fifth of the time of writing it anew.

    Without spaces and line breaks, the text is the canonical content. False does not mean that it is damaged: names may
    sort before the checksum, or a string hold a space.
    """
    start, (claimed, _, body) = content[: len(_CHECKSUM_FIRST)], content[len(_CHECKSUM_FIRST) :].partition(b'",')
    if start != _CHECKSUM_FIRST or not _LAID_OUT.fullmatch(content):
        return False
    return hashlib.sha256(b"{" + body.translate(None, b"\n ")).hexdigest().encode() == claimed


def read_sealed(path: Path) -> dict[str, Any]:
    """Return a sealed document, its checksum included and checked; `CacheError` if it does not hold."""
    try:
        content = path.read_bytes()
        document: dict[str, Any] = json.loads(content)
        if _holds(content):
            return document
        claimed = document["checksum"]
        body = {key: value for key, value in document.items() if key != "checksum"}
        actual = sha256_bytes(canonical_json(body))
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, OSError) and error.errno in NOT_THE_FILES:
            raise
        raise CacheError(f"{path} cannot be read as a sealed JSON document: {error!r}.") from error
    if claimed != actual or content != sealed_bytes(body):
        raise CacheError(
            f"{path} is damaged: its checksum says {claimed}, its content gives {actual}. Restore it from a copy."
        )
    return document


@contextmanager
def locked(path: Path, *, wait: bool, unknown: bool = True) -> Iterator[bool]:
    """Hold an exclusive lock on a file or folder that exists; yields whether it was got. Dies with the process.

    Where the file system knows no locks, `unknown` is yielded: then an existing valid record decides.
    """
    try:  # over NFS an exclusive lock needs a file that is open for writing; a folder cannot be
        descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
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


@contextmanager
def nobody_at(lock: Path, *, host: str, process: int, untouched_s: float) -> Iterator[bool]:
    """Hold the lock of what a process left; yields whether nobody can be at it.

    A free lock says so of a process of this machine, and where there are no locks, that the process has ended. Of
    another machine neither does: what it left must have been untouched for an hour.
    """
    here = host == socket.gethostname()
    with locked(lock, wait=False, unknown=not (here and _runs(process))) as free:
        yield free and (here or untouched_s > ABANDONED_S)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # it is another user's
    return True


def output_folder(path: Path, *, marker: str, kind: str, renamed: bool) -> Path:
    """Return the real path of an output folder; `DflashError` if it cannot become one.

    It may be absent, empty, or hold `marker`, which says that it is a `kind` already. A folder that will be put in
    place by a rename can be neither a mount point nor the working directory.
    """
    folder = path.resolve()
    parent = next(p for p in folder.parents if p.exists())
    if not parent.is_dir():
        raise DflashError(f"{path} lies inside {parent}, which is not a folder. Name another --out.")
    if not folder.exists() or (folder / marker).is_file():
        return folder
    if not folder.is_dir() or any(renamed or entry.name != f".{marker}" for entry in folder.iterdir()):
        raise DflashError(f"{path} exists and is not a {kind}. Name a new folder, or empty it.")
    if renamed and (os.path.ismount(folder) or folder == Path.cwd()):
        raise DflashError(
            f"{path} is a mount point or the working directory, and a {kind} is put in place by a rename. Name a "
            f"folder inside it, as in --out {path / 'new'}."
        )
    return folder


@contextmanager
def building_folder(final: Path) -> Iterator[Path]:
    """Give a locked folder of this process's own beside `final`; what nobody can be at of others' is removed first."""
    final.parent.mkdir(parents=True, exist_ok=True)
    remove_unfinished(final)
    prefix = f".{final.name}.building-{socket.gethostname()}-{os.getpid()}-"
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=final.parent))
        with locked(folder, wait=False) as held:
            if not held or not folder.exists():  # another process took it for a leftover before it was locked
                continue
            folder.chmod(0o777 & ~_umask())
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
            return


def being_built(final: Path) -> list[Path]:
    """Return the folders in which `final` is being built, or was when the process died."""
    return sorted(final.parent.glob(f".{glob.escape(final.name)}.building-*"))


def remove_unfinished(final: Path) -> list[Path]:
    """Remove the folders of `being_built` that nobody can be at; returns the others.

    Locks of folders do not reach other machines.
    """
    found = being_built(final)
    try:
        with tempfile.TemporaryFile(dir=final.parent) as file:
            now = os.fstat(file.fileno()).st_mtime  # by the file system's clock
    except OSError:  # where nothing can be written, nothing can be removed
        return found
    for folder in found:
        name = _BUILDER.fullmatch(folder.name, len(f".{final.name}.building-"))
        host, process = (name[1], int(name[2])) if name else ("", 0)
        untouched_s = now - _last_touched(folder)
        with suppress(PermissionError), nobody_at(folder, host=host, process=process, untouched_s=untouched_s) as gone:
            if gone:
                shutil.rmtree(folder, ignore_errors=True)
    return being_built(final)


def _last_touched(folder: Path) -> float:
    """Return when the folder or anything in it was last written to; what vanishes meanwhile is being touched."""
    try:
        return max(path.stat().st_mtime for path in (folder, *folder.rglob("*")))
    except FileNotFoundError:
        return math.inf


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
