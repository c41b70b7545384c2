"""One zarr v3 shard file, encoded and decoded with several threads and without zarr-python's per-chunk costs.

A shard file is its inner chunks one after the other, then an index of (offset, size) pairs in row-major order, then
the index's crc32c; each chunk is a Blosc frame followed by its own crc32c (zarr v3, codec `sharding_indexed`).
zarr-python writes the metadata and can read and write the same files; tests compare the two.

The frames are standard, but laid out for bfloat16. Its high bytes (sign and exponent) hold some 2.6 bits each, its
low bytes nearly eight. Blosc gives zstd both planes as one stream, and zstd makes a Huffman table for each 128 KiB of
it, so that in a small chunk the two share one. Here each plane is a stream of its own, which Blosc knows as a split
block. And zstd is kept from looking for repetitions: in noise there are only accidental ones, which cost more bits
and time than the letters they stand for.
"""

import errno
import math
import os
import struct
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, wait
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import zstandard
from crc32c import crc32c
from numcodecs import blosc
from numpy.typing import DTypeLike, NDArray

from dflash_offline.schemas.commits import ShardFileRecord
from dflash_offline.schemas.errors import CacheError
from dflash_offline.schemas.manifest import Layout

BLOSC: dict[str, Any] = {"cname": "zstd", "clevel": 1, "shuffle": "shuffle", "blocksize": 1 << 19}
"""What the arrays' metadata says, and what zarr-python would write with."""
CODEC = "blosc, zstd, each byte plane a stream of literals"
"""What is written here; the bytes of a cache depend on it."""
_CRC_BYTES, _LENGTH_BYTES, _HEADER_BYTES = 4, 4, 20
_SMALLEST_SPLIT = 128
"""Elements below which Blosc takes the planes for one stream."""
_LARGEST_PLANE = 1 << 16
"""Bytes of a plane up to which it is quicker to decode the planes one by one."""
_PARALLEL_BYTES = 1 << 20
"""Raw bytes from which a sample's chunks are decoded side by side."""
_PART_BYTES = 3 << 19
"""Raw bytes from which it pays to wake another thread: about what one decodes at a time."""
REDO = "Run `dflash verify --repair` on this cache, then repeat the `dflash extract` that made it."

_SOUND = 0x48674BC7
"""The crc32c of any bytes followed by their own crc32c."""

_local = threading.local()
_start = struct.Struct(f"<{_HEADER_BYTES}sI").unpack_from


class Encoded(NamedTuple):
    """Chunks as they stand in a shard file, one after the other."""

    data: NDArray[np.uint8]
    sizes: list[int]
    """Bytes of each chunk."""


