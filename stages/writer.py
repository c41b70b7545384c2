"""Shards of one cache: claimed, checked, encoded, written whole, and recorded last.

Axes: T token slots, L captured layers, H hidden size.
"""

import os
import socket
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dflash_offline.schemas.commits import Commit, ShardFileRecord, SkippedSample, commit_path, read_finished
from dflash_offline.schemas.errors import CacheError
from dflash_offline.schemas.files import locked, publish
from dflash_offline.schemas.manifest import FEATURES, TMP, Manifest
from dflash_offline.schemas.samples import SampleTable
from dflash_offline.stages.cache import HIDDEN, IDS, MASK
from dflash_offline.stages.cores import usable_cores
from dflash_offline.stages.features import FeatureCodec
from dflash_offline.stages.shards import EncodedShard, chunk_slices, encode_chunk, join_chunks
from dflash_offline.stages.statistics import Sums, layer_statistics


class ShardWriter:
    """Checks, encodes and commits shards of one cache."""

    def __init__(self, cache: Path, manifest: Manifest, samples: SampleTable, codec: FeatureCodec) -> None:
        self.cache = cache
        self.manifest = manifest
        self.samples = samples
        self.codec = codec
        self.layer_ids: list[int] = manifest.identity["layer_ids"]
        self._encoders = ThreadPoolExecutor(usable_cores(), thread_name_prefix="encode")

    def finished(self, shard: int) -> Commit | None:
        """Return the shard's record if it is valid and the files have the recorded sizes, else None."""
        try:
            return read_finished(self.cache, shard, self.manifest.checksum)
        except CacheError:
            return None

    def is_done(self, shard: int) -> bool:
        """Say whether the shard is finished."""
        return self.finished(shard) is not None

    @contextmanager
    def claim(self, shard: int, *, wait: bool) -> Iterator[bool]:
        """Hold the shard against other workers of this file system; yields whether it is ours and still to do."""
        lock = self.cache / TMP / f"{shard:06d}.lock"
        lock.touch()
        with locked(lock, wait=wait) as free:
            yield free and not self.is_done(shard)

    def commit(
        self, shard: int, codes: NDArray[np.uint16], skipped: Sequence[SkippedSample] = (), started: float | None = None
    ) -> int:
        """Check and encode a claimed shard, write its files whole, then its record; returns the bytes written.

        `codes` is [shard_tokens, L, H] uint16; slots between samples, and those of skipped samples, hold the fill
        value. If another worker has finished the shard meanwhile, where locks do not reach, its record wins: nothing
        is written and 0 returned.
        """
        layout = self.manifest.layout
        left_out = {one.sample for one in skipped}
        members = [i for i in self.samples.samples_of_shard(shard).tolist() if i not in left_out]
        ids, mask = np.zeros(layout.shard_tokens, np.uint32), np.zeros(layout.shard_tokens, np.bool_)
        for sample in members:
            slots = self._slots(sample)
            ids[slots], mask[slots] = self.samples.input_ids(sample), self.samples.loss_mask(sample)
        hidden, sums = self._encode_hidden(codes, members)
        arrays = {
            f"{HIDDEN}/c/{shard}/0/0": hidden,
            f"{IDS}/c/{shard}": join_chunks([encode_chunk(ids)]),
            f"{MASK}/c/{shard}": join_chunks([encode_chunk(mask)]),
        }
        if self.is_done(shard):
            return 0
        # A name of this process's own: where locks do not reach, two may be writing the same shard.
        temporary = self.cache / TMP / f"{shard:06d}.{socket.gethostname()}-{os.getpid()}.part"
        files: dict[str, ShardFileRecord] = {}
        for name, encoded in arrays.items():
            publish(encoded.parts, temporary=temporary, path=self.cache / FEATURES / name)
            files[f"{FEATURES}/{name}"] = encoded.record
        now = time.time()
        record = Commit(
            shard=shard,
            manifest=self.manifest.checksum,
            num_samples=len(members),
            num_tokens=int(self.samples.num_tokens[members].sum()),
            skipped=list(skipped),
            files=files,
            layers=layer_statistics(sums, self.layer_ids),
            worker=f"{socket.gethostname()}:{os.getpid()}",
            started=_time(now if started is None else started),
            finished=_time(now),
        )
        publish([record.to_bytes()], temporary=temporary, path=commit_path(self.cache, shard))
        return sum(file.size for file in files.values())

    def _slots(self, sample: int) -> slice:
        """Return where a sample lies in its shard."""
        begin = int(self.samples.start[sample]) % self.manifest.layout.shard_tokens
        return slice(begin, begin + int(self.samples.num_tokens[sample]))

    def _encode_hidden(self, codes: NDArray[np.uint16], members: list[int]) -> tuple[EncodedShard, list[Sums]]:
        """Encode the features chunk by chunk, adding up each layer's statistics on the way."""
        layout = self.manifest.layout
        filled = np.zeros(layout.shard_tokens, np.bool_)
        for sample in members:
            filled[self._slots(sample)] = True
        counts = filled.reshape(-1, layout.chunk_tokens).sum(axis=1)  # a chunk belongs to one sample

        def encode(where: tuple[slice, ...]) -> tuple[bytes, Sums]:
            chunk, column = codes[where], where[1].start
            real = chunk[: counts[where[0].start // layout.chunk_tokens]]
            sums = Sums.of(self.codec.values(real, [column])[:, 0])
            if not np.isfinite(sums.max_abs):
                raise CacheError(
                    f"A feature of layer {self.layer_ids[column]} that is to be stored in slots {where[0].start} to "
                    f"{where[0].stop} of a shard is not finite. Nothing of the shard was written."
                )
            return encode_chunk(chunk), sums

        chunk_shape = (layout.chunk_tokens, 1, layout.hidden_size)
        encoded = list(self._encoders.map(encode, chunk_slices(codes.shape, chunk_shape)))
        by_layer: list[Sums] = []
        for column in range(layout.num_layers):
            by_layer.append(sum((sums for _, sums in encoded[column :: layout.num_layers]), start=Sums()))
        return join_chunks([chunk for chunk, _ in encoded]), by_layer


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
