"""Files of a few KiB that would become gigabytes are named, and the memory that reading them took is measured."""

import gzip
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from dflash_offline.schemas.errors import BadInputError
from dflash_offline.stages.conversations.files import identify, read_rows
from dflash_offline.stages.conversations.reading import apart

GOOD = b'{"text": "one bird"}\n'
READ = """
import resource, sys
from pathlib import Path
from dflash_offline.stages.conversations.files import identify, read_rows
from dflash_offline.stages.conversations.reading import apart
try:
    print(*(row.fault or str(row.value)[:40] for row in read_rows(identify(Path(sys.argv[1])))), sep="; ")
except ValueError as error:
    print(error)
pids = ["self"] if apart._process is None else ["self", apart._process.process.pid]
lines = [line for pid in pids for line in Path(f"/proc/{pid}/status").read_text().splitlines() if "VmHWM" in line]
print(max(int(line.split()[1]) for line in lines) >> 10)
"""


def frames(size: int) -> bytes:
    """Return a line of JSON that never ends, as zstd of some hundred bytes a MiB."""
    compressor = zstandard.ZstdCompressor(level=1).compressobj()
    line = b'{"text": "' + b"a" * (1 << 20)
    return (
        compressor.compress(line)
        + b"".join(compressor.compress(b"a" * (1 << 20)) for _ in range(size))
        + (compressor.flush())
    )


def repeated(path: Path) -> None:
    """Write a Parquet file whose one row is a list of 20 million numbers."""
    many = 20_000_000
    cells = pa.ListArray.from_arrays(pa.array([0, many], pa.int32()), pa.array(np.zeros(many, np.int8)))
    pq.write_table(pa.table({"input_ids": cells}), path, compression="zstd", data_page_size=1 << 30)


def nothing_of(many: int) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array([0, 1, many], pa.int32()), pa.nulls(many))


def views_of(many: int) -> pa.Array:
    """Return lists that all are the same hundred million nulls."""
    sizes = pa.array([10**8] * many, pa.int32())
    return pa.ListViewArray.from_arrays(pa.array([0] * many, pa.int32()), sizes, pa.nulls(10**8))


def write_arrow(path: Path, cells: pa.Array, compression: str | None = None) -> None:
    table = pa.table({"messages": cells})
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.ipc.new_file(str(path), table.schema, options=options) as writer:
        writer.write_table(table)


def swollen(path: Path) -> None:
    """Write an Arrow file that claims a buffer of 8 GiB behind its compression."""
    write_arrow(path, pa.array(["a" * 4096] * 64), "zstd")
    content = path.read_bytes()
    frame = content.rindex(b"\x28\xb5\x2f\xfd")  # zstd's; before it stands how long the texts are
    path.write_bytes(content[: frame - 8] + (8 << 30).to_bytes(8, "little") + content[frame:])


def line_of(item: bytes, count: int) -> bytes:
    return b'{"text": [' + b",".join([item] * count) + b"]}\n"


BOMBS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a.jsonl.zst": (lambda path: path.write_bytes(frames(200)), "is longer than 64 MiB"),
    "endless.jsonl.zst": (lambda path: path.write_bytes(frames(1100)), "line 1 does not end within 1,024 MiB"),
    "a.jsonl.gz": (
        lambda path: path.write_bytes(gzip.compress(GOOD + line_of(b"[]", 4_200_000) + GOOD, 1)),
        "'one bird'}; holds more than 4,194,304 values; {'text': 'one bird'}",
    ),
    "array.json": (
        lambda path: path.write_bytes(b"[" + GOOD + b"," + line_of(b"{}", 4_200_000)),
        "after row 1: row 2 holds more than 4,194,304 values, or is broken",
    ),
    "one.json": (
        lambda path: path.write_bytes(b'{"text":\n"' + b"a" * (65 << 20) + b'"}'),
        "row 1 is longer than 64 MiB",
    ),
    "nulls.arrow": (lambda path: write_arrow(path, nothing_of(10**9)), "[None]}; holds more than 4,194,304 values"),
    "views.arrow": (lambda path: write_arrow(path, views_of(3)), "holds more than 4,194,304 values; holds more"),
    "a.parquet": (repeated, "holds more than 4,194,304 values"),
    "swollen.arrow": (swollen, "what follows takes more than 2,048 MiB of memory"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_few_bytes_never_become_gigabytes(tmp_path: Path, name: str) -> None:
    write, said = BOMBS[name]
    write(tmp_path / name)
    run = subprocess.run(
        [sys.executable, "-c", READ, str(tmp_path / name)], capture_output=True, text=True, timeout=120, check=True
    )
    *printed, peak = run.stdout.splitlines()
    assert said in "\n".join(printed), run.stdout[:1000]
    assert int(peak) < 1200


def test_a_file_that_ends_the_reading_process_is_named_and_the_next_is_read(tmp_path: Path) -> None:
    for name in ("a.arrow", "b.arrow"):
        write_arrow(tmp_path / name, pa.array(["one bird"] * 3000))
    rows = read_rows(identify(tmp_path / "a.arrow"))
    assert next(rows).line == 1
    assert apart._process is not None
    apart._process.process.kill()
    with pytest.raises(BadInputError, match=r"a\.arrow cannot be read as arrow after row 256: .* killed by SIGKILL"):
        list(rows)
    assert len(list(read_rows(identify(tmp_path / "b.arrow")))) == 3000


def test_files_are_read_side_by_side_and_left_unread(tmp_path: Path) -> None:
    for name in "abc":
        write_arrow(tmp_path / name, pa.array([f"{name} {i}" for i in range(1000)]))
    a, b, c = (read_rows(identify(tmp_path / name)) for name in "abc")
    assert next(c).value == {"messages": "c 0"}
    c.close()
    assert [(one.value["messages"], two.value["messages"]) for one, two in zip(a, b, strict=True)] == [
        (f"a {i}", f"b {i}") for i in range(1000)
    ]
