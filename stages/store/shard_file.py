"""One zarr v3 shard file, read with several threads and without zarr-python's per-chunk costs.

A shard file is its inner chunks one after the other, then an index of (offset, size) pairs in row-major order, then
the index's crc32c (zarr v3, codec `sharding_indexed`); `chunks` encodes and decodes the chunks. zarr-python can read
and write the same files; tests compare the two.
"""

import errno
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, wait
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from crc32c import crc32c
from numpy.typing import DTypeLike, NDArray

from dflash_offline.schemas.commits import ShardFileRecord
from dflash_offline.schemas.errors import CacheError
from dflash_offline.schemas.files import Piece
from dflash_offline.schemas.manifest import Layout
from dflash_offline.schemas.samples import Tokens
from dflash_offline.stages.store.chunks import (
    CRC_BYTES,
    LEAST_BYTES,
    DamagedFrameError,
    Encoded,
    crc32c_bytes,
    decode_chunks,
    decode_frame,
    encode_chunk,
    encoded_room,
    room,
    scratch,
)

_PARALLEL_BYTES = 1 << 20
"""Raw bytes from which a sample's chunks are decoded side by side."""
_PART_BYTES = 3 << 19
"""Raw bytes from which it pays to wake another thread: about what one decodes at a time."""
_HELD_TOKENS = 1 << 29
"""Tokens of shards that `ShardTokens` keeps, 5 bytes each."""
REDO = "Run `dflash verify --repair` on this cache, then repeat the `dflash extract` that made it."

_SOUND = 0x48674BC7
"""The crc32c of any bytes followed by their own crc32c."""


class ShardSummary:
    """What stands after a shard file's chunks, and what its commit record says, from the chunks as they come."""

    def __init__(self) -> None:
        self._sizes: list[int] = []
        self._first_crc = b""

    def add(self, chunks: Encoded) -> None:
        """Take the next encoded chunks in the order of the index."""
        first = chunks.sizes[0]
        self._first_crc = self._first_crc or chunks.data[first - CRC_BYTES : first].tobytes()
        self._sizes += chunks.sizes

    def index(self) -> bytes:
        """Return the index, and its crc32c, that end the file."""
        sizes = np.array(self._sizes, "<u8")
        index = np.stack([np.cumsum(sizes) - sizes, sizes], axis=1).tobytes()
        return index + crc32c_bytes(index)

    def record(self, sha256: str) -> ShardFileRecord:
        """Return the record of the whole file, whose sha256 is given."""
        index = self.index()
        return ShardFileRecord(
            size=sum(self._sizes) + len(index),
            sha256=sha256,
            index_crc32c=int.from_bytes(index[-CRC_BYTES:], "little"),
            first_chunk_crc32c=int.from_bytes(self._first_crc, "little"),
        )


class OpenFile:
    """The bytes of a file on disk, by ranges; safe in threads."""

    def __init__(self, path: Path) -> None:
        """`CacheError` if it cannot be opened."""
        try:
            self._file = os.open(path, os.O_RDONLY)
        except OSError as error:
            self._file = -1
            advice = REDO if error.errno == errno.ENOENT else "Mend that and try again."
            raise CacheError(f"{path} cannot be opened: {error.strerror}. {advice}") from error

    def __del__(self) -> None:
        if self._file >= 0:
            os.close(self._file)

    def end(self, _size: int, length: int) -> tuple[int, bytes]:
        """Return the file's bytes and its last `length` ones."""
        size = os.fstat(self._file).st_size
        return size, self.read(max(size - length, 0), size)

    def read(self, begin: int, end: int) -> bytes:
        """Return the bytes from `begin` to `end`, fewer where the file ends before."""
        return os.pread(self._file, end - begin, begin)

    def fill(self, out: memoryview, begin: int) -> int:
        """Fill `out` with the bytes from `begin`; returns how many there were."""
        return os.preadv(self._file, [out], begin)

    def ahead(self, _places: NDArray[np.uint64]) -> "OpenFile":
        """Return what the chunks at these places are read from: the file, which the system reads ahead by itself."""
        return self


class HeldBytes:
    """The bytes of a whole file, in memory."""

    def __init__(self, content: bytes) -> None:
        self._content = content

    def end(self, _size: int, length: int) -> tuple[int, bytes]:
        """Return the file's bytes and its last `length` ones."""
        return len(self._content), self._content[max(len(self._content) - length, 0) :]

    def read(self, begin: int, end: int) -> bytes:
        """Return the bytes from `begin` to `end`, fewer where the file ends before."""
        return self._content[begin:end]


class Chunks(Protocol):
    """Where chunks of a shard file are read from; see `OpenFile.fill`."""

    def fill(self, out: memoryview, begin: int) -> int: ...


class Bytes(Protocol):
    """The bytes of a shard file, by ranges; see `OpenFile`. `size` is what the file should have."""

    def end(self, size: int, length: int) -> tuple[int, bytes]: ...
    def read(self, begin: int, end: int) -> bytes: ...


