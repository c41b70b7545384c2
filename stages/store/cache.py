"""The feature cache on disk: created whole, read sample by sample. `writer.py` fills it shard by shard.

Axes: T token slots, L captured layers, H hidden size.
"""

import os
import resource
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakSet

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BloscCodec, Crc32cCodec

from dflash_offline.schemas.commits import read_commits
from dflash_offline.schemas.errors import CacheError
from dflash_offline.schemas.files import sealed_bytes, sha256_file, sync_folder, write_synced
from dflash_offline.schemas.manifest import (
    CAPTURE_RULE,
    COMMITS,
    FEATURES,
    HIDDEN,
    IDS,
    MANIFEST,
    MASK,
    SAMPLES,
    TMP,
    Layout,
    Manifest,
)
from dflash_offline.schemas.samples import SampleTable
from dflash_offline.stages.cores import usable_cores
from dflash_offline.stages.store.codec import FeatureCodec
from dflash_offline.stages.store.shard_file import BLOSC, ShardFile, open_shard

CENTER, STEP = "feature_center", "feature_step"
_MOST_OPEN = 1024
"""Shard files that a process keeps open, with their indexes, and never more than half of the files it may have open."""
_readers: "WeakSet[CacheReader]" = WeakSet()
_opening = threading.Lock()
"""Held while shard files are opened or closed, and readers counted."""


def create_arrays(
    folder: Path,
    layout: Layout,
    layer_ids: list[int],
    scales: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None,
) -> None:
    """Write the zarr group's metadata, and the scales [L, H] of scaled features; no shard exists yet."""
    group = zarr.create_group(folder, zarr_format=3, attributes={"format": "dflash-features"})

    def create(
        name: str, dtype: str, item: tuple[int, ...], chunk: tuple[int, ...], fill: int, **attributes: Any
    ) -> None:
        codec = BloscCodec(
            cname=BLOSC["cname"],
            clevel=BLOSC["clevel"],
            shuffle=BLOSC["shuffle"],
            blocksize=BLOSC["blocksize"],
            typesize=np.dtype(dtype).itemsize,
        )
        group.create_array(
            name,
            shape=(layout.num_slots, *item),
            shards=(layout.shard_tokens, *item),
            chunks=chunk,
            dtype=dtype,
            compressors=[codec, Crc32cCodec()],
            fill_value=fill,
            dimension_names=["token", "layer", "feature"][: 1 + len(item)],
            attributes=attributes,
            config={"write_empty_chunks": True},
        )

    item = (layout.num_layers, layout.hidden_size)
    chunk = (layout.chunk_tokens, 1, layout.hidden_size)
    codec = FeatureCodec(layout.features)
    known = {"target_layer_ids": layer_ids, "capture": CAPTURE_RULE}
    create(HIDDEN, "uint16", item, chunk, codec.fill, **known, **codec.attributes())
    create(IDS, "uint32", (), (layout.shard_tokens,), 0, description="token ids; slots between samples hold 0")
    create(MASK, "bool", (), (layout.shard_tokens,), 0, description="true where the token is supervised")
    for name, values in zip((CENTER, STEP), scales or (), strict=False):
        group.create_array(name, data=values, dimension_names=["layer", "feature"])


def publish_cache(folder: Path, cache: Path, **manifest: Any) -> bool:
    """Seal the static files in `folder` with a manifest and rename it to `cache`.

    Returns False, with nothing changed, if another process published first.
    """
    (folder / COMMITS).mkdir()
    (folder / TMP).mkdir()
    names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    files = {name: {"size": (folder / name).stat().st_size, "sha256": sha256_file(folder / name)} for name in names}
    document = Manifest(files=files, **manifest).to_json()
    write_synced(folder / MANIFEST, [sealed_bytes(document)])
    for path in folder.rglob("*"):
        if path.is_dir():
            sync_folder(path)
        else:
            with path.open("rb") as file:
                os.fsync(file.fileno())
    sync_folder(folder)
    try:
        folder.rename(cache)
    except OSError:  # not empty: somebody was first
        if (cache / MANIFEST).exists():
            return False
        raise
    sync_folder(cache.parent)
    return True


def open_codec(cache: Path, manifest: Manifest) -> FeatureCodec:
    """Return how this cache's features are stored, its scales read if it has any."""
    if manifest.layout.features.kind != "scaled":
        return FeatureCodec(manifest.layout.features)
    group = zarr.open_group(str(cache / FEATURES), mode="r")
    center, step = (np.asarray(group[name][:], np.float32) for name in (CENTER, STEP))  # type: ignore[index]
    return FeatureCodec(manifest.layout.features, center, step)


