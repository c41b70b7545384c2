"""samples.parquet and rejects.parquet: which input rows became samples, where they lie, and why others did not."""

import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from dflash_offline.schemas.draft.anchor_rule import WHOLE, AnchorRule
from dflash_offline.schemas.errors import CacheError
from dflash_offline.schemas.manifest import Manifest

SAMPLE_SCHEMA = pa.schema(
    [
        ("sample_id", pa.int64()),
        ("source", pa.string()),
        ("row", pa.int64()),
        ("answer", pa.int32()),
        ("num_tokens", pa.int32()),
        ("num_supervised", pa.int32()),
        ("num_anchors", pa.int32()),
        ("shard", pa.int32()),
        ("start", pa.int64()),
        ("input_ids", pa.list_(pa.uint32())),
        ("loss_mask", pa.list_(pa.bool_())),
    ]
)
NUMBERS = ("row", "answer", "num_tokens", "num_supervised", "num_anchors", "shard", "start")
_LATER = {"answer"}
"""Columns that older caches lack: all zeros."""
_GROUP_ROWS = 65_536
_GROUP_TOKENS = 1 << 20
"""Tokens of one row group, all of which are read for the tokens of any sample in it."""
_HELD_TOKENS = 1 << 24
"""Tokens of the row groups that are kept after reading; 5 bytes a token."""
_ENCODINGS = {"use_dictionary": ["source"], "use_byte_stream_split": ["input_ids.list.element"]}
"""Ids are mostly zero in their upper bytes; the usual dictionary takes twice the time for more bytes."""
_REJECTS_AT_ONCE = 8_192
_READ_ROWS = 65_536
_FAULTS = (OSError, UnicodeDecodeError, pa.ArrowException)
_MOST_ITEMS_A_BYTE = 4096
"""Of a file; a sample of one token repeated a million times has some hundred items a byte."""

Numbers = NDArray[np.int64] | NDArray[np.int32]
Tokens = tuple[NDArray[np.uint32], NDArray[np.bool_]]
"""Token ids and which of them are supervised, of the same length."""


