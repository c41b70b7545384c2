"""A copy on a local disk of what is read of caches in buckets: ranges of objects, a file each, bounded in bytes.

It is filled as ranges are read, and never evicted for others: an epoch reads everything once, in an order of its own,
so that what is there is worth as much as what would take its place. All processes of a machine may share the folder.
A file appears whole, by a rename, and is read back only with its chunks' checksums; any of them may be removed at any
time. What was written is counted in one file under a lock, before it is written, so that the bound holds wherever a
process dies; who comes while nobody uses the folder counts anew, and removes what is half written or too much.
"""

import fcntl
import os
import secrets
import shutil
import stat
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from dflash_offline.schemas.errors import DflashError

_COUNT = struct.Struct("<q")
_USERS, _COUNTED = "users.lock", "bytes"
"""Held shared by every process that uses the folder; the file that counts, whose lock is held to change it."""
_HALF = ".half-"
_BLOCK = 4096
"""Bytes in which a file system gives room."""


class LocalCopy:
    """Ranges of caches' objects in one folder. Safe in threads and processes.

    An object's place in it is its cache's name, a slash, and its own.
    """

    def __init__(self, folder: Path, most_bytes: int, wanted: Mapping[str, int], say: Callable[[str], object]) -> None:
        """`wanted` are the bytes of each cache that is to be read, by name; `say` is told if nothing can be written.

        `DflashError` if the folder cannot be made, or somebody else can write in it.
        """
        self.folder = _private(folder)
        self._folder = str(self.folder)
        self.most_bytes = most_bytes
        self._say, self._saying = say, threading.Lock()
        self._is_full = False
        for cache in wanted:
            (self.folder / cache).mkdir(exist_ok=True)
            os.utime(self.folder / cache)  # of the other caches, those used longest ago go first
        self._users = os.open(self.folder / _USERS, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with suppress(BlockingIOError):
            fcntl.flock(self._users, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._tidy(wanted)
        fcntl.flock(self._users, fcntl.LOCK_SH)

    def __del__(self) -> None:
        if hasattr(self, "_users"):
            os.close(self._users)

    def holds(self, place: str, begin: int, end: int) -> bool:
        """Say whether a file holds so many bytes for these of an object."""
        try:
            return os.lstat(self.path(place, begin, end)).st_size == end - begin
        except OSError:
            return False

    def keep(self, place: str, begin: int, content: memoryview) -> None:
        """Keep an object's bytes from `begin`, unless the copy is full or cannot be written."""
        if self._is_full:
            return
        path = Path(self.path(place, begin, begin + len(content)))
        size = -(-len(content) // _BLOCK) * _BLOCK
        half = path.with_name(f"{_HALF}{secrets.token_hex(8)}")
        try:
            if not self._reserved(size):
                self._is_full = True
                return
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                with half.open("xb") as file:
                    file.write(content)
                half.rename(path)
            except OSError:
                with suppress(OSError):
                    half.unlink(missing_ok=True)
                self._reserved(-size)
                raise
        except FileNotFoundError:  # the folder was thrown away meanwhile; it is made again
            with suppress(OSError):
                self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            self._stop(error)

    def forget(self, place: str, begin: int, end: int) -> None:
        """Remove what is kept of these bytes, for it is damaged."""
        path = Path(self.path(place, begin, end))
        with suppress(OSError):
            size = _size(path.stat())
            path.unlink()
            self._reserved(-size)

    def path(self, place: str, begin: int, end: int) -> str:
        """Return where these bytes of an object are kept, if they are."""
        return f"{self._folder}/{place}/{begin}-{end}"

    def _stop(self, error: OSError) -> None:
        with self._saying:
            if self._is_full:
                return
            self._is_full = True
        self._say(
            f"{self.folder} takes nothing more ({error.strerror or error}): what it does not hold is read from the "
            f"store. Make room there, or name another --local-cache."
        )

    def _reserved(self, size: int) -> bool:
        """Add to what is counted, unless it is then beyond the bound; returns whether it was added."""
        with self._counted() as descriptor:
            stored = os.pread(descriptor, _COUNT.size, 0)
            count = max(0, _COUNT.unpack(stored)[0] if len(stored) == _COUNT.size else 0) + size
            if size > 0 and count > self.most_bytes:
                return False
            os.pwrite(descriptor, _COUNT.pack(count), 0)
            return True

    @contextmanager
    def _counted(self) -> Iterator[int]:
        """Hold the file that counts, open."""
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(self.folder / _COUNTED, flags, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield descriptor
        finally:
            os.close(descriptor)

    def _tidy(self, wanted: Mapping[str, int]) -> None:
        """Count anew while nobody else uses the folder; remove what is half written, and what is too much.

        Other caches make room for those wanted, those used longest ago first.
        """
        entries = list(os.scandir(self.folder))
        caches = [Path(entry.path) for entry in entries if entry.is_dir(follow_symlinks=False)]
        sizes = {cache: sum(_size(file.stat(follow_symlinks=False)) for file in _files(cache)) for cache in caches}
        own = [cache for cache in caches if cache.name in wanted]
        others = sorted((cache for cache in caches if cache.name not in wanted), key=lambda path: path.stat().st_mtime)
        room = max(0, self.most_bytes - sum(wanted.values()))
        while others and sum(sizes[cache] for cache in others) > room:
            shutil.rmtree(gone := others.pop(0), ignore_errors=True)
            del sizes[gone]
        total = sum(sizes.values())
        for file in (file for cache in own for file in _files(cache)):
            if total <= self.most_bytes:
                break
            total -= _size(file.stat(follow_symlinks=False))
            os.unlink(file.path)  # noqa: PTH108 - a Path for each of a million takes longer
        with self._counted() as descriptor:
            os.pwrite(descriptor, _COUNT.pack(total), 0)


def _files(cache: Path) -> Iterator[os.DirEntry[str]]:
    """Yield the files that are kept of a cache; what is half written is removed."""
    for folder in list(os.scandir(cache)):
        if folder.is_dir(follow_symlinks=False):
            for file in list(os.scandir(folder.path)):
                if file.name.startswith(_HALF):
                    os.unlink(file.path)  # noqa: PTH108
                else:
                    yield file


def _size(status: os.stat_result) -> int:
    return -(-status.st_size // _BLOCK) * _BLOCK


def _private(folder: Path) -> Path:
    """Return the folder, made if need be; `DflashError` if it cannot be, or others can write in it."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        state = folder.lstat()
    except OSError as error:
        raise DflashError(
            f"{folder} cannot be the local cache: {error.strerror}. Name another --local-cache."
        ) from error
    if not stat.S_ISDIR(state.st_mode) or state.st_uid != os.getuid() or state.st_mode & 0o022:
        raise DflashError(
            f"{folder} is not a folder that this user alone may write into, and features that anybody could change "
            f"are not trained on. Name another --local-cache."
        )
    return folder
