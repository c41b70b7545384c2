"""The base draft: each slot by itself, by the frozen head."""

# Axes: M slots, H hidden size, K block size.

from collections.abc import Mapping

from torch import Tensor, nn

from dflash_offline.schemas.draft.config import DraftConfig
from dflash_offline.stages.draft.layers import DraftLayer
from dflash_offline.stages.draft.objective import Head
from dflash_offline.stages.draft.sampling import Chooser
from dflash_offline.stages.draft.variants.variant import Slots, SlotTerms


def extend_layer(layer: DraftLayer, config: DraftConfig, /) -> nn.Module:
    """Return the layer as it is."""
    return layer


def heads(config: DraftConfig, /) -> dict[str, nn.Module]:
    """Return nothing: the target's head is borrowed."""
    return {}


def terms(draft: nn.Module, slots: Slots, head: Head, settings: Mapping[str, float], progress: float, /) -> SlotTerms:
    """Return each slot's loss, and whether its greedy token is the label."""
    found = head.loss(slots.hidden, slots.labels, slots.teacher)
    acceptance = None
    if slots.expects_acceptance and slots.teacher is not None:
        acceptance = head.acceptance(slots.hidden, slots.teacher(), slots.labels)
    return SlotTerms(loss=found.loss, ce=found.ce, correct=found.correct, acceptance=acceptance)


def propose(
    draft: nn.Module,
    hidden: Tensor,
    head: nn.Module,
    anchor: Tensor,
    chooser: Chooser,
    threshold: float | None = None,
    /,
) -> Tensor:
    """Return each slot's token by its own logits."""
    return chooser.draft(head(hidden))
