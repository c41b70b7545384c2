"""Kills regenerations at random instants, then lets one come through: python killed_regeneration.py KILLS CONFIG.

Prints the number of kills that fell into the work. Each regeneration is a fork of this process, which has done the
imports, so that kills fall into answering and not into loading libraries.
"""

import json
import os
import random
import signal
import sys
import time
import traceback
from importlib import import_module
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

from dflash_offline.schemas.regeneration import RegenerateConfig
from dflash_offline.stages.regenerate import regenerate

SERVER = ["dflash_offline.stages.server"]
LOCAL = ["dflash_offline.stages.generation", "transformers.models.qwen3.modeling_qwen3"]


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


def main(kills: int, settings: dict[str, object]) -> None:
    given = {"data": (Path(str(settings["data"])),), "out": Path(str(settings["out"]))}
    config = RegenerateConfig(**{**settings, **given})
    for name in SERVER if config.servers else LOCAL:
        import_module(name)
    answers = Path(f"{config.out}.partial/answers")
    chance, in_work = random.Random(0), 0
    for _ in range(kills):
        before = answers.stat().st_size if answers.exists() else 0
        child = start(config)
        while not answers.exists() or answers.stat().st_size == before:
            assert os.waitpid(child, os.WNOHANG) == (0, 0), "it came through, or broke, before its kill"
            time.sleep(0.001)
        time.sleep(chance.random() * 0.1)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        in_work += answers.exists()
    _, status = os.waitpid(start(config), 0)
    assert status == 0 and not answers.exists()
    print(in_work)


if __name__ == "__main__":
    main(int(sys.argv[1]), json.loads(sys.argv[2]))
