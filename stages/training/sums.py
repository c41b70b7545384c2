"""Exact sums of what steps computed: they add over micro-batches, ranks and steps, and are divided once."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Annotated, Any

import torch
from msgspec import Meta
from torch import Tensor

from dflash_offline.schemas.checked import Count
from dflash_offline.schemas.draft.config import DraftConfig
from dflash_offline.schemas.variants.variant import Variant
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
    """Return one micro-batch's sums as one float64 vector, in the order of `SUMS`; what a variant adds stands behind.

    These are the sums of the parts of its loss, and of each path the accepted lengths and the correct tokens by slot.
    """
    own = [getattr(metrics, name) for name in SUMS]
    own += metrics.part_sums.values()
    own += [each for path in metrics.paths.values() for each in (path.accept_len_sum, path.correct_by_slot)]
    return torch.cat([each.detach().double().reshape(-1) for each in own])


def no_sums(variant: Variant, block_size: int, device: torch.device) -> Tensor:
    """Return the sums of nothing, float64 [6 + 2 n] and what the variant adds; n slots of a block predict."""
    slots = block_size - variant.first_slot
    length = 6 + 2 * slots + len(variant.losses) + len(variant.paths) * (1 + slots)
    return torch.zeros(length, dtype=torch.float64, device=device)


def means_of(sums: Sequence[float], config: DraftConfig) -> dict[str, Any]:
    """Return loss, accuracy (also by slot) and acceptance length over all anchors, given added-up sums.

    Those of a variant's other paths bear their names, and what it makes of them stands behind.
    """
    variant, left = config.variant, iter(sums)
    slots = config.block_size - variant.first_slot
    loss, weight, correct, valid, accepted, blocks = islice(left, 6)
    correct_by_slot, valid_by_slot = list(islice(left, slots)), list(islice(left, slots))

    def shares(by_slot: Sequence[float]) -> list[float]:
        return [round(c / max(v, 1), 4) for c, v in zip(by_slot, valid_by_slot, strict=True)]

    means = {
        "loss": loss / (weight + 1e-6),
        "accuracy": correct / max(valid, 1),
        "accuracy_by_slot": shares(correct_by_slot),
        "accept_len_over_anchors": accepted / max(blocks, 1),
        **{name: next(left) / (weight + 1e-6) for name in variant.losses},
    }
    further: dict[str, Any] = {}
    for path in variant.paths:
        means[f"accept_len_over_anchors_{path}"] = next(left) / max(blocks, 1)
        by_slot = list(islice(left, slots))
        further |= {f"accuracy_{path}": sum(by_slot) / max(valid, 1), f"accuracy_{path}_by_slot": shares(by_slot)}
    return means | variant.figures(means | further)


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

    def means(self, config: DraftConfig) -> dict[str, Any]:
        """Return the means and rates of these steps, as a row of the log names them."""
        means = means_of(self.sums, config)
        return {
            **{name: value for name, value in means.items() if not name.endswith("_by_slot")},
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
