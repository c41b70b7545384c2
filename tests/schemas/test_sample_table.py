"""samples.parquet: its numbers read at once, its tokens a row group at a time, in any order and from any thread."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from dflash_offline.schemas import samples
from dflash_offline.schemas.errors import CacheError
from dflash_offline.schemas.samples import Reject, RejectWriter, SampleTable, read_rejects, write_samples

NUM_SAMPLES = 300


def written(path: Path, seed: int = 0) -> tuple[NDArray[np.uint32], NDArray[np.bool_], dict[str, Any]]:
    """Write a table of several row groups; returns all its ids and masks, end to end, and its numbers."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 60, NUM_SAMPLES)
    lengths[7] = 5000  # larger than a row group
    numbers = {name: rng.integers(0, 2**31, NUM_SAMPLES) for name in samples.NUMBERS} | {"num_tokens": lengths}
    numbers["start"] = numbers["start"] << 20
    ids, mask = rng.integers(0, 2**32, lengths.sum(), np.uint32), rng.random(lengths.sum()) < 0.5
    source_index = rng.permutation(np.arange(NUM_SAMPLES, dtype=np.int32) % 3)
    write_samples(
        path,
        sources=["c", "a", "b"],
        source_index=source_index,
        numbers=numbers,
        read=lambda begin, end: (ids[begin:end], mask[begin:end]),
    )
    return ids, mask, numbers | {"source": [("c", "a", "b")[index] for index in source_index]}


@pytest.fixture(autouse=True)
def _small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "_GROUP_TOKENS", 1000)
    monkeypatch.setattr(samples, "_GROUP_ROWS", 40)
    monkeypatch.setattr(samples, "_HELD_TOKENS", 2500)
    monkeypatch.setattr(samples, "_READ_ROWS", 64)


@pytest.mark.parametrize("loaded", [False, True], ids=["from disk", "loaded"])
def test_what_was_written_is_read_back_in_any_order_from_any_thread(tmp_path: Path, loaded: bool) -> None:
    ids, mask, numbers = written(tmp_path / "s.parquet")
    table = SampleTable.read(tmp_path / "s.parquet")
    assert len(table) == NUM_SAMPLES and pq.ParquetFile(tmp_path / "s.parquet").num_row_groups > 8
    for name in samples.NUMBERS:
        np.testing.assert_array_equal(getattr(table, name), numbers[name])
    assert [table.source(i) for i in range(NUM_SAMPLES)] == numbers["source"]
    assert sorted(table.sources) == ["a", "b", "c"]
    if loaded:
        table.tokens.load()
        (tmp_path / "s.parquet").write_bytes(b"")
    ends = np.cumsum(numbers["num_tokens"])

    def is_right(sample: int) -> bool:
        one = slice(ends[sample] - numbers["num_tokens"][sample], ends[sample])
        found = np.array_equal(table.input_ids(sample), ids[one]) and np.array_equal(table.loss_mask(sample), mask[one])
        return found and table.input_ids(sample).dtype == np.uint32 and table.loss_mask(sample).dtype == np.bool_

    order = np.random.default_rng(1).permutation(np.arange(NUM_SAMPLES).repeat(3)).tolist()
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(is_right, order))


def test_the_table_is_what_any_reader_of_parquet_sees(tmp_path: Path) -> None:
    ids, mask, numbers = written(tmp_path / "s.parquet")
    rows = pq.read_table(tmp_path / "s.parquet").to_pylist()
    assert [row["sample_id"] for row in rows] == list(range(NUM_SAMPLES))
    for name in ("source", *samples.NUMBERS):
        assert [row[name] for row in rows] == list(numbers[name])
    assert [token for row in rows for token in row["input_ids"]] == ids.tolist()
    assert [one for row in rows for one in row["loss_mask"]] == mask.tolist()


def test_only_the_row_groups_last_asked_for_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path / "s.parquet")
    reads: list[int] = []
    whole = samples.StoredTokens._read
    monkeypatch.setattr(samples.StoredTokens, "_read", lambda self, n: (reads.append(n), whole(self, n))[1])
    table = SampleTable.read(tmp_path / "s.parquet")
    assert reads == []
    for sample in range(NUM_SAMPLES):
        table.input_ids(sample)
        table.loss_mask(sample)
    assert reads == list(range(len(reads)))  # each once
    table.input_ids(NUM_SAMPLES - 1)
    assert len(reads) == len(set(reads))
    table.input_ids(0)
    assert reads[-1] == 0 and len(reads) == len(set(reads)) + 1


def test_the_same_samples_give_the_same_bytes(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        written(tmp_path / name, seed)
    a, b, c = ((tmp_path / name).read_bytes() for name in "abc")
    assert a == b != c


def test_a_damaged_table_is_refused_by_name_when_that_part_is_read(tmp_path: Path) -> None:
    path = tmp_path / "s.parquet"
    written(path)
    column = pq.ParquetFile(path).metadata.row_group(0).column(len(samples.SAMPLE_SCHEMA) - 2)
    content = bytearray(path.read_bytes())
    content[column.data_page_offset : column.data_page_offset + 40] = bytes(40)
    path.write_bytes(content)
    table = SampleTable.read(path)
    with pytest.raises(CacheError, match=r"s\.parquet cannot be read.*Restore it from a copy"):
        table.input_ids(0)
    path.write_bytes(content[:-100])
    with pytest.raises(CacheError, match=r"s\.parquet cannot be read"):
        SampleTable.read(path)


def test_rejects_are_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "_REJECTS_AT_ONCE", 4)
    rejects = [Reject(source="a", row=i, reason="bad row", detail=f"is {i}") for i in range(10)]
    for count in (0, 4, 10):
        with RejectWriter(tmp_path / "r.parquet") as writer:
            for reject in rejects[:count]:
                writer.add(reject)
        assert read_rejects(tmp_path / "r.parquet") == rejects[:count]
