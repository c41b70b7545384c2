"""Rows of data files: JSON, JSONL (plain, gzip, zstd), Parquet and Arrow, read as a stream, each with its place."""

import codecs
import gzip
import io
import json
import os
import pickle
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from dflash_offline.schemas.errors import BadInputError
from dflash_offline.schemas.paths import utf8_name
from dflash_offline.stages.conversations.content import MOST_NESTED, ROW_KEYS, is_too_deep, shown

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
MOST_LINE_BYTES = 1 << 28
"""A longer line is no row but a file of another kind; it is named and passed over without being held."""
MOST_NAMED = 20
"""Faults that an error names before it only counts them."""
_TOO_DEEP = f"is nested more than {MOST_NESTED} deep"
_PIECE = 1 << 16
_ARROW_ROWS = 256
_BLANKS = re.compile(r"[ \t\r\n]*")
_STREAM_FAULTS = (OSError, EOFError, zlib.error, pa.ArrowException, UnicodeDecodeError)


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
        value, fault = _line(content) if is_json else (pickle.loads(content), "")
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
    except _STREAM_FAULTS as error:
        raise BadInputError(f"{path} cannot be read: {first_line(error)}. Name a file of conversations.") from error
    return DataFile(path, utf8_name(name or path.name), container)


def read_rows(file: DataFile) -> Iterator[Row]:
    """Yield each row; `BadInputError` if the file breaks off or is not what it seemed: then rows would be lost."""
    return (row.parsed() for row in read_raw_rows(file))


def read_raw_rows(file: DataFile) -> Iterator[RawRow]:
    """Yield each row unparsed; `BadInputError` as from `read_rows`."""
    line = 0
    try:
        rows = _READERS[file.container](file.path)
        for line, value, fault in rows if file.rows is None else islice(rows, file.rows.start, file.rows.stop):
            content = b"" if fault else value if file.container == "jsonl" else pickle.dumps(value)
            yield RawRow(file, line, content, fault)
    except (*_STREAM_FAULTS, ValueError, RecursionError) as error:
        raise BadInputError(
            f"{file.path} cannot be read as {file.container} after row {line}: {first_line(error)}. "
            f"Get the whole file, or name its kind with --input-format."
        ) from error


def first_line(error: BaseException) -> str:
    """Return what an error says, in one line without a full stop."""
    lines = str(getattr(error, "strerror", None) or error).splitlines()
    return lines[0][:200].rstrip(".!") if lines else type(error).__name__


def _open(path: Path) -> BinaryIO:
    """Return the file's content as a stream, decompressed if its first bytes say that it is compressed."""
    with path.open("rb") as file:
        magic = file.read(4)
    if magic[:2] == b"\x1f\x8b":
        return gzip.open(path)  # type: ignore[return-value]
    if magic == b"\x28\xb5\x2f\xfd":  # by pyarrow, which tells a file that breaks off from one that ends
        return io.BufferedReader(pa.input_stream(pa.OSFile(os.fsencode(path)), compression="zstd"), _PIECE)
    return path.open("rb")


def _container(path: Path) -> str:
    with _open(path) as stream:
        head = stream.read(_PIECE)
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
        first = text.split(b"\n", 1)[0] if b"\n" in text else text + stream.readline(MOST_LINE_BYTES)
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return "json" if ".json" in endings else "jsonl"
    return "jsonl"


class _BrokenError(ValueError):
    """A JSON document ends too early or goes on wrongly."""


NumberedRows = Iterator[tuple[int, Any, str]]
"""Of each row its number from 1, what it holds (a line of JSON as bytes), and what is wrong with it."""


@dataclass
class _Decoder:
    """A JSON decoder that remembers keys which stand twice in one object, where it cannot be told which is meant."""

    doubled: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.decoder = json.JSONDecoder(object_pairs_hook=self._object)

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) < len(pairs):
            names = [name for name, _ in pairs]
            self.doubled.append(next(name for name in names if names.count(name) > 1))
        return value

    def decode(self, text: str, at: int = 0) -> tuple[Any, int, str]:
        """Return the value that begins at `at`, where it ends, and its fault."""
        self.doubled.clear()
        value, end = self.decoder.raw_decode(text, at)
        fault = f"has the key {shown(self.doubled[0])} twice in one object" if self.doubled else ""
        brackets = text.count("[", at, end) + text.count("{", at, end)
        return value, end, _TOO_DEEP if brackets > MOST_NESTED and is_too_deep(value) else fault


def _jsonl(path: Path) -> NumberedRows:
    with _open(path) as stream:
        number = 0
        while content := stream.readline(MOST_LINE_BYTES):
            number += 1
            if len(content) == MOST_LINE_BYTES and not content.endswith(b"\n"):
                while (more := stream.readline(MOST_LINE_BYTES)) and not more.endswith(b"\n"):
                    pass
                yield number, None, f"is longer than {MOST_LINE_BYTES >> 20} MiB"
            elif content.strip():
                yield number, content.removeprefix(codecs.BOM_UTF8) if number == 1 else content, ""