def before_supervised(loss_mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return which positions stand before a supervised token, bool [T]: those whose final states are kept."""
    return np.append(loss_mask[1:], np.False_)


@dataclass(frozen=True, kw_only=True)
class Reject:
    """An input row that is not a sample, or an answer of one that is in none of the row's samples."""

    source: str
    """File name."""
    row: int
    """Line number, from 1."""
    reason: str
    """Short and countable."""
    detail: str
    """What was found in this row."""
    answer: int = 0
    """Counts the assistant's turns of the row, from 1; 0 where the whole row is no sample."""


REJECT_SCHEMA = pa.schema(
    [(field.name, pa.int64() if field.name in ("row", "answer") else pa.string()) for field in fields(Reject)]
)


class RejectWriter:
    """Writes rejects.parquet as rejects come, row group by row group; a context that is left when all have."""

    def __init__(self, path: Path) -> None:
        self._file = pq.ParquetWriter(path, REJECT_SCHEMA)
        self._waiting: list[Reject] = []

    def add(self, reject: Reject) -> None:
        """Add one reject."""
        self._waiting.append(reject)
        if len(self._waiting) == _REJECTS_AT_ONCE:
            self._write()

    def _write(self) -> None:
        columns = {name: [getattr(reject, name) for reject in self._waiting] for name in REJECT_SCHEMA.names}
        self._file.write_table(pa.table(columns, schema=self._file.schema))
        self._waiting = []

    def __enter__(self) -> "RejectWriter":
        return self

    def __exit__(self, *raised: object) -> None:
        with self._file:
            if self._waiting:
                self._write()


def read_rejects(path: Path) -> list[Reject]:
    """Return what rejects.parquet holds; `CacheError` if it cannot be read."""
    try:
        return [Reject(**row) for row in open_table(path, REJECT_SCHEMA).read(REJECT_SCHEMA.names).to_pylist()]
    except _FAULTS as error:
        raise _unreadable(path, error) from error


def write_samples(
    path: Path,
    *,
    sources: Sequence[str],
    source_index: NDArray[np.int32],
    numbers: Mapping[str, Numbers],
    read: Callable[[int, int], Tokens],
) -> None:
    """Write samples.parquet, row group by row group; the same samples always give the same bytes.

    `numbers` holds the columns of `NUMBERS`, `source_index` each sample's place in `sources`; `read(begin, end)`
    returns these tokens of all samples' tokens laid end to end.
    """
    begin, names = 0, pa.array(sources, pa.string())
    with pq.ParquetWriter(path, SAMPLE_SCHEMA, compression="zstd", **_ENCODINGS) as file:
        for first, ends in _groups(numbers["num_tokens"]):
            rows = slice(first, first + len(ends))
            ids, mask = read(begin, begin + int(ends[-1]))
            offsets = pa.array(np.concatenate([[0], ends]), pa.int32())
            columns = {
                "sample_id": pa.array(np.arange(rows.start, rows.stop)),
                "source": names.take(pa.array(source_index[rows])),
                **{name: pa.array(numbers[name][rows]) for name in NUMBERS},
                "input_ids": pa.ListArray.from_arrays(offsets, pa.array(ids)),
                "loss_mask": pa.ListArray.from_arrays(offsets, pa.array(mask)),
            }
            cast = {field.name: columns[field.name].cast(field.type) for field in SAMPLE_SCHEMA}
            file.write_table(pa.table(cast, schema=SAMPLE_SCHEMA))
            begin += len(ids)


def _groups(num_tokens: Numbers) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Yield each row group's first sample and where its samples end in its tokens."""
    first = 0
    while first < len(num_tokens):
        ends = np.cumsum(num_tokens[first : first + _GROUP_ROWS], dtype=np.int64)
        ends = ends[: max(1, int(np.searchsorted(ends, _GROUP_TOKENS, "right")))]
        yield first, ends
        first += len(ends)


@dataclass(frozen=True)
class _Group:
    """The tokens of one row group's samples: ids[offsets[i]:offsets[i + 1]] are its sample i's."""

    offsets: NDArray[np.int64]
    ids: NDArray[np.uint32]
    mask: NDArray[np.bool_]


class StoredTokens:
    """The tokens of samples.parquet, read a row group at a time when they are asked for. Safe in threads."""

    def __init__(self, path: Path, file: pq.ParquetFile, num_tokens: NDArray[np.int64]) -> None:
        self._path = path
        self._file = file
        self._num_tokens = num_tokens
        metadata = file.metadata
        sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        self._firsts: list[int] = np.cumsum([0, *sizes]).tolist()
        self._held: OrderedDict[int, _Group] = OrderedDict()
        self._most_held: int | None = _HELD_TOKENS
        self._lock = threading.Lock()

    def of(self, sample: int) -> Tokens:
        """Return a sample's tokens; `CacheError` if the file cannot be read."""
        number = bisect_right(self._firsts, sample) - 1
        with self._lock:
            group = self._held.get(number)
            if group is None:
                group = self._held[number] = self._read(number)
                self._forget()
            if self._most_held is not None:
                self._held.move_to_end(number)
        one = slice(*group.offsets[sample - self._firsts[number] :][:2].tolist())
        return group.ids[one], group.mask[one]

    def load(self) -> None:
        """Read all tokens into memory, 5 bytes each, for a reader that takes samples in any order."""
        with self._lock:
            self._most_held = None
            for number in range(len(self._firsts) - 1):
                if number not in self._held:
                    self._held[number] = self._read(number)

    def groups(self) -> Iterator[tuple[int, NDArray[np.int64], NDArray[np.uint32]]]:
        """Yield the first sample of each row group, where its samples begin and end in its tokens, and the tokens."""
        for number, first in enumerate(self._firsts[:-1]):
            with self._lock:
                group = self._held.get(number)
            group = group or self._read(number)
            yield first, group.offsets, group.ids

    def _forget(self) -> None:
        """Drop the row groups used longest ago; at least two stay, for a shard may begin in one and end in the next."""
        while self._most_held is not None and len(self._held) > 2:
            if sum(len(group.ids) for group in self._held.values()) <= self._most_held:
                return
            self._held.popitem(last=False)

    def _read(self, number: int) -> _Group:
        try:
            table = self._file.read_row_group(number, columns=["input_ids", "loss_mask"])
            ids, mask = (pa.concat_arrays([part.flatten() for part in column.chunks]) for column in table.columns)
        except _FAULTS as error:
            raise _unreadable(self._path, error) from error
        lengths = self._num_tokens[self._firsts[number] : self._firsts[number + 1]]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        if not len(ids) == len(mask) == offsets[-1] or ids.null_count or mask.null_count:
            raise _unreadable(self._path, f"row group {number} holds {len(ids)} tokens, not {offsets[-1]}")
        return _Group(offsets, ids.to_numpy(), mask.to_numpy(zero_copy_only=False))


def open_table(path: Path, schema: pa.Schema, read_dictionary: list[str] | None = None) -> pq.ParquetFile:
    """Return a Parquet file that has the columns of `schema`, and no more rows and items than its bytes can hold.

    `CacheError` for another file. Columns named in `read_dictionary` are read as their distinct values and indices.
    """
    try:
        file = pq.ParquetFile(path, read_dictionary=read_dictionary or [])
        for field in schema:
            place = file.schema_arrow.get_field_index(field.name)
            if place < 0 and field.name in _LATER:
                continue
            found: Any = None if place < 0 else file.schema_arrow.field(place).type
            plain = found.value_type if isinstance(found, pa.DictionaryType) else found
            if plain != field.type:
                raise _unreadable(path, f"column {field.name} is {found or 'missing'}, expected {field.type}")
        metadata, size = file.metadata, path.stat().st_size
        groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
        items = sum(group.column(column).num_values for group in groups for column in range(metadata.num_columns))
    except (*_FAULTS, KeyError, TypeError, ValueError) as error:  # KeyError: no such column to read as a dictionary
        if isinstance(error, CacheError):
            raise
        raise _unreadable(path, error) from error
    if metadata.num_rows > size or items > _MOST_ITEMS_A_BYTE * size:
        raise _unreadable(path, f"{size:,} bytes cannot hold {metadata.num_rows:,} rows with {items:,} items")
    return file


def _unreadable(path: Path, error: object) -> CacheError:
    said = " ".join(str(error).split()).rstrip(".")
    return CacheError(f"{path} cannot be read: {said}. Restore it from a copy, or extract again.")


@dataclass(frozen=True)
class SampleTable:
    """The plan, one entry a sample; everything a reader needs before it opens a feature."""

    sources: tuple[str, ...]
    """Names of the input files."""
    source_index: NDArray[np.int32]
    """Place of each sample's file among them."""
    row: NDArray[np.int64]
    answer: NDArray[np.int64]
    """Counts the assistant's turns of the row, from 1, up to the last one that is supervised in the sample, where a
    conversation became several samples or not all of its answers are in one; 0 where the whole row is the sample."""
    num_tokens: NDArray[np.int64]
    num_supervised: NDArray[np.int64]
    num_anchors: NDArray[np.int64]
    shard: NDArray[np.int64]
    start: NDArray[np.int64]
    """First slot in the zarr arrays."""
    tokens: StoredTokens

    def __len__(self) -> int:
        return len(self.num_tokens)

    def check(self, path: Path, manifest: Manifest) -> None:
        """Raise `CacheError` naming the first sample that does not lie where a plan of this manifest puts samples."""
        layout, ends = manifest.layout, self.start % manifest.layout.shard_tokens + self.num_tokens
        if len(self) != manifest.plan["samples"]:
            raise _unreadable(path, f"it holds {len(self):,} samples, the manifest says {manifest.plan['samples']:,}")
        after = np.concatenate([[0], self.start[:-1] + self.num_tokens[:-1]])
        rules = {
            "row": (self.row >= 0, "a row of the data"),
            "answer": (self.answer >= 0, "an answer of the row"),
            "num_tokens": ((self.num_tokens >= 1) & (ends <= layout.shard_tokens), "tokens within the shard"),
            "num_supervised": (
                (self.num_supervised >= 0) & (self.num_supervised <= self.num_tokens),
                "no more than its tokens",
            ),
            "num_anchors": (
                (self.num_anchors >= 0) & (self.num_anchors <= self.num_supervised),
                "no more than its supervised tokens",
            ),
            "shard": (
                (self.shard < layout.num_shards) & (self.shard == self.start // layout.shard_tokens),
                "the shard of its first slot",
            ),
            "start": (
                (self.start >= after) & (self.start % layout.chunk_tokens == 0),
                "where a chunk begins, after the sample before it",
            ),
        }
        for name, (holds, expected) in rules.items():
            if not holds.all():
                sample = int(np.argmin(holds))
                found = getattr(self, name)[sample]
                raise _unreadable(path, f"{name} of sample {sample} is {found}; expected {expected}")

    def source(self, sample: int) -> str:
        """Return the name of the file that the sample came from."""
        return self.sources[self.source_index[sample]]

    def input_ids(self, sample: int) -> NDArray[np.uint32]:
        """Return the sample's tokens, [num_tokens] uint32."""
        return self.tokens.of(sample)[0]

    def loss_mask(self, sample: int) -> NDArray[np.bool_]:
        """Return which tokens are supervised, [num_tokens] bool."""
        return self.tokens.of(sample)[1]

    def place(self, sample: int) -> str:
        """Return the sample and the input row it came from, as messages name them."""
        return f"Sample {sample} ({self.origin(sample)})"

    def origin(self, sample: int) -> str:
        """Return the input row that the sample came from, and of what answer it is if it is not the whole row."""
        return origin(self.source(sample), int(self.row[sample]), int(self.answer[sample]))

    def samples_of_shard(self, shard: int) -> NDArray[np.int64]:
        """Return the samples that lie in a shard, in order."""
        low, high = np.searchsorted(self.shard, [shard, shard + 1])
        return np.arange(low, high)

    @classmethod
    def read(cls, path: Path) -> "SampleTable":
        """Return the table of samples.parquet, its tokens still on disk; `CacheError` if it cannot be read."""
        try:
            file = open_table(path, SAMPLE_SCHEMA, read_dictionary=["source"])
            count = file.metadata.num_rows
            numbers = {name: np.zeros(count, np.int64) for name in NUMBERS}
            given = [name for name in NUMBERS if name not in _LATER or name in file.schema_arrow.names]
            source_index, known, first = np.empty(count, np.int32), dict[str, int](), 0
            for batch in file.iter_batches(_READ_ROWS, columns=["source", *given]):
                rows = slice(first, first + len(batch))
                for name in given:
                    numbers[name][rows] = batch[name].to_numpy()
                names = batch["source"].dictionary.to_pylist()  # its own in every row group
                places = np.array([known.setdefault(name, len(known)) for name in names], np.int32)
                source_index[rows] = places[batch["source"].indices.to_numpy()]
                first = rows.stop
        except (*_FAULTS, ValueError, TypeError) as error:
            raise _unreadable(path, error) from error
        return cls(tuple(known), source_index, **numbers, tokens=StoredTokens(path, file, numbers["num_tokens"]))


def origin(source: str, row: int, answer: int) -> str:
    """Return an input row as messages name it, and the answer of it if it is not the whole row that is meant."""
    return f"{source}:{row}" + (f", answer {answer}" if answer else "")


def document_anchors(loss_mask: NDArray[np.bool_], rule: AnchorRule) -> NDArray[np.int64]:
    """Return the candidates of one document, ascending; `loss_mask` is bool [T]."""
    return np.flatnonzero(_is_anchor(loss_mask, rule)).astype(np.int64, copy=False)


def count_anchors(loss_mask: NDArray[np.bool_], rule: AnchorRule) -> int:
    """Return how many candidates a document has."""
    return int(np.count_nonzero(_is_anchor(loss_mask, rule)))


def _is_anchor(loss_mask: NDArray[np.bool_], rule: AnchorRule) -> NDArray[np.bool_]:
    """Return which positions are candidates, bool, as far as there can be any."""
    if rule.kind == WHOLE:
        return loss_mask[: max(len(loss_mask) - rule.tokens + 1, 0)]
    before = np.concatenate([[0], np.cumsum(loss_mask)])
    position = np.arange(len(loss_mask))
    end = np.minimum(position + rule.tokens, len(loss_mask))
    is_anchor: NDArray[np.bool_] = loss_mask & (before[end] > before[position + 1])
    return is_anchor
