"""Chunks of a shard file: encoded, checked and decoded with several threads and without zarr-python's per-chunk costs.

A chunk is a Blosc frame followed by its own crc32c. A frame is 16 bytes (version, version of the codec, flags, bytes of
an item, then as 32-bit numbers the bytes it holds, those of a block, and its own), the place of every block, and the
blocks. A block is one stream, or one for each byte of an item; a stream is its length and then its bytes, as they are
or as a zstd frame. Everything that a frame says is checked before it is decoded: the C library believes it.

The frames are standard, but laid out for bfloat16. Its high bytes (sign and exponent) hold some 2.6 bits each, its
low bytes nearly eight. Blosc gives zstd both planes as one stream, and zstd makes a Huffman table for each 128 KiB of
it, so that in a small chunk the two share one. Here each plane is a stream of its own, which Blosc knows as a split
block. And zstd is kept from looking for repetitions: in noise there are only accidental ones, which cost more bits
and time than the letters they stand for.
"""

import math
import struct
import threading
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import zstandard
from crc32c import crc32c
from numcodecs import blosc
from numpy.typing import DTypeLike, NDArray

CODEC = "blosc, zstd, each byte plane a stream of literals"
"""What is written here; the bytes of a cache depend on it."""
CRC_BYTES, _LENGTH_BYTES, _HEADER_BYTES = 4, 4, 20
LEAST_BYTES = _HEADER_BYTES + _LENGTH_BYTES
"""Of a chunk, whoever encoded it."""
_LARGEST_PLANE = 1 << 16
"""Bytes of a plane up to which it is quicker to decode the planes one by one."""
SMALLEST_SPLIT = 128
"""Items of a block below which it is one stream."""
_VERSIONS = (2, 1)
_SHUFFLED, _COPIED, _UNSPLIT, _ZSTD = 1, 2, 16, 4 << 5
_HEADER = struct.Struct("<4B3I")
_LENGTH = struct.Struct("<I")
_length_at = _LENGTH.unpack_from
_SMALLEST_WINDOW = 1 << 10
"""Bytes that any zstd decoder may be asked to look back."""

_local = threading.local()


class DamagedFrameError(ValueError):
    """A frame does not hold what its header, or its place, says."""


def expand(stream: memoryview, out: memoryview) -> None:
    """Fill `out` with a zstd frame that holds exactly so many bytes; `DamagedFrameError` if it holds others."""
    check_expands(stream, len(out))
    try:
        found = _decompressor().stream_reader(stream).readinto(out)
    except zstandard.ZstdError as error:
        raise DamagedFrameError(f"a zstd frame is damaged ({error})") from error
    if found != len(out):
        raise DamagedFrameError(f"a zstd frame holds {found:,} bytes, expected {len(out):,}")


def check_expands(stream: memoryview, num_bytes: int) -> None:
    """Raise `DamagedFrameError` unless a zstd frame says that it holds so many bytes and needs no more memory."""
    try:
        known = zstandard.get_frame_parameters(stream)
    except zstandard.ZstdError as error:
        raise DamagedFrameError(f"a stream is no zstd frame ({error})") from error
    if known.content_size != num_bytes or known.window_size > max(num_bytes, _SMALLEST_WINDOW):
        raise DamagedFrameError(
            f"a zstd frame says that it holds {known.content_size:,} bytes and looks back {known.window_size:,}, "
            f"expected {num_bytes:,}"
        )


def _decompressor() -> zstandard.ZstdDecompressor:
    """Return this thread's zstd decompressor."""
    decompressor: zstandard.ZstdDecompressor | None = getattr(_local, "decompressor", None)
    if decompressor is None:
        decompressor = _local.decompressor = zstandard.ZstdDecompressor()
    return decompressor


def fill(out: memoryview, stream: memoryview) -> None:
    """Fill `out` with a stream of a block, stored as it is or as a zstd frame."""
    if len(stream) == len(out):
        out[:] = stream
    else:
        expand(stream, out)


