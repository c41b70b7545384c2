"""Runs `trials.py` so that neither a crash nor a hang of torch reaches the command that asks."""

import json
import os
import signal
import subprocess
import sys
from typing import Any

TIMEOUT_S = 240
"""After which trials are given up."""


def run_trials(what: str, *arguments: str) -> list[dict[str, Any]]:
    """Return what `trials.py` finds in a process of its own; of a trial in which it dies or hangs, how that was."""
    command = [sys.executable, "-m", "dflash_offline.pipeline.doctor.trials", what, *arguments]
    settings = {"HF_HUB_OFFLINE": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, **settings},
    )
    try:
        printed, errors = process.communicate(timeout=TIMEOUT_S)
        end = f"ended with {_exit_text(process.returncode)}: {(errors.strip().splitlines() or [''])[-1]}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        printed, _ = process.communicate()
        end = f"had not ended after {TIMEOUT_S} s"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    lines = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    results = [line for line in lines if "trial" in line]
    if lines and "trying" in lines[-1]:
        fields = dict(lines[-1])
        results.append({"trial": fields.pop("trying"), "seconds": None, **fields, "error": end})
    elif not lines:
        results.append({"trial": what, "seconds": None, "error": end})
    return results


def _exit_text(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
