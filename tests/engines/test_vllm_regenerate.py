"""A real vLLM answers in the command's own process: the target's own answers, a kill in the middle included."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from live_vllm import ended, environment, left_files, shared_files

from dflash_offline.pipeline.demo import CONVERSATIONS, TARGET
from dflash_offline.schemas.settings.regenerate import RegenerateConfig
from dflash_offline.stages.regenerate import regenerate

pytestmark = pytest.mark.vllm
NUM_ROWS = int(os.environ.get("DFLASH_VLLM_PROMPTS", "200"))
TIES = max(1, NUM_ROWS // 100)
"""Rows in which two words may all but tie, so that arithmetic decides."""


def rows_of(path: Path) -> dict[str, Any]:
    rows = map(json.loads, path.read_text().splitlines())
    return {row["source"]: row["messages"] for row in rows}


def test_vllm_in_process_gives_the_targets_own_answers_though_it_is_killed(tmp_path: Path) -> None:
    data, out = tmp_path / "chats.jsonl", tmp_path / "new.jsonl"
    data.write_text("".join(CONVERSATIONS.read_text().splitlines(keepends=True)[:NUM_ROWS]))
    most = {"max_new_tokens": 256}
    regenerate(RegenerateConfig(data=(data,), out=tmp_path / "own.jsonl", target=str(TARGET), **most))
    command = [sys.executable, "-m", "dflash_offline.pipeline", "regenerate", data, "--out", out, "--target", TARGET]
    command += ["--engine", "vllm", "--max-new-tokens", "256", "--engine-args", '{"max_num_seqs": 16}', "--json"]
    line = [*map(str, command)]
    for number in (signal.SIGKILL, signal.SIGINT):
        kept = size_of(out)
        process = subprocess.Popen(line, env=environment(), start_new_session=True, stderr=subprocess.PIPE, text=True)
        while process.poll() is None and size_of(out) == kept:
            time.sleep(0.01)
        assert process.poll() is None, process.communicate()[1]
        held = shared_files(process.pid)
        os.killpg(process.pid, number)
        said = process.communicate()[1]
        assert ended(process.pid) and not left_files(held) and "Traceback" not in said, said
    done = subprocess.run(line, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout)
    assert 0 < told["num_answers_now"] < told["num_answers"]
    own, new = rows_of(tmp_path / "own.jsonl"), rows_of(out)
    equal = sum(own.get(source) == messages for source, messages in new.items())
    print(f"{equal} of {len(own)} rows as transformers answers them")
    assert len(own) >= 0.9 * NUM_ROWS and min(len(own), len(new)) - equal <= TIES >= abs(len(own) - len(new))


def size_of(out: Path) -> int:
    """Return how many bytes of answers a command that goes on with `out` would find."""
    answers = Path(f"{out}.partial/answers")
    return answers.stat().st_size if answers.exists() else 0
