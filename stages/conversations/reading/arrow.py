"""Parquet and Arrow as rows: each column read as what its type means, within bounds of memory."""

import os
import pickle
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import types

from dflash_offline.stages.conversations.content import ROW_KEYS
from dflash_offline.stages.conversations.reading import bounds
from dflash_offline.stages.conversations.reading.faults import RowFaultError
from dflash_offline.stages.conversations.reading.json_text import parse_value
from dflash_offline.stages.conversations.reading.streams import NumberedRows, first_line
from dflash_offline.stages.conversations.reading.value_counts import num_values
from dflash_offline.stages.conversations.turn_marks import ROW_KEYS as MARK_KEYS

_MOST_ROWS = 256
_BATCH_BYTES = 1 << 26
"""Bytes of columns, as a row group's metadata knows them, after which a batch is large enough."""
_EXTENSION = b"ARROW:extension:name"
_READABLE = "text, numbers, lists, structs, maps and JSON"

Reader = Callable[[Any], Any]
"""Takes a value as pyarrow gives it, and returns what it means; raises `RowFaultError`."""
_ASKED = {"instruction", "input"}
"""Columns of a public set of prompts whose rows are texts too."""


def read_parquet(path: Path) -> NumberedRows:
    """Yield the rows of a Parquet file, the columns of rows alone."""
    with pa.OSFile(os.fsencode(path)) as source:  # as bytes: names need not be UTF-8
        yield from _rows(_parquet_batches(source))


def read_arrow(path: Path) -> NumberedRows:
    """Yield the rows of an Arrow file or stream, the columns of rows alone."""
    with pa.memory_map(os.fsencode(path)) as source:
        yield from _rows(_arrow_batches(source))


def count_arrow(path: Path) -> NumberedRows:
    """Yield the number of rows of an Arrow file or stream, as of one empty row."""
    with pa.memory_map(os.fsencode(path)) as source:
        yield sum(batch.num_rows for batch in _arrow_batches(source)), b"", ""