def _line(content: bytes) -> tuple[Any, str]:
    try:
        text = content.decode().strip(" \t\r\n")
        value, end, fault = _Decoder().decode(text)
        if end < len(text):
            raise json.JSONDecodeError("Extra data", text, end)
    except UnicodeDecodeError as error:
        return None, f"is not UTF-8 (byte {error.start}: {error.reason})"
    except RecursionError:
        return None, _TOO_DEEP
    except ValueError as error:
        return None, f"is not JSON ({first_line(error)})"
    return value, fault


def _json(path: Path) -> NumberedRows:
    """Read an array element by element, or the one object that the file is."""
    decoder = _Decoder()
    with io.TextIOWrapper(_open(path), "utf-8-sig") as text:
        buffer = ""
        while not buffer and (piece := text.read(_PIECE)):
            buffer = piece.lstrip()
        if not buffer.startswith("["):
            whole = buffer + text.read()
            value, end, fault = decoder.decode(whole)
            _refuse_more(whole, end)
            yield 1, value, fault
            return
        number, at, separator = 0, 1, ","
        while separator == ",":
            try:
                at = _end_of_blanks(buffer, at)
                if number == 0 and buffer[at] == "]":
                    end, fault, value, separator = at, "", None, "]"
                else:
                    value, end, fault = decoder.decode(buffer, at)
                    end = _end_of_blanks(buffer, end)
                    separator = buffer[end]
                    number += 1
            except (IndexError, json.JSONDecodeError) as error:
                # The element goes on beyond the buffer, or is broken: twice as much each time tells at linear cost.
                piece = text.read(max(_PIECE, len(buffer) - at))
                if not piece:
                    raise _BrokenError(f"row {number + 1} is broken or unfinished") from error
                buffer, at = buffer[at:] + piece, 0
                continue
            if separator not in ",]":
                raise _BrokenError(f"row {number} is followed by {separator!r}; expected , or ]")
            if number:
                yield number, value, fault
            at = end + 1
        _refuse_more(buffer[at:] + text.read(_PIECE), 0)


def _end_of_blanks(text: str, at: int) -> int:
    blanks = _BLANKS.match(text, at)
    assert blanks is not None
    return blanks.end()


def _refuse_more(text: str, end: int) -> None:
    if text[end:].strip():
        raise _BrokenError("more follows the end of the document")


def _parquet(path: Path) -> NumberedRows:
    with pa.OSFile(os.fsencode(path)) as source, pq.ParquetFile(source) as file:  # as bytes: names need not be UTF-8
        yield from _values(file.iter_batches(batch_size=_ARROW_ROWS, columns=_columns(file.schema_arrow)))


def _arrow(path: Path) -> NumberedRows:
    with pa.memory_map(os.fsencode(path)) as source:
        yield from _values(_batches(source))


def num_arrow_rows(path: Path) -> int:
    """Return how many rows an Arrow file or stream holds."""
    with pa.memory_map(os.fsencode(path)) as source:
        return sum(batch.num_rows for batch in _batches(source))


def _batches(source: pa.NativeFile) -> Iterator[pa.RecordBatch]:
    """Yield the batches of an Arrow file or stream, the columns of rows alone."""
    if source.read(6) == b"ARROW1":
        file = pa.ipc.open_file(source)
        batches: Iterator[pa.RecordBatch] = (file.get_batch(i) for i in range(file.num_record_batches))
    else:
        source.seek(0)
        batches = iter(pa.ipc.open_stream(source))
    for batch in batches:
        wanted = _columns(batch.schema)
        batch = batch.select(wanted) if wanted else batch
        for begin in range(0, batch.num_rows, _ARROW_ROWS):
            yield batch.slice(begin, _ARROW_ROWS)


def _values(batches: Iterator[pa.RecordBatch]) -> NumberedRows:
    number = 0
    for batch in batches:
        try:
            batch.validate(full=True)  # damaged offsets would be followed out of the file
            values = [(value, "") for value in batch.to_pylist()]
        except (UnicodeDecodeError, pa.ArrowInvalid):
            values = [_value(batch.slice(i, 1)) for i in range(batch.num_rows)]
        for value, fault in values:
            number += 1
            yield number, _without_nulls(value), fault


def _value(batch: pa.RecordBatch) -> tuple[Any, str]:
    try:
        batch.validate(full=True)
        return batch.to_pylist()[0], ""
    except (UnicodeDecodeError, pa.ArrowInvalid) as error:
        return None, f"is damaged ({first_line(error)})"


def _without_nulls(value: Any) -> Any:
    """Return the value without the keys that Arrow fills with null because another row has them."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list) and value and isinstance(value[0], (dict, list)):
        return [_without_nulls(item) for item in value]
    return value


def _columns(schema: pa.Schema) -> list[str] | None:
    """Return the columns that rows are made of; None where there is none of them, for all."""
    return [name for name in schema.names if name in ROW_KEYS] or None


_READERS: dict[str, Callable[[Path], NumberedRows]] = {
    "json": _json,
    "jsonl": _jsonl,
    "parquet": _parquet,
    "arrow": _arrow,
}
"""What reads each kind of file."""
CONTAINERS = tuple(_READERS)