class Ranges(Bytes, Protocol):
    """Those of hidden states, wherever the file lies."""

    def ahead(self, places: NDArray[np.uint64]) -> Chunks: ...


def _checked_index(
    path: Path, file: Bytes, record: ShardFileRecord, num_chunks: int, chunk_bytes: int
) -> NDArray[np.uint64]:
    """Return where a shard's chunks lie, (offset, size) each; `CacheError` unless the record and the file agree."""
    length = num_chunks * 16 + CRC_BYTES
    size, tail = file.end(record.size, length)
    stored = int.from_bytes(tail[-CRC_BYTES:], "little")
    intact = len(tail) == length and crc32c_bytes(tail[:-CRC_BYTES]) == tail[-CRC_BYTES:]
    if size != record.size or not intact or stored != record.index_crc32c:
        raise CacheError(
            f"{path} is not the file its commit record describes ({size} bytes, expected {record.size}; "
            f"index checksum {stored:#010x}, expected {record.index_crc32c:#010x}). {REDO}"
        )
    index = np.frombuffer(tail[:-CRC_BYTES], "<u8").reshape(num_chunks, 2)
    end, most = size - length, encoded_room(1, chunk_bytes)
    begins, sizes = index.T
    fits = (sizes >= LEAST_BYTES) & (sizes <= min(most, end))
    fits &= begins <= end - np.minimum(sizes, end).astype(np.int64)
    if not fits.all():
        place, found = index[int(np.argmin(fits))].tolist()
        raise CacheError(
            f"{path}: its index says that a chunk of {found:,} bytes lies at {place:,}; expected {LEAST_BYTES} to "
            f"{most:,} bytes within the first {end:,}. {REDO}"
        )
    offset, first_bytes = index[0].tolist()
    end_of_first = offset + first_bytes
    first = int.from_bytes(file.read(end_of_first - CRC_BYTES, end_of_first), "little")
    if first != record.first_chunk_crc32c:
        raise CacheError(f"{path} belongs to another shard or cache: its first chunk differs. {REDO}")
    return index


def one_chunk(values: NDArray[np.generic]) -> tuple[list[Piece], ShardSummary]:
    """Return the content of a shard file of one chunk that holds these items, [count], and what is to be recorded."""
    chunk, summary = encode_chunk(values), ShardSummary()
    summary.add(chunk)
    return [chunk.data, summary.index()], summary


def read_one_chunk(
    path: Path, record: ShardFileRecord, count: int, dtype: DTypeLike, content: bytes | None = None
) -> NDArray[Any]:
    """Return the items of a shard file of one chunk, [count]; `CacheError` if it does not hold them.

    `content` is what the file holds, where it does not lie at `path`, which messages name.
    """
    out = np.empty(count, dtype)
    try:
        file: Bytes = OpenFile(path) if content is None else HeldBytes(content)
        ((offset, size),) = _checked_index(path, file, record, 1, out.nbytes).tolist()
        chunk = memoryview(file.read(offset, offset + size))
    except OSError as error:
        raise CacheError(f"{path} cannot be read: {error.strerror}. {REDO}") from error
    try:
        if len(chunk) != size or crc32c(chunk) != _SOUND:
            raise DamagedFrameError("its checksum does not hold")
        decode_frame(chunk[:-CRC_BYTES], out.view(np.uint8), out.itemsize)
    except DamagedFrameError as error:
        raise CacheError(f"{path}, bytes {offset} to {offset + size}, is damaged: {error}. {REDO}") from error
    return out


