"""Records of finished shards of a bucket, a thousand in one object, so that a reader asks for few objects.

The records remain the truth. A bundle holds copies of them, each with the entity tag that it was read with; a reader
lists the records, and takes a copy only of one that is listed with the same tag, which an object of other content
cannot have. So a bundle neither hides a record nor stands for one that is gone or was made anew, whoever wrote it and
when; without it, or where it is damaged, records are read one by one.
"""

import random
from collections.abc import Mapping
from pathlib import Path

import msgspec
import zstandard

from dflash_offline.schemas.commits import Commit, commit_name, commit_path, parse_commit, reread_commit
from dflash_offline.schemas.errors import CacheError
from dflash_offline.schemas.files import sha256_bytes
from dflash_offline.schemas.manifest import COMMITS, HIDDEN, Manifest
from dflash_offline.stages.buckets.bucket import SMALL_AT_ONCE, Bucket, Listed, in_parallel

BUNDLES = "bundles"
BUNDLE_SHARDS = 1000
"""Shards of a bundle: those of a page of a list. A cache with fewer has none."""
_MOST_BYTES = 256 << 20
"""Of the records in a bundle."""
_SHA_BYTES = 64


class _Copy(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A record as it was read."""

    e_tag: str
    content: str


_COPIES = msgspec.json.Decoder(dict[int, _Copy])  # made before there are threads, see `checked`


class DamagedBundleError(ValueError):
    """A bundle does not hold what was written."""


def bundle_name(number: int, array: str = HIDDEN) -> str:
    """Return the name of the bundle of an array's shards `number * BUNDLE_SHARDS` and on."""
    return f"{BUNDLES}/{number:06d}" if array == HIDDEN else f"{BUNDLES}/{number:06d}.{array}"


def bundle_names(manifest: Manifest) -> list[str]:
    """Return the names of all bundles that a cache can have: a last range of fewer shards has none."""
    return [bundle_name(number, manifest.array) for number in range(manifest.layout.num_shards // BUNDLE_SHARDS)]


def list_records(bucket: Bucket, num_shards: int, array: str = HIDDEN) -> dict[int, Listed]:
    """Return an array's records that are in a bucket, by shard; pages of the list are asked for side by side."""
    names = {commit_name(shard, array): shard for shard in range(num_shards)}
    cuts = [*names][BUNDLE_SHARDS - 1 : -1 : BUNDLE_SHARDS]
    return {names[name]: one for name, one in bucket.names(COMMITS, cuts).items() if name in names}


def bundled_commits(content: bytes, manifest: Manifest, listed: Mapping[int, Listed]) -> dict[int, Commit]:
    """Return the records that a bundle holds as they are listed; `DamagedBundleError` if it is damaged."""
    commits = {}
    for shard, copy in _unpack(content).items():
        one = listed.get(shard)
        if one is None or one.e_tag != copy.e_tag or one.size != len(copy.content.encode()):
            continue  # gone, or made anew
        try:
            commits[shard] = reread_commit(copy.content, shard, manifest)
        except CacheError:  # it is read by itself, and then told of
            continue
    return commits


def damaged_bundles(bucket: Bucket, manifest: Manifest) -> dict[str, str]:
    """Return what is wrong with each damaged bundle, by its name."""
    there = bucket.names(BUNDLES)

    def fault(name: str) -> str:
        try:
            _unpack(bucket.read(name) or b"")
        except DamagedBundleError as error:
            return str(error)
        return ""

    names = [name for name in bundle_names(manifest) if name in there]
    return {name: what for name, what in zip(names, in_parallel(fault, names), strict=True) if what}


def write_bundles(bucket: Bucket, manifest: Manifest, *, anew: bool = False) -> list[str]:
    """Put the bundles that are missing of ranges all of whose shards have sound records; returns their names.

    Several processes share the work, each in an order of its own. With `anew`, a bundle that is damaged, or lacks a
    record as it is now, is removed first.
    """
    if not (names := bundle_names(manifest)):
        return []
    listed = list_records(bucket, manifest.layout.num_shards, manifest.array)
    there = bucket.names(BUNDLES)
    written = []
    for number in random.sample(range(len(names)), len(names)):
        name, shards = names[number], range(number * BUNDLE_SHARDS, (number + 1) * BUNDLE_SHARDS)
        if not all(shard in listed for shard in shards):
            continue
        if name in there and not (anew and _is_stale(bucket, name, manifest, listed, shards)):
            continue
        if bucket.size(name) is None:  # nobody was first
            content = _pack(bucket, manifest, shards)
            if content is not None and bucket.create(name, content):
                written.append(name)
    return sorted(written)


def _is_stale(bucket: Bucket, name: str, manifest: Manifest, listed: Mapping[int, Listed], shards: range) -> bool:
    """Remove a bundle that does not hold all of these records as they are listed; returns whether it did not."""
    try:
        if bundled_commits(bucket.read(name) or b"", manifest, listed).keys() == {*shards}:
            return False
    except DamagedBundleError:
        pass
    bucket.remove(name)
    return True


def _pack(bucket: Bucket, manifest: Manifest, shards: range) -> bytes | None:
    """Return a bundle of these shards' records as they are now; None if one is gone, damaged or has no tag."""

    def copied(shard: int) -> _Copy | None:
        path = commit_path(Path(), shard, manifest.array)
        content, e_tag = bucket.read_tagged(str(path)) or (b"", None)
        try:
            parse_commit(content, path, shard, manifest)
        except CacheError:
            return None
        return None if e_tag is None else _Copy(e_tag, content.decode())

    copies = in_parallel(copied, shards, SMALL_AT_ONCE)
    if any(copy is None for copy in copies):
        return None
    packed = zstandard.compress(msgspec.json.encode(dict(zip(map(str, shards), copies, strict=True))))
    return sha256_bytes(packed).encode() + packed


def _unpack(content: bytes) -> dict[int, _Copy]:
    claimed, packed = content[:_SHA_BYTES], content[_SHA_BYTES:]
    if sha256_bytes(packed).encode() != claimed:
        raise DamagedBundleError("it has another sha256 than when it was written")
    try:
        if not 0 < zstandard.frame_content_size(packed) <= _MOST_BYTES:
            raise DamagedBundleError(f"it says that it holds {zstandard.frame_content_size(packed):,} bytes")
        return _COPIES.decode(zstandard.decompress(packed))
    except (zstandard.ZstdError, msgspec.DecodeError) as error:
        raise DamagedBundleError(str(error)) from error
