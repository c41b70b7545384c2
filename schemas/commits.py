"""commits/000017.json: one record for each finished shard. A shard without one does not exist."""

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dflash_offline.schemas.errors import CacheError
from dflash_offline.schemas.manifest import COMMITS
from dflash_offline.schemas.sealed import read_sealed, sealed_bytes


@dataclass(frozen=True, kw_only=True)
class ShardFileRecord:
    """What a reader compares with one shard file before it trusts it."""

    size: int
    """Bytes."""
    sha256: str
    index_crc32c: int
    """Checksum of the trailing shard index; ties the file to its record when it is opened."""
    first_chunk_crc32c: int
    """Checksum of the first inner chunk; shards of equal-sized chunks have equal indexes."""


@dataclass(frozen=True, kw_only=True)
class LayerStatistics:
    """Statistics of one captured layer over the tokens of one shard."""

    layer_id: int
    mean: float
    std: float
    max_abs: float
    zeros: float
    """Share of values that are exactly zero."""


@dataclass(frozen=True, kw_only=True)
class SkippedSample:
    """A sample without features: the target's own were bad and the user asked to go on without it."""

    sample: int
    reason: str
    layer_id: int
    position: int


@dataclass(frozen=True, kw_only=True)
class Commit:
    """One finished shard."""

    shard: int
    manifest: str
    """Checksum of the manifest it belongs to."""
    num_samples: int
    """Samples with features; skipped ones are not counted."""
    num_tokens: int
    skipped: list[SkippedSample]
    files: dict[str, ShardFileRecord]
    """By path within the cache."""
    layers: list[LayerStatistics]
    worker: str
    started: str
    finished: str

    def to_bytes(self) -> bytes:
        """Return the content of the record's file."""
        return sealed_bytes(asdict(self))


def commit_path(cache: Path, shard: int) -> Path:
    """Return where a shard's record lies."""
    return cache / COMMITS / _name(shard)


def _name(shard: int) -> str:
    return f"{shard:06d}.json"


def read_commit(cache: Path, shard: int, manifest_checksum: str) -> Commit | None:
    """Return a shard's record, or None if there is none; `CacheError` if it is damaged or of another cache."""
    path = commit_path(cache, shard)
    try:
        document = read_sealed(path)
    except CacheError:
        if not path.exists():
            return None
        raise
    try:
        return _checked(path, document, shard, manifest_checksum)
    except (KeyError, TypeError, AttributeError) as error:
        raise CacheError(
            f"{path} is no commit record of this format ({error!r}). Remove it and run `dflash extract` again."
        ) from error


def _checked(path: Path, document: dict[str, Any], shard: int, manifest_checksum: str) -> Commit:
    del document["checksum"]
    if document["manifest"] != manifest_checksum or document["shard"] != shard:
        raise CacheError(
            f"{path} belongs to shard {document['shard']} of the cache with manifest {document['manifest']}; "
            f"expected shard {shard} of {manifest_checksum}. Remove it and run `dflash extract` again."
        )
    files = {name: ShardFileRecord(**record) for name, record in document.pop("files").items()}
    layers = [LayerStatistics(**record) for record in document.pop("layers")]
    skipped = [SkippedSample(**record) for record in document.pop("skipped")]
    return Commit(files=files, layers=layers, skipped=skipped, **document)


def read_finished(cache: Path, shard: int, manifest_checksum: str) -> Commit | None:
    """Return a shard's record if its files are there, None without one; `CacheError` if either is damaged.

    Files are compared by size: quick on any cache. `dflash verify` reads them.
    """
    commit = read_commit(cache, shard, manifest_checksum)
    if commit is not None:
        for name, record in commit.files.items():
            path = f"{cache}/{name}"
            try:
                size: int | None = os.stat(path).st_size  # noqa: PTH116 - a Path for each of 60,000 takes longer
            except OSError:
                size = None
            if size != record.size:
                found = "no file" if size is None else f"{size} bytes"
                raise CacheError(
                    f"{path}: {found}, expected {record.size} bytes. Repeat the `dflash extract` that made the cache."
                )
    return commit


def read_commits(cache: Path, num_shards: int, manifest_checksum: str) -> tuple[dict[int, Commit], list[str]]:
    """Return the finished shards' records, and one line for each record that is damaged or lacks its files."""
    commits, faults = {}, []
    try:
        recorded = set(os.listdir(cache / COMMITS))  # noqa: PTH208 - one call, however many are left to do
    except FileNotFoundError:  # copies of a cache may lack empty folders
        recorded = set()
    # In one thread: most of the time goes into parsing, and threads only pass the interpreter back and forth.
    for shard in range(num_shards):
        if _name(shard) not in recorded:
            continue
        try:
            commit = read_finished(cache, shard, manifest_checksum)
        except CacheError as error:
            faults.append(str(error))
            continue
        if commit is not None:
            commits[shard] = commit
    return commits, faults
