"""What a run says of itself: sums over steps, rows of metrics.jsonl, TensorBoard events."""

import importlib
import importlib.util
import json
import math
import resource
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from dflash_offline.schemas.errors import DflashError
from dflash_offline.schemas.files import publish
from dflash_offline.schemas.run import EVENTS, METRICS, RunRecord, settings_identity
from dflash_offline.schemas.settings.train import TrainConfig
from dflash_offline.stages.trainer import DFlashStepMetrics

SUMS = (
    "loss_sum",
    "loss_weight",
    "correct_tokens",
    "valid_tokens",
    "accept_len_sum",
    "valid_blocks",
    "correct_by_slot",
    "valid_by_slot",
)


def sums_of(metrics: DFlashStepMetrics) -> Tensor:
    """Return one micro-batch's sums as one float64 vector, [6 + 2 (K-1)], in the order of `SUMS`.

    Vectors add over micro-batches, steps and ranks; means are formed from their sums only.
    """
    return torch.cat([getattr(metrics, name).detach().double().reshape(-1) for name in SUMS])


def no_sums(block_size: int, device: torch.device) -> Tensor:
    """Return the sums of nothing."""
    return torch.zeros(6 + 2 * (block_size - 1), dtype=torch.float64, device=device)


def means_of(sums: Tensor) -> dict[str, Any]:
    """Return loss, accuracy (also by slot) and acceptance length over all anchors of summed-up vectors."""
    loss, weight, correct, valid, accepted, blocks, *by_slot = sums.tolist()
    slots = len(by_slot) // 2
    return {
        "loss": loss / (weight + 1e-6),
        "accuracy": correct / max(valid, 1),
        "accuracy_by_slot": [round(c / max(v, 1), 4) for c, v in zip(by_slot[:slots], by_slot[slots:], strict=True)],
        "accept_len_over_anchors": accepted / max(blocks, 1),
    }


def check_reporter(name: str | None) -> None:
    """Raise `DflashError` if metrics are to go to a package that is not installed."""
    if name and importlib.util.find_spec(name) is None:
        raise DflashError(f"report_to is {name}, which is not installed. Install it with `pip install {name}`.")


class MetricsLog:
    """metrics.jsonl and TensorBoard events of one run, and wandb or trackio if asked for.

    Rows after the resumed step are dropped from the first two; a tracker goes on with the run of the same name.
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


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one optimizer step did, over all ranks."""

    sums: Tensor
    """As `sums_of` gives them."""
    tokens: int
    samples: int
    wait_s: float
    """Seconds that ranks waited for data, their mean."""
    grad_norm: float
    """Before clipping."""
    learning_rate: float
    stop: bool
    """A signal asked one of the ranks to stop."""


class Window:
    """Steps since the last row of the log."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.steps: list[StepResult] = []

    def row(self, device: torch.device) -> dict[str, Any]:
        """Return the row of these steps; learning rate and gradient norm are the last one's."""
        seconds, last = time.perf_counter() - self.began, self.steps[-1]
        means = means_of(torch.stack([step.sums for step in self.steps]).sum(dim=0))
        return {
            **{name: value for name, value in means.items() if name != "accuracy_by_slot"},
            "tokens_per_s": sum(step.tokens for step in self.steps) / seconds,
            "samples_per_s": sum(step.samples for step in self.steps) / seconds,
            "data_wait_share": sum(step.wait_s for step in self.steps) / seconds,
            "learning_rate": last.learning_rate,
            "grad_norm": last.grad_norm,
            "peak_memory_gib": peak_memory(device) / 2**30,
        }


def peak_memory(device: torch.device) -> int:
    """Return the most bytes held so far: by tensors on a GPU, by the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
