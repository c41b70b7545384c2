"""Exact sums of what steps computed: they add over micro-batches, ranks and steps, and are divided once."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from msgspec import Meta
from torch import Tensor

from dflash_offline.schemas.checked import Count
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
    """Return one micro-batch's sums as one float64 vector, [6 + 2 (K-1)], in the order of `SUMS`."""
    return torch.cat([getattr(metrics, name).detach().double().reshape(-1) for name in SUMS])


def no_sums(block_size: int, device: torch.device) -> Tensor:
    """Return the sums of nothing, float64 [6 + 2 (K-1)]."""
    return torch.zeros(6 + 2 * (block_size - 1), dtype=torch.float64, device=device)


def means_of(sums: Sequence[float]) -> dict[str, Any]:
    """Return loss, accuracy (also by slot) and acceptance length over all anchors, given added-up sums."""
    loss, weight, correct, valid, accepted, blocks, *by_slot = sums
    slots = len(by_slot) // 2
    return {
        "loss": loss / (weight + 1e-6),
        "accuracy": correct / max(valid, 1),
        "accuracy_by_slot": [round(c / max(v, 1), 4) for c, v in zip(by_slot[:slots], by_slot[slots:], strict=True)],
        "accept_len_over_anchors": accepted / max(blocks, 1),
    }


@dataclass(frozen=True, kw_only=True)
class Window:
    """One step's sums, or those of the steps since the last row of the log, over all ranks.

    Checkpoints hold these, so that the first row after a resume covers the same steps as that of a run that went
    through.
    """

    sums: tuple[float, ...] = ()
    """As `sums_of` gives them; empty before the first step."""
    tokens: Count = 0
    """Real tokens, padding left out."""
    samples: Count = 0
    seconds: Annotated[float, Meta(ge=0)] = 0.0
    """Spent by this rank, waiting for data included."""
    wait_s: Annotated[float, Meta(ge=0)] = 0.0
    """Seconds that ranks waited for data, their mean."""

    def plus(self, step: "Window") -> "Window":
        """Return the window with one more step."""
        sums = self.sums or (0.0,) * len(step.sums)
        return Window(
            sums=tuple(mine + its for mine, its in zip(sums, step.sums, strict=True)),
            tokens=self.tokens + step.tokens,
            samples=self.samples + step.samples,
            seconds=self.seconds + step.seconds,
            wait_s=self.wait_s + step.wait_s,
        )

    def means(self) -> dict[str, Any]:
        """Return the means and rates of these steps, as a row of the log names them."""
        means = means_of(self.sums)
        del means["accuracy_by_slot"]
        return {
            **means,
            "tokens_per_s": self.tokens / self.seconds,
            "samples_per_s": self.samples / self.seconds,
            "data_wait_share": self.wait_s / self.seconds,
        }


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one optimizer step did, over all ranks."""

    window: Window
    """This step alone."""
    grad_norm: float
    """Before clipping."""
    learning_rate: float
    stop: bool
    """Whether a signal asked one of the ranks to stop."""
