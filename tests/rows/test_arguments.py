"""What data arguments name: nothing that lies in a folder is passed over unsaid; hub ids with their configs."""

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest

from dflash_offline.schemas.errors import BadInputError
from dflash_offline.schemas.settings.extract import ExtractConfig
from dflash_offline.stages.conversations.sources import Data


def texts(*data: Path | str) -> list[str]:
    config = ExtractConfig(data=tuple(Path(path) for path in data), target="t", out=Path("o"))
    return [row.value["text"] for row in Data(config).rows()]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a", "b/c", "b/d"):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / f"{name}.jsonl").write_text(f'{{"text": "{name}"}}\n')
    return tmp_path / "data"


@pytest.mark.parametrize("glob", ["", "*", "**/*.jsonl", "*/*.jsonl"])
def test_a_folder_that_cannot_be_entered_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch, glob: str) -> None:
    listed = os.scandir

    def scandir(path: Any) -> Any:
        if Path(path).name == "b":
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(BadInputError, match=r"data/b cannot be read: Permission denied\. What it holds would be miss"):
        texts(folder / glob)


@pytest.mark.parametrize("name", ["z.jsonl", "b/z.parquet", "z"])
@pytest.mark.parametrize("to", ["nowhere", "z.jsonl"])
def test_a_link_that_leads_nowhere_is_refused(folder: Path, name: str, to: str) -> None:
    (folder / name).symlink_to(to)
    with pytest.raises(BadInputError, match=rf"data/{name} cannot be read: (No such file|Too many levels)"):
        texts(folder)
    with pytest.raises(BadInputError, match=rf"data/{name} cannot be read: (No such file|Too many levels)"):
        texts(folder / Path(name).parent / "z*")


def test_linked_folders_are_entered_and_a_circle_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    (tmp_path / "more/e.jsonl").write_text('{"text": "e"}\n')
    (folder / "linked").symlink_to(tmp_path / "more")
    (folder / ".hidden").symlink_to("nowhere")
    assert texts(folder) == ["a", "b/c", "b/d", "e"]
    (folder / "b/back").symlink_to(folder)
    with pytest.raises(BadInputError, match="data/b/back leads back to a folder that it lies in"):
        texts(folder)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub of owner/one with a split, owner/splits with two, and owner/configs with two configs of a split."""
    sets = {"owner/one": {"default": ["train"]}, "owner/splits": {"default": ["train", "test"]}}
    sets["owner/configs"] = {"main": ["train"], "2.0": ["train"]}

    def load_dataset(name: str, config: str | None = None, *, split: str | None = None) -> Any:
        found = {}
        for part in sets[name][config or next(iter(sets[name]))]:
            table = pa.table({"text": [f"{name} {config} {part}"]})
            path = str(tmp_path / f"{len(list(tmp_path.iterdir()))}.arrow")
            with pa.ipc.new_stream(path, table.schema) as writer:
                writer.write_table(table)
            found[part] = SimpleNamespace(cache_files=[{"filename": path}])
        return found[split] if split else found

    library = SimpleNamespace(load_dataset=load_dataset, get_dataset_config_names=lambda name: [*sets[name]])
    monkeypatch.setattr("dflash_offline.stages.conversations.sources.find_spec", lambda _name: True)
    monkeypatch.setitem(sys.modules, "datasets", library)


@pytest.mark.usefixtures("hub")
def test_a_config_is_named_after_a_colon_before_the_split_and_the_weight() -> None:
    assert texts("owner/one") == texts("owner/one@train") == texts("owner/one:1.0") == ["owner/one None train"]
    assert texts("owner/configs:main") == texts("owner/configs:main@train") == ["owner/configs main train"]
    assert texts("owner/configs:2.0@train") == texts("owner/configs:2.0@train:1") == ["owner/configs 2.0 train"]
    assert texts("owner/splits@test") == ["owner/splits None test"]


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("owner/configs", "has the configs main, 2.0, and none is named. Name one, as in owner/configs:main."),
        (
            "owner/configs@train",
            "has the configs main, 2.0, and none is named. Name one, as in owner/configs:main@train.",
        ),
        ("owner/splits", "has the splits train, test, and none is named. Name one, as in owner/splits@train."),
        (
            "owner/splits:default",
            "has the splits train, test, and none is named. Name one, as in owner/splits:default@tr",
        ),
        ("owner/configs:2.0", "If 2.0 is a config of a dataset, name a split of it too, as in owner/configs:2.0@train"),
    ],
)
def test_what_is_not_told_apart_is_listed(place: str, said: str) -> None:
    with pytest.raises(BadInputError) as caught:
        texts(place)
    assert said in str(caught.value)
