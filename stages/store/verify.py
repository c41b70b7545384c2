"""A cache checked against its manifest, its plan and its records; faulty shards are forgotten.

Of a cache in a bucket the static files are fetched anew, and a shard's objects as it is judged, into a folder of this
process's own; then all is judged as on disk.

Axes: T tokens, L captured layers, H hidden size.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dflash_offline.schemas.commits import Commit, commit_name, read_commit
from dflash_offline.schemas.errors import CacheError
from dflash_offline.schemas.files import NOT_THE_FILES
from dflash_offline.schemas.locks import locked
from dflash_offline.schemas.manifest import (
    ARRAYS,
    FEATURES,
    FINAL,
    FINAL_MANIFEST,
    FINAL_METADATA,
    HIDDEN,
    IDS,
    MANIFEST,
    MASK,
    OTHER_CONTENT,
    SAMPLES,
    Manifest,
    feature_file,
    file_fault,
    shard_files,
    token_file,
)
from dflash_offline.schemas.samples import SampleTable, count_anchors
from dflash_offline.stages.buckets.bundles import damaged_bundles, write_bundles
from dflash_offline.stages.buckets.mirror import Mirror, mirror_of
from dflash_offline.stages.buckets.publish import remove_attempts
from dflash_offline.stages.cores import usable_cores
from dflash_offline.stages.progress import Progress
from dflash_offline.stages.store.cache import Cache
from dflash_offline.stages.store.feature_ranges import Sums, agree, layer_statistics
from dflash_offline.stages.store.leftovers import claimed_lock
from dflash_offline.stages.store.object_commit import remove_aliens
from dflash_offline.stages.store.shard_file import read_one_chunk
from dflash_offline.stages.store.unexpected_files import UnexpectedFiles, unexpected_files

_MEND_FINAL = "Run `dflash verify --repair` on this cache, which removes it, then the `dflash extract --final`."
_AT_ONCE = 8
"""Shards verified side by side; each holds one sample's features in float32."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One thing that is wrong."""

    place: str
    """A file within the cache, or a shard."""
    what: str
    """What is wrong, and what to do about it where that is not to redo the shard."""
    shard: int | None = None
    """The shard that `extract` is to do; None if it cannot mend this."""
    missing: bool = False
    """Whether the shard has no record: it is yet to be extracted, and nothing of it is to be forgotten."""
    array: str = HIDDEN
    """What is wrong: the shard's hidden states, with its tokens, or its final ones."""


def verify_cache(cache: Path, progress: Progress, unexpected: UnexpectedFiles | None = None) -> list[Fault]:
    """Return every fault of a cache, in a folder or a mirror's: files against their records, chunks against their
    checksums, tokens against the plan, features against the recorded statistics, files that nobody knows. A shard that
    is not extracted is a fault too. Shards are judged unless the plan or the arrays' metadata are damaged. `unexpected`
    is what `unexpected_files` found, where it is known."""
    mirror = mirror_of(cache)
    if mirror is None:
        return list(_faults(cache, cache, None, progress, unexpected))
    with mirror.apart() as apart:
        found = _faults(apart.folder, cache, apart, progress, unexpected)
        return [replace(fault, what=fault.what.replace(str(apart.folder), str(cache))) for fault in found]


