"""An opened feature cache: what its small files say, and each sample's features, read from finished shards.

Axes: L captured layers, H hidden size.
"""

import resource
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property, partial
from pathlib import Path
from typing import Any
from weakref import WeakSet

import numpy as np
from numpy.typing import NDArray

from dflash_offline.schemas.commits import Commit, SkippedSample, commit_name, commit_path, read_commits, read_finished
from dflash_offline.schemas.errors import CacheError
from dflash_offline.schemas.manifest import (
    FEATURES,
    FINAL,
    FINAL_MANIFEST,
    FINAL_METADATA,
    HIDDEN,
    IDS,
    MASK,
    SAMPLES,
    Manifest,
    feature_file,
    token_file,
)
from dflash_offline.schemas.samples import SampleTable, Tokens, before_supervised
from dflash_offline.stages.buckets.bundles import list_records
from dflash_offline.stages.buckets.local_copy import LocalCopy
from dflash_offline.stages.buckets.mirror import Mirror, mirror_of, worked_on
from dflash_offline.stages.buckets.ranges import Kept, ObjectRanges
from dflash_offline.stages.cores import usable_cores
from dflash_offline.stages.store.array_metadata import check_final_metadata, check_metadata, read_scale
from dflash_offline.stages.store.codec import CENTER, STEP, FeatureCodec
from dflash_offline.stages.store.shard_file import Chunks, OpenFile, Ranges, ShardFile, ShardTokens, read_one_chunk

_MOST_OPEN = 1024
"""Shard files that a process keeps open, with their indexes, and never more than half of the files it may have open."""
_MOST_INDEX_BYTES = 256 << 20
"""Of the indexes of a bucket's shards that are kept."""
_FETCHED_AT_ONCE = 16
"""Samples that are fetched from a bucket ahead of their use."""
_caches: "WeakSet[Cache]" = WeakSet()
_opening = threading.Lock()
"""Held while shard files are opened or closed, and caches counted."""


