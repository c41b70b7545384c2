"""File names that are not UTF-8: read where they can be, refused in words where not."""

import os
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from running import Settings
from tiny_target import conversations
from typer.testing import CliRunner

from dflash_offline.pipeline.app import app
from dflash_offline.schemas.errors import BadInputError, DflashError
from dflash_offline.schemas.paths import utf8_name
from dflash_offline.schemas.settings.extract import ExtractConfig
from dflash_offline.stages.conversations.files import identify, read_rows
from dflash_offline.stages.extract import extract
from dflash_offline.stages.progress import Silent
from dflash_offline.stages.store.cache import Cache
from dflash_offline.stages.store.verify import verify_cache


def latin_1(folder: Path, name: str) -> Path:
    """Return a path whose last part is written as another encoding than UTF-8 has it."""
    try:
        path = folder / os.fsdecode(name.encode("latin-1"))
        path.touch()
    except OSError:
        pytest.skip("this file system takes no such name")
    path.unlink()
    return path


def test_names_that_are_utf8_stay_as_they_are_and_others_are_spelled() -> None:
    assert utf8_name(Path("a/caf\u00e9.jsonl")) == "a/caf\u00e9.jsonl"
    assert utf8_name(os.fsdecode(b"caf\xe9.jsonl")) == "caf\\xe9.jsonl"


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.zst", "parquet", "arrow"])
def test_a_data_file_of_any_name_is_read(tmp_path: Path, ending: str) -> None:
    rows, path = conversations(3), latin_1(tmp_path, f"café.{ending}")
    table = pa.Table.from_pylist(rows)
    plain = tmp_path / f"plain.{ending}"
    if ending == "parquet":
        pq.write_table(table, plain)
    elif ending == "arrow":
        with pa.OSFile(str(plain), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
    else:
        lines = "".join(f'{{"text": "{i}"}}\n' for i in range(3)).encode()
        plain.write_bytes(zstandard.compress(lines) if ending.endswith("zst") else lines)
    expected = [row.value for row in read_rows(identify(plain))]
    plain.rename(path)
    assert [row.value for row in read_rows(identify(path))] == expected and len(expected) == 3
    assert identify(path).name == f"caf\\xe9.{ending}"


def test_a_cache_of_such_data_is_whole_and_one_in_such_a_folder_is_refused_in_words(
    extract_config: Settings, data: Path, tmp_path: Path
) -> None:
    path = Path(shutil.copy(data, latin_1(tmp_path, "café.jsonl")))
    config = ExtractConfig(**extract_config | {"data": (path,)}, out=tmp_path / "cache", limit=10)
    extract(config, Silent())
    reader = Cache.open(config.out)
    assert reader.samples.source(0) == "caf\\xe9.jsonl" and reader.manifest.origin["data"][0].endswith("caf\\xe9.jsonl")
    assert verify_cache(config.out, Silent()) == []
    with path.open("a") as file:
        file.write("no JSON\n")
    bad = ExtractConfig(**extract_config | {"data": (path,)}, out=tmp_path / "bad")
    with pytest.raises(BadInputError, match="1 bad row"):
        extract(bad, Silent())

    folder = latin_1(tmp_path, "caché")
    refused = r"cach\\xe9 is not UTF-8, and a feature cache cannot lie there.*Rename it"
    with pytest.raises(DflashError, match=refused):
        extract(ExtractConfig(**extract_config, out=folder), Silent())
    config.out.rename(folder)
    for command in ("inspect", "verify"):
        result = CliRunner().invoke(app, [command, str(folder)])
        assert result.exit_code == 1 and "is not UTF-8" in result.output
    with pytest.raises(DflashError, match=refused):
        Cache.open(folder)