def _faults(
    folder: Path, cache: Path, apart: Mirror | None, progress: Progress, unexpected: UnexpectedFiles | None
) -> list[Fault]:
    """Return the faults of a cache whose files are in `folder`; of one in a bucket, those that `apart` brings there."""
    try:
        manifest = Manifest.read(folder)
    except CacheError as error:
        return [Fault(place=MANIFEST, what=str(error))]
    damaged = manifest.static_faults(folder)
    needed = [name for name, _ in damaged if name == SAMPLES or name.startswith(f"{FEATURES}/")]
    faults = [Fault(place=name, what=f"{what}; {_mend(name in needed)}") for name, what in damaged]
    faults += [
        Fault(place=name, what="is no file of this cache, and a reader may take it for one; move it elsewhere")
        for name in (unexpected or unexpected_files(cache, manifest)).misleading
    ]
    if apart is not None:
        faults += [
            Fault(place=name, what=f"is damaged ({what}), and its records are read one by one; --repair writes it anew")
            for array in _arrays(folder)
            for name, what in damaged_bundles(apart.bucket, replace(manifest, array=array)).items()
        ]
    if needed:
        return faults
    try:
        shards = _Shards(Cache(folder, manifest, whole=True), apart)
        faults += [Fault(place=SAMPLES, what=what) for what in _plan_faults(manifest, shards.cache.samples)]
    except CacheError as error:  # a file is as it was written, but not by this program
        return [*faults, Fault(place=MANIFEST, what=str(error))]
    parts = [shards]
    try:
        if (final := shards.cache.final) is not None:
            parts.append(_Shards(final, apart))
    except CacheError as error:
        faults.append(Fault(place=FINAL_MANIFEST, what=f"{error} {_MEND_FINAL}", array=FINAL))
    progress.start("Verifying", manifest.layout.num_shards * len(parts), "shards")
    with ThreadPoolExecutor(min(usable_cores(), _AT_ONCE), thread_name_prefix="verify") as pool:
        for part in parts:
            for of_shard in pool.map(part.faults, range(manifest.layout.num_shards)):
                faults += of_shard
                progress.advance(1, faults=len(faults))
    progress.finish()
    return faults


def repair(cache: Path, faults: list[Fault]) -> list[int]:
    """Forget the faulty shards, so that `extract` redoes just those; returns them.

    Each is judged again while it is locked: a worker that was at it finishes first, and what it wrote may be sound. In
    a bucket, objects that no worker of the cache has put are removed as well, for none is written over, and bundles of
    records are written where they are missing, damaged or of records that are gone. What says that there are final
    states is removed where it is damaged: `extract --final` writes the same again, and goes on with their records.
    """
    if any(fault.place == MANIFEST for fault in faults):
        return []  # nothing was judged
    mirror = mirror_of(cache)
    with nullcontext() if mirror is None else mirror.apart() as apart:
        whole = cache if apart is None else apart.folder
        if any(fault.place == FINAL_MANIFEST for fault in faults):
            for name in (FINAL_MANIFEST, FINAL_METADATA):
                if mirror is not None:
                    mirror.bucket.remove(name)
                for folder in {cache, whole}:
                    (folder / name).unlink(missing_ok=True)
        forgotten = set[int]()
        for array in _arrays(whole):
            of_array = [fault for fault in faults if fault.shard is not None and fault.array == array]
            faulty = {fault.shard for fault in of_array if fault.shard is not None and not fault.missing}
            missing = {fault.shard for fault in of_array if fault.shard is not None} - faulty
            if faulty:
                there = _of_array(Cache(cache), array)
                shards = _Shards(_of_array(Cache(whole, whole=True), array), apart)
                forgotten |= (gone := {shard for shard in sorted(faulty) if _forget(there, shards, shard)})
                missing |= gone
            if mirror is not None:
                remove_attempts(mirror.bucket)
                for shard in sorted(missing):
                    remove_aliens(_of_array(Cache(cache), array), shard)
                manifest = Manifest.read(whole)
                write_bundles(
                    mirror.bucket, manifest.final(whole) or manifest if array == FINAL else manifest, anew=True
                )
    return sorted(forgotten)


def _arrays(cache: Path) -> tuple[str, ...]:
    """Return the arrays of features that a cache says it has."""
    return ARRAYS if (cache / FINAL_MANIFEST).exists() else (HIDDEN,)


def _of_array(cache: Cache, array: str) -> Cache:
    """Return a cache, or its final states, which it has."""
    if array == HIDDEN:
        return cache
    assert cache.final is not None, "its shards were judged"
    return cache.final


def _forget(cache: Cache, shards: "_Shards", shard: int) -> bool:
    """Remove a shard's record if there is one and the shard is faulty; returns whether it was."""
    with locked(claimed_lock(cache.path, shard), wait=True) as held:
        is_faulty = held and any(not fault.missing for fault in shards.faults(shard))
        if is_faulty:
            cache.forget(shard)  # where there are no locks it may be gone
    return is_faulty


