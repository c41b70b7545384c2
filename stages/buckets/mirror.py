"""The folder on this machine in which a cache of a bucket is worked on.

It holds the cache's small files (manifest, plan, target, metadata and the records that were asked for) under their own
names, so that they are read as those of a local cache are, and what a worker is writing. Features stay in the bucket.

All processes of a user on one machine share the folder of a URL, below the folder for temporary files: locks in it keep
them apart as in a local cache, and static files are fetched once. The last process removes it as it ends; what a killed
one left is used, or replaced, by the next.
"""

import atexit
import fcntl
import os
import shutil
import stat
import tempfile
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dflash_offline.schemas.commits import Commit, commit_name
from dflash_offline.schemas.errors import CacheError, DflashError
from dflash_offline.schemas.files import building_name, sha256_bytes
from dflash_offline.schemas.locks import building_folder, locked, touch_lock
from dflash_offline.schemas.manifest import (
    COMMITS,
    FEATURES,
    FINAL,
    FINAL_MANIFEST,
    FINAL_METADATA,
    HIDDEN,
    IDS,
    MANIFEST,
    MASK,
    TARGET,
    TMP,
    Manifest,
)
from dflash_offline.schemas.paths import local_path, store_url
from dflash_offline.stages.buckets.bucket import SMALL_AT_ONCE, Bucket, Listed, in_parallel
from dflash_offline.stages.buckets.bundles import (
    BUNDLE_SHARDS,
    BUNDLES,
    DamagedBundleError,
    bundle_names,
    bundled_commits,
    list_records,
)

_URL, _FOLDER = "url", "cache"
_ENDPOINTS = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT", "AWS_ENDPOINT_URL_S3", "GOOGLE_BASE_URL", "AZURE_ENDPOINT")
_mirrors: dict[Path, "Mirror"] = {}
_opening = threading.Lock()


class Mirror:
    """The folder of one cache of a bucket. Safe in threads and processes."""

    def __init__(self, folder: Path, bucket: Bucket) -> None:
        self.folder = folder
        self.bucket = bucket

    @property
    def url(self) -> str:
        """The cache's address."""
        return self.bucket.url

    def pull(self) -> bool:
        """Let the folder hold the static files of the cache that is published now; returns whether there is one.

        Files of the same manifest are not fetched again; readers compare them with it.
        """
        content = self.bucket.read(MANIFEST)
        if content is None:
            shutil.rmtree(self.folder, ignore_errors=True)
            return False
        if self._is_of(content):
            return True
        lock = self.folder.with_name("pulling.lock")
        lock.parent.mkdir(exist_ok=True)
        touch_lock(lock)
        with locked(lock, wait=True):  # the other processes of this machine need the same files
            if not self._is_of(content):
                self._build(content)
        return True

    def _is_of(self, manifest: bytes) -> bool:
        with suppress(OSError):
            return manifest == (self.folder / MANIFEST).read_bytes()
        return False

    def _build(self, content: bytes) -> None:
        """Let the folder hold the static files of this manifest."""
        with building_folder(self.folder) as new:
            (new / MANIFEST).write_bytes(content)
            for name in (COMMITS, TMP):
                (new / name).mkdir()
            with suppress(CacheError):  # who reads it says what is wrong with it
                for name in Manifest.read(new).files:
                    self.bucket.fetch(name, new / name)
            shutil.rmtree(self.folder, ignore_errors=True)
            with suppress(OSError):  # not empty: another process was first
                new.rename(self.folder)

    @contextmanager
    def apart(self) -> Iterator["Mirror"]:
        """Give a mirror of the same cache in a folder that no other process uses, just fetched; it goes on leaving."""
        self.folder.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="apart-", dir=self.folder.parent) as folder:
            mirror = Mirror(Path(folder) / _FOLDER, self.bucket)
            if mirror.pull():
                for name in (FINAL_MANIFEST, FINAL_METADATA):
                    self.bucket.fetch(name, mirror.folder / name)
            yield mirror

    @contextmanager
    def fetched(self, names: list[str]) -> Iterator[None]:
        """Let the folder, which is `apart`, hold these files as they are now in the bucket; they go on leaving."""
        try:
            for name in names:
                self.bucket.fetch(name, self.folder / name)
            yield
        finally:
            for name in names:
                (self.folder / name).unlink(missing_ok=True)

    def pull_one(self, name: str) -> None:
        """Let the folder hold the small file of this name, such as a record, as it is now in the bucket, or none."""
        content = self.bucket.read(name)
        if content is None:
            (self.folder / name).unlink(missing_ok=True)
        else:
            self._write(name, content)

    def pull_records(self, manifest: Manifest) -> dict[int, Commit]:
        """Return the records that are in the bucket now and in a bundle as well; let the folder hold the others.

        What its folder of records held and the bucket does not is no longer there.
        """
        array = manifest.array
        listed = list_records(self.bucket, manifest.layout.num_shards, array)
        bundled: dict[int, Commit] = {}
        if (names := bundle_names(manifest)) and (found := self.bucket.names(BUNDLES)):
            there = {name: found[name] for name in names if name in found}
            self._pull_changed(BUNDLES, array, there, there)
            for name in there:
                with suppress(OSError, DamagedBundleError):  # then its records are read one by one
                    bundled |= bundled_commits((self.folder / name).read_bytes(), manifest, listed)
        by_name = {commit_name(shard, array): one for shard, one in listed.items()}
        loose = [commit_name(shard, array) for shard in listed.keys() - bundled.keys()]
        self._pull_changed(COMMITS, array, by_name, loose)
        return bundled

    def _pull_changed(self, within: str, array: str, listed: dict[str, Listed], wanted: Iterable[str]) -> None:
        """Let a folder hold an array's wanted objects as they are listed, and none of it that is not listed.

        Those that it has are not fetched again.
        """
        folder = self.folder / within
        folder.mkdir(exist_ok=True)
        of_array = [entry for entry in os.scandir(folder) if (f".{FINAL}" in entry.name) == (array == FINAL)]
        # One that begins with a dot is being written by another worker.
        here = {f"{within}/{entry.name}": entry.stat() for entry in of_array if not entry.name.startswith(".")}
        for name in here.keys() - listed.keys():
            (self.folder / name).unlink(missing_ok=True)

        def pull(name: str) -> None:
            content = self.bucket.read(name)
            if content is not None:
                self._write(name, content, changed=listed[name].changed)

        def is_here(name: str) -> bool:
            return name in here and (here[name].st_size, here[name].st_mtime) == listed[name][:2]

        in_parallel(pull, [name for name in wanted if not is_here(name)], SMALL_AT_ONCE)

    def _write(self, name: str, content: bytes, changed: float | None = None) -> None:
        """Write a small file, whole; it need not outlast the machine."""
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        temporary = building_name(path)
        temporary.write_bytes(content)
        if changed is not None:
            os.utime(temporary, (changed, changed))
        temporary.replace(path)

    def names(self, num_shards: int) -> list[str]:
        """Return the name of every object of the cache; of folders that are not its own, their own names alone."""
        cuts = list[str]()
        if num_shards > 10 * BUNDLE_SHARDS:
            cuts += [commit_name(shard) for shard in range(BUNDLE_SHARDS - 1, num_shards, BUNDLE_SHARDS)]
            arrays = (HIDDEN, FINAL, IDS, MASK)
            cuts += [f"{FEATURES}/{array}/c/{digits}" for array in arrays for digits in range(10, 100)]
        own = {BUNDLES, COMMITS, FEATURES, TARGET, TMP}
        parts = (name.partition("/") for name in self.bucket.names(cuts=cuts))
        return sorted({f"{top}/{rest}" if top in own and rest else top for top, _, rest in parts})


