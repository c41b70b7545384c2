"""A shard committed in a bucket, where no lock keeps workers apart.

Each of a shard's objects is made only if there is none of its name, and none is written over: the hidden states first,
which decide the shard, then the token ids and the mask, which follow from the plan and from the samples that have
hidden states, and the record last. Who finds an object made before goes on with that one: the record says what is
there, whoever writes it. So no order of several workers' writes, and no worker's death, leaves a record beside objects
that are not its own; and what a dead worker has put is used, not in the way. Only `dflash verify --repair` removes
objects.

Axes: T token slots, L captured layers, H hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dflash_offline.schemas.commits import ShardFileRecord, SkippedSample
from dflash_offline.schemas.errors import CacheError
from dflash_offline.schemas.files import sha256_bytes, sha256_file, write_synced
from dflash_offline.schemas.manifest import FINAL, IDS, MASK, feature_file, shard_files, token_file
from dflash_offline.stages.buckets.bucket import Bucket
from dflash_offline.stages.store.cache import Cache
from dflash_offline.stages.store.chunks import CRC_BYTES
from dflash_offline.stages.store.feature_ranges import Sums
from dflash_offline.stages.store.leftovers import part_path
from dflash_offline.stages.store.shard_file import ShardFile, one_chunk, read_one_chunk

_TRIES = 5
"""Times that an object is put which seems to be there and then is not."""
_LEFT_OUT = "left out by a worker that ended before it recorded why"
_ALIEN = "was put by no worker of this cache, or is damaged: {}. Run `dflash verify --repair`, and repeat the command."


@dataclass(frozen=True)
class Hidden:
    """The hidden states of a shard as they lie in its cache."""

    record: ShardFileRecord
    sums: Sequence[Sums]
    """Of each layer's features."""
    skipped: list[SkippedSample]


def put_hidden(cache: Cache, shard: int, path: Path, own: Hidden) -> Hidden:
    """Put a shard's hidden states, a file at `path`, unless some are there; returns those that are there.

    `CacheError` if what is there is no shard of this cache.
    """
    bucket, name = _bucket(cache), feature_file(cache.array, shard)
    if _is_put(bucket, name, path):
        return own
    if sha256_file(path) == own.record.sha256:
        return own
    try:
        return _as_found(cache, shard, path, own.skipped)
    except CacheError as error:
        raise CacheError(f"{bucket.url}/{name} {_ALIEN.format(error)}") from error


def put_tokens(cache: Cache, name: str, values: NDArray[np.generic], temporary: Path) -> ShardFileRecord:
    """Put one number for each token slot of a shard, [T], unless they are there; returns the record of what is there.

    `CacheError` if what is there are other numbers.
    """
    bucket, (pieces, summary) = _bucket(cache), one_chunk(values)
    temporary.unlink(missing_ok=True)
    record = summary.record(write_synced(temporary, pieces))
    if _is_put(bucket, name, temporary) or sha256_file(temporary) == record.sha256:
        return record
    try:
        return _tokens_as_found(name, values, temporary)
    except CacheError as error:
        raise CacheError(f"{bucket.url}/{name} {_ALIEN.format(error)}") from error


def _tokens_as_found(name: str, values: NDArray[np.generic], path: Path) -> ShardFileRecord:
    """Return the record of a file that holds these numbers as another worker has encoded them; `CacheError` if not."""
    record = file_record(path, 1)
    if not np.array_equal(read_one_chunk(path, record, len(values), values.dtype), values):
        raise CacheError(f"{name} holds other numbers than the plan")
    return record


def remove_aliens(cache: Cache, shard: int) -> None:
    """Remove the objects of a shard without a record that no worker could go on with; no other repair is under way.

    The hidden states go last, for while they are there no worker puts anything; where there are none, something that is
    no shard stands for them meanwhile.
    """
    bucket, (name, *token_names) = _bucket(cache), shard_files(shard, cache.array)
    there = [token_name for token_name in token_names if bucket.size(token_name) is not None]
    if bucket.size(name) is None:
        if not there or not bucket.create(name, b"removed by dflash verify --repair"):
            return
        bucket.remove(*there, name)
        return
    temporary = part_path(cache.path, shard)
    try:
        bucket.fetch(name, temporary)
        skipped = _as_found(cache, shard, temporary, ()).skipped
    except CacheError:
        bucket.remove(*there, name)
        return
    finally:
        temporary.unlink(missing_ok=True)
    for token_name, values in token_arrays(cache, shard, skipped).items():
        try:
            if token_name in there:
                bucket.fetch(token_name, temporary)
                _tokens_as_found(token_name, values, temporary)
        except CacheError:
            bucket.remove(token_name)
        finally:
            temporary.unlink(missing_ok=True)