class ShardTokens:
    """The tokens of a cache's shards, those used last kept in memory. Safe in threads."""

    def __init__(self, read: Callable[[int], Tokens], shard_tokens: int) -> None:
        """`read` returns those of a shard, of so many slots."""
        self._read = read
        self._held: OrderedDict[int, Tokens] = OrderedDict()
        self._lock = threading.Lock()
        self._most = max(1, _HELD_TOKENS // shard_tokens)

    def of(self, shard: int) -> Tokens:
        """Return the token ids and the mask of a finished shard, [shard_tokens] each."""
        with self._lock:
            held = self._held.get(shard)
            if held is not None:
                self._held.move_to_end(shard)
                return held
        found = self._read(shard)
        with self._lock:
            self._held[shard] = found
            while len(self._held) > self._most:
                self._held.popitem(last=False)
        return found


class ShardFile:
    """One open hidden-state shard, its index in memory; safe in threads.

    Opening compares size, index and first chunk with the commit record, so that a shard copied from elsewhere is
    refused although each of its chunks passes its own checksum.
    """

    def __init__(
        self,
        path: Path,
        record: ShardFileRecord,
        layout: Layout,
        layer_ids: Sequence[int],
        ranges: Ranges | None = None,
    ) -> None:
        """`ranges` are the file's bytes, where it does not lie at `path`, which messages name."""
        self.path = path
        self.layer_ids = layer_ids
        self.chunk_tokens = layout.chunk_tokens
        self._width = layout.hidden_size
        self._file = OpenFile(path) if ranges is None else ranges
        num_chunks = layout.shard_tokens // layout.chunk_tokens * layout.num_layers
        chunk_bytes = 2 * layout.chunk_tokens * layout.hidden_size
        self._index = _checked_index(self.path, self._file, record, num_chunks, chunk_bytes)

    def layer_bytes(self) -> NDArray[np.int64]:
        """Return the encoded bytes of each layer, [L], from the index alone."""
        return self._index[:, 1].reshape(-1, len(self.layer_ids)).sum(axis=0).astype(np.int64)

    def read(
        self,
        start: int,
        layers: list[int],
        out: NDArray[np.uint16],
        executor: Executor | None = None,
        num_helpers: int = 0,
        chunks: Chunks | None = None,
    ) -> None:
        """Fill `out` [tokens, layers, H] with the codes of the slots from `start`, where a chunk begins.

        `layers` are columns of the shard. With a large sample's chunks, `num_helpers` threads of the executor help the
        calling one. `chunks` is what `ahead` returned for the same slots and layers, if it was asked.
        """
        step, width = self.chunk_tokens, len(layers)
        index = self._places(start, len(out), layers)
        num_rows = len(index)
        file = self._file.ahead(index) if chunks is None else chunks
        parts, helpers = [(file, index, out)], []
        if out.nbytes >= _PARALLEL_BYTES:
            most = max(1, _PART_BYTES // (step * out[0, 0].nbytes))
            wide = min(width, most)
            tall = max(1, most // width)
            parts = [
                (
                    file,
                    index[row : row + tall, left : left + wide],
                    out[row * step : (row + tall) * step, left : left + wide],
                )
                for row in range(0, num_rows, tall)
                for left in range(0, width, wide)
            ]
        shared = iter(parts)  # each goes to the thread that is free
        if executor is not None:
            helpers = [executor.submit(self._read, shared) for _ in range(min(num_helpers, len(parts) - 1))]
        try:
            self._read(shared)
        finally:  # whatever happens, nobody writes into `out` any more
            helpers = [helper for helper in helpers if not helper.cancel()]
            wait(helpers)
        for helper in helpers:
            helper.result()

    def ahead(self, start: int, num_tokens: int, layers: list[int]) -> Chunks:
        """Return what the codes of these slots and layers are read from; from a bucket they are fetched for it."""
        return self._file.ahead(self._places(start, num_tokens, layers))

    def _places(self, start: int, num_tokens: int, layers: list[int]) -> NDArray[np.uint64]:
        """Return where the chunks of so many slots from `start` lie, [rows, layers, 2]."""
        assert start % self.chunk_tokens == 0, "a sample begins with a chunk"
        num_rows = -(-num_tokens // self.chunk_tokens)
        index = self._index.reshape(-1, len(self.layer_ids), 2)[start // self.chunk_tokens :][:num_rows]
        return index if layers == list(range(len(self.layer_ids))) else index[:, layers]

    def codes(self, begin: int, num_slots: int) -> NDArray[np.uint16]:
        """Return the codes of whole chunks that hold so many slots from `begin`, [at least num_slots, L, H]."""
        num_tokens = -(-num_slots // self.chunk_tokens) * self.chunk_tokens
        codes = np.empty((num_tokens, len(self.layer_ids), self._width), np.uint16)
        self.read(begin, list(range(len(self.layer_ids))), codes)
        return codes

    def _read(self, parts: Iterator[tuple[Chunks, NDArray[np.uint64], NDArray[np.uint16]]]) -> None:
        """Fill each part's `out` [tokens, layers, H] with its chunks, whose places in a file are [rows, layers, 2]."""
        for file, index, out in parts:
            chunks: list[list[int]] = index.reshape(-1, 2).tolist()
            head = room(len(chunks))
            begin = min(chunks)[0] - head
            data = scratch("encoded", (max(offset + size for offset, size in chunks) - begin,), np.uint8)
            view = data.data
            end = head + file.fill(view[head:], begin + head)
            places = [(offset - begin, size) for offset, size in chunks]
            for at, size in places:
                if at + size > end or crc32c(view[at : at + size]) != _SOUND:
                    offset = at + begin
                    raise CacheError(
                        f"{self.path}, bytes {offset} to {offset + size}, layer {self._layer(offset)}, is damaged: its "
                        f"checksum does not hold. {REDO}"
                    )
            try:
                decode_chunks(data, places, out, self.chunk_tokens)
            except DamagedFrameError as error:
                offset, last = chunks[0][0], sum(max(chunks))
                raise CacheError(
                    f"{self.path}, bytes {offset} to {last}, layers {self._layer(offset)} and on, holds other chunks "
                    f"than its checksums say: {error}. {REDO}"
                ) from error

    def _layer(self, offset: int) -> int:
        """Return the id of the layer of the chunk that begins there."""
        return self.layer_ids[int(np.flatnonzero(self._index[:, 0] == offset)[0]) % len(self.layer_ids)]