def block_streams(data: memoryview, begin: int, end: int, num_streams: int, num_bytes: int) -> list[memoryview]:
    """Return the streams of the block in these bytes, none longer than `num_bytes`; `DamagedFrameError` if they are."""
    streams = []
    for _ in range(num_streams):
        first = begin + _LENGTH_BYTES
        length = _length_at(data, begin)[0] if first < end else 0
        begin = first + length
        if not (0 < length <= num_bytes and begin <= end):
            raise DamagedFrameError(
                f"a stream says that it has {length:,} bytes; its block has {max(end - first, 0):,} left for the "
                f"{num_bytes:,} bytes that it becomes"
            )
        streams.append(data[first:begin])
    return streams


def decode_frame(frame: memoryview, out: NDArray[np.uint8], item_size: int) -> None:
    """Fill `out` with a frame of exactly so many bytes; `DamagedFrameError` if the frame says or holds anything else.

    `item_size` is that of the items whose bytes were shuffled. Frames of every Blosc encoder are read that use zstd.
    """
    num_bytes, known = len(out), _SHUFFLED | _COPIED | _UNSPLIT
    if len(frame) < _HEADER.size:
        raise DamagedFrameError(f"a frame has {len(frame)} bytes")
    *versions, flags, found_size, held, block_bytes, length = _HEADER.unpack_from(frame)
    wanted = (*_VERSIONS, item_size, num_bytes, len(frame))
    if (*versions, found_size, held, length) != wanted or flags & ~known != _ZSTD:
        raise DamagedFrameError(
            f"its frame says versions {versions}, flags {flags:#04x}, items of {found_size}, {held:,} bytes in "
            f"{length:,}; expected {wanted[:2]}, shuffled zstd, {item_size}, {num_bytes:,} in {len(frame):,}"
        )
    if flags & _COPIED:
        if len(frame) != _HEADER.size + num_bytes:
            raise DamagedFrameError(f"{num_bytes:,} bytes that are stored as they are lie in {len(frame):,}")
        out[:] = np.frombuffer(frame[_HEADER.size :], np.uint8)
        return
    if not min(SMALLEST_SPLIT, num_bytes) <= block_bytes <= num_bytes or block_bytes % item_size:
        raise DamagedFrameError(f"its blocks have {block_bytes:,} bytes, of {num_bytes:,} in items of {item_size}")
    _decode_blocks(frame, out, item_size, block_bytes, flags)


