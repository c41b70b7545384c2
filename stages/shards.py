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
import os
import struct
import threading
from collections.abc import Iterator
from concurrent.futures import Executor
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import zstandard
from crc32c import crc32c
from numcodecs import blosc
from numpy.typing import NDArray

from dflash_offline.schemas.commits import ShardFileRecord
from dflash_offline.schemas.errors import CacheError
from dflash_offline.schemas.files import Piece
from dflash_offline.stages.scratch import scratch

BLOSC: dict[str, Any] = {"cname": "zstd", "clevel": 1, "shuffle": "shuffle", "blocksize": 1 << 19}
"""What the arrays' metadata says, and what zarr-python would write with."""
CODEC = "blosc, zstd, each byte plane a stream of literals"
"""What is written here; the bytes of a cache depend on it."""
_CRC_BYTES = 4
_HEADER_BYTES = 20
_SMALLEST_SPLIT = 128
"""Elements below which Blosc takes the planes for one stream."""
_LARGEST_PLANE = 1 << 16
"""Bytes of a plane up to which it is quicker to decode the planes one by one; larger ones' memory costs too much."""
_PARALLEL_BYTES = 1 << 20
"""Raw bytes from which a sample's chunks are decoded side by side."""
REDO = "Run `dflash verify --repair` on this cache, then repeat the `dflash extract` that made it."

_local = threading.local()


class Encoded(NamedTuple):
    """A chunk as it stands in a shard file, in pieces that follow each other; the last is its crc32c."""

    pieces: list[Piece]
    num_bytes: int


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


def _crc32c(data: Piece) -> bytes:
    return int(crc32c(data)).to_bytes(_CRC_BYTES, "little")


def encode_chunks(values: NDArray[Any]) -> list[Encoded]:
    """Return chunks [N, ...] as they stand in a shard file: each a Blosc frame of one block, then its crc32c.

    Their bytes are dealt to planes all at once, and pieces are never joined: every operation costs a turn among the
    threads that encode, and what Python copies itself keeps the others waiting.
    """
    size, count = values.dtype.itemsize, values[0].size
    words = scratch("words", values.shape, f"<u{size}")
    words[...] = values
    planes = scratch("planes", (size, len(values), count), np.uint8)
    for number, plane in enumerate(planes):  # the lowest byte first
        if number:
            words >>= 8
        np.copyto(plane, words.reshape(plane.shape), casting="unsafe")
    if count < _SMALLEST_SPLIT:
        planes = planes.transpose(1, 0, 2).reshape(1, len(values), -1)
    streams = [plane[number] for number in range(len(values)) for plane in planes]
    packed = _literals().multi_compress_to_buffer([stream.data for stream in streams])
    kept = [packed[i] if len(packed[i]) < len(stream) else stream.copy() for i, stream in enumerate(streams)]
    each = len(planes)
    return [_frame(kept[i * each : (i + 1) * each], size, values[0].nbytes) for i in range(len(values))]


def encode_chunk(values: NDArray[Any]) -> Encoded:
    """Return one chunk as it stands in a shard file."""
    return encode_chunks(values[None])[0]


def _frame(streams: list[Piece], item_size: int, num_bytes: int) -> Encoded:
    """Return the frame of a chunk whose planes are these streams."""
    body: list[Piece] = []
    for stream in streams:
        body += [struct.pack("<i", len(stream)), stream]
    length = _HEADER_BYTES + sum(map(len, body))
    header = _header(item_size, num_bytes, length)
    crc = 0
    for piece in (header, *body):
        crc = crc32c(piece, crc)
    return Encoded([header, *body, crc.to_bytes(_CRC_BYTES, "little")], length + _CRC_BYTES)


@lru_cache
def _header(item_size: int, num_bytes: int, length: int) -> bytes:
    """Return the start of a Blosc frame of `length` bytes that holds one block of split planes."""
    shuffled, zstd = 1, 4 << 5
    return struct.pack("<4B4I", 2, 1, shuffled | zstd, item_size, num_bytes, num_bytes, length, _HEADER_BYTES)


