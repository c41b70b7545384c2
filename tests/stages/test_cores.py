"""The thread count follows the process's own limits."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from dflash_offline.stages import cores


def test_a_quota_of_the_control_group_limits_the_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quota = tmp_path / "cpu.max"
    monkeypatch.setattr(cores, "_QUOTA", quota)
    free = cores.usable_cores()
    assert free == len(os.sched_getaffinity(0))
    for text, expected in (("max 100000", free), ("100000 100000", 1), ("50000 100000", 1), ("9900000 100000", free)):
        quota.write_text(text)
        assert cores.usable_cores() == expected


def test_the_users_own_setting_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    cores.limit_threads()
    assert os.environ["OMP_NUM_THREADS"] == "3"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
@pytest.mark.parametrize("settings", [{}, {"MALLOC_MMAP_THRESHOLD_": "4096"}])
def test_freed_memory_is_kept_unless_the_user_says_otherwise(settings: dict[str, str]) -> None:
    code = (
        "import resource, ctypes; from dflash_offline.stages.cores import keep_freed_memory\n"
        "def faults():\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    for _ in range(20): bytearray(64 << 20)[:: 4096] = bytes(16384)\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "first = faults(); keep_freed_memory(); faults(); print(first, faults())"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | settings, check=True, capture_output=True, text=True
    )
    before, after = map(int, run.stdout.split())
    assert before > 100_000
    assert after > 100_000 if settings else after < 1_000