def _mend(is_needed: bool) -> str:
    """Return what to do about a damaged static file."""
    how = "restore it from a copy of this cache; without one, extract anew into a new folder"
    return f"{how}. Until then no shard can be judged" if is_needed else how


def _plan_faults(manifest: Manifest, samples: SampleTable) -> Iterator[str]:
    """Yield what is wrong with the plan's tokens: files that are as they were written may hold nothing to train on."""
    mask_token, rule = manifest.plan["mask_token_id"], manifest.anchor_rule
    wrong: dict[str, list[int]] = {"masked": [], "counted": [], "anchored": [], "holding": []}
    for sample in range(len(samples)):
        mask = samples.loss_mask(sample)
        num_supervised = int(np.count_nonzero(mask))
        if not num_supervised:
            wrong["masked"].append(sample)
        if num_supervised != samples.num_supervised[sample]:
            wrong["counted"].append(sample)
        if count_anchors(mask, rule) != samples.num_anchors[sample]:
            wrong["anchored"].append(sample)
        if (samples.input_ids(sample) == mask_token).any():
            wrong["holding"].append(sample)
    said = {
        "masked": "have no supervised token and train nothing; extract anew with another --mask, or mend the template",
        "counted": "have another number of supervised tokens than their row says; extract anew",
        "anchored": f"have another number of anchors for blocks of {rule.tokens} than their row says; extract anew",
        "holding": f"hold the mask token {mask_token}, which stands for what is to be drafted; extract anew without "
        f"--mask-token-id",
    }
    for kind, numbers in wrong.items():
        if numbers:
            yield f"{len(numbers):,} of {len(samples):,} samples, the first {numbers[0]}, {said[kind]}"
    totals = {
        "samples": len(samples),
        "tokens": samples.num_tokens.sum(),
        "supervised": samples.num_supervised.sum(),
        "anchors": samples.num_anchors.sum(),
    }
    for name, total in totals.items():
        if manifest.plan[name] != total:
            yield f"holds {total:,} {name}, the manifest says {manifest.plan[name]:,}; extract anew"


