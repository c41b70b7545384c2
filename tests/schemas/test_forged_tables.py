"""Parquet tables of a stranger's cache: other columns, values missing or beyond range, and more than bytes hold."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cache_files import sealed_anew
from feature_writer import create, fill_cache

from dflash_offline.pipeline.inspect.overview import overview
from dflash_offline.schemas.errors import CacheError
from dflash_offline.stages.progress import Silent
from dflash_offline.stages.store.cache import Cache
from dflash_offline.stages.store.verify import verify_cache

Change = Callable[[pa.Table], pa.Table]


def value(name: str, lie: object, row: int = 0) -> Change:
    """Let one value be another."""

    def change(table: pa.Table) -> pa.Table:
        place = table.schema.get_field_index(name)
        values = table[name].to_pylist()
        values[row] = lie
        return table.set_column(place, table.schema.field(place), pa.array(values, table.schema.field(place).type))

    return change


def typed(name: str, kind: pa.DataType) -> Change:
    """Let a column be of another type."""
    return lambda table: table.set_column(table.schema.get_field_index(name), name, pa.nulls(len(table), kind))


NUMBERS = {"num_tokens": (0, -1, 1 << 30), "num_supervised": (-1, 1 << 30), "num_anchors": (-5, 10_000), "row": (-1,)}
LIES = {
    **{f"{name} {lie}": value(name, lie) for name, lies in NUMBERS.items() for lie in lies},
    **{f"shard {lie}": value("shard", lie) for lie in (-1, 1, 1 << 30)},
    **{f"start {lie}": value("start", lie) for lie in (-32, 1, 1 << 60, 64)},
    **{f"no {name}": value(name, None) for name in ("source", "shard", "num_tokens", "input_ids", "loss_mask")},
    **{
        f"{name} missing": lambda table, name=name: table.drop_columns([name])
        for name in ("source", "input_ids", "row")
    },
    **{f"{name} of text": typed(name, pa.string()) for name in ("start", "input_ids")},
    "tokens of 64 bits": typed("input_ids", pa.list_(pa.int64())),
    "a token missing": value("input_ids", [1, None, 3]),
    "no rows": lambda table: table[:0],
    "a row more": lambda table: pa.concat_tables([table, table[-1:]]),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = tmp_path_factory.mktemp("tables") / "cache"
    create(cache, num_shards=1, shard_tokens=224, width=8)
    fill_cache(cache)
    return cache


def read(cache: Path) -> None:
    opened = Cache.open(cache)
    opened.samples.tokens.load()
    opened.codes(0)


@pytest.mark.parametrize("lie", LIES)
def test_a_plan_that_no_extraction_writes_is_refused_by_name(made: Path, lie: str) -> None:
    path = made / "samples.parquet"
    before = {file: file.read_bytes() for file in (path, made / "manifest.json", made / "commits/000000.json")}
    pq.write_table(LIES[lie](pq.read_table(path)), path)
    sealed_anew(made)
    try:
        assert any("samples.parquet" in fault.what for fault in verify_cache(made, Silent()))
        with pytest.raises(CacheError, match=r"samples\.parquet"):
            read(made)
        with pytest.raises(CacheError, match=r"samples\.parquet"):
            opened = Cache(made)
            overview(opened)
            opened.samples.tokens.load()
    finally:
        for file, content in before.items():
            file.write_bytes(content)


@pytest.mark.parametrize("columns", ["numbers", "tokens"])
def test_a_table_that_says_it_holds_more_than_its_bytes_can_is_refused_before_it_is_read(
    made: Path, columns: str
) -> None:
    """Some KiB that become gigabytes: every row the same, or one sample of one token repeated."""
    path = made / "samples.parquet"
    before, table = path.read_bytes(), pq.read_table(path)
    one, count = table[:1].combine_chunks(), 12_000_000
    if columns == "numbers":
        few = one.set_column(
            table.schema.get_field_index("input_ids"),
            "input_ids",
            pa.array([[1]], table.schema.field("input_ids").type),
        )
        few = few.set_column(table.schema.get_field_index("loss_mask"), "loss_mask", pa.array([[True]]))
        bomb = few.take(pa.array(np.zeros(1_000_000, np.int32)))
    else:
        ids = pa.ListArray.from_arrays(pa.array([0, count], pa.int32()), pa.array(np.zeros(count, np.uint32)))
        mask = pa.ListArray.from_arrays(pa.array([0, count], pa.int32()), pa.array(np.zeros(count, np.bool_)))
        bomb = one.set_column(table.schema.get_field_index("input_ids"), "input_ids", ids)
        bomb = bomb.set_column(table.schema.get_field_index("loss_mask"), "loss_mask", mask)
    pq.write_table(bomb, path, compression="zstd")
    try:
        assert path.stat().st_size < 1 << 17
        with pytest.raises(CacheError, match=r"samples\.parquet.* bytes cannot hold"):
            Cache(made).samples  # noqa: B018 - reading is the point
    finally:
        path.write_bytes(before)
