"""What the disk under a folder does, and what a feature cache costs this process. Loads no torch."""

import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dflash_offline.schemas.errors import DflashError
from dflash_offline.schemas.locks import locked

TRIAL_BYTES = 128 << 20
"""Written and read; less on a disk that is nearly full."""
TRIAL_OBJECT_BYTES = 16 << 20
"""Written to a bucket and read from it."""
_CODEC_S = 0.5
"""Seconds for which encoding is timed, and decoding."""
_CHUNKS = (2, 128, 1, 4096)
"""Chunks that are encoded together; tokens, layers and width of each."""
_TRY_LOCK = """
import sys
from pathlib import Path
from dflash_offline.schemas.locks import locked
with locked(Path(sys.argv[1]), wait=False) as held:
    print(held)
"""


@dataclass(frozen=True, kw_only=True)
class Disk:
    """What was measured under one folder."""

    folder: str
    """That exists: the one asked for, or the nearest above it."""
    free_bytes: int
    error: str | None = None
    """Why nothing could be written; nothing was measured then."""
    write_bytes_per_s: float = 0
    """Of one file of random bytes, until it is on the disk."""
    read_bytes_per_s: float = 0
    """Of the same file, dropped from the page cache first where the system can do that."""
    locks: bool = True
    """Whether a lock keeps another process out."""


def try_disk(out: Path) -> Disk:
    """Write, read and lock a file beside where `out` is or will be; nothing of it stays."""
    folder = next(path for path in (out.absolute(), *out.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(folder).free
    data = os.urandom(min(TRIAL_BYTES, free // 4))
    try:
        with tempfile.TemporaryFile(dir=folder) as file:  # has no name, so that nothing stays if this is killed
            begun = time.perf_counter()
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            written = time.perf_counter()
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            file.seek(0)
            file.read()
            read = time.perf_counter()
        with tempfile.NamedTemporaryFile(prefix=".dflash-doctor-", dir=folder) as named:
            locks = _locks_hold(Path(named.name))
    except OSError as error:
        return Disk(folder=str(folder), free_bytes=free, error=error.strerror or str(error))
    return Disk(
        folder=str(folder),
        free_bytes=free,
        write_bytes_per_s=len(data) / (written - begun),
        read_bytes_per_s=len(data) / (read - written),
        locks=locks,
    )


@dataclass(frozen=True, kw_only=True)
class BucketTrial:
    """What was measured below the address of a bucket."""

    address: str
    error: str | None = None
    """Why no cache can lie there; nothing else is known then."""
    write_bytes_per_s: float = 0
    """Of one object of random bytes."""
    read_bytes_per_s: float = 0
    request_s: float = 0
    """Of one request for a few bytes."""


def try_bucket(url: str) -> BucketTrial:
    """Write, read, list and remove an object, and see whether writes can be conditional; nothing of it stays."""
    from dflash_offline.stages.buckets.bucket import Bucket
    from dflash_offline.stages.buckets.publish import try_conditional_writes

    name, data = f"tmp/doctor-{os.urandom(8).hex()}", os.urandom(TRIAL_OBJECT_BYTES)
    try:
        bucket = Bucket(url)
        try_conditional_writes(bucket)
        try:
            begun = time.perf_counter()
            bucket.create(name, data)
            written = time.perf_counter()
            bucket.read(name)
            read = time.perf_counter()
            bucket.read_range(name, 0, 4)
            answered = time.perf_counter()
            bucket.names("tmp")
        finally:
            bucket.remove(name)
    except DflashError as error:
        return BucketTrial(address=url, error=str(error))
    return BucketTrial(
        address=url,
        write_bytes_per_s=len(data) / (written - begun),
        read_bytes_per_s=len(data) / (read - written),
        request_s=answered - read,
    )


def _locks_hold(path: Path) -> bool:
    """Return whether another process is kept from a file that this one has locked."""
    with locked(path, wait=False) as held:
        other = subprocess.run([sys.executable, "-c", _TRY_LOCK, str(path)], capture_output=True, text=True)
        return held and other.stdout.strip() == "False"


@dataclass(frozen=True, kw_only=True)
class Store:
    """How fast one core encodes and decodes features, in bytes of raw bfloat16, and how many files stay open."""

    encode_bytes_per_s: float
    decode_bytes_per_s: float
    open_files: int
    """That this process may have; -1 for any number."""
    open_shards: int
    """Shard files among them that it keeps open; where it reads more, it closes one to open another."""


def try_store() -> Store:
    """Time the lossless codec on normal values; raises ImportError where a package that it needs is broken."""
    import numpy as np

    from dflash_offline.stages.store.cache import most_open_shards
    from dflash_offline.stages.store.chunks import decode_chunks, encode_chunks, room

    values = np.random.default_rng(0).standard_normal(_CHUNKS, np.float32)
    codes = (values.view(np.uint32) >> 16).astype(np.uint16)
    chunks = encode_chunks(codes)
    head = room(len(codes))
    data = np.concatenate([np.zeros(head, np.uint8), chunks.data])
    ends = (head + np.cumsum(chunks.sizes)).tolist()
    places = [(end - size, size) for end, size in zip(ends, chunks.sizes, strict=True)]
    out = np.empty((_CHUNKS[1], len(codes), _CHUNKS[3]), np.uint16)
    return Store(
        encode_bytes_per_s=codes.nbytes * _turns_per_s(lambda: encode_chunks(codes)),
        decode_bytes_per_s=codes.nbytes * _turns_per_s(lambda: decode_chunks(data, places, out, len(out))),
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        open_shards=most_open_shards(),
    )


def _turns_per_s(turn: Callable[[], object]) -> float:
    turns, began = 0, time.perf_counter()
    while turns == 0 or time.perf_counter() - began < _CODEC_S:
        turn()
        turns += 1
    return turns / (time.perf_counter() - began)
