"""The feature cache on disk: created whole, filled shard by shard, read sample by sample.

Axes: T token slots, L captured layers, H hidden size.
"""

import os
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BloscCodec, Crc32cCodec

from dflash_offline.schemas.commits import (
    Commit,
    LayerStatistics,
    ShardFileRecord,
    commit_path,
    read_commits,
    read_finished,
)
from dflash_offline.schemas.errors import CacheError
from dflash_offline.schemas.files import locked, publish, sealed_bytes, sha256_file, sync_folder, write_synced
from dflash_offline.schemas.manifest import CAPTURE_RULE, COMMITS, FEATURES, MANIFEST, SAMPLES, TMP, Layout, Manifest
from dflash_offline.schemas.samples import SampleTable
from dflash_offline.stages.shards import BLOSC, ShardFile, encode_shard

NAN = 0x7FC0
"""bfloat16 bits of the fill value: zarr reads a missing shard as fill, so fill must not look like a feature."""
HIDDEN, IDS, MASK = "hidden_states", "input_ids", "loss_mask"


def create_arrays(folder: Path, layout: Layout, layer_ids: list[int]) -> None:
    """Write the zarr group's metadata; no shard exists yet."""
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
    create(
        HIDDEN,
        "uint16",
        item,
        (layout.chunk_tokens, 1, layout.hidden_size),
        NAN,
        logical_dtype="bfloat16",
        target_layer_ids=layer_ids,
        capture=CAPTURE_RULE,
        decode="each uint16 holds the bits of one bfloat16: float32 = (uint32(value) << 16) viewed as float32",
    )
    create(IDS, "uint32", (), (layout.shard_tokens,), 0, description="token ids; slots between samples hold 0")
    create(MASK, "bool", (), (layout.shard_tokens,), 0, description="true where the token is supervised")


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


class ShardWriter:
    """Checks, encodes and commits shards of one cache."""

    def __init__(self, cache: Path, manifest: Manifest, samples: SampleTable, layer_ids: tuple[int, ...]) -> None:
        self.cache = cache
        self.manifest = manifest
        self.samples = samples
        self.layer_ids = layer_ids
        self._encoders = ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="encode")

    def empty(self) -> NDArray[np.uint16]:
        """Return a shard buffer, [shard_tokens, L, H] uint16, filled with NaN."""
        layout = self.manifest.layout
        return np.full((layout.shard_tokens, layout.num_layers, layout.hidden_size), NAN, np.uint16)

    def is_done(self, shard: int) -> bool:
        """Say whether the shard has a valid commit record and files of the recorded sizes."""
        try:
            return read_finished(self.cache, shard, self.manifest.checksum) is not None
        except CacheError:
            return False

    @contextmanager
    def claim(self, shard: int, *, wait: bool) -> Iterator[bool]:
        """Hold the shard against other workers of this file system; yields whether it is ours and still to do."""
        lock = self.cache / TMP / f"{shard:06d}.lock"
        lock.touch()
        with locked(lock, wait=wait) as free:
            yield free and not self.is_done(shard)

    def commit(self, shard: int, hidden: NDArray[np.uint16], started: float) -> int:
        """Check and encode a claimed shard, write its files whole, then its record; returns the bytes written.

        `hidden` is [shard_tokens, L, H] uint16 (bfloat16 bits); slots between samples hold NaN.
        """
        members = self.samples.samples_of_shard(shard)
        layout = self.manifest.layout
        base = shard * layout.shard_tokens
        spans = (slice(begin := self.samples.start[i] - base, begin + self.samples.num_tokens[i]) for i in members)
        layers = layer_statistics(self.samples, members, (hidden[span] for span in spans), self.layer_ids)
        ids, mask = np.zeros(layout.shard_tokens, np.uint32), np.zeros(layout.shard_tokens, np.bool_)
        for sample in members:
            where = slice(self.samples.start[sample] - base, None)
            count = self.samples.num_tokens[sample]
            ids[where][:count] = self.samples.input_ids(sample)
            mask[where][:count] = self.samples.loss_mask(sample)
        arrays: list[tuple[str, NDArray[Any], tuple[int, ...]]] = [
            (f"{HIDDEN}/c/{shard}/0/0", hidden, (layout.chunk_tokens, 1, layout.hidden_size)),
            (f"{IDS}/c/{shard}", ids, (layout.shard_tokens,)),
            (f"{MASK}/c/{shard}", mask, (layout.shard_tokens,)),
        ]
        temporary = self.cache / TMP / f"{shard:06d}.part"
        files: dict[str, ShardFileRecord] = {}
        for name, values, chunk in arrays:
            encoded = encode_shard(values, chunk, self._encoders)
            publish(encoded.parts, temporary=temporary, path=self.cache / FEATURES / name)
            files[f"{FEATURES}/{name}"] = encoded.record
        record = Commit(
            shard=shard,
            manifest=self.manifest.checksum,
            num_samples=len(members),
            num_tokens=int(self.samples.num_tokens[members].sum()),
            files=files,
            layers=layers,
            worker=f"{socket.gethostname()}:{os.getpid()}",
            started=datetime.fromtimestamp(started, UTC).isoformat(timespec="milliseconds"),
            finished=datetime.fromtimestamp(time.time(), UTC).isoformat(timespec="milliseconds"),
        )
        publish([record.to_bytes()], temporary=temporary, path=commit_path(self.cache, shard))
        return sum(file.size for file in files.values())