def scratch(use: str, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """Return an array of undefined content, this thread's own until it asks again for the same use.

    A fresh array of megabytes costs more than what is computed in it: the system hands out its pages one by one, and
    for all threads of a process in turn.
    """
    num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    buffer: NDArray[np.uint8] | None = getattr(_local, f"{use} scratch", None)
    if buffer is None or len(buffer) < num_bytes:
        buffer = np.empty(num_bytes, np.uint8)
        setattr(_local, f"{use} scratch", buffer)
    return buffer[:num_bytes].view(dtype).reshape(shape)


def _literals() -> zstandard.ZstdCompressor:
    """Return this thread's zstd compressor: Huffman coding, and only repetitions too long to miss."""
    compressor = getattr(_local, "compressor", None)
    if compressor is None:
        parameters = zstandard.ZstdCompressionParameters(
            strategy=zstandard.STRATEGY_FAST, min_match=7, hash_log=6, chain_log=6, search_log=1, window_log=19
        )
        compressor = _local.compressor = zstandard.ZstdCompressor(compression_params=parameters)
    return compressor


def _decompressor() -> zstandard.ZstdDecompressor:
    """Return this thread's zstd decompressor."""
    decompressor = getattr(_local, "decompressor", None)
    if decompressor is None:
        decompressor = _local.decompressor = zstandard.ZstdDecompressor()
    return decompressor


def _crc32c(data: Any) -> bytes:
    return int(crc32c(data)).to_bytes(_CRC_BYTES, "little")


def encode_chunks(values: NDArray[Any], out: NDArray[np.uint8] | None = None) -> Encoded:
    """Return chunks [N, ...] as they stand in a shard file: each a Blosc frame of one block, then its crc32c.

    They are written to the start of `out`, of `encoded_room` bytes, if given. Their bytes are dealt to planes all at
    once: every operation costs a turn among the threads that encode.
    """
    num_chunks, size, count = len(values), values.dtype.itemsize, values[0].size
    words = scratch("words", values.shape, f"<u{size}")
    words[...] = values
    planes = scratch("planes", (size, num_chunks, count), np.uint8)
    for number, plane in enumerate(planes):  # the lowest byte first
        if number:
            words >>= 8
        np.copyto(plane, words.reshape(plane.shape), casting="unsafe")
    if count < _SMALLEST_SPLIT:
        planes = planes.transpose(1, 0, 2).reshape(1, num_chunks, -1)
    if out is None:
        out = np.empty(encoded_room(num_chunks, values[0].nbytes), np.uint8)
    compress, view, end, sizes = _literals().compress, out.data, 0, []
    for chunk in range(num_chunks):
        begin, end = end, end + _HEADER_BYTES
        for plane in planes:
            stream = plane[chunk]
            packed = compress(stream.data)
            kept = np.frombuffer(packed, np.uint8) if len(packed) < len(stream) else stream
            view[end : end + _LENGTH_BYTES] = len(kept).to_bytes(_LENGTH_BYTES, "little")
            end += _LENGTH_BYTES + len(kept)
            out[end - len(kept) : end] = kept  # numpy leaves other threads the interpreter meanwhile
        view[begin : begin + _HEADER_BYTES] = _header(size, values[0].nbytes, end - begin)
        view[end : end + _CRC_BYTES] = _crc32c(view[begin:end])
        end += _CRC_BYTES
        sizes.append(end - begin)
    return Encoded(out[:end], sizes)


def encode_chunk(values: NDArray[Any]) -> Encoded:
    """Return one chunk as it stands in a shard file."""
    return encode_chunks(values[None])


def encoded_room(num_chunks: int, num_bytes: int) -> int:
    """Return the bytes that encoded chunks of `num_bytes` each need at most."""
    return num_chunks * (_HEADER_BYTES + 8 * _LENGTH_BYTES + num_bytes + _CRC_BYTES)


@lru_cache
def _header(item_size: int, num_bytes: int, length: int) -> bytes:
    """Return the start of a Blosc frame of `length` bytes that holds one block of split planes."""
    shuffled, zstd = 1, 4 << 5
    return struct.pack("<4B4I", 2, 1, shuffled | zstd, item_size, num_bytes, num_bytes, length, _HEADER_BYTES)


def decode_chunks(data: NDArray[np.uint8], places: Sequence[tuple[int, int]], out: NDArray[Any], num_rows: int) -> None:
    """Fill `out` [T, C, H] with chunks of `num_rows` tokens of one layer each, row by row of C chunks.

    They stand in `data` at these places, (begin, size) each; their crc32c is not compared. What lies before the first
    of them, `room(N)` bytes, is overwritten.
    """
    view, (_, width, num_features) = data.data, out.shape
    num_bytes = 2 * num_rows * num_features
    ours = all(_start(view, at)[0] == _header(2, num_bytes, size - _CRC_BYTES) for at, size in places)
    if ours and 2 * _SMALLEST_SPLIT <= num_bytes <= 2 * _LARGEST_PLANE:
        planes = _planes(view, places, num_bytes // 2).reshape(2, -1, width, num_rows, num_features)
        for row in range(planes.shape[1]):
            tokens = out[row * num_rows : (row + 1) * num_rows]
            low, high = planes[:, row, :, : len(tokens)].transpose(0, 2, 1, 3)
            np.multiply(high, 256, out=tokens, dtype=tokens.dtype)
            tokens += low
        return
    words = scratch("words", (len(places) // width, width, num_rows, out.shape[2]), out.dtype)
    blosc.use_threads = False  # groups of chunks are decoded at once instead
    if ours:
        _make_one_frame(view, places, num_bytes)
        blosc.decompress(data, words)
    else:  # another encoder's
        for (at, size), chunk in zip(places, words.reshape(-1, *words.shape[2:]), strict=True):
            blosc.decompress(view[at : at + size - _CRC_BYTES], chunk)
    for row, chunks in enumerate(words):
        tokens = out[row * num_rows : (row + 1) * num_rows]
        tokens[...] = chunks.transpose(1, 0, 2)[: len(tokens)]


def _planes(data: memoryview, places: Sequence[tuple[int, int]], count: int) -> NDArray[np.uint8]:
    """Return the byte planes of small chunks, [2, N, count], the low one first.

    Blosc would make a decompressor for every plane, which takes longer than to decode it.
    """
    planes = scratch("planes", (2, len(places), count), np.uint8)
    low, high = (plane.reshape(-1).data for plane in planes)
    read, first = _decompressor().stream_reader, 0
    for at, size in places:
        begin = at + _HEADER_BYTES + _LENGTH_BYTES
        middle = begin + _start(data, at)[1]
        last = first + count
        for plane, stream in ((low, data[begin:middle]), (high, data[middle + _LENGTH_BYTES : at + size - _CRC_BYTES])):
            if len(stream) == count:
                plane[first:last] = stream
            elif read(stream).readinto(plane[first:last]) != count:
                raise zstandard.ZstdError("a plane is too short")
        first = last
    return planes


def _make_one_frame(data: memoryview, places: Sequence[tuple[int, int]], num_bytes: int) -> None:
    """Make the chunks in `data`, where they lie, the blocks of one Blosc frame.

    A call for each would take its memory anew, and its turn among the threads that decode.
    """
    blocks = [at + _HEADER_BYTES for at, _ in places]
    sizes = num_bytes * len(places), num_bytes, len(data)
    data[: room(len(places))] = struct.pack(f"<4B{3 + len(blocks)}I", *_header(2, 0, 0)[:4], *sizes, *blocks)


def room(num_chunks: int) -> int:
    """Return the bytes to leave free before chunks that are decoded together."""
    return _HEADER_BYTES - 4 + 4 * num_chunks


class ShardSummary:
    """What stands after a shard file's chunks, and what its commit record says, from the chunks as they come."""

    def __init__(self) -> None:
        self._sizes: list[int] = []
        self._first_crc = b""

    def add(self, chunks: Encoded) -> None:
        """Take the next encoded chunks in the order of the index."""
        first = chunks.sizes[0]
        self._first_crc = self._first_crc or chunks.data[first - _CRC_BYTES : first].tobytes()
        self._sizes += chunks.sizes

    def index(self) -> bytes:
        """Return the index, and its crc32c, that end the file."""
        sizes = np.array(self._sizes, "<u8")
        index = np.stack([np.cumsum(sizes) - sizes, sizes], axis=1).tobytes()
        return index + _crc32c(index)

    def record(self, sha256: str) -> ShardFileRecord:
        """Return the record of the whole file, whose sha256 is given."""
        index = self.index()
        return ShardFileRecord(
            size=sum(self._sizes) + len(index),
            sha256=sha256,
            index_crc32c=int.from_bytes(index[-_CRC_BYTES:], "little"),
            first_chunk_crc32c=int.from_bytes(self._first_crc, "little"),
        )


class ShardFile:
    """One open hidden-state shard, its index in memory; safe in threads.

    Opening compares size, index and first chunk with the commit record, so that a shard copied from elsewhere is
    refused although each of its chunks passes its own checksum.
    """

    def __init__(self, path: Path, record: ShardFileRecord, layout: Layout, layer_ids: Sequence[int]) -> None:
        self.path = path
        self.layer_ids = layer_ids
        self.chunk_tokens = layout.chunk_tokens
        try:
            self._file = os.open(path, os.O_RDONLY)
        except OSError as error:
            self._file = -1
            advice = REDO if error.errno == errno.ENOENT else "Mend that and try again."
            raise CacheError(f"{path} cannot be opened: {error.strerror}. {advice}") from error
        self._index = self._checked_index(record, layout.shard_tokens // layout.chunk_tokens * layout.num_layers)

    def __del__(self) -> None:
        if self._file >= 0:
            os.close(self._file)

    def _checked_index(self, record: ShardFileRecord, num_chunks: int) -> NDArray[np.uint64]:
        size = os.fstat(self._file).st_size
        length = num_chunks * 16 + _CRC_BYTES
        tail = os.pread(self._file, length, max(size - length, 0))
        stored = int.from_bytes(tail[-_CRC_BYTES:], "little")
        intact = len(tail) == length and _crc32c(tail[:-_CRC_BYTES]) == tail[-_CRC_BYTES:]
        if size != record.size or not intact or stored != record.index_crc32c:
            raise CacheError(
                f"{self.path} is not the file its commit record describes ({size} bytes, expected {record.size}; "
                f"index checksum {stored:#010x}, expected {record.index_crc32c:#010x}). {REDO}"
            )
        index = np.frombuffer(tail[:-_CRC_BYTES], "<u8").reshape(num_chunks, 2)
        offset, length = (int(value) for value in index[0])
        first = int.from_bytes(os.pread(self._file, _CRC_BYTES, offset + length - _CRC_BYTES), "little")
        if first != record.first_chunk_crc32c:
            raise CacheError(f"{self.path} belongs to another shard or cache: its first chunk differs. {REDO}")
        return index

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
    ) -> None:
        """Fill `out` [tokens, layers, H] with the codes of the slots from `start`, where a chunk begins.

        `layers` are columns of the shard. With a large sample's chunks, `num_helpers` threads of the executor help the
        calling one.
        """
        step, width = self.chunk_tokens, len(layers)
        assert start % step == 0, "a sample begins with a chunk"
        num_rows = -(-len(out) // step)
        index = self._index.reshape(-1, len(self.layer_ids), 2)[start // step :][:num_rows]
        if layers != list(range(len(self.layer_ids))):
            index = index[:, layers]
        parts, helpers = [(index, out)], []
        if out.nbytes >= _PARALLEL_BYTES:
            most = max(1, _PART_BYTES // (step * out[0, 0].nbytes))
            wide = min(width, most)
            tall = max(1, most // width)
            parts = [
                (index[row : row + tall, left : left + wide], out[row * step : (row + tall) * step, left : left + wide])
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

    def _read(self, parts: Iterator[tuple[NDArray[np.uint64], NDArray[np.uint16]]]) -> None:
        """Fill each part's `out` [tokens, layers, H] with its chunks, whose places are [rows, layers, 2]."""
        for index, out in parts:
            chunks: list[list[int]] = index.reshape(-1, 2).tolist()
            head = room(len(chunks))
            begin = min(chunks)[0] - head
            data = scratch("encoded", (max(offset + size for offset, size in chunks) - begin,), np.uint8)
            view = data.data
            end = head + os.preadv(self._file, [view[head:]], begin + head)
            places = [(offset - begin, size) for offset, size in chunks]
            for at, size in places:
                if at + size > end or crc32c(view[at : at + size]) != _SOUND:
                    offset = at + begin
                    raise CacheError(
                        f"{self.path}, bytes {offset} to {offset + size}, layer {self._layer(offset)}, is damaged: its "
                        f"checksum does not hold. {REDO}"
                    )
            decode_chunks(data, places, out, self.chunk_tokens)

    def _layer(self, offset: int) -> int:
        """Return the id of the layer of the chunk that begins there."""
        return self.layer_ids[int(np.flatnonzero(self._index[:, 0] == offset)[0]) % len(self.layer_ids)]
