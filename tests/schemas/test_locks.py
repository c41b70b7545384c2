"""A folder is held by the lock of a file in it: over a network that of the folder itself reaches no other machine."""

import stat
import subprocess
import sys
from pathlib import Path

import pytest
from processes import held_by_another_process

from dflash_offline.schemas.locks import LOCK, locked_folder
from dflash_offline.schemas.paths import output_folder


def test_a_folder_is_held_by_the_lock_of_a_regular_file_in_it(tmp_path: Path) -> None:
    with locked_folder(tmp_path) as held:
        assert held and stat.S_ISREG((tmp_path / LOCK).stat().st_mode)
        with pytest.raises(AssertionError), held_by_another_process(tmp_path / LOCK):
            pass
    with held_by_another_process(tmp_path / LOCK), locked_folder(tmp_path) as held:
        assert not held
    with locked_folder(tmp_path) as held:
        assert held


def test_a_lock_ends_with_its_process_and_the_file_that_stays_is_in_nobodys_way(tmp_path: Path) -> None:
    code = "import os; from pathlib import Path; from dflash_offline.schemas.locks import locked_folder\n"
    code += f"with locked_folder(Path({str(tmp_path)!r})) as held: os._exit(7 if held else 1)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 7
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]
    assert output_folder(tmp_path, marker="run.json", kind="training run", renamed=False) == tmp_path
    with locked_folder(tmp_path) as held:
        assert held


def test_a_folder_that_is_gone_is_not_held(tmp_path: Path) -> None:
    with locked_folder(tmp_path / "gone") as held:
        assert not held
