"""What a training step computed: its loss, and sums that add over micro-batches and ranks."""

# Axes: B rows, N anchors, K block size, n predicting slots of a block (K - 1 of the base draft), M supervised slots.

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dflash_offline.stages.draft.objective import accepted_prefix
from dflash_offline.stages.draft.variants.variant import SlotTerms


@dataclass(frozen=True)
class PathSums:
    """What would have been accepted, had a block's tokens been chosen in another way."""

    accept_len_sum: Tensor
    """Sum over valid blocks of 1 + number of leading correct slots."""
    correct_by_slot: Tensor
    """Supervised slots whose token is the label, [n]."""


@dataclass(frozen=True)
class DFlashStepMetrics:
    """What one step computed. Over micro-batches and ranks, add the sums and divide once; never average the means.

    Only `loss` and `loss_sum` carry a gradient. Counts are int64, the rest float32.
    """

    loss: Tensor
    """loss_sum / (loss_weight + 1e-6)."""
    accuracy: Tensor
    """correct_tokens / valid_tokens; 0 without a supervised slot."""
    valid_tokens: Tensor
    """Number of supervised slots."""
    loss_sum: Tensor
    """Sum of weight * loss over supervised slots; the loss of the base draft is its cross-entropy."""
    loss_weight: Tensor
    """Sum of the weights of supervised slots."""
    correct_tokens: Tensor
    """Supervised slots whose greedy token is the label."""
    accept_len: Tensor
    """accept_len_sum / valid_blocks over all anchors, which is not what serving sees; 0 without a valid block."""
    accept_len_sum: Tensor
    """Sum over valid blocks of 1 + number of leading correct slots."""
    valid_blocks: Tensor
    """Blocks with at least one supervised slot."""
    correct_by_slot: Tensor
    """correct_tokens of the predicting slots, [n]; n = K - 1 of the base draft."""
    valid_by_slot: Tensor
    """valid_tokens of the predicting slots, [n]."""
    part_sums: Mapping[str, Tensor] = field(default_factory=dict)
    """Sum of weight * each part of the loss that the draft's variant measures by itself."""
    paths: Mapping[str, PathSums] = field(default_factory=dict)
    """Of the other ways to choose tokens that the variant measures."""


def step_metrics(terms: SlotTerms, weight: Tensor, supervised: Tensor) -> DFlashStepMetrics:
    """Return the metrics of the supervised slots, bool [B, N, n], given their terms and weights [M]."""
    loss_sum, loss_weight = (weight * terms.loss).sum(), weight.sum()
    valid = supervised.any(dim=-1)

    def placed(flags: Tensor) -> Tensor:
        return torch.zeros_like(supervised).masked_scatter(supervised, flags)

    def sums(correct: Tensor) -> PathSums:
        return PathSums(((1 + accepted_prefix(correct, supervised)) * valid).sum(), correct.sum(dim=(0, 1)))

    correct = placed(terms.correct)
    served, valid_blocks = sums(correct), valid.sum()
    valid_tokens, correct_tokens = supervised.sum(), correct.sum()
    return DFlashStepMetrics(
        loss=loss_sum / (loss_weight + 1e-6),
        accuracy=correct_tokens / valid_tokens.clamp(min=1),
        valid_tokens=valid_tokens,
        loss_sum=loss_sum,
        loss_weight=loss_weight,
        correct_tokens=correct_tokens,
        accept_len=served.accept_len_sum / valid_blocks.clamp(min=1),
        accept_len_sum=served.accept_len_sum,
        valid_blocks=valid_blocks,
        correct_by_slot=served.correct_by_slot,
        valid_by_slot=supervised.sum(dim=(0, 1)),
        part_sums={name: (weight * part).sum() for name, part in terms.parts.items()},
        paths={name: sums(placed(flags)) for name, flags in terms.paths.items()},
    )