def worked_on(path: Path) -> Path:
    """Return the folder in which a cache is worked on: the path itself, or the mirror of what its URL names.

    A mirror holds the static files that are published now, or does not exist if there are none.
    """
    url = store_url(path)
    if url is None:
        return local_path(path)
    mirror = open_mirror(url)
    mirror.pull()
    return mirror.folder


def open_mirror(url: str, bucket: Bucket | None = None) -> Mirror:
    """Return the mirror of a URL, through `bucket` if that is given; what is in its folder may be of any age."""
    endpoints = [os.environ.get(name, "") for name in _ENDPOINTS]
    place = _private_folder() / sha256_bytes("\n".join([url, *endpoints]).encode())[:16]
    folder = place / _FOLDER
    with _opening:
        if folder not in _mirrors:
            bucket = bucket or Bucket(url)
            _share(place)
            (place / _URL).write_text(url)
            _mirrors[folder] = Mirror(folder, bucket)
        return _mirrors[folder]


def mirror_of(folder: Path) -> Mirror | None:
    """Return the mirror whose folder this is; None for a local cache."""
    if folder not in _mirrors and folder.name == _FOLDER and folder.parent.parent == _private_folder(make=False):
        with suppress(FileNotFoundError):
            return open_mirror((folder.parent / _URL).read_text())  # as in the process that started this one
    return _mirrors.get(folder)


def with_urls(text: str) -> str:
    """Return a text in which the addresses of caches stand for the folders of their mirrors."""
    for folder, mirror in _mirrors.items():
        text = text.replace(str(folder), mirror.url)
    return text


def _private_folder(*, make: bool = True) -> Path:
    """Return this user's folder of mirrors; `DflashError` if somebody else can write there."""
    folder = Path(tempfile.gettempdir()).resolve() / f"dflash-{os.getuid()}"
    if make:
        folder.mkdir(mode=0o700, exist_ok=True)
        state = folder.lstat()
        if not stat.S_ISDIR(state.st_mode) or state.st_uid != os.getuid() or state.st_mode & 0o022:
            raise DflashError(
                f"{folder} is not a folder that this user alone may write into. Move it away, or set TMPDIR to a "
                f"folder of your own."
            )
    return folder


def _share(place: Path) -> None:
    """Keep a mirror's folder until this process ends, and remove it then unless another process has it, too."""
    descriptor = os.open(place.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    place.mkdir(exist_ok=True)
    owner = os.getpid()

    def leave() -> None:
        if os.getpid() != owner:  # a fork
            return
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(place, ignore_errors=True)

    atexit.register(leave)