def _parquet_batches(source: pa.NativeFile) -> Iterator[pa.RecordBatch]:
    # Buffered: a page at a time, not all of a row group.
    with pq.ParquetFile(source, buffer_size=1 << 20, arrow_extensions_enabled=True) as file:
        wanted = _columns(file.schema_arrow)
        for index in range(file.num_row_groups):
            group = file.metadata.row_group(index)
            columns = [group.column(i) for i in range(group.num_columns)]
            size = sum(
                max(column.total_uncompressed_size, 4 * column.num_values)
                for column in columns
                if wanted is None or column.path_in_schema.split(".")[0] in wanted
            )
            rows = max(1, min(_MOST_ROWS, _BATCH_BYTES * group.num_rows // max(1, size)))
            yield from file.iter_batches(batch_size=rows, row_groups=[index], columns=wanted)


def _arrow_batches(source: pa.NativeFile) -> Iterator[pa.RecordBatch]:
    is_file = source.read(6) == b"ARROW1"
    source.seek(0)
    open_arrow = pa.ipc.open_file if is_file else pa.ipc.open_stream
    schema = open_arrow(source).schema
    source.seek(0)
    fields = [schema.get_field_index(name) for name in _columns(schema) or ()]
    reader = open_arrow(source, options=pa.ipc.IpcReadOptions(included_fields=fields))
    if is_file:
        yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
    else:
        yield from reader


def _rows(batches: Iterator[pa.RecordBatch]) -> NumberedRows:
    number, readers = 0, None
    for batch in batches:
        readers = _readers(batch.schema) if readers is None else readers
        for begin in range(0, batch.num_rows, _MOST_ROWS):
            for value, fault in _values(batch.slice(begin, _MOST_ROWS), readers):
                number += 1
                yield number, b"" if fault else pickle.dumps(value), fault


def _values(batch: pa.RecordBatch, readers: dict[str, Reader | None]) -> Iterator[tuple[Any, str]]:
    """Yield each row's value and fault."""
    try:
        batch.validate(full=True)  # damaged offsets would be followed out of the file
        values = batch.to_pylist() if num_values(batch) <= bounds.MOST_VALUES else None
    except (UnicodeDecodeError, pa.ArrowInvalid) as error:
        if batch.num_rows == 1:
            yield None, f"is damaged ({first_line(error)})"
            return
        values = None
    if values is not None:
        yield from (_meaning(value, readers) for value in values)
    elif batch.num_rows == 1:
        yield None, bounds.TOO_MANY_VALUES
    else:
        for row in range(batch.num_rows):
            yield from _values(batch.slice(row, 1), readers)


def _meaning(row: dict[str, Any], readers: dict[str, Reader | None]) -> tuple[Any, str]:
    try:
        return _read_fields(row, readers), ""
    except RowFaultError as fault:
        return None, str(fault)


def _read_fields(value: dict[str, Any], readers: dict[str, Reader | None]) -> dict[str, Any]:
    """Return a struct without the keys that Arrow fills with null because another row has them."""
    read = {
        key: item if (reader := readers[key]) is None else reader(item)
        for key, item in value.items()
        if item is not None
    }
    return {key: item for key, item in read.items() if item is not None}


def _readers(schema: Iterable[pa.Field], place: str = "") -> dict[str, Reader | None]:
    """Return what reads each field; `OSError` naming the first of a type that no row is written in."""
    return {field.name: _reader(field.type, f"{place}{field.name}", field.metadata) for field in schema}


def _reader(kind: pa.DataType, place: str, metadata: dict[bytes, bytes] | None = None) -> Reader | None:
    """Return what reads a value of a type; None where the value is what it means."""
    if isinstance(kind, pa.JsonType):
        return lambda text: _from_json(text, place)
    unknown = (metadata or {}).get(_EXTENSION)  # of a type that pyarrow does not know it leaves the name
    if isinstance(kind, pa.BaseExtensionType) and not isinstance(kind, pa.Bool8Type):
        unknown = kind.extension_name.encode()
    if unknown:
        raise OSError(f"column {place} is of the type {unknown.decode(errors='replace')!r}; expected {_READABLE}")
    if types.is_struct(kind):
        fields = _readers(kind, f"{place}.")
        return lambda value: _read_fields(value, fields)
    if types.is_map(kind):
        if not types.is_string(kind.key_type) and not types.is_large_string(kind.key_type):
            raise OSError(f"column {place} is a map whose keys are of type {kind.key_type}; expected text")
        item = _reader(kind.item_type, f"{place}.*", kind.item_field.metadata)
        return lambda pairs: _read_map(pairs, item, place)
    if _is_list(kind):
        element = _reader(kind.value_type, f"{place}[]", kind.value_field.metadata)
        return None if element is None else lambda values: [None if one is None else element(one) for one in values]
    if types.is_dictionary(kind):
        return _reader(kind.value_type, place)
    if types.is_union(kind) or types.is_run_end_encoded(kind):
        raise OSError(f"column {place} is of the type {kind}; expected {_READABLE}")
    return None


def _is_list(kind: pa.DataType) -> bool:
    is_view = types.is_list_view(kind) or types.is_large_list_view(kind)
    return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind) or is_view


def _from_json(text: str, place: str) -> Any:
    value, fault = parse_value(text)
    if fault:
        raise RowFaultError(f"has {place} of JSON that {fault}")
    return value


def _read_map(pairs: list[tuple[str, Any]], item: Reader | None, place: str) -> dict[str, Any]:
    value = {key: one if item is None or one is None else item(one) for key, one in pairs}
    if len(value) < len(pairs):
        raise RowFaultError(f"has {place} with a key twice in one map")
    return value


def _columns(schema: pa.Schema) -> list[str] | None:
    """Return the columns that rows are made of; None where there is none of them, for all."""
    if ROW_KEYS.isdisjoint(schema.names):
        return None
    asked = _ASKED if _ASKED.issubset(schema.names) else set()
    return [name for name in schema.names if name in ROW_KEYS or name in MARK_KEYS or name in asked]
