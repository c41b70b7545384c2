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

import os
import struct
import threading
from collections.abc import Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import zstandard
from numcodecs import blosc
from numpy.typing import NDArray

from dflash_offline.schemas.commits import ShardFileRecord
from dflash_offline.schemas.errors import CacheError
from dflash_offline.schemas.files import sha256_bytes

BLOSC: dict[str, Any] = {"cname": "zstd", "clevel": 1, "shuffle": "shuffle", "blocksize": 1 << 19}
"""What the arrays' metadata says, and what zarr-python would write with."""
CODEC = "blosc, zstd, each byte plane a stream of literals"
"""What is written here; the bytes of a cache depend on it."""
_CRC_BYTES = 4
_SMALLEST_SPLIT = 128
"""Elements below which Blosc takes the planes for one stream."""
_PARALLEL_BYTES = 1 << 20
"""Raw bytes from which a sample's chunks are decoded side by side."""
REDO = "Run `dflash verify --repair` on this cache, then repeat the `dflash extract` that made it."

_local = threading.local()


def _literals() -> zstandard.ZstdCompressor:
    """Return this thread's zstd compressor: Huffman coding, and only repetitions too long to miss."""
    compressor = getattr(_local, "compressor", None)
    if compressor is None:
        parameters = zstandard.ZstdCompressionParameters(
            strategy=zstandard.STRATEGY_FAST, min_match=7, hash_log=6, chain_log=6, search_log=1, window_log=19
        )
        compressor = _local.compressor = zstandard.ZstdCompressor(compression_params=parameters)
    return compressor


def _crc32c(data: bytes) -> bytes:
    return int(google_crc32c.value(data)).to_bytes(_CRC_BYTES, "little")


def _planes(values: NDArray[Any]) -> list[bytes]:
    """Return the array's bytes, all first bytes of its elements, then all second ones, and so on."""
    size = values.dtype.itemsize
    words = np.ascontiguousarray(values).view(f"<u{size}")
    return [(words >> 8 * i).astype(np.uint8).tobytes() if i else words.astype(np.uint8).tobytes() for i in range(size)]


def encode_chunk(values: NDArray[Any]) -> bytes:
    """Return one chunk as it stands in a shard file: a Blosc frame of one block, then its crc32c."""
    planes = _planes(values)
    if values.size < _SMALLEST_SPLIT:
        planes = [b"".join(planes)]
    streams = []
    for plane in planes:
        packed = _literals().compress(plane)
        stream = packed if len(packed) < len(plane) else plane
        streams += [struct.pack("<i", len(stream)), stream]
    length = 20 + sum(map(len, streams))
    shuffled, zstd = 1, 4 << 5
    header = struct.pack(
        "<4B4I", 2, 1, shuffled | zstd, values.dtype.itemsize, values.nbytes, values.nbytes, length, 20
    )
    frame = b"".join([header, *streams])
    return frame + _crc32c(frame)


def decode_chunk(data: bytes, out: NDArray[Any], place: str) -> None:
    """Fill a contiguous array with one chunk's values; `CacheError` naming `place` if its crc32c does not hold."""
    body = data[:-_CRC_BYTES]
    if _crc32c(body) != data[-_CRC_BYTES:]:
        raise CacheError(f"{place} is damaged: its checksum does not hold. {REDO}")
    blosc.use_threads = False  # several chunks are decoded at once instead
    blosc.decompress(body, out)


def chunk_slices(shape: tuple[int, ...], chunk: tuple[int, ...]) -> Iterator[tuple[slice, ...]]:
    """Yield the place of every inner chunk of a shard, in the order of its index."""
    counts = [-(-size // step) for size, step in zip(shape, chunk, strict=True)]
    for position in product(*map(range, counts)):
        yield tuple(slice(p * step, (p + 1) * step) for p, step in zip(position, chunk, strict=True))


@dataclass(frozen=True)
class EncodedShard:
    """The content of one shard file and what a commit record says of it."""

    parts: list[bytes]
    record: ShardFileRecord


def join_chunks(chunks: list[bytes]) -> EncodedShard:
    """Return the shard file of encoded chunks in the order of `chunk_slices`."""
    sizes = np.array([len(data) for data in chunks], "<u8")
    index = np.stack([np.cumsum(sizes) - sizes, sizes], axis=1).tobytes()
    parts = [*chunks, index, _crc32c(index)]
    record = ShardFileRecord(
        size=sum(map(len, parts)),
        sha256=sha256_bytes(*parts),
        index_crc32c=int.from_bytes(parts[-1], "little"),
        first_chunk_crc32c=int.from_bytes(chunks[0][-_CRC_BYTES:], "little"),
    )
    return EncodedShard(parts, record)


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
            raise CacheError(f"{path} cannot be opened: {error.strerror}. {REDO}") from error
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

    def read(self, start: int, layers: list[int], out: NDArray[np.uint16], executor: Executor | None = None) -> None:
        """Fill `out` [tokens, layers, H] with the codes of the slots from `start` of the chosen layer columns.

        Chunks of a large sample are decoded side by side if an executor is given.
        """
        first, last = start // self.chunk_tokens, -(-(start + out.shape[0]) // self.chunk_tokens)
        jobs = [(chunk, place) for chunk in range(first, last) for place in enumerate(layers)]

        def decode(job: tuple[int, tuple[int, int]]) -> None:
            chunk, (column, layer) = job
            self._decode(chunk, layer, start, out[:, column])

        if executor is None or out.nbytes < _PARALLEL_BYTES:
            for job in jobs:
                decode(job)
        else:
            for _ in executor.map(decode, jobs):
                pass

    def _decode(self, chunk: int, layer: int, start: int, out: NDArray[np.uint16]) -> None:
        """Fill those rows of `out` [tokens, H], which begins at slot `start`, that lie in a chunk."""
        slot = chunk * self.chunk_tokens
        begin, end = max(slot, start), min(slot + self.chunk_tokens, start + len(out))
        offset, length = (int(value) for value in self._index[chunk * self.shape[1] + layer])
        data = os.pread(self._file, length, offset)
        place = f"{self.path}, slots {slot} to {slot + self.chunk_tokens}, layer {layer},"
        rows = out[begin - start : end - start]
        if end - begin == self.chunk_tokens and rows.flags.c_contiguous:
            decode_chunk(data, rows, place)
            return
        scratch = _scratch((self.chunk_tokens, out.shape[1]))
        decode_chunk(data, scratch, place)
        rows[:] = scratch[begin - slot : end - slot]


def _scratch(shape: tuple[int, int]) -> NDArray[np.uint16]:
    """Return this thread's buffer for one chunk."""
    buffer: NDArray[np.uint16] | None = getattr(_local, "scratch", None)
    if buffer is None or buffer.shape != shape:
        buffer = _local.scratch = np.empty(shape, np.uint16)
    return buffer
