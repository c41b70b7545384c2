"""Kills regenerations at random instants, then lets one come through: python killed_regeneration.py KILLS CONFIG.

Where one comes through before its kill it begins anew; prints how often. Each regeneration is a fork of this process,
which has done the imports, so that kills fall into answering and not into loading libraries.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from contextlib import suppress
from importlib import import_module
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

from dflash_offline.schemas.settings.regenerate import RegenerateConfig
from dflash_offline.stages.regenerate import regenerate

SERVER = ["dflash_offline.stages.answers.servers"]
LOCAL = ["dflash_offline.stages.answers.local", "transformers.models.qwen3.modeling_qwen3"]


def start(config: RegenerateConfig) -> int:
    child = os.fork()
    if child == 0:
        try:
            regenerate(config)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return child


def kill_and_complete(kills: int, config: RegenerateConfig) -> int:
    """Kill so many regenerations at work, let one come through, and return how often one did so before its kill."""
    for name in SERVER if config.servers else LOCAL:
        import_module(name)
    answers = Path(f"{config.out}.partial/answers")
    chance, killed, anew = random.Random(0), 0, 0
    while killed < kills:
        before = answers.stat().st_size if answers.exists() else 0
        child = start(config)
        while os.waitpid(child, os.WNOHANG) == (0, 0) and (not answers.exists() or answers.stat().st_size == before):
            time.sleep(0.001)
        time.sleep(chance.random() * 0.1)
        with suppress(ProcessLookupError, ChildProcessError):  # it came through meanwhile
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        if Path(f"{config.out}.provenance").exists():
            anew += 1
            for made in config.out.parent.glob(f"{config.out.name}*"):
                shutil.rmtree(made) if made.is_dir() else made.unlink()
        else:
            assert answers.exists(), "it broke"
            killed += 1
        assert anew < kills, "no kill finds it at work"
    _, status = os.waitpid(start(config), 0)
    assert status == 0 and not answers.exists()
    return anew


if __name__ == "__main__":
    settings = json.loads(sys.argv[2])
    paths = {"data": (Path(settings["data"]),), "out": Path(settings["out"])}
    print(kill_and_complete(int(sys.argv[1]), RegenerateConfig(**{**settings, **paths})))
