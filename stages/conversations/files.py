"""Rows of data files: JSON, JSONL (plain, gzip, zstd), Parquet and Arrow, read as a stream, each with its place."""

import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from dflash_offline.schemas.errors import BadInputError
from dflash_offline.schemas.paths import utf8_name
from dflash_offline.stages.conversations.reading import bounds
from dflash_offline.stages.conversations.reading.apart import read_apart
from dflash_offline.stages.conversations.reading.json_text import parse_line, read_document, read_lines
from dflash_offline.stages.conversations.reading.streams import (
    GET_WHOLE,
    PIECE,
    STREAM_FAULTS,
    NumberedRows,
    first_line,
    open_stream,
)

ENDINGS = {
    ".json": None,  # an array or lines: only its content tells
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".ipc": "arrow",
}
COMPRESSED = (".gz", ".zst", ".zstd")
MOST_NAMED = 20
"""Faults that an error names before it only counts them."""


@dataclass(frozen=True)
class DataFile:
    """One file of rows and how it is to be read."""

    path: Path
    name: str
    """As the sample table names it: the file's name, or its path within the folder that was given."""
    container: str
    rows: range | None = None
    """The rows that are taken, counted from 0; None for all."""


@dataclass(frozen=True)
class Row:
    """One row of a file: an object, or what is wrong with it."""

    source: DataFile
    line: int
    """Line of a JSONL file, number of the row in any other; from 1."""
    value: dict[str, Any]
    fault: str = ""

    @property
    def place(self) -> str:
        """File and line, as errors name them."""
        return f"{self.source.path}:{self.line}"


@dataclass(frozen=True)
class RawRow:
    """One row of a file before it is parsed, so that another process can do that."""

    source: DataFile
    line: int
    content: bytes
    """A line of JSON, or a pickled value."""
    fault: str

    def parsed(self) -> Row:
        """Return the row."""
        value, fault = parse(self.content, self.fault, is_json=self.source.container == "jsonl")
        return Row(self.source, self.line, value, fault)


def parse(content: bytes, fault: str, *, is_json: bool) -> tuple[dict[str, Any], str]:
    """Return the object that a row's content spells, or what is wrong with it."""
    value: Any = {}
    if not fault:
        value, fault = parse_line(content) if is_json else (pickle.loads(content), "")
    if not fault and not isinstance(value, dict):
        fault = f"is a JSON {type(value).__name__}; expected an object"
    return ({}, fault) if fault else (value, "")


def refuse_bad_rows(faults: list[str], what_to_do: str, count: int | None = None) -> None:
    """Raise `BadInputError` naming the first faulty rows and counting the rest, if there are any.

    There are `count` of them, where `faults` holds only the first.
    """
    if faults:
        named = "\n  ".join(faults[:MOST_NAMED])
        count = count or len(faults)
        rest = f"\n  ... and {count - MOST_NAMED} more" if count > MOST_NAMED else ""
        rows = "row" if count == 1 else "rows"
        raise BadInputError(f"{count} bad {rows}:\n  {named}{rest}\n{what_to_do}")


def identify(path: Path, *, name: str = "", container: str | None = None) -> DataFile:
    """Return how a file is to be read, by its first bytes and its name; `BadInputError` if it cannot be opened."""
    try:
        container = container or _container(path)
    except STREAM_FAULTS as error:
        what_to_do = "Name a file of conversations" if getattr(error, "errno", None) else "Get the whole file"
        raise BadInputError(f"{path} cannot be read: {first_line(error)}. {what_to_do}.") from error
    return DataFile(path, utf8_name(name or path.name), container)


def read_rows(file: DataFile) -> Iterator[Row]:
    """Yield each row; `BadInputError` if the file breaks off or is not what it seemed: then rows would be lost."""
    return (row.parsed() for row in read_raw_rows(file))


def read_raw_rows(file: DataFile) -> Iterator[RawRow]:
    """Yield each row unparsed; `BadInputError` as from `read_rows`."""
    line = 0
    try:
        rows = _READERS[file.container](file.path)
        for line, content, fault in rows if file.rows is None else islice(rows, file.rows.start, file.rows.stop):
            yield RawRow(file, line, content, fault)
    except (*STREAM_FAULTS, ValueError, RecursionError) as error:
        raise BadInputError(
            f"{file.path} cannot be read as {file.container} after row {line}: {first_line(error)}. "
            f"{getattr(error, 'what_to_do', GET_WHOLE)}."
        ) from error


def _container(path: Path) -> str:
    with open_stream(path) as stream:
        head = stream.read(PIECE)
        if head[:4] == b"PAR1":
            return "parquet"
        if head[:6] == b"ARROW1" or head[:4] == b"\xff\xff\xff\xff":
            return "arrow"
        endings = [ending for ending in path.suffixes if ending not in COMPRESSED]
        by_name = ENDINGS.get(endings[-1]) if endings else None
        text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
        if by_name is not None or not text.startswith((b"[", b"{")):
            return by_name or "jsonl"
        if text.startswith(b"["):
            return "json"
        first = text.split(b"\n", 1)[0] if b"\n" in text else text + stream.readline(bounds.MOST_LINE_BYTES)
    _, fault = parse_line(first)
    return "json" if fault and ".json" in endings else "jsonl"


_READERS: dict[str, Callable[[Path], NumberedRows]] = {
    "json": read_document,
    "jsonl": read_lines,
    "parquet": partial(read_apart, "parquet"),
    "arrow": partial(read_apart, "arrow"),
}
"""What reads each kind of file."""
CONTAINERS = tuple(_READERS)
