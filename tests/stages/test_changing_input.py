"""Data and targets that change while a cache is made of them: refused, or without effect."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from cache_files import content
from running import Settings
from tiny_target import save_conversations, save_target

from dflash_offline.schemas.errors import BadInputError, MismatchError
from dflash_offline.schemas.settings.extract import ExtractConfig
from dflash_offline.stages.extract import extract, open_worker
from dflash_offline.stages.progress import Silent


def _append(data: Path) -> None:
    with data.open("a") as file:
        file.write(json.dumps({"messages": [{"role": "user", "content": "a"}]}) + "\n")


def _replace(data: Path) -> None:
    other = save_conversations(data.with_name("other"), 80, seed=5)
    other.replace(data)


class Meanwhile(Silent):
    """Changes something at a moment: when a line that begins so is said, or a piece of work `is done`."""

    def __init__(self, moment: str, change: Callable[[], object]) -> None:
        self.moment, self.change = moment, change

    def say(self, text: str) -> None:
        if text.startswith(self.moment):
            self.change()

    def start(self, what: str, *_numbers: object, **_done: object) -> None:
        self.what = what

    def finish(self) -> None:
        self.say(f"{self.what} is done")


@pytest.mark.parametrize("change", [_append, _replace, Path.unlink])
def test_data_that_changes_between_its_hash_and_its_rows_is_refused(
    extract_config: Settings, data: Path, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    copy = Path(shutil.copy(data, tmp_path / "chats.jsonl"))
    config = ExtractConfig(**extract_config | {"data": (copy,)}, out=tmp_path / "cache")
    with pytest.raises(BadInputError, match=r"chats\.jsonl changed while being read.*Repeat the command"):
        extract(config, Meanwhile("Tokenizing is done", lambda: change(copy)))
    assert sorted(path.name for path in tmp_path.iterdir()) in (["chats.jsonl"], [])


def test_data_that_changes_after_the_plan_has_no_effect_on_what_is_extracted_and_is_refused_on_resume(
    cache: Path, extract_config: Settings, data: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copy(data, tmp_path / "chats.jsonl"))
    config = ExtractConfig(**extract_config | {"data": (copy,)}, out=tmp_path / "cache")
    extract(config, Meanwhile("Forecast", lambda: _replace(copy)))
    assert content(config.out) == content(cache)  # the tokens are the plan's own
    with pytest.raises(MismatchError, match=r"data\.file_0_sha256"):
        extract(config, Silent())


def test_a_target_that_changes_while_it_is_loaded_is_refused(
    extract_config: Settings, target: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(target, tmp_path / "target"))
    config = ExtractConfig(**extract_config | {"target": str(copy)}, out=tmp_path / "cache")
    with pytest.raises(MismatchError, match=r"(?s)changed while the target was loaded.*weights_sha256"):
        extract(config, Meanwhile("Loading", lambda: save_target(copy, seed=9)))
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_a_worker_that_finds_another_target_than_the_plans_is_refused(
    cache: Path, extract_config: Settings, target: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(target, tmp_path / "target"))
    config = ExtractConfig(**extract_config | {"target": str(copy)}, out=cache)
    open_worker(config)
    save_target(copy, seed=9)
    with pytest.raises(MismatchError, match=r"target\.weights_sha256\.model\.safetensors"):
        open_worker(replace(config, device="cpu"))
