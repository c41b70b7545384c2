"""The whole command, killed a hundred times, and on a file system that fills up."""

import os
import random
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from test_extract import Settings, command, content

from dflash_offline.stages.progress import Silent
from dflash_offline.stages.verify import verify_cache

pytestmark = pytest.mark.torture
KILLS = 100


def test_a_hundred_kills_of_the_whole_command_leave_the_same_bytes(
    cache: Path, extract_config: Settings, tmp_path: Path
) -> None:
    """Every third time with two workers; the kill falls anywhere from the imports to the last record."""
    out, chance = tmp_path / "cache", random.Random(0)
    kills, longest = 0, 5.0
    while kills < KILLS:
        workers = ["--workers", "2"] if kills % 3 == 2 else []
        process = subprocess.Popen([*command(extract_config, out), *workers], stderr=subprocess.DEVNULL)
        time.sleep(chance.random() * longest)
        if process.poll() is None:
            process.kill()
            kills += 1
        else:  # it came through: begin anew
            assert process.returncode == 0
            assert content(out) == content(cache)
            shutil.rmtree(out)
        process.wait()
    subprocess.run(command(extract_config, out), check=True, capture_output=True)
    assert content(out) == content(cache)
    assert verify_cache(out, Silent()) == []


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
