"""Shards of one cache: claimed, checked, encoded, written whole, and recorded last.

Axes: T token slots, L captured layers, H hidden size.
"""

import errno
import os
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dflash_offline.schemas.commits import Commit, ShardFileRecord, SkippedSample, commit_name
from dflash_offline.schemas.errors import CacheError
from dflash_offline.schemas.files import Piece, move_synced, publish, write_synced
from dflash_offline.schemas.locks import locked
from dflash_offline.schemas.manifest import HIDDEN, feature_file
from dflash_offline.stages.cores import usable_cores
from dflash_offline.stages.store.cache import Cache
from dflash_offline.stages.store.chunks import Encoded, encode_chunks, encoded_room, scratch
from dflash_offline.stages.store.feature_ranges import Sums, layer_statistics
from dflash_offline.stages.store.leftovers import claimed_lock, part_path
from dflash_offline.stages.store.object_commit import Hidden, put_hidden, put_tokens, token_arrays
from dflash_offline.stages.store.shard_file import ShardSummary, one_chunk

_JOB_BYTES = 1 << 20
"""Raw bytes, at least, that one thread encodes at a time."""
_AHEAD = 16
"""Encoded pieces that may lie ready, or be written, beside those being encoded."""
_NICENESS = 10
"""Added to the niceness of threads that encode."""
_GONE = {errno.ENOENT, errno.ESTALE}
"""Error numbers of a file that was removed while it was written, on a disk and over NFS."""