def decode_chunk(data: NDArray[np.uint8], out: NDArray[Any], num_rows: int) -> bool:
    """Fill `out` [N, ...] with the first N of a chunk's rows; False, with nothing done, if its crc32c does not hold."""
    body = data.data[:-_CRC_BYTES]
    if crc32c(body) != int.from_bytes(data.data[-_CRC_BYTES:], "little"):
        return False
    if not _decode_planes(body, out, num_rows * out[0].size):
        rows = scratch("rows", (num_rows, *out.shape[1:]), out.dtype)
        blosc.use_threads = False  # several chunks are decoded at once instead
        blosc.decompress(body, rows)
        out[...] = rows[: len(out)]
    return True


def _decode_planes(body: memoryview, out: NDArray[Any], count: int) -> bool:
    """Fill `out` with the first words of a small chunk of `count`; False, with nothing done, if it is not of that kind.

    Blosc would take room for its work anew for every chunk.
    """
    item_size = out.itemsize
    if item_size != 2 or not _SMALLEST_SPLIT <= count <= _LARGEST_PLANE or body[:12] != _header(2, 2 * count, 0)[:12]:
        return False
    decompress = _decompressor().decompress
    planes, at = [], _HEADER_BYTES
    for _ in range(2):
        begin = at + 4
        at = begin + int.from_bytes(body[at:begin], "little")
        stream = body[begin:at]
        plane = stream if len(stream) == count else decompress(stream, max_output_size=count)
        planes.append(np.frombuffer(plane, np.uint8, out.size))
    low, high = planes
    words = high.astype(np.uint16)
    words <<= 8
    words |= low
    out[...] = words.reshape(out.shape)
    return True


class ShardSummary:
    """What stands after a shard file's chunks, and what its commit record says, from the chunks as they come."""

    def __init__(self) -> None:
        self._sizes: list[int] = []
        self._first_crc = b""

    def add(self, chunks: list[Encoded]) -> None:
        """Take the next encoded chunks in the order of the index."""
        self._first_crc = self._first_crc or bytes(chunks[0].pieces[-1])
        self._sizes += [chunk.num_bytes for chunk in chunks]

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

    def __init__(self, path: Path, record: ShardFileRecord, shape: tuple[int, int, int], chunk_tokens: int) -> None:
        self.path = path
        self.shape = shape
        self.chunk_tokens = chunk_tokens
        try:
            self._file = os.open(path, os.O_RDONLY)
        except OSError as error:
            self._file = -1
            advice = REDO if error.errno == errno.ENOENT else "Mend that and try again."
            raise CacheError(f"{path} cannot be opened: {error.strerror}. {advice}") from error
        num_tokens, num_layers, _ = shape
        self._index = self._checked_index(record, num_tokens // chunk_tokens * num_layers)

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
        return self._index[:, 1].reshape(-1, self.shape[1]).sum(axis=0).astype(np.int64)

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
        step, (_, num_layers, _) = self.chunk_tokens, self.shape
        assert start % step == 0, "a sample begins with a chunk"
        first = start // step * num_layers
        index = self._index[first : first + -(-len(out) // step) * num_layers].tolist()
        chunks = [
            (*index[row // step * num_layers + layer], layer, out[row : row + step, column])
            for row in range(0, len(out), step)
            for column, layer in enumerate(layers)
        ]
        helpers = []
        if executor is None or out.nbytes < _PARALLEL_BYTES:
            groups = iter([chunks])
        else:  # shared: each chunk goes to the thread that is free
            groups = iter([[chunk] for chunk in chunks])
            helpers = [executor.submit(self._read, groups) for _ in range(min(num_helpers, len(chunks) - 1))]
        try:
            self._read(groups)
        finally:  # whatever happens, nobody writes into `out` any more
            for helper in helpers:
                if not helper.cancel():
                    helper.result()

    def _read(self, groups: Iterator[list[tuple[int, int, int, NDArray[np.uint16]]]]) -> None:
        """Decode groups of (offset, size, layer, where to) chunks that lie near each other in the file."""
        for chunks in groups:
            begin = min(chunk[0] for chunk in chunks)
            data = scratch("encoded", (max(offset + size for offset, size, _, _ in chunks) - begin,), np.uint8)
            data = data[: os.preadv(self._file, [data.data], begin)]
            for offset, size, layer, rows in chunks:
                encoded = data[offset - begin : offset - begin + size]
                if len(encoded) != size or not decode_chunk(encoded, rows, self.chunk_tokens):
                    raise CacheError(
                        f"{self.path}, bytes {offset} to {offset + size}, layer {layer}, is damaged: its checksum does "
                        f"not hold. {REDO}"
                    )
