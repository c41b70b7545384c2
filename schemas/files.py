"""Whole-file writes that survive a crash, checksums, and sealed JSON documents."""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dflash_offline.schemas.errors import CacheError


def sync_folder(folder: Path) -> None:
    """Make the folder's entries durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_synced(path: Path, parts: Iterable[bytes]) -> None:
    """Write a new file's parts and make its content durable; the file may be left half-written by a crash."""
    with path.open("wb") as file:
        for part in parts:
            file.write(part)
        file.flush()
        os.fsync(file.fileno())


def publish(parts: Iterable[bytes], *, temporary: Path, path: Path) -> None:
    """Make `path` hold the parts, whole or not at all: write `temporary`, sync, rename, sync the folder."""
    write_synced(temporary, parts)
    path.parent.mkdir(parents=True, exist_ok=True)
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


def read_sealed(path: Path) -> dict[str, Any]:
    """Return a sealed document, its checksum included and checked; `CacheError` if it does not hold."""
    try:
        content = path.read_bytes()
        document = json.loads(content)
        claimed = document["checksum"]
        body = {key: value for key, value in document.items() if key != "checksum"}
        actual = sha256_bytes(canonical_json(body))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CacheError(f"{path} cannot be read as a sealed JSON document: {error!r}.") from error
    if claimed != actual or content != sealed_bytes(body):
        raise CacheError(
            f"{path} is damaged: its checksum says {claimed}, its content gives {actual}. Restore it from a copy."
        )
    return document


@contextmanager
def locked(path: Path, *, wait: bool) -> Iterator[bool]:
    """Hold an exclusive lock on a file or folder that exists; yields whether it was got. Dies with the process."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        yield False
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True
    finally:
        os.close(descriptor)
