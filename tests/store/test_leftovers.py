"""Half-written files of workers: counted by everyone, removed where the worker is known to be dead."""

import fcntl
import json
import os
import socket
from pathlib import Path

import pytest
from feature_writer import create, fill_cache
from typer.testing import CliRunner

from dflash_offline.pipeline.app import app
from dflash_offline.schemas.locks import ABANDONED_S, remove_unfinished
from dflash_offline.stages.store.leftovers import half_written, remove_abandoned, summarize

HERE = socket.gethostname()


@pytest.fixture()
def cache(tmp_path: Path) -> Path:
    create(tmp_path / "cache", num_shards=4)
    return tmp_path / "cache"


def leave(cache: Path, shard: int, host: str, *, age_s: float = 0.0) -> Path:
    path = cache / "tmp" / f"{shard:06d}.{host}-1.part"  # a process that runs: a free lock says it is another now
    path.write_bytes(b"x" * 1000)
    then = path.stat().st_mtime - age_s
    os.utime(path, (then, then))
    return path


def done_is_1(shard: int) -> bool:
    return shard == 1


def test_what_nobody_can_be_at_is_removed_and_the_rest_stays(cache: Path) -> None:
    ours = leave(cache, 0, HERE)
    of_a_finished_shard = leave(cache, 1, "elsewhere")
    old = leave(cache, 2, "elsewhere", age_s=ABANDONED_S + 60)
    perhaps_at_work = leave(cache, 3, "else-where.2", age_s=ABANDONED_S - 60)
    no_shards = cache / "tmp" / "notes.part"
    no_shards.touch()
    removed = remove_abandoned(cache, done_is_1)
    assert [one.path for one in removed] == [ours, of_a_finished_shard, old]
    assert not any(path.exists() for path in (ours, of_a_finished_shard, old))
    assert perhaps_at_work.exists() and no_shards.exists()
    assert [(one.shard, one.host, one.num_bytes) for one in half_written(cache)] == [(3, "else-where.2", 1000)]


def test_a_folder_that_is_built_goes_when_its_machines_lock_is_free_or_nothing_in_it_was_touched_for_an_hour(
    tmp_path: Path,
) -> None:
    def build(host: str, age_s: float, name: str = "cache") -> Path:
        folder = tmp_path / f".{name}.building-{host}"
        (folder / "target").mkdir(parents=True)
        written = folder / "target" / "embeddings.safetensors"
        written.touch()
        then = written.stat().st_mtime - age_s
        for path in (folder, folder / "target"):
            os.utime(path, (0, 0))  # what is written last is a file
        os.utime(written, (then, then))
        return folder

    ours = build(f"{HERE}-1-x", 0.0)
    old = build("elsewhere-1-x", ABANDONED_S + 60)
    perhaps_at_work = build("else-where.2-1-x", ABANDONED_S - 60)
    of_a_name_like_none = build("somewhere", ABANDONED_S - 60)
    of_another_cache = build("elsewhere-1-x", 2 * ABANDONED_S, "cache-2")
    held = build(f"{HERE}-1-y", 2 * ABANDONED_S)
    descriptor = os.open(held, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    assert remove_unfinished(tmp_path / "cache") == sorted([perhaps_at_work, held, of_a_name_like_none])
    os.close(descriptor)
    assert not ours.exists() and not old.exists() and of_another_cache.exists()


def test_a_shard_that_is_held_is_left_alone(cache: Path) -> None:
    ours = leave(cache, 0, HERE, age_s=2 * ABANDONED_S)
    lock = cache / "tmp" / "000000.lock"
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert remove_abandoned(cache, done_is_1) == []
    assert [one.path for one in remove_abandoned(cache, done_is_1)] == [ours]


def test_inspect_and_verify_count_them_and_call_old_ones_abandoned(cache: Path) -> None:
    fill_cache(cache)
    leave(cache, 2, "elsewhere")
    leave(cache, 3, "elsewhere")
    assert (summarize(cache).files, summarize(cache).bytes) == (2, 2000)
    run = CliRunner()
    shown = run.invoke(app, ["inspect", str(cache)])
    assert "2 half-written files" in shown.stdout and "elsewhere" in shown.stdout
    assert "abandoned" not in shown.stdout
    verified = run.invoke(app, ["verify", str(cache), "--quiet"])
    assert verified.exit_code == 0 and "tmp/ holds 2 half-written files, 2.0 KiB" in verified.stdout
    assert json.loads(run.invoke(app, ["verify", str(cache), "--json", "--quiet"]).stdout)["half_written"]["files"] == 2
    leave(cache, 3, "elsewhere", age_s=2 * ABANDONED_S)
    shown = run.invoke(app, ["inspect", str(cache)])
    assert "abandoned files: tmp/ holds 2 half-written files" in shown.stdout