class _Shards:
    """The shards of a cache whose plan and zarr metadata are as they were written. Safe in threads.

    Nothing of a shard is remembered: it may be done anew at any time.
    """

    def __init__(self, cache: Cache, apart: Mirror | None) -> None:
        """`cache` is taken to be whole; `apart` brings a shard's files there from a bucket."""
        self.cache = cache
        self._mirror = apart
        self._columns = list(range(cache.layout.num_layers))
        self._array = cache.array

    def faults(self, shard: int) -> list[Fault]:
        """Return what is wrong with a shard."""
        if self._mirror is None:
            return self._faults(shard)
        names = [commit_name(shard, self._array), *shard_files(shard, self._array)]
        with self._mirror.fetched(names):
            return self._faults(shard)

    def _faults(self, shard: int) -> list[Fault]:
        place = commit_name(shard, self._array)
        try:
            commit = read_commit(self.cache.path, shard, self.cache.manifest)
        except CacheError as error:
            return [Fault(place=place, what=str(error), shard=shard, array=self._array)]
        if commit is None:
            what = "the shard is not extracted" if self._array == HIDDEN else "the shard has no final states"
            return [Fault(place=place, what=f"is missing: {what}", shard=shard, missing=True, array=self._array)]
        try:
            faults = list(self._file_faults(commit)) or list(self._content_faults(commit))
        except OSError as error:  # of a disk that gave the same file whole a moment before
            if error.errno in NOT_THE_FILES:
                raise
            faults = [(f"shard {shard}", f"cannot be read: {error}")]
        return [Fault(place=place, what=what, shard=shard, array=self._array) for place, what in faults]

    def _file_faults(self, commit: Commit) -> Iterator[tuple[str, str]]:
        for name, record in commit.files.items():
            if what := file_fault(self.cache.path / name, record.size, record.sha256):
                yield name, what + (self._sample_hit(commit, name) if what == OTHER_CONTENT else "")

    def _sample_hit(self, commit: Commit, name: str) -> str:
        """Name the first sample of a damaged shard whose features can no longer be read."""
        if name != feature_file(self._array, commit.shard):
            return ""
        place = "it"
        try:
            file = self.cache.open_shard(commit)
            for sample in self.cache.members(commit.shard, commit.skipped):
                place = self.cache.samples.place(sample)
                slots = self.cache.slots(sample)
                file.codes(slots.start, slots.stop - slots.start)
        except (CacheError, OSError) as error:
            return f"; {place} cannot be read: {error}"
        return "; all samples can still be read"

    def _content_faults(self, commit: Commit) -> Iterator[tuple[str, str]]:
        members, place = self.cache.members(commit.shard, commit.skipped), f"shard {commit.shard}"
        num_tokens = sum(int(np.count_nonzero(self.cache.stored(sample))) for sample in members)
        if (commit.num_samples, commit.num_tokens) != (len(members), num_tokens):
            yield (
                place,
                f"the record counts {commit.num_samples} samples, {commit.num_tokens} tokens; the plan {len(members)}, "
                f"{num_tokens}",
            )
        try:
            samples = self.cache.samples
            tokens = ((IDS, "<u4", samples.input_ids), (MASK, "?", samples.loss_mask))
            for name, dtype, wanted in tokens if self._array == HIDDEN else ():
                if fault := self._token_fault(commit, members, name, dtype, wanted):
                    yield place, fault
            yield from ((place, what) for what in self._feature_faults(commit, members))
        except CacheError as error:
            yield place, str(error)

    def _token_fault(
        self, commit: Commit, members: list[int], name: str, dtype: str, wanted: Callable[[int], NDArray[np.generic]]
    ) -> str:
        """Return what is wrong with the tokens or the mask of a shard, or an empty string; `CacheError` if neither."""
        file = token_file(name, commit.shard)
        stored = read_one_chunk(self.cache.path / file, commit.files[file], self.cache.layout.shard_tokens, dtype)
        for sample in members:
            slots = self.cache.slots(sample)
            if not np.array_equal(stored[slots], wanted(sample)):
                return f"{name} of {self.cache.samples.place(sample)} differs from the plan"
            stored[slots] = 0
        return f"{name} holds something in slots of no sample" if stored.any() else ""

    def _feature_faults(self, commit: Commit, members: list[int]) -> Iterator[str]:
        """Yield what is wrong with a shard's features; `CacheError` if they cannot be read."""
        layout, file = self.cache.layout, self.cache.open_shard(commit)
        is_free = np.ones(layout.shard_tokens, np.bool_)
        sums, strays = [Sums() for _ in self._columns], 0
        for sample in members:
            slots = self.cache.slots(sample)
            codes = file.codes(slots.start, slots.stop - slots.start)
            stored = np.zeros(len(codes), np.bool_)
            stored[: slots.stop - slots.start] = self.cache.stored(sample)
            own = codes[stored]
            strays += int((codes[~stored] != self.cache.codec.fill).any(axis=(1, 2)).sum())
            is_free[slots.start : slots.start + len(codes)] = False
            values = self.cache.codec.values(own, self._columns)
            sums = [layer + Sums.of(values[:, column]) for column, layer in enumerate(sums)]
        for begin in np.flatnonzero(is_free[:: layout.chunk_tokens]) * layout.chunk_tokens:
            codes = file.codes(int(begin), layout.chunk_tokens)
            strays += int((codes != self.cache.codec.fill).any(axis=(1, 2)).sum())
        if strays:
            where = "slots of no sample" if self._array == HIDDEN else "slots that are to hold none"
            yield f"{self._array} holds something else than fill in {strays:,} {where}"
        for have, want in zip(commit.layers, layer_statistics(sums, self.cache.layer_ids), strict=True):
            if not agree(have, want):
                yield f"statistics of layer {have.layer_id} are {want}, the record says {have}"
