"""A data file's content as a stream, decompressed where its first bytes say that it is compressed."""

import gzip
import io
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa

from dflash_offline.stages.conversations.reading import bounds

PIECE = 1 << 16
"""Bytes that are read at once."""
STREAM_FAULTS = (OSError, EOFError, MemoryError, zlib.error, pa.ArrowException, UnicodeDecodeError)
"""What a file can provoke while it is read."""
GET_WHOLE = "Get the whole file, or name its kind with --input-format"
"""What to do about a file that breaks off, or is not what it seems."""

NumberedRows = Iterator[tuple[int, bytes, str]]
"""Of each row its number from 1, what it holds, a line of JSON or a pickled value, and what is wrong with it."""


def open_stream(path: Path) -> BinaryIO:
    """Return the file's content as a stream, decompressed if its first bytes say that it is compressed."""
    with path.open("rb") as file:
        magic = file.read(4)
    if magic[:2] == b"\x1f\x8b":
        return gzip.open(path)  # type: ignore[return-value]
    if magic == b"\x28\xb5\x2f\xfd":  # by pyarrow, which tells a file that breaks off from one that ends
        return io.BufferedReader(pa.input_stream(pa.OSFile(os.fsencode(path)), compression="zstd"), PIECE)
    return path.open("rb")


def pass_over_line(stream: BinaryIO, number: int) -> None:
    """Read to the end of a line whose first `MOST_LINE_BYTES` were read; `OSError` if it goes on far too long."""
    passed = bounds.MOST_LINE_BYTES
    while (more := stream.readline(PIECE)) and not more.endswith(b"\n"):
        passed += len(more)
        if passed > bounds.MOST_PASSED_BYTES:
            raise OSError(f"line {number} does not end within {bounds.MOST_PASSED_BYTES >> 20:,} MiB")


def first_line(error: BaseException) -> str:
    """Return what an error says, in one line without a full stop."""
    if isinstance(error, gzip.BadGzipFile) and str(error).startswith("Not a gzipped file"):
        # The first bytes were gzip's, or the file would not have been opened as gzip.
        return "bytes that are not gzip follow what is compressed; `gzip -dc` writes what stands before them"
    lines = str(getattr(error, "strerror", None) or error).splitlines()
    return lines[0][:200].rstrip(".!") if lines else type(error).__name__