def token_arrays(cache: Cache, shard: int, skipped: Sequence[SkippedSample]) -> dict[str, NDArray[Any]]:
    """Return a shard's token ids and its mask, [T] each, by the names of their files; nothing of final states."""
    if cache.array == FINAL:
        return {}
    num_slots = cache.layout.shard_tokens
    ids, mask = np.zeros(num_slots, np.uint32), np.zeros(num_slots, np.bool_)
    for sample in cache.members(shard, skipped):
        slots = cache.slots(sample)
        ids[slots], mask[slots] = cache.samples.tokens.of(sample)
    return {token_file(IDS, shard): ids, token_file(MASK, shard): mask}


def _bucket(cache: Cache) -> Bucket:
    assert cache.mirror is not None, "a cache in a bucket"
    return cache.mirror.bucket


def _is_put(bucket: Bucket, name: str, path: Path) -> bool:
    """Put a file as a new object; where there is one, let the file hold that one's content, and return False."""
    for _ in range(_TRIES):
        if bucket.create(name, path):
            return True
        there = path.with_suffix(".there")
        there.unlink(missing_ok=True)
        try:
            if bucket.fetch(name, there):
                there.replace(path)
                return False
        finally:
            there.unlink(missing_ok=True)
    raise CacheError(f"{bucket.url}/{name} comes and goes; something else writes and removes objects there.")


def file_record(path: Path, num_chunks: int) -> ShardFileRecord:
    """Return the record of a shard file of which none is known; `CacheError` if it has no index of so many chunks."""
    content = path.read_bytes()
    index = np.frombuffer(content[-16 * num_chunks - CRC_BYTES : -CRC_BYTES], np.uint8)
    if len(index) != 16 * num_chunks:
        raise CacheError(f"it has {len(content):,} bytes, no room for the index of {num_chunks:,} chunks")
    begin, size = index[:16].view("<u8").tolist()
    return ShardFileRecord(
        size=len(content),
        sha256=sha256_bytes(content),
        index_crc32c=int.from_bytes(content[-CRC_BYTES:], "little"),
        first_chunk_crc32c=int.from_bytes(content[begin : begin + size][-CRC_BYTES:], "little"),
    )


def _as_found(cache: Cache, shard: int, path: Path, skipped: Sequence[SkippedSample]) -> Hidden:
    """Return what a file of another worker's holds, all of it read; `CacheError` if it is no such shard.

    `skipped` are the samples that this worker leaves out, and why.
    """
    layout = cache.layout
    record = file_record(path, layout.shard_tokens // layout.chunk_tokens * layout.num_layers)
    file = ShardFile(path, record, layout, cache.layer_ids)
    sums, known = [Sums()] * layout.num_layers, {sample.sample: sample for sample in skipped}
    left_out = []
    for sample in cache.samples.samples_of_shard(shard).tolist():
        slots = cache.slots(sample)
        codes = file.codes(slots.start, slots.stop - slots.start)[: slots.stop - slots.start]
        if not (stored := cache.stored(sample)).all():
            if (codes[~stored] != cache.codec.fill).any():
                raise CacheError(f"sample {sample} has final states where none are kept")
            codes = codes[stored]
        if len(codes) and (codes == cache.codec.fill).all():
            nowhere = SkippedSample(sample=sample, reason=_LEFT_OUT, layer_id=cache.layer_ids[0], position=0)
            left_out.append(known.get(sample, nowhere))
            continue
        if len(codes) and cache.codec.holds_fill(codes):
            raise CacheError(f"sample {sample} has features that are missing or not finite")
        values = cache.codec.values(codes, range(layout.num_layers))
        sums = [layer + Sums.of(values[:, column]) for column, layer in enumerate(sums)]
    return Hidden(record, sums, left_out)
