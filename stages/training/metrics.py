"""The log of a run: metrics.jsonl, TensorBoard events, and a tracker if asked for."""

import importlib
import importlib.util
import json
import math
import resource
import sys
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter

from dflash_offline.schemas.errors import DflashError
from dflash_offline.schemas.files import publish
from dflash_offline.schemas.run import EVENTS, METRICS, RunRecord, settings_identity
from dflash_offline.schemas.settings.train import TrainConfig


def check_reporter(name: str | None) -> None:
    """Raise `DflashError` if metrics are to go to a package that is not installed."""
    if name and importlib.util.find_spec(name) is None:
        raise DflashError(f"report_to is {name}, which is not installed. Install it with `pip install {name}`.")


class MetricsLog:
    """metrics.jsonl and TensorBoard events of one run, and wandb or trackio if asked for.

    Rows after the resumed step are dropped from metrics.jsonl and the events; a tracker resumes the run of that name.
    """

    def __init__(self, config: TrainConfig, step: int) -> None:
        run = config.out
        path = run / METRICS
        if path.exists():
            rows = [line for line in path.read_text().splitlines() if _step_of(line) <= step]
            publish(["".join(f"{row}\n" for row in rows).encode()], temporary=run / f".{METRICS}", path=path)
        self._file = path.open("a")
        self._events = SummaryWriter(str(run / EVENTS), purge_step=step + 1)
        self._tracker = importlib.import_module(config.report_to) if config.report_to else None
        if self._tracker:
            # wandb finds a run again by id, trackio by name.
            known = {"id": RunRecord.read(run).checksum[:16]} if config.report_to == "wandb" else {}
            settings = settings_identity(config)
            self._tracker.init(project="dflash", name=run.name, config=settings, resume="allow", **known)

    def write(self, step: int, row: dict[str, Any]) -> None:
        """Add one row."""
        self._file.write(json.dumps({"step": step, **row}) + "\n")
        self._file.flush()
        flat: dict[str, float] = {}
        for name, value in row.items():
            slots = enumerate(value, start=1) if isinstance(value, list) else ()
            flat.update({f"{name}/{slot}": number for slot, number in slots} or {name: value})
        for name, number in flat.items():
            self._events.add_scalar(name, number, step)
        if self._tracker:
            self._tracker.log(flat, step=step)

    def close(self) -> None:
        """Flush and close all."""
        self._file.close()
        self._events.close()
        if self._tracker:
            self._tracker.finish()


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # the last line of a killed run may be cut off
        return math.inf


def peak_memory(device: torch.device) -> int:
    """Return the most bytes held so far: by tensors on a GPU, by the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
