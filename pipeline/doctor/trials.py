"""Trials of torch in a process of its own, so that neither a crash nor a hang reaches the command that asks."""

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass, replace

from dflash_offline.stages.stop import left_to_this_process

TIMEOUT_S = 300
"""Seconds after which the trials are given up."""
BEGUN = "begun"
"""Stands as the error of a trial until it has ended."""
REINSTALL = "pip install --force-reinstall dflash-offline, in an environment of its own."


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One thing that was tried, and what came of it."""

    name: str
    """What was tried: torch, a device, a target, or something on a device."""
    needed: bool = True
    """Whether the commands do this unless told otherwise."""
    do: str = REINSTALL
    """What to do if it fails."""
    error: str | None = None
    """Why it failed; None if it did not."""
    result: str = ""
    """What was found, in words."""


def run_trials(target: str | None) -> list[Trial]:
    """Return what `torch_trials.py` finds; of the trial in which it dies or hangs, how that was."""
    command = [sys.executable, "-m", "dflash_offline.pipeline.doctor.torch_trials", *([target] if target else [])]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    with left_to_this_process():
        run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env, start_new_session=True)
    with run:
        try:
            printed, said = run.communicate(timeout=TIMEOUT_S)
            code = run.returncode
            how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            end = f"ended with {how}: {(said.decode(errors='replace').strip().splitlines() or [''])[-1]}"
        except subprocess.TimeoutExpired as error:
            printed, end = error.stdout or b"", f"had not ended after {TIMEOUT_S} s"
        finally:
            with suppress(ProcessLookupError):  # it has ended, as has each compiler that it started
                os.killpg(run.pid, signal.SIGKILL)
    lines = [Trial(**json.loads(line)) for line in printed.splitlines() if line.startswith(b"{")]
    trials = {trial.name: trial for trial in lines or [Trial(name="torch", error=BEGUN)]}
    return [replace(trial, error=end) if trial.error == BEGUN else trial for trial in trials.values()]
