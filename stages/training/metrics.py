"""The log of a run: metrics.jsonl, TensorBoard events, and a tracker if asked for."""

import importlib
import importlib.util
import json
import os
import resource
import secrets
import socket
import sys
import time
from collections.abc import Callable
from io import BytesIO, FileIO
from pathlib import Path
from typing import Any

import torch
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.summary import scalar

from dflash_offline.schemas.errors import DflashError
from dflash_offline.schemas.files import append, open_kept, publish, write_synced
from dflash_offline.schemas.paths import free_name
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

    def __init__(self, config: TrainConfig, step: int, say: Callable[[str], None]) -> None:
        run = config.out
        _keep_rows(run / METRICS, step, say)
        self._file = open_kept(run / METRICS, "a")
        self._events = _EventFile(run / EVENTS, step)
        self._tracker = importlib.import_module(config.report_to) if config.report_to else None
        if self._tracker:
            # wandb finds a run again by id, trackio by name.
            known = {"id": RunRecord.read(run).checksum[:16]} if config.report_to == "wandb" else {}
            settings = settings_identity(config)
            self._tracker.init(project="dflash", name=run.name, config=settings, resume="allow", **known)

    def write(self, step: int, row: dict[str, Any]) -> None:
        """Add one row."""
        append(self._file, f"{json.dumps({'step': step, **row})}\n".encode())
        flat: dict[str, float] = {}
        for name, value in row.items():
            slots = enumerate(value, start=1) if isinstance(value, list) else ()
            flat.update({f"{name}/{slot}": number for slot, number in slots} or {name: value})
        self._events.write(step, flat)
        if self._tracker:
            self._tracker.log(flat, step=step)

    def close(self) -> None:
        """Flush and close all."""
        self._file.close()
        self._events.close()
        if self._tracker:
            self._tracker.finish()


class _EventFile:
    """A file of TensorBoard's events, whose rows after `step` replace those of older files.

    Torch's SummaryWriter would write from a thread of its own, which cannot tell of a full disk but by a traceback, and
    under a name through which a link could be followed.
    """

    def __init__(self, folder: Path, step: int) -> None:
        folder.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}.{secrets.token_hex(4)}"
        self._file = FileIO(folder / name, "x")
        self._add(Event(step=step + 1, file_version="brain.Event:2"))
        self._add(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))

    def write(self, step: int, numbers: dict[str, float]) -> None:
        """Add a step's numbers."""
        self._add(*(Event(step=step, summary=scalar(name, number)) for name, number in numbers.items()))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _add(self, *events: Event) -> None:
        records = BytesIO()
        writer = RecordWriter(records)
        for event in events:
            event.wall_time = time.time()
            writer.write(event.SerializeToString())
        append(self._file, records.getvalue())


def _keep_rows(path: Path, step: int, say: Callable[[str], None]) -> None:
    """Leave in a run's log the rows up to the resumed step; of a damaged one a copy is set aside, and said."""
    if not path.is_file() or path.is_symlink():  # a link is refused when the file is opened
        return
    content = path.read_bytes()
    lines = [line for line in content.split(b"\n") if line]
    steps = [_step_of(line) for line in lines]
    sound = [line for line, found in zip(lines, steps, strict=True) if found is not None and found <= step]
    if damaged := steps.count(None):
        aside = free_name(path, f"{path.name}.damaged")
        write_synced(aside, [content])
        say(f"{damaged} of {len(lines)} lines of {path} are damaged. All are set aside as {aside.name}, the rest kept.")
    publish([b"".join(line + b"\n" for line in sound)], path=path)


def _step_of(line: bytes) -> int | None:
    """Return the step of a row of the log; None for what is no row."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return step if type(step) is int else None


def peak_memory(device: torch.device) -> int:
    """Return the most bytes held so far: by tensors on a GPU, by the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