def layer_statistics(
    samples: SampleTable, members: NDArray[np.int64], features: Iterable[NDArray[np.uint16]], layer_ids: Sequence[int]
) -> list[LayerStatistics]:
    """Return each layer's statistics over some samples' features, [tokens, L, H] uint16 each.

    Raises `CacheError` naming sample, layer and position for a value that is not finite or a layer that is constant.
    """
    num_layers = len(layer_ids)
    total, squares, zeros, largest = (np.zeros(num_layers) for _ in range(4))
    count = 0
    for sample, bits in zip(members.tolist(), features, strict=True):
        _refuse_bad_features(samples, sample, bits, layer_ids)
        values = widen(bits)
        total += values.sum(axis=(0, 2), dtype=np.float64)
        squares += np.square(values).sum(axis=(0, 2), dtype=np.float64)
        zeros += (values == 0).sum(axis=(0, 2))
        largest = np.maximum(largest, np.abs(values).max(axis=(0, 2)))
        count += values.shape[0] * values.shape[2]
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 0))
    return [
        LayerStatistics(
            layer_id=layer_id,
            mean=float(mean[i]),
            std=float(std[i]),
            max_abs=float(largest[i]),
            zeros=float(zeros[i] / count),
        )
        for i, layer_id in enumerate(layer_ids)
    ]


def _refuse_bad_features(samples: SampleTable, sample: int, bits: NDArray[np.uint16], layer_ids: Sequence[int]) -> None:
    advice = "Check the target's dtype and attention implementation."
    infinite = (bits & 0x7F80) == 0x7F80
    if infinite.any():
        token, layer, _ = (int(axis[0]) for axis in np.nonzero(infinite))
        raise CacheError(
            f"{samples.place(sample)} has a feature that is not finite at layer {layer_ids[layer]}, position {token}. "
            f"{advice}"
        )
    constant = (bits == bits[:1, :, :1]).all(axis=(0, 2))
    if constant.any():
        layer = int(np.flatnonzero(constant)[0])
        raise CacheError(
            f"{samples.place(sample)} has the same feature value everywhere at layer {layer_ids[layer]}, positions 0 "
            f"to {len(bits) - 1}: the layer is dead. {advice}"
        )


def widen(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Return the float32 values of bfloat16 bits."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


class CacheReader:
    """Samples and their features, read from finished shards. Opens nothing before it is asked for; safe in threads."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self.manifest = Manifest.read(cache)
        self.manifest.check_static_files(cache)
        self.samples = SampleTable.read(cache / SAMPLES)
        self.layer_ids = tuple(self.manifest.identity["layer_ids"])
        layout = self.manifest.layout
        self.commits, self.faults = read_commits(cache, layout.num_shards, self.manifest.checksum)
        self._shards: dict[int, ShardFile] = {}
        self._lock = threading.Lock()

    def require_complete(self) -> None:
        """Raise `CacheError` unless every shard is finished."""
        missing = self.manifest.layout.num_shards - len(self.commits)
        if missing:
            raise CacheError(
                f"{self.cache} is not complete: {missing} of {self.manifest.layout.num_shards} shards are not extracted"
                f"{f' ({self.faults[0]})' if self.faults else ''}. Repeat the `dflash extract` that made it to go on."
            )

    def _shard(self, shard: int) -> ShardFile:
        with self._lock:
            if shard not in self._shards:
                layout = self.manifest.layout
                name = f"{FEATURES}/{HIDDEN}/c/{shard}/0/0"
                self._shards[shard] = ShardFile(
                    self.cache / name,
                    self.commits[shard].files[name],
                    (layout.shard_tokens, layout.num_layers, layout.hidden_size),
                    layout.chunk_tokens,
                )
            return self._shards[shard]

    def read_hidden(
        self, sample: int, columns: list[int] | None = None, out: NDArray[np.uint16] | None = None
    ) -> NDArray[np.uint16]:
        """Return a sample's features, [num_tokens, L, H] uint16 holding bfloat16 bits, checksums checked.

        `columns` chooses layers by their place in the cache; `out` receives the values if given.
        """
        layout = self.manifest.layout
        columns = list(range(layout.num_layers)) if columns is None else columns
        if out is None:
            out = np.empty((int(self.samples.num_tokens[sample]), len(columns), layout.hidden_size), np.uint16)
        shard = int(self.samples.shard[sample])
        self._shard(shard).read(int(self.samples.start[sample]) - shard * layout.shard_tokens, columns, out)
        return out
