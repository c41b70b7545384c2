"""What a run says of itself: sums over steps, rows of metrics.jsonl, TensorBoard events."""

import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter

from dflash_offline.schemas.files import publish
from dflash_offline.schemas.run import EVENTS, METRICS
from dflash_offline.stages.loader import Batch
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


def add_sums(sums: dict[str, torch.Tensor], metrics: DFlashStepMetrics) -> None:
    """Add one micro-batch's sums; means are formed from sums only."""
    for name in SUMS:
        value = getattr(metrics, name).detach()
        sums[name] = sums[name] + value if name in sums else value


class MetricsLog:
    """metrics.jsonl and TensorBoard events of one run; rows after the resumed step are dropped."""

    def __init__(self, run: Path, step: int) -> None:
        path = run / METRICS
        if path.exists():
            rows = [line for line in path.read_text().splitlines() if _step_of(line) <= step]
            publish(["".join(f"{row}\n" for row in rows).encode()], temporary=run / f".{METRICS}", path=path)
        self._file = path.open("a")
        self._events = SummaryWriter(str(run / EVENTS), purge_step=step + 1)

    def write(self, step: int, row: dict[str, Any]) -> None:
        """Add one row."""
        self._file.write(json.dumps({"step": step, **row}) + "\n")
        self._file.flush()
        for name, value in row.items():
            for index, number in enumerate(value if isinstance(value, list) else [value], start=1):
                tag = f"{name}/{index}" if isinstance(value, list) else name
                self._events.add_scalar(tag, number, step)

    def close(self) -> None:
        """Flush and close both."""
        self._file.close()
        self._events.close()


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # the last line of a killed run may be cut off
        return math.inf


class Window:
    """Metrics and times since the last row of the log."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.sums: dict[str, torch.Tensor] = {}
        self.tokens = self.samples = 0
        self.wait_s = 0.0

    def add(self, sums: dict[str, torch.Tensor], batches: list[Batch]) -> None:
        for name, value in sums.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.tokens += sum(batch.num_tokens for batch in batches)
        self.samples += sum(len(batch.samples) for batch in batches)
        self.wait_s += sum(batch.wait_s for batch in batches)

    def row(self) -> dict[str, Any]:
        sums, seconds = self.sums, time.perf_counter() - self.began
        return {
            "loss": float(sums["loss_sum"] / (sums["loss_weight"] + 1e-6)),
            "accuracy": float(sums["correct_tokens"] / sums["valid_tokens"].clamp(min=1)),
            "accept_len_over_anchors": float(sums["accept_len_sum"] / sums["valid_blocks"].clamp(min=1)),
            "tokens_per_s": self.tokens / seconds,
            "samples_per_s": self.samples / seconds,
            "data_wait_share": self.wait_s / seconds,
        }


def peak_memory(device: torch.device) -> dict[str, float]:
    if device.type != "cuda":
        return {}
    return {"peak_memory_gib": torch.cuda.max_memory_allocated(device) / 2**30}
