"""commits/000017.json: one record for each finished shard. A shard without one does not exist.

commits/000017.final.json is the same for the shard's final states, which may be added later.
"""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from dflash_offline.schemas.checked import Count, Index, LayerIndex, Sha256, checked, unlike
from dflash_offline.schemas.errors import CacheError
from dflash_offline.schemas.manifest import COMMITS, HIDDEN, Manifest, shard_files
from dflash_offline.schemas.sealed import parse_sealed, read_sealed, sealed_bytes

_LARGEST = 3.5e38
"""Beyond every feature, which float32 holds."""
_AGAIN = "Remove it and run `dflash extract` again."
Crc32 = Annotated[int, Meta(ge=0, lt=1 << 32)]


@dataclass(frozen=True, kw_only=True)
class ShardFileRecord:
    """What a reader compares with one shard file before it trusts it."""

    size: Annotated[int, Meta(ge=1, le=1 << 53)]
    """Bytes."""
    sha256: Sha256
    index_crc32c: Crc32
    """Checksum of the trailing shard index; ties the file to its record when it is opened."""
    first_chunk_crc32c: Crc32
    """Checksum of the first inner chunk; shards of equal-sized chunks have equal indexes."""


@dataclass(frozen=True, kw_only=True)
class LayerStatistics:
    """Statistics of one captured layer over the tokens of one shard."""

    layer_id: LayerIndex
    mean: Annotated[float, Meta(ge=-_LARGEST, le=_LARGEST)]
    std: Annotated[float, Meta(ge=0, le=_LARGEST)]
    max_abs: Annotated[float, Meta(ge=0, le=_LARGEST)]
    zeros: Annotated[float, Meta(ge=0, le=1)]
    """Share of values that are exactly zero."""


@dataclass(frozen=True, kw_only=True)
class SkippedSample:
    """A sample without features: the target's own were bad and the user asked to go on without it."""

    sample: Index
    reason: str
    layer_id: LayerIndex
    position: Index


@dataclass(frozen=True, kw_only=True)
class Commit:
    """One finished shard."""

    shard: Index
    manifest: Sha256
    """Checksum of the manifest it belongs to."""
    num_samples: Count
    """Samples with features; skipped ones are not counted."""
    num_tokens: Count
    """Of these samples; of final states, the positions that hold one."""
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


_DECODER = msgspec.json.Decoder(Commit)  # made before there are threads, see `checked`


def commit_path(cache: Path, shard: int, array: str = HIDDEN) -> Path:
    """Return where a shard's record of an array of features lies."""
    return cache / commit_name(shard, array)


def commit_name(shard: int, array: str = HIDDEN) -> str:
    """Return the name of a shard's record in a cache: `commit_path` of a bucket, where there may be 200,000."""
    return f"{COMMITS}/{_name(shard, array)}"


def _name(shard: int, array: str) -> str:
    return f"{shard:06d}.json" if array == HIDDEN else f"{shard:06d}.{array}.json"


def read_commit(cache: Path, shard: int, manifest: Manifest) -> Commit | None:
    """Return a shard's record, or None if there is none; `CacheError` if it is damaged or of another cache."""
    path = commit_path(cache, shard, manifest.array)
    try:
        document = read_sealed(path)
    except CacheError:
        if not path.exists():
            return None
        raise
    return _of_this_cache(checked(document, Commit, path, _AGAIN), path, shard, manifest)


def parse_commit(content: bytes, path: Path, shard: int, manifest: Manifest) -> Commit:
    """Return the record that a file at `path` holds; `CacheError` if it is damaged or of another cache."""
    return _of_this_cache(checked(parse_sealed(content, path), Commit, path, _AGAIN), path, shard, manifest)


def reread_commit(content: str, shard: int, manifest: Manifest) -> Commit:
    """Return a record that `parse_commit` took before, its checksum not compared again: a tenth of the time.

    `CacheError` if it is not what this version reads, or of another cache.
    """
    path = commit_name(shard, manifest.array)
    try:
        return _of_this_cache(_DECODER.decode(content), path, shard, manifest)
    except msgspec.DecodeError as error:
        raise unlike(path, str(error), _AGAIN) from error


def _of_this_cache(commit: Commit, path: Path | str, shard: int, manifest: Manifest) -> Commit:
    if (commit.manifest, commit.shard) != (manifest.checksum, shard):
        raise CacheError(
            f"{path} belongs to shard {commit.shard} of the cache with manifest {commit.manifest}; "
            f"expected shard {shard} of {manifest.checksum}. {_AGAIN}"
        )
    if fault := _fault(commit, manifest):
        raise unlike(path, fault, _AGAIN)
    return commit


def _fault(commit: Commit, manifest: Manifest) -> str:
    """Return what of a record does not go with its cache, or an empty string."""
    shard, layer_ids = commit.shard, [layer.layer_id for layer in commit.layers]
    if commit.files.keys() != {*(wanted := shard_files(shard, manifest.array))}:
        return f"files are {', '.join(commit.files)[:200]!r}, expected {', '.join(wanted)}"
    if layer_ids != manifest.identity["layer_ids"]:
        return f"layers are {layer_ids[:100]}, expected {manifest.identity['layer_ids']}"
    if wrong := [skipped.sample for skipped in commit.skipped if skipped.sample >= manifest.plan["samples"]]:
        return f"skipped names sample {wrong[0]}, and there are {manifest.plan['samples']}"
    for name, text in (("started", commit.started), ("finished", commit.finished)):
        try:
            zone = datetime.fromisoformat(text).tzinfo
        except ValueError:
            zone = None
        if zone is None:
            return f"{name} is {text[:60]!r}, expected a time with its zone"
    return ""


def read_finished(cache: Path, shard: int, manifest: Manifest, *, with_files: bool = True) -> Commit | None:
    """Return a shard's record if its files are there, None without one; `CacheError` if either is damaged.

    Files are compared by size: quick on any cache. `dflash verify` reads them. `with_files` is false where only the
    record is here, and the files in a bucket.
    """
    commit = read_commit(cache, shard, manifest)
    if commit is not None and with_files:
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


def read_commits(
    cache: Path, manifest: Manifest, *, with_files: bool = True, known: Mapping[int, Commit] | None = None
) -> tuple[dict[int, Commit], list[str]]:
    """Return the finished shards' records, and one line for each record that is damaged or lacks its files.

    Those of `known` are taken as they are, and not read.
    """
    known = known or {}
    commits, faults = {}, []
    try:
        recorded = set(os.listdir(cache / COMMITS))  # noqa: PTH208 - one call, however many are left to do
    except FileNotFoundError:  # copies of a cache may lack empty folders
        recorded = set()
    # In one thread: most of the time goes into parsing, and threads only pass the interpreter back and forth.
    for shard in range(manifest.layout.num_shards):
        if shard in known:
            commits[shard] = known[shard]
            continue
        if _name(shard, manifest.array) not in recorded:
            continue
        try:
            commit = read_finished(cache, shard, manifest, with_files=with_files)
        except CacheError as error:
            faults.append(str(error))
            continue
        if commit is not None:
            commits[shard] = commit
    return commits, faults
