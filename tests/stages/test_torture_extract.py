"""The whole command, killed a hundred times, and on a file system that fills up."""

import os
import random
import shutil
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest
from cache_files import content
from processes import Command, run
from running import Settings, arguments, command

from dflash_offline.stages.progress import Silent
from dflash_offline.stages.store.cache import Cache
from dflash_offline.stages.store.verify import verify_cache

pytestmark = pytest.mark.torture
KILLS = 100


STAGES = ("starting", "planning", "writing")
"""Where kills are aimed at, in turn: before anything is on disk, before the plan is published, among the shards."""


def plans(out: Path) -> set[str]:
    """Return the folders in which plans are being made, or were when a kill came."""
    return {folder.name for folder in out.parent.glob(f".{out.name}.building-*")}


def records(out: Path) -> int:
    return len(list((out / "commits").glob("*.json")))


def killed(config: list[str], out: Path, stage: str, chance: random.Random) -> bool:
    """Start the command and kill it a random instant after a stage has begun; returns whether it was still running."""
    before = plans(out), records(out)
    process = Command(config)
    while (
        process.poll() is None
        and not {
            "starting": True,
            "planning": bool(plans(out) - before[0]),
            "writing": records(out) > before[1],
        }[stage]
    ):
        time.sleep(0.002)
    time.sleep(chance.random() * (0.5 if stage == "starting" else 0.2))
    process.send_signal(signal.SIGKILL)
    return process.wait()[0] == -signal.SIGKILL


def test_a_hundred_kills_of_the_whole_command_leave_the_same_bytes(
    cache: Path, extract_config: Settings, tmp_path: Path
) -> None:
    """Every third time with two workers. A cache that is complete is begun anew."""
    out, chance = tmp_path / "cache", random.Random(0)
    landed: Counter[str] = Counter()
    completed = 0
    while landed.total() < KILLS:
        if records(out) == Cache.open(cache).manifest.layout.num_shards:
            assert run(arguments(extract_config, out))[0] == 0
            assert content(out) == content(cache)
            shutil.rmtree(out)
            completed += 1
        workers = ["--workers", "2"] if landed.total() % 3 == 2 else []
        stage = STAGES[landed.total() % len(STAGES)] if not out.exists() else "writing"
        landed[stage] += killed([*arguments(extract_config, out), *workers], out, stage, chance)
    code, said = run(arguments(extract_config, out))
    assert code == 0, said
    assert content(out) == content(cache)
    assert verify_cache(out, Silent()) == []
    assert list((out / "tmp").iterdir()) == [] and [path.name for path in tmp_path.iterdir()] == ["cache"]
    assert completed and min(landed[stage] for stage in STAGES) >= 3, landed


def test_kills_while_a_fresh_interpreter_starts_leave_the_same_bytes(
    cache: Path, extract_config: Settings, tmp_path: Path
) -> None:
    out, chance = tmp_path / "cache", random.Random(1)
    for _ in range(5):
        process = subprocess.Popen(command(extract_config, out), stderr=subprocess.DEVNULL)
        time.sleep(chance.random() * 5)
        process.kill()
        process.wait()
    subprocess.run(command(extract_config, out), check=True, capture_output=True)
    assert content(out) == content(cache)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a file system needs root")
def test_a_full_file_system_gives_a_clear_error_and_a_resumable_cache(
    cache: Path, extract_config: Settings, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], check=True, capture_output=True)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"this machine mounts no tmpfs: {error.stderr.decode()}")
    try:
        out = disk / "cache"
        full = subprocess.run(command(extract_config, out), capture_output=True, text=True)
        assert full.returncode == 1 and "free" in full.stderr and "Traceback" not in full.stderr
        forced = subprocess.run([*command(extract_config, out), "--ignore-free-space"], capture_output=True, text=True)
        assert forced.returncode == 1 and "No space left on device" in forced.stderr
        assert "Traceback" not in forced.stderr
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        subprocess.run(command(extract_config, out), check=True, capture_output=True)
        assert content(out) == content(cache)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_four_starts_at_once_share_the_work(cache: Path, extract_config: Settings, tmp_path: Path) -> None:
    out = tmp_path / "cache"
    starts = [subprocess.Popen(command(extract_config, out), stderr=subprocess.PIPE, text=True) for _ in range(4)]
    for process in starts:
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said
    assert content(out) == content(cache)
