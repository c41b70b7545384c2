"""One zarr v3 shard file, encoded and decoded with several threads and without zarr-python's per-chunk costs.

A shard file is its inner chunks one after the other, then an index of (offset, size) pairs in row-major order, then
the index's crc32c; each chunk is Blosc-compressed and followed by its own crc32c (zarr v3, codec
`sharding_indexed`). zarr-python writes the metadata and can read and write the same files; tests compare the two.
"""

import os
import threading
from collections.abc import Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import lru_cache
from io import FileIO
from itertools import product
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numcodecs import blosc
from numpy.typing import NDArray

from dflash_offline.schemas.commits import ShardFileRecord
from dflash_offline.schemas.errors import CacheError
from dflash_offline.schemas.files import sha256_bytes

BLOSC: dict[str, Any] = {"cname": "zstd", "clevel": 1, "shuffle": "shuffle", "blocksize": 1 << 19}
"""The codec's settings; the block size decides the ratio: left to Blosc it costs a sixth."""
_CRC_BYTES = 4
REDO = "Run `dflash verify --repair` on this cache, then repeat the `dflash extract` that made it."


@lru_cache
def _codec() -> Any:
    blosc.use_threads = False  # Blosc's own threads make the bytes differ from run to run
    return blosc.Blosc(
        cname=BLOSC["cname"], clevel=BLOSC["clevel"], shuffle=blosc.SHUFFLE, blocksize=BLOSC["blocksize"]
    )


def _crc32c(data: bytes) -> bytes:
    return int(google_crc32c.value(data)).to_bytes(_CRC_BYTES, "little")


def encode_chunk(values: NDArray[Any]) -> bytes:
    """Return one chunk as it stands in a shard file: compressed, then its crc32c."""
    compressed = bytes(_codec().encode(np.ascontiguousarray(values)))
    return compressed + _crc32c(compressed)


def decode_chunk(data: bytes, out: NDArray[Any], place: str) -> None:
    """Fill a contiguous array with one chunk's values; `CacheError` naming `place` if its crc32c does not hold."""
    body = data[:-_CRC_BYTES]
    if _crc32c(body) != data[-_CRC_BYTES:]:
        raise CacheError(f"{place} is damaged: its checksum does not hold. {REDO}")
    _codec().decode(body, out=out)


def _grid(shape: tuple[int, ...], chunk: tuple[int, ...]) -> Iterator[tuple[slice, ...]]:
    counts = [-(-size // step) for size, step in zip(shape, chunk, strict=True)]
    for position in product(*map(range, counts)):
        yield tuple(slice(p * step, (p + 1) * step) for p, step in zip(position, chunk, strict=True))


@dataclass(frozen=True)
class EncodedShard:
    """The content of one shard file and what a commit record says of it."""

    parts: list[bytes]
    record: ShardFileRecord


def encode_shard(values: NDArray[Any], chunk: tuple[int, ...], executor: Executor) -> EncodedShard:
    """Return the shard file of an array, its chunks encoded side by side; the bytes depend on the values alone."""
    chunks = list(executor.map(lambda where: encode_chunk(values[where]), _grid(values.shape, chunk)))
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
        self._scratch = threading.local()
        num_tokens, num_layers, _ = shape
        with self._open() as file:
            self._index = self._checked_index(file.fileno(), record, num_tokens // chunk_tokens * num_layers)

    def _open(self) -> FileIO:
        """Open the file for one call; a cache has more shards than a process may keep open."""
        try:
            return self.path.open("rb", buffering=0)
        except OSError as error:
            raise CacheError(f"{self.path} cannot be opened: {error.strerror}. {REDO}") from error

    def _checked_index(self, file: int, record: ShardFileRecord, num_chunks: int) -> NDArray[np.uint64]:
        size = os.fstat(file).st_size
        length = num_chunks * 16 + _CRC_BYTES
        tail = os.pread(file, length, max(size - length, 0))
        stored = int.from_bytes(tail[-_CRC_BYTES:], "little")
        intact = len(tail) == length and _crc32c(tail[:-_CRC_BYTES]) == tail[-_CRC_BYTES:]
        if size != record.size or not intact or stored != record.index_crc32c:
            raise CacheError(
                f"{self.path} is not the file its commit record describes ({size} bytes, expected {record.size}; "
                f"index checksum {stored:#010x}, expected {record.index_crc32c:#010x}). {REDO}"
            )
        index = np.frombuffer(tail[:-_CRC_BYTES], "<u8").reshape(num_chunks, 2)
        offset, length = (int(value) for value in index[0])
        first = int.from_bytes(os.pread(file, _CRC_BYTES, offset + length - _CRC_BYTES), "little")
        if first != record.first_chunk_crc32c:
            raise CacheError(f"{self.path} belongs to another shard or cache: its first chunk differs. {REDO}")
        return index

    def read(self, start: int, layers: list[int], out: NDArray[np.uint16]) -> None:
        """Fill `out` [tokens, layers, H] with the features of the slots from `start` of the chosen layer columns."""
        num_tokens, width = out.shape[0], out.shape[2]
        chunk = self._chunk_buffer(width)
        with self._open() as file:
            for first in range(start // self.chunk_tokens, -(-(start + num_tokens) // self.chunk_tokens)):
                slot = first * self.chunk_tokens
                begin, end = max(slot, start), min(slot + self.chunk_tokens, start + num_tokens)
                for column, layer in enumerate(layers):
                    offset, length = (int(value) for value in self._index[first * self.shape[1] + layer])
                    data = os.pread(file.fileno(), length, offset)
                    decode_chunk(
                        data, chunk, f"{self.path}, slots {slot} to {slot + self.chunk_tokens}, layer {layer},"
                    )
                    out[begin - start : end - start, column] = chunk[begin - slot : end - slot]

    def _chunk_buffer(self, width: int) -> NDArray[np.uint16]:
        buffer = getattr(self._scratch, "buffer", None)
        if buffer is None:
            buffer = self._scratch.buffer = np.empty((self.chunk_tokens, width), np.uint16)
        return buffer
