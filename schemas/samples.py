"""samples.parquet and rejects.parquet: which input rows became samples, where they lie, and why others did not."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from dflash_offline.schemas.errors import CacheError

SAMPLE_SCHEMA = pa.schema(
    [
        ("sample_id", pa.int64()),
        ("source", pa.string()),
        ("row", pa.int64()),
        ("num_tokens", pa.int32()),
        ("num_supervised", pa.int32()),
        ("num_anchors", pa.int32()),
        ("shard", pa.int32()),
        ("start", pa.int64()),
        ("input_ids", pa.list_(pa.uint32())),
        ("loss_mask", pa.list_(pa.bool_())),
    ]
)


@dataclass(frozen=True, kw_only=True)
class Reject:
    """An input row that is not a sample."""

    source: str
    """File name."""
    row: int
    """Line number, from 1."""
    reason: str
    """Short and countable."""
    detail: str
    """What was found in this row."""


def write_rejects(path: Path, rejects: list[Reject]) -> None:
    """Write rejects.parquet."""
    names = [field.name for field in fields(Reject)]
    schema = pa.schema([(name, pa.int64() if name == "row" else pa.string()) for name in names])
    columns = {name: [getattr(reject, name) for reject in rejects] for name in names}
    pq.write_table(pa.table(columns, schema=schema), path)


@dataclass(frozen=True)
class SampleTable:
    """The plan, one entry a sample, in the order of the input; everything a reader needs before it opens a feature."""

    source: list[str]
    row: NDArray[np.int64]
    num_tokens: NDArray[np.int64]
    num_supervised: NDArray[np.int64]
    num_anchors: NDArray[np.int64]
    shard: NDArray[np.int64]
    start: NDArray[np.int64]
    """First slot in the zarr arrays."""
    offsets: NDArray[np.int64]
    """Sample i's tokens are flat_ids[offsets[i]:offsets[i + 1]]."""
    flat_ids: NDArray[np.uint32]
    flat_mask: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.num_tokens)

    def input_ids(self, sample: int) -> NDArray[np.uint32]:
        """Return the sample's tokens, [num_tokens] uint32."""
        return self.flat_ids[self.offsets[sample] : self.offsets[sample + 1]]

    def loss_mask(self, sample: int) -> NDArray[np.bool_]:
        """Return which tokens are supervised, [num_tokens] bool."""
        return self.flat_mask[self.offsets[sample] : self.offsets[sample + 1]]

    def place(self, sample: int) -> str:
        """Return the sample and the input row it came from, as messages name them."""
        return f"Sample {sample} ({self.source[sample]}:{self.row[sample]})"

    def samples_of_shard(self, shard: int) -> NDArray[np.int64]:
        """Return the samples that lie in a shard, in order."""
        low, high = np.searchsorted(self.shard, [shard, shard + 1])
        return np.arange(low, high)

    def write(self, path: Path) -> None:
        """Write samples.parquet; the same table always gives the same bytes."""
        offsets = pa.array(self.offsets, pa.int32() if self.offsets[-1] < 2**31 else pa.int64())
        as_list = pa.ListArray if offsets.type == pa.int32() else pa.LargeListArray
        columns: dict[str, Any] = {
            "sample_id": np.arange(len(self)),
            "source": pa.array(self.source, pa.string()),
            **{name: getattr(self, name) for name in ("row", "num_tokens", "num_supervised", "num_anchors")},
            "shard": self.shard,
            "start": self.start,
            "input_ids": as_list.from_arrays(offsets, pa.array(self.flat_ids)),
            "loss_mask": as_list.from_arrays(offsets, pa.array(self.flat_mask)),
        }
        with pq.ParquetWriter(path, SAMPLE_SCHEMA, compression="zstd") as file:
            for begin in range(
                0, len(self), _ROW_GROUP
            ):  # a list column holds less than 2**31 values, so group by group
                part = {name: pa.array(column[begin : begin + _ROW_GROUP]) for name, column in columns.items()}
                cast = {name: part[name].cast(kind) for name, kind in _fields()}
                file.write_table(pa.table(cast, schema=SAMPLE_SCHEMA))

    @classmethod
    def read(cls, path: Path) -> "SampleTable":
        """Return the table of samples.parquet; `CacheError` if it cannot be read."""
        try:
            table = pq.read_table(path).combine_chunks()
        except (OSError, pa.ArrowException) as error:
            raise CacheError(f"{path} cannot be read: {error}. Restore it from a copy, or extract again.") from error
        num_tokens = table["num_tokens"].to_numpy().astype(np.int64)

        def flat(name: str) -> pa.Array:
            column = table[name]
            chunks = [chunk.flatten() for chunk in column.chunks]
            return pa.concat_arrays(chunks) if chunks else pa.array([], column.type.value_type)

        return cls(
            source=table["source"].to_pylist(),
            **{name: table[name].to_numpy().astype(np.int64) for name in _NUMBERS},
            offsets=np.concatenate([[0], np.cumsum(num_tokens)]),
            flat_ids=flat("input_ids").to_numpy(),
            flat_mask=flat("loss_mask").to_numpy(zero_copy_only=False),
        )


_ROW_GROUP = 65_536
_NUMBERS = ("row", "num_tokens", "num_supervised", "num_anchors", "shard", "start")


def _fields() -> list[tuple[str, pa.DataType]]:
    return [(field.name, field.type) for field in SAMPLE_SCHEMA]
