"""A later rank waits for the plan as long as one is being made, and no longer."""

import threading
import time
from pathlib import Path

import pytest

from dflash_offline.schemas.errors import DflashError
from dflash_offline.schemas.locks import building_folder
from dflash_offline.schemas.manifest import MANIFEST
from dflash_offline.stages.progress import Silent
from dflash_offline.stages.store import plan_wait
from dflash_offline.stages.store.plan_wait import wait_for_plan


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_wait, "POLL_S", 0.01)


def rank_0(out: Path, *, seconds: float, publishes: bool) -> threading.Thread:
    """Plan as rank 0 does: in a folder beside the cache, a file that grows, and one rename at the end."""

    def plan() -> None:
        with building_folder(out) as folder, (folder / "input_ids.tmp").open("wb", buffering=0) as spool:
            ends = time.monotonic() + seconds
            while time.monotonic() < ends:
                spool.write(b"tokens")
                time.sleep(0.02)
            if publishes:
                (folder / MANIFEST).write_text("{}")
                folder.rename(out)

    thread = threading.Thread(target=plan)
    thread.start()
    return thread


def test_it_waits_as_long_as_the_plan_grows(tmp_path: Path) -> None:
    thread = rank_0(tmp_path / "cache", seconds=1.2, publishes=True)
    wait_for_plan(tmp_path / "cache", 0.6, Silent())
    assert (tmp_path / "cache" / MANIFEST).exists()
    thread.join()


def test_without_a_sign_of_rank_0_it_ends_and_says_what_to_look_at(tmp_path: Path) -> None:
    dead = tmp_path / ".cache.building-killed"
    dead.mkdir()
    (dead / "input_ids.tmp").write_bytes(b"left by a plan that was killed")
    with pytest.raises(DflashError, match=r"no sign of a plan of .*/cache.*same --out.*--plan-timeout-s"):
        wait_for_plan(tmp_path / "cache", 0.1, Silent())


def test_a_plan_that_was_begun_and_given_up_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_wait, "GONE_S", 0.1)
    killed_before = tmp_path / ".cache.building-elsewhere-7-x"
    killed_before.mkdir()
    (killed_before / "input_ids.tmp").write_bytes(b"left by an earlier job")
    thread = rank_0(tmp_path / "cache", seconds=0.3, publishes=False)
    time.sleep(0.1)  # begun; as the wait begins, or later, is the same
    with pytest.raises(DflashError, match=r"began to plan .* and ended without a plan"):
        wait_for_plan(tmp_path / "cache", 60.0, Silent())
    thread.join()


def test_a_plan_that_is_there_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text("{}")
    wait_for_plan(tmp_path, 0.0, Silent())