class ShardWriter:
    """Checks, encodes and commits shards of one cache: its hidden states with their tokens, or its final states."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache
        self._encoders = ThreadPoolExecutor(usable_cores(), "encode", initializer=_lower_priority)
        layout = cache.layout
        row_bytes = layout.chunk_tokens * layout.slot_bytes
        self._rows = -(-_JOB_BYTES // row_bytes)
        """Rows of chunks that one thread encodes at a time."""
        room = self._rows * encoded_room(layout.num_layers, row_bytes // layout.num_layers)
        self._memory = [np.empty(room, np.uint8) for _ in range(usable_cores() + _AHEAD)]
        self._encoding = threading.Lock()

    @contextmanager
    def claim(self, shard: int, *, wait: bool, is_done: Callable[[int], bool] | None = None) -> Iterator[bool]:
        """Hold the shard against other workers of this file system; yields whether it is ours and still to do.

        `is_done` says whether a shard is, where that is not for this writer's features alone.
        """
        lock = claimed_lock(self.cache.path, shard)
        with locked(lock, wait=wait) as free:
            yield free and not (is_done or self.cache.is_done)(shard)

    def commit(
        self,
        shard: int,
        codes: NDArray[np.uint16],
        skipped: Sequence[SkippedSample] = (),
        started: float | None = None,
        sums: Sequence[Sums] | None = None,
        encoded: Callable[[], object] = int,
        in_turn: Callable[[], object] = int,
    ) -> int:
        """Check, encode and write a claimed shard's files whole, then its record; returns the bytes written.

        `codes` is [shard_tokens, L, H] uint16; slots that hold no features (`Cache.stored`), and those of skipped
        samples, hold the fill value; it may change once `encoded` was called. `sums` are each layer's; without them
        they are added up here. The record is written once `in_turn` has returned. If another worker has finished the
        shard meanwhile, where locks do not reach, its record wins: nothing is put in place and 0 returned. Several
        threads may commit shards at once: one of them encodes while others wait for the disk.
        """
        temporary = part_path(self.cache.path, shard)
        try:
            return self._commit(shard, codes, skipped, started, sums, encoded, in_turn, temporary)
        except OSError as error:
            if error.errno in _GONE and self.cache.is_done(shard):
                return 0  # another worker finished the shard just now, and removed what is left of it
            raise
        finally:
            temporary.unlink(missing_ok=True)  # on a full disk, what was written of it is in the way

    def _commit(
        self,
        shard: int,
        codes: NDArray[np.uint16],
        skipped: Sequence[SkippedSample],
        started: float | None,
        sums: Sequence[Sums] | None,
        encoded: Callable[[], object],
        in_turn: Callable[[], object],
        temporary: Path,
    ) -> int:
        cache, place = self.cache, self._place if self.cache.mirror is None else self._put
        members = cache.members(shard, skipped)
        record, added_up = self._write_hidden(temporary, codes, members, encoded, add_up=sums is None)
        if cache.is_done(shard):
            return 0
        hidden, files = place(shard, temporary, Hidden(record, added_up if sums is None else sums, list(skipped)))
        in_turn()
        members, now = cache.members(shard, hidden.skipped), time.time()
        commit = Commit(
            shard=shard,
            manifest=cache.manifest.checksum,
            num_samples=len(members),
            num_tokens=sum(int(cache.stored(sample).sum()) for sample in members),
            skipped=hidden.skipped,
            files=files,
            layers=layer_statistics(hidden.sums, cache.layer_ids),
            worker=f"{socket.gethostname()}:{os.getpid()}",
            started=_time(now if started is None else started),
            finished=_time(now),
        )
        name = commit_name(shard, cache.array)
        if cache.mirror is None:
            publish([commit.to_bytes()], temporary=temporary, path=cache.path / name)
        elif not cache.mirror.bucket.create(name, commit.to_bytes()):
            return 0
        return sum(file.size for file in files.values())

    def _place(self, shard: int, temporary: Path, hidden: Hidden) -> tuple[Hidden, dict[str, ShardFileRecord]]:
        """Put a shard's files in place on disk, that at `temporary` first; returns what they are."""
        files = {feature_file(self.cache.array, shard): hidden.record}
        move_synced(temporary, self.cache.path / next(iter(files)))
        for name, values in token_arrays(self.cache, shard, hidden.skipped).items():
            pieces, summary = one_chunk(values)
            files[name] = summary.record(publish(pieces, temporary=temporary, path=self.cache.path / name))
        return hidden, files

    def _put(self, shard: int, temporary: Path, own: Hidden) -> tuple[Hidden, dict[str, ShardFileRecord]]:
        """Put a shard's objects into the bucket, that at `temporary` first; returns what is there."""
        hidden = put_hidden(self.cache, shard, temporary, own)
        files = {feature_file(self.cache.array, shard): hidden.record}
        for name, values in token_arrays(self.cache, shard, hidden.skipped).items():
            files[name] = put_tokens(self.cache, name, values, temporary)
        return hidden, files

    def _write_hidden(
        self,
        path: Path,
        codes: NDArray[np.uint16],
        members: list[int],
        encoded: Callable[[], object],
        *,
        add_up: bool,
    ) -> tuple[ShardFileRecord, list[Sums]]:
        """Write the features' shard file, synced; returns its record and each layer's sums, if they are to be added up.

        Chunks are encoded side by side, and hashed and written in order meanwhile; `encoded` is called after the last.
        """
        layout, cache_has_all = self.cache.layout, self.cache.array == HIDDEN
        slots = np.zeros(layout.shard_tokens, np.bool_)
        for sample in members:
            slots[self.cache.slots(sample)] = self.cache.stored(sample)
        filled = slots.reshape(-1, layout.chunk_tokens)
        counts = filled.sum(axis=1)  # of hidden states they come first: a chunk belongs to one sample

        def encode(rows: range, out: NDArray[np.uint8]) -> tuple[Encoded, list[Sums]]:
            end, sizes, by_layer = 0, [], [Sums()] * layout.num_layers
            for row in rows:
                slot = row * layout.chunk_tokens
                part = codes[slot : slot + layout.chunk_tokens]
                features = part[: counts[row]] if cache_has_all else part[filled[row]]
                if features.size and self.cache.codec.holds_fill(features):
                    raise self._not_finite(slot)
                if add_up:
                    by_layer = [*map(Sums.__add__, by_layer, self._sums(features, slot))]
                chunks = encode_chunks(part.transpose(1, 0, 2), out[end:])
                end += len(chunks.data)
                sizes += chunks.sizes
            return Encoded(out[:end], sizes), by_layer

        summary = ShardSummary()
        by_layer = [Sums()] * layout.num_layers

        def pieces() -> Generator[Piece, None, None]:
            with self._encoding:  # until the last piece is written and hashed: what is synced needs no memory here
                for chunks, sums in self._in_order(encode, len(counts)):
                    by_layer[:] = map(Sums.__add__, by_layer, sums)
                    summary.add(chunks)
                    yield chunks.data
                encoded()
                yield summary.index()

        with closing(pieces()) as content:
            return summary.record(write_synced(path, content)), by_layer

    def _in_order(
        self, encode: Callable[[range, NDArray[np.uint8]], tuple[Encoded, list[Sums]]], num_rows: int
    ) -> Iterator[tuple[Encoded, list[Sums]]]:
        """Yield what `encode` gives for all rows of chunks, some at a time, side by side in memory that is kept.

        What is yielded stays as it is until the second after it is asked for.
        """
        pending: deque[Future[tuple[Encoded, list[Sums]]]] = deque()
        try:
            for number, first in enumerate(range(0, num_rows, self._rows)):
                if len(pending) == len(self._memory) - 1:
                    yield pending.popleft().result()
                rows = range(first, min(first + self._rows, num_rows))
                pending.append(self._encoders.submit(encode, rows, self._memory[number % len(self._memory)]))
            while pending:
                yield pending.popleft().result()
        finally:
            wait([job for job in pending if not job.cancel()])

    def _sums(self, codes: NDArray[np.uint16], slot: int) -> list[Sums]:
        """Return the sums of each layer's features, of codes [T, L, H]; `CacheError` if one is not finite."""
        values = scratch("values", (codes.shape[1], codes.shape[0], codes.shape[2]), np.float32)
        self.cache.codec.values(codes, range(len(values)), out=values.transpose(1, 0, 2))
        by_layer = Sums.of_layers(values)
        if not np.isfinite([sums.max_abs for sums in by_layer]).all():
            raise self._not_finite(slot)
        return by_layer

    def _not_finite(self, slot: int) -> CacheError:
        return CacheError(
            f"A feature that is to be stored in slots {slot} to {slot + self.cache.layout.chunk_tokens} of a shard "
            f"is missing or not finite. Nothing of the shard was put in place."
        )


def _lower_priority() -> None:
    """Lower this thread's priority below the forward, the hashing and the writing."""
    if sys.platform == "linux":  # elsewhere a thread has no priority of its own
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), os.getpriority(os.PRIO_PROCESS, 0) + _NICENESS)


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