class Cache:
    """One feature cache. The plan, the commit records, the codec and the shards are read when they are first used.

    Its features are the hidden states. Where the cache has the target's last hidden states, too, `final` is an object
    of this class for them: its array is `FINAL`, of one layer, with records of its own and the same plan. It is read as
    hidden states are (`codes`, `values`, `usable`, `require_complete`, `codec`), with L = 1.

    A cache in a bucket is worked on in a folder that mirrors its small files; its shards are read from the bucket. Safe
    in threads; a copy sent to a spawned process opens the cache anew.
    """

    def __init__(
        self, path: Path, manifest: Manifest | None = None, *, whole: bool = False, samples: SampleTable | None = None
    ) -> None:
        """Read the manifest, unless it is given; the other static files are taken to be as it says.

        `path` is a folder, or the URL of a bucket; with `whole`, a mirror's folder is taken for all of the cache.
        `samples` is the plan, where it was read before.
        `CacheError` unless the arrays' metadata are what is written for its layout.
        """
        self.path = path = worked_on(path)
        self.mirror = None if whole else mirror_of(path)
        """Of a cache in a bucket."""
        self.name = str(path) if self.mirror is None else self.mirror.url
        """As a user names the cache."""
        self.manifest = Manifest.read(path) if manifest is None else manifest
        self.layout = self.manifest.layout
        self.layer_ids: tuple[int, ...] = tuple(self.manifest.identity["layer_ids"])
        self.array = self.manifest.array
        """`HIDDEN`, or `FINAL`."""
        if self.array == FINAL:
            check_final_metadata(path / FEATURES, self.manifest)
        else:
            check_metadata(path / FEATURES, self.layout, self.layer_ids)
        self._whole, self._samples = whole, samples
        self._known: dict[int, Commit] = {}
        """The commit records that were read."""
        self._shards: OrderedDict[int, ShardFile] = OrderedDict()
        self.local_copy: LocalCopy | None = None
        """Where what is read from a bucket is kept on this machine; set before anything is read."""
        self.shard_tokens: ShardTokens | None = None
        """What tokens are read by where the plan's are too many to be held; set before anything is read."""
        with _opening:
            _caches.add(self)
        self._ahead: dict[tuple[int, ...], list[Future[Chunks]]] = {}
        """What is being fetched, by sample and columns."""
        self._changing_ahead = threading.Lock()
        self._fetchers = ThreadPoolExecutor(_FETCHED_AT_ONCE, thread_name_prefix="fetch")
        self._num_helpers = usable_cores() - 1
        self._decoders = ThreadPoolExecutor(max(1, self._num_helpers), thread_name_prefix="decode")

    @classmethod
    def open(cls, path: Path, *, hashed: bool = True) -> "Cache":
        """Return a cache whose static files have the sizes and, if `hashed`, the sha256 that its manifest lists."""
        cache = cls(path)
        cache.manifest.check_static_files(cache.path, hashed=hashed)
        return cache

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        """Pickle as the address alone: locks, threads and open files belong to one process."""
        return (_open_final if self.array == FINAL else partial(Cache.open, hashed=False)), (Path(self.name),)

    @cached_property
    def final(self) -> "Cache | None":
        """The target's last hidden state after its final norm, [T, H], of this cache; None if it has none.

        Softmax of the head's product with it is the target's distribution of the next token. Positions that stand
        before no supervised token hold fill, which decodes as NaN (`stored`): never compute with what is there. Its
        samples are those of this cache; a sample that has hidden states may be left out of it (`usable`).
        """
        if self.mirror is not None:
            for name in (FINAL_MANIFEST, FINAL_METADATA):
                self.mirror.pull_one(name)
        manifest = self.manifest.final(self.path)
        return None if manifest is None else Cache(self.path, manifest, whole=self._whole, samples=self.samples)

    def require_final(self) -> "Cache":
        """Return `final`, of every shard; `CacheError` with what adds it where there is none, or not all of it."""
        if self.final is None:
            raise CacheError(
                f"{self.name} has no final states, from which the target's distribution follows. Add them: repeat the "
                f"`dflash extract` that made it, with --final; the hidden states are not extracted again."
            )
        self.final.require_complete()
        return self.final

    @cached_property
    def samples(self) -> SampleTable:
        """The plan, its tokens still on disk."""
        if self._samples is not None:
            return self._samples
        samples = SampleTable.read(self.path / SAMPLES)
        samples.check(self.path / SAMPLES, self.manifest)
        return samples

    @cached_property
    def codec(self) -> FeatureCodec:
        """How features are stored, with the scales [L, H] of scaled ones."""
        features = self.layout.features
        if features.kind != "scaled":
            return FeatureCodec(features)
        center, step = (read_scale(self.path, name, self.layout) for name in (CENTER, STEP))
        return FeatureCodec(features, center, step)

    @cached_property
    def _records(self) -> tuple[dict[int, Commit], list[str]]:
        known = None if self.mirror is None else self.mirror.pull_records(self.manifest)
        commits, faults = read_commits(self.path, self.manifest, with_files=self.mirror is None, known=known)
        self._known.update(commits)
        return commits, faults

    @cached_property
    def recorded(self) -> frozenset[int]:
        """Shards with a record, as they were when first asked for; in a bucket, where records are not read for it,
        that of one may be damaged."""
        if self.mirror is None:
            return frozenset(self.commits)
        return frozenset(list_records(self.mirror.bucket, self.layout.num_shards, self.array))

    @property
    def commits(self) -> dict[int, Commit]:
        """The finished shards' records, as they were when first asked for."""
        return self._records[0]

    @property
    def faults(self) -> list[str]:
        """A line for each commit record that is damaged or lacks its files."""
        return self._records[1]

    @cached_property
    def skipped(self) -> frozenset[int]:
        """Samples without features: extraction was told to leave samples with bad features out."""
        return frozenset(sample.sample for commit in self.commits.values() for sample in commit.skipped)

    def require_complete(self) -> None:
        """Raise `CacheError` unless every shard is finished."""
        num_shards = self.layout.num_shards
        missing, is_final = num_shards - len(self.commits), self.array == FINAL
        if missing:
            raise CacheError(
                f"{self.path} is not complete: {missing} of {num_shards} shards "
                f"{'have no final states' if is_final else 'are not extracted'}"
                f"{f' ({self.faults[0]})' if self.faults else ''}. Repeat the `dflash extract` that made it"
                f"{', with --final,' if is_final else ''} to go on."
            )

    def usable(self) -> NDArray[np.int64]:
        """Return the samples that have features, in order: those of finished shards, without the skipped ones."""
        has_features = np.isin(self.samples.shard, list(self.commits))
        has_features[list(self.skipped)] = False
        return np.flatnonzero(has_features)

    def finished(self, shard: int) -> Commit | None:
        """Return a shard's record as it is now, if it is valid and the files have the recorded sizes, else None."""
        try:
            return self.record(shard)
        except CacheError:
            return None

    def record(self, shard: int) -> Commit | None:
        """Return a shard's record as it is now, None without one; `CacheError` if it is damaged.

        Files that are missing or of another size count as damage, but not in a bucket: there they are asked for as they
        are read.
        """
        if self.mirror is not None:
            self.mirror.pull_one(commit_name(shard, self.array))
        return read_finished(self.path, shard, self.manifest, with_files=self.mirror is None)

    def forget(self, shard: int) -> None:
        """Remove a shard's record, so that the shard does not exist for any reader."""
        if self.mirror is not None:
            self.mirror.bucket.remove(commit_name(shard, self.array))
        commit_path(self.path, shard, self.array).unlink(missing_ok=True)

    def is_done(self, shard: int) -> bool:
        """Say whether a shard is finished now."""
        return self.finished(shard) is not None

    def members(self, shard: int, skipped: Sequence[SkippedSample]) -> list[int]:
        """Return the samples of a shard, without those that were skipped."""
        left_out = {sample.sample for sample in skipped}
        return [sample for sample in self.samples.samples_of_shard(shard).tolist() if sample not in left_out]

    def slots(self, sample: int) -> slice:
        """Return where a sample lies in its shard."""
        begin = int(self.samples.start[sample]) % self.layout.shard_tokens
        return slice(begin, begin + int(self.samples.num_tokens[sample]))

    def stored(self, sample: int) -> NDArray[np.bool_]:
        """Return which positions of a sample that was not left out hold features, bool [num_tokens]."""
        if self.array == HIDDEN:
            return np.ones(int(self.samples.num_tokens[sample]), np.bool_)
        return before_supervised(self.samples.tokens.of(sample)[1])

    def open_shard(self, commit: Commit) -> ShardFile:
        """Return the features of a finished shard."""
        name = feature_file(self.array, commit.shard)
        record, path = commit.files[name], self.path / name
        ranges: Ranges = OpenFile(path) if self.mirror is None else self._object(self.mirror, name, record.sha256)
        return ShardFile(path, record, self.layout, self.layer_ids, ranges)

    def _object(self, mirror: Mirror, name: str, sha256: str) -> ObjectRanges:
        return ObjectRanges(mirror.bucket, name, self.local_copy, f"{self.copied_as}/{sha256[:32]}")

    @property
    def copied_as(self) -> str:
        """The cache's name in a local copy."""
        return self.manifest.checksum[:32]

    def _record(self, shard: int) -> Commit:
        """Return a finished shard's record, read alone if no other was asked for."""
        if shard not in self._known:
            commit = self.record(shard)
            if commit is None:
                what = "has no final states" if self.array == FINAL else "is not extracted"
                raise CacheError(f"Shard {shard} of {self.path} {what}. Repeat the `dflash extract`.")
            self._known[shard] = commit
        return self._known[shard]

    def _shard(self, shard: int) -> ShardFile:
        with _opening:
            if shard in self._shards:
                self._shards.move_to_end(shard)
                return self._shards[shard]
        opened = self.open_shard(self._record(shard))  # others open theirs meanwhile: a store takes its time
        with _opening:
            if shard not in self._shards:
                self._make_room()
                self._shards[shard] = opened
            return self._shards[shard]

    def _make_room(self) -> None:
        """Close shards until one more may be opened: files of all caches, or this one's indexes of objects."""
        if self.mirror is not None:
            index_bytes = 16 * self.layout.num_layers * (self.layout.shard_tokens // self.layout.chunk_tokens)
            while len(self._shards) >= max(1, _MOST_INDEX_BYTES // index_bytes):
                self._shards.popitem(last=False)
            return
        opened = [cache._shards for cache in _caches if cache.mirror is None]
        while sum(map(len, opened)) >= most_open_shards():
            max(opened, key=len).popitem(last=False)

    def ahead(self, sample: int, columns: list[int]) -> Future[Chunks] | None:
        """Begin to fetch a sample's features from a bucket, for the next `codes` of the same sample and columns.

        Returns what comes of it, to be given to `forget_ahead` if nobody asks for them; None for a local cache.
        """
        if self.mirror is None:
            return None
        future = self._fetchers.submit(self._chunks, sample, columns)
        with self._changing_ahead:
            self._ahead.setdefault((sample, *columns), []).append(future)
        return future

    def forget_ahead(self, sample: int, columns: list[int], future: Future[Chunks]) -> None:
        """Drop what was fetched ahead, unless it was asked for."""
        with self._changing_ahead:
            waiting = self._ahead.get((sample, *columns), [])
            if future in waiting:
                waiting.remove(future)
                future.cancel()

    def read_tokens(self, shard: int) -> Tokens:
        """Return the token ids and the mask of a finished shard, [shard_tokens] each; 0 in slots of no sample."""
        found, commit = [], self._record(shard)
        for array, dtype in ((IDS, "<u4"), (MASK, "?")):
            name = token_file(array, shard)
            content = None if self.mirror is None else self.mirror.bucket.read(name) or b""
            path = self.path / name
            found.append(read_one_chunk(path, commit.files[name], self.layout.shard_tokens, dtype, content))
        ids, mask = found
        return ids, mask

    def _chunks(self, sample: int, columns: list[int]) -> Chunks:
        shard = self._shard(int(self.samples.shard[sample]))
        if self.shard_tokens is not None:
            self.shard_tokens.of(int(self.samples.shard[sample]))  # read before they are asked for
        return shard.ahead(self.slots(sample).start, int(self.samples.num_tokens[sample]), columns)

    def _fetched(self, sample: int, columns: list[int]) -> Chunks | None:
        """Return what `ahead` has fetched, waiting for it; None if it was not asked."""
        with self._changing_ahead:
            waiting = self._ahead.get((sample, *columns), [])
            future = waiting.pop(0) if waiting else None
            if not waiting:
                self._ahead.pop((sample, *columns), None)
        return None if future is None else future.result()

    def codes(
        self, sample: int, columns: list[int] | None = None, out: NDArray[np.uint16] | None = None
    ) -> NDArray[np.uint16]:
        """Return a sample's features as they are stored, [num_tokens, L, H] uint16, checksums checked.

        `columns` chooses layers by their place in the cache; `out` (a pinned tensor's memory, for instance) receives
        the codes if given. `codec` makes features of them: on the device by `widen`, in numpy by `values`.
        """
        columns = list(range(self.layout.num_layers)) if columns is None else columns
        if out is None:
            out = np.empty((int(self.samples.num_tokens[sample]), len(columns), self.layout.hidden_size), np.uint16)
        shard = int(self.samples.shard[sample])
        for skipped in self._record(shard).skipped:
            if skipped.sample == sample:
                raise CacheError(f"{self.samples.place(sample)} was left out of {self.path}: {skipped.reason}.")
        file, start = self._shard(shard), self.slots(sample).start
        chunks = self._fetched(sample, columns) or file.ahead(start, len(out), columns)
        try:
            file.read(start, columns, out, self._decoders, self._num_helpers, chunks)
        except (CacheError, OSError):
            if not isinstance(chunks, Kept):
                raise
            chunks.forget()  # damaged on this machine, or thrown away just now
            file.read(start, columns, out, self._decoders, self._num_helpers)
        return out

    def values(self, sample: int) -> NDArray[np.float32]:
        """Return a sample's features as float32, [num_tokens, L, H]."""
        return self.codec.values(self.codes(sample), range(self.layout.num_layers))


def _open_final(path: Path) -> Cache:
    """Return the final states of a cache."""
    return Cache.open(path, hashed=False).require_final()


def most_open_shards() -> int:
    """Return how many shard files this process keeps open under its limit of open files; at least 1."""
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MOST_OPEN if allowed == resource.RLIM_INFINITY else max(1, min(_MOST_OPEN, allowed // 2))
