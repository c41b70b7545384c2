"""Forges the frames of chunks and decodes them: no crash, no memory beyond a bound, nothing left of what was there.

A process of its own, for a decoder that believes a header dies: `python tests/store/forged_chunks.py COUNT SEED`.
"""

import random
import resource
import struct
import sys
from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path

import numpy as np
from numcodecs import blosc
from numpy.typing import NDArray

from dflash_offline.stages.store.chunks import DamagedFrameError, decode_chunks, decode_frame, encode_chunks, room

MEMORY = 256 << 20
"""Bytes that may be added to what the process has."""
LIES = (0, 1, 2, 3, 7, 15, 16, 17, 127, 128, 255, 256, 1 << 15, 1 << 16, 1 << 24, (1 << 31) - 1, 1 << 31, (1 << 32) - 1)

Frame = bytes
Decode = Callable[[Frame, int], NDArray[np.generic]]
"""A frame's items; what is not written of them is the given byte."""


def features(rows: int, width: int, noise: int) -> NDArray[np.uint16]:
    """Features of one chunk, [rows, 1, width]; the less noise, the fewer streams are stored as they are."""
    rng = np.random.default_rng(rows * width)
    return rng.integers(0x3F80, 0x3F80 + noise, (rows, 1, width), dtype=np.uint16)


def as_chunk(rows: int, width: int) -> Decode:
    """What a reader of hidden states does with a frame."""

    def decode(frame: Frame, before: int) -> NDArray[np.generic]:
        head = room(1)
        data = np.frombuffer(bytearray(head) + frame + b"crc.", np.uint8)
        out = np.full((rows, 1, width), before * 257, np.uint16)
        decode_chunks(data, [(head, len(frame) + 4)], out, rows)
        return out

    return decode


def as_items(count: int, dtype: str) -> Decode:
    """What a reader of token ids does with a frame."""

    def decode(frame: Frame, before: int) -> NDArray[np.generic]:
        out = np.full(count * np.dtype(dtype).itemsize, before, np.uint8)
        decode_frame(memoryview(frame), out, np.dtype(dtype).itemsize)
        return out

    return decode


def cases() -> list[tuple[str, Frame, Decode]]:
    """A sound frame of every kind that is read, and how."""
    blosc.use_threads = False
    found = []
    for rows, width, noise in (
        (1, 8, 9),
        (32, 64, 20),
        (32, 64, 1 << 14),
        (128, 4096, 300),
    ):  # the last by the C library
        values = features(rows, width, noise)
        ours = encode_chunks(values[None]).data[:-4].tobytes()
        found.append((f"ours {rows} x {width}", ours, as_chunk(rows, width)))
        for block in (0, 1 << 12):  # chosen by Blosc, and several in a frame
            theirs = blosc.compress(values, b"zstd", 1, blosc.SHUFFLE, block)
            found.append((f"blosc's {rows} x {width}, {block}", bytes(theirs), as_chunk(rows, width)))
    for dtype in ("<u4", "?"):
        items = np.random.default_rng(0).integers(0, 2, 1000).astype(dtype)
        found.append((dtype, encode_chunks(items[None]).data[:-4].tobytes(), as_items(1000, dtype)))
        found.append(
            (f"blosc's {dtype}", bytes(blosc.compress(items, b"zstd", 1, blosc.SHUFFLE)), as_items(1000, dtype))
        )
    return found


def forged(frame: Frame, chance: random.Random) -> Frame:
    """A frame with a number, some bytes or its length changed; mostly where structure is."""
    out = bytearray(frame)
    near = chance.choice((16, 32, 64, len(out)))
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        place = chance.randrange(min(near, len(out)))
        kind = chance.randrange(4)
        if kind == 0 and len(out) >= 4:  # a 32-bit number
            place = min(place & ~3, len(out) - 4)
            struct.pack_into("<I", out, place, (chance.choice(LIES) + chance.choice((0, 0, len(out)))) & 0xFFFFFFFF)
        elif kind == 1:
            out[place] ^= 1 << chance.randrange(8)
        elif kind == 2:
            out[place] = chance.randrange(256)
        else:
            out = out[:place] if chance.random() < 0.5 else out + out[place:]
        if not out:
            break
    return bytes(out)


def main(count: int, seed: int) -> None:
    """Try so many forged frames; what is wrong is an `AssertionError`, or the end of this process."""
    chance = random.Random(seed)
    sound = cases()
    for name, frame, decode in sound:
        assert np.array_equal(decode(frame, 0), decode(frame, 255)), name
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    refused = 0
    for name, frame, decode in islice(cycle(sound), count):
        lie = forged(frame, chance)
        try:
            one, other = decode(lie, 0), decode(lie, 255)
        except DamagedFrameError:
            refused += 1
        else:
            assert np.array_equal(one, other), f"{name}: what was there before is left in {lie!r}"
    print(refused, count)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