def _decode_blocks(frame: memoryview, out: NDArray[np.uint8], item_size: int, block_bytes: int, flags: int) -> None:
    num_blocks = -(-len(out) // block_bytes)
    first = _HEADER.size + _LENGTH_BYTES * num_blocks
    if first > len(frame):
        raise DamagedFrameError(f"a frame of {len(frame):,} bytes has no room for the places of {num_blocks:,} blocks")
    is_split = not flags & _UNSPLIT and block_bytes // item_size >= SMALLEST_SPLIT
    shuffled = np.empty(block_bytes, np.uint8)
    for number, (begin,) in enumerate(_LENGTH.iter_unpack(frame[_HEADER.size : first])):
        if not first <= begin < len(frame):
            raise DamagedFrameError(f"block {number} is said to begin at byte {begin:,} of {len(frame):,}")
        block = out[number * block_bytes : (number + 1) * block_bytes]
        num_streams = item_size if is_split and len(block) == block_bytes else 1
        each = len(block) // num_streams
        planes = shuffled[: len(block)]
        for place, stream in enumerate(block_streams(frame, begin, len(frame), num_streams, each)):
            fill(planes[place * each : (place + 1) * each].data, stream)
        if flags & _SHUFFLED:
            planes = planes.reshape(item_size, -1).T.reshape(-1)
        block[:] = planes


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


def crc32c_bytes(data: Any) -> bytes:
    return int(crc32c(data)).to_bytes(CRC_BYTES, "little")


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
    if count < SMALLEST_SPLIT:
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
        view[end : end + CRC_BYTES] = crc32c_bytes(view[begin:end])
        end += CRC_BYTES
        sizes.append(end - begin)
    return Encoded(out[:end], sizes)


def encode_chunk(values: NDArray[Any]) -> Encoded:
    """Return one chunk as it stands in a shard file."""
    return encode_chunks(values[None])


def encoded_room(num_chunks: int, num_bytes: int) -> int:
    """Return the bytes that encoded chunks of `num_bytes` each need at most."""
    return num_chunks * (_HEADER_BYTES + 8 * _LENGTH_BYTES + num_bytes + CRC_BYTES)


@lru_cache
def _header(item_size: int, num_bytes: int, length: int) -> bytes:
    """Return the start of a Blosc frame of `length` bytes that holds one block of split planes."""
    shuffled, zstd = 1, 4 << 5
    return struct.pack("<4B4I", 2, 1, shuffled | zstd, item_size, num_bytes, num_bytes, length, _HEADER_BYTES)


def decode_chunks(data: NDArray[np.uint8], places: Sequence[tuple[int, int]], out: NDArray[Any], num_rows: int) -> None:
    """Fill `out` [T, C, H] with chunks of `num_rows` tokens of one layer each, row by row of C chunks.

    They stand in `data` at these places, (begin, size) each; their crc32c is not compared. What lies before the first
    of them, `room(N)` bytes, is overwritten. `DamagedFrameError` where one does not hold so many numbers.
    """
    view, (_, width, num_features) = data.data, out.shape
    num_bytes = 2 * num_rows * num_features
    ours = all(view[at : at + _HEADER_BYTES] == _header(2, num_bytes, size - CRC_BYTES) for at, size in places)
    if ours and 2 * SMALLEST_SPLIT <= num_bytes <= 2 * _LARGEST_PLANE:
        planes = _planes(view, places, num_bytes // 2).reshape(2, -1, width, num_rows, num_features)
        for row in range(planes.shape[1]):
            tokens = out[row * num_rows : (row + 1) * num_rows]
            low, high = planes[:, row, :, : len(tokens)].transpose(0, 2, 1, 3)
            np.multiply(high, 256, out=tokens, dtype=tokens.dtype)
            tokens += low
        return
    words = scratch("words", (len(places) // width, width, num_rows, out.shape[2]), out.dtype)
    if ours:
        _check_streams(view, places, num_bytes)
        _make_one_frame(view, places, num_bytes)
        blosc.use_threads = False  # groups of chunks are decoded at once instead
        try:
            blosc.decompress(data, words)
        except RuntimeError as error:
            raise DamagedFrameError(f"a zstd frame is damaged ({error})") from error
    else:  # another encoder's
        for (at, size), chunk in zip(places, words.view(np.uint8).reshape(len(places), -1), strict=True):
            decode_frame(view[at : at + size - CRC_BYTES], chunk, 2)
    for row, chunks in enumerate(words):
        tokens = out[row * num_rows : (row + 1) * num_rows]
        tokens[...] = chunks.transpose(1, 0, 2)[: len(tokens)]


def _planes(data: memoryview, places: Sequence[tuple[int, int]], count: int) -> NDArray[np.uint8]:
    """Return the byte planes of small chunks, [2, N, count], the low one first.

    Blosc would make a decompressor for every plane, which takes longer than to decode it.
    """
    planes = scratch("planes", (2, len(places), count), np.uint8)
    both, first = [plane.reshape(-1).data for plane in planes], 0
    for at, size in places:
        streams = block_streams(data, at + _HEADER_BYTES, at + size - CRC_BYTES, 2, count)
        for plane, stream in zip(both, streams, strict=True):
            fill(plane[first : first + count], stream)
        first += count
    return planes


def _check_streams(data: memoryview, places: Sequence[tuple[int, int]], num_bytes: int) -> None:
    """Raise `DamagedFrameError` unless the streams of chunks of ours lie in them and become so many bytes."""
    num_streams = 2 if num_bytes >= 2 * SMALLEST_SPLIT else 1
    each = num_bytes // num_streams
    for at, size in places:
        for stream in block_streams(data, at + _HEADER_BYTES, at + size - CRC_BYTES, num_streams, each):
            if len(stream) != each:
                check_expands(stream, each)


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
