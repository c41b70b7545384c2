"""The thread count follows the process's own limits."""

import os
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
