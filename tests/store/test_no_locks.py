"""Where the file system knows no locks, workers that are at the same shard end well and leave the same bytes."""

import errno
import fcntl
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
from cache_files import content
from feature_writer import create, fill_cache
from processes import FORKING

from dflash_offline.schemas import files
from dflash_offline.schemas.locks import building_folder
from dflash_offline.stages.store import writer
from dflash_offline.stages.store.leftovers import half_written, remove_abandoned


def no_locks(_descriptor: int, _operation: int) -> None:
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


@pytest.fixture(autouse=True)
def _without_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", no_locks)


@pytest.fixture()
def caches(tmp_path: Path) -> tuple[Path, Path]:
    """An empty cache, and the same that one worker has filled."""
    for name in ("cache", "whole"):
        create(tmp_path / name, num_shards=3)
    fill_cache(tmp_path / "whole")
    return tmp_path / "cache", tmp_path / "whole"


def until(done: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 60
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def fill_slowly(cache: Path, host: str, before: str, go: Path) -> None:
    """Fill a cache as a worker of `host`; wait for the file `go` before the first file of `before` is in place."""
    move = files.move_synced

    def wait_and_move(temporary: Path, path: Path) -> None:
        if before in path.parts:
            (go.parent / "waits").touch()
            until(go.exists)
        move(temporary, path)

    fcntl.flock = no_locks
    socket.gethostname = lambda: host
    files.move_synced = writer.move_synced = wait_and_move
    fill_cache(cache)


@contextmanager
def slow_worker(cache: Path, host: str, before: str, go: Path) -> Iterator[ForkServerProcess]:
    process = FORKING.Process(target=fill_slowly, args=(cache, host, before, go))
    process.start()
    try:
        until((go.parent / "waits").exists)
        yield process
    finally:
        process.kill()
        process.join()


@pytest.mark.parametrize("before", ["hidden_states", "input_ids", "commits"])
@pytest.mark.parametrize("host", [socket.gethostname(), "elsewhere"])
def test_a_worker_that_is_overtaken_at_its_shard_ends_well_and_leaves_the_same_bytes(
    caches: tuple[Path, Path], tmp_path: Path, host: str, before: str
) -> None:
    cache, whole = caches
    with slow_worker(cache, host, before, tmp_path / "go") as overtaken:
        [its_file] = half_written(cache)
        assert (its_file.host, its_file.process) == (host, overtaken.pid)
        assert remove_abandoned(cache, lambda _shard: False) == []
        fill_cache(cache)
        assert its_file.path.exists()
        removed = remove_abandoned(cache, lambda _shard: True)
        assert removed == ([] if host == socket.gethostname() else [its_file])  # of a finished shard, of no use
        (tmp_path / "go").touch()
        overtaken.join(60)
        assert overtaken.exitcode == 0
    assert content(cache) == content(whole)
    assert half_written(cache) == []


def test_what_a_killed_worker_of_this_machine_left_is_removed(caches: tuple[Path, Path], tmp_path: Path) -> None:
    cache, _ = caches
    with slow_worker(cache, socket.gethostname(), "hidden_states", tmp_path / "go") as killed:
        found = half_written(cache)
        killed.kill()
        killed.join()
        assert remove_abandoned(cache, lambda _shard: False) == found != []
    assert half_written(cache) == []


def plan_forever(out: Path, begun: Path) -> None:
    fcntl.flock = no_locks
    with building_folder(out) as folder:
        begun.write_text(str(folder))
        time.sleep(600)


def test_a_plan_that_is_being_made_is_left_alone_until_its_process_ends(tmp_path: Path) -> None:
    out, begun = tmp_path / "cache", tmp_path / "begun"
    planner = FORKING.Process(target=plan_forever, args=(out, begun))
    planner.start()
    try:
        until(lambda: begun.exists() and begun.read_text())
        its_folder = Path(begun.read_text())
        with building_folder(out) as ours:
            assert its_folder.exists() and ours.exists()
    finally:
        planner.kill()
        planner.join()
    with building_folder(out):
        assert not its_folder.exists()


def test_a_process_of_another_user_counts_as_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_process: int, _signal: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "kill", refuse)
    its_folder = tmp_path / f".cache.building-{socket.gethostname()}-1-x"
    its_folder.mkdir()
    with building_folder(tmp_path / "cache"):
        assert its_folder.exists()