def most_open_shards() -> int:
    """Return how many shard files this process keeps open under its limit of open files; at least 1."""
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MOST_OPEN if allowed == resource.RLIM_INFINITY else max(1, min(_MOST_OPEN, allowed // 2))


def _make_room() -> None:
    """Close shard files of the readers with most of them until one more may be opened."""
    held = [reader._shards for reader in _readers]
    while sum(map(len, held)) >= most_open_shards():
        max(held, key=len).popitem(last=False)


class CacheReader:
    """Samples and their features, read from finished shards.

    Opens no shard before it is asked for one of its samples. Safe in threads; a copy sent to a spawned process opens
    the cache anew.
    """

    def __init__(self, cache: Path, *, hashed: bool = True) -> None:
        """`hashed` compares the static files' sha256, not their sizes alone."""
        self.cache = cache
        self.manifest = Manifest.read(cache)
        self.manifest.check_static_files(cache, hashed=hashed)
        self.samples = SampleTable.read(cache / SAMPLES)
        self.layer_ids = tuple(self.manifest.identity["layer_ids"])
        self.codec = open_codec(cache, self.manifest)
        layout = self.manifest.layout
        self.commits, self.faults = read_commits(cache, layout.num_shards, self.manifest.checksum)
        self.skipped = frozenset(one.sample for commit in self.commits.values() for one in commit.skipped)
        """Samples without features: extraction was told to leave samples with bad features out."""
        self._shards: OrderedDict[int, ShardFile] = OrderedDict()
        with _opening:
            _readers.add(self)
        self._num_helpers = usable_cores() - 1
        self._decoders = ThreadPoolExecutor(max(1, self._num_helpers), thread_name_prefix="decode")

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        """Pickle as the folder alone: locks, threads and open files belong to one process."""
        return partial(CacheReader, hashed=False), (self.cache,)

    def require_complete(self) -> None:
        """Raise `CacheError` unless every shard is finished."""
        missing = self.manifest.layout.num_shards - len(self.commits)
        if missing:
            raise CacheError(
                f"{self.cache} is not complete: {missing} of {self.manifest.layout.num_shards} shards are not extracted"
                f"{f' ({self.faults[0]})' if self.faults else ''}. Repeat the `dflash extract` that made it to go on."
            )

    def usable(self) -> NDArray[np.int64]:
        """Return the samples that have features, in order: those of finished shards, without the skipped ones."""
        finished = np.isin(self.samples.shard, list(self.commits))
        finished[list(self.skipped)] = False
        return np.flatnonzero(finished)

    def _shard(self, shard: int) -> ShardFile:
        with _opening:
            if shard not in self._shards:
                if shard not in self.commits:
                    raise CacheError(f"Shard {shard} of {self.cache} is not extracted. Repeat the `dflash extract`.")
                _make_room()
                self._shards[shard] = open_shard(self.cache, self.manifest, self.commits[shard])
            self._shards.move_to_end(shard)
            return self._shards[shard]

    def read_codes(
        self, sample: int, columns: list[int] | None = None, out: NDArray[np.uint16] | None = None
    ) -> NDArray[np.uint16]:
        """Return a sample's features as they are stored, [num_tokens, L, H] uint16, checksums checked.

        `columns` chooses layers by their place in the cache; `out` (a pinned tensor's memory, for instance) receives
        the codes if given. `codec` makes features of them: on the device by `widen`, in numpy by `values`.
        """
        layout = self.manifest.layout
        columns = list(range(layout.num_layers)) if columns is None else columns
        if out is None:
            out = np.empty((int(self.samples.num_tokens[sample]), len(columns), layout.hidden_size), np.uint16)
        if sample in self.skipped:
            raise CacheError(f"{self.samples.place(sample)} was left out of {self.cache}: its features were bad.")
        shard = int(self.samples.shard[sample])
        start = int(self.samples.start[sample]) - shard * layout.shard_tokens
        self._shard(shard).read(start, columns, out, self._decoders, self._num_helpers)
        return out

    def read_values(self, sample: int, columns: list[int] | None = None) -> NDArray[np.float32]:
        """Return a sample's features as float32, [num_tokens, L, H]."""
        columns = list(range(self.manifest.layout.num_layers)) if columns is None else columns
        return self.codec.values(self.read_codes(sample, columns), columns)
