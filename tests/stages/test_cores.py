"""The thread count follows the process's own limits."""

import os
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


@pytest.mark.parametrize(
    ("ranks", "workers", "expected"), [("", 1, 12), ("4", 1, 3), ("4", 2, 1), ("x", 5, 2), ("0", 99, 1)]
)
def test_ranks_and_workers_of_a_machine_share_its_cores(
    monkeypatch: pytest.MonkeyPatch, ranks: str, workers: int, expected: int
) -> None:
    monkeypatch.setattr(cores, "_QUOTA", Path("/none"))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _process: set(range(12)))
    monkeypatch.setattr(cores, "_sharing", 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    cores.share_cores(workers)
    assert cores.usable_cores() == expected


@pytest.mark.parametrize(("own", "expected"), [("3", "3"), ("", ""), (None, str(cores.usable_cores()))])
def test_the_users_own_setting_wins(own: str | None, expected: str) -> None:
    """In a fresh process, as the command starts: what the first library to load torch then finds."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    environment |= {} if own is None else {"OMP_NUM_THREADS": own}
    code = (
        "import os, sys; from dflash_offline.pipeline.app import main\n"
        "sys.argv = ['dflash', '--help']\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print(repr(os.environ['OMP_NUM_THREADS']))"
    )
    run = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    assert run.stdout.splitlines()[-1] == repr(expected)
