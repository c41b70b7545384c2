"""What a variant of the draft computes."""

# Axes: M slots, H hidden size, K block size, V vocabulary.

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor, nn

from dflash_offline.schemas.draft.config import DraftConfig
from dflash_offline.stages.draft.layers import DraftLayer
from dflash_offline.stages.draft.objective import Head
from dflash_offline.stages.draft.sampling import Chooser


@dataclass(frozen=True, kw_only=True)
class Slots:
    """What some slots of a batch predict, and from what."""

    hidden: Tensor
    """The draft's states after its final norm, [M, H]."""
    labels: Tensor
    """Tokens to predict, int64 [M]."""
    previous: Callable[[], Tensor]
    """Returns the true token before each of them, int64 [M]."""
    teacher: Callable[[], Tensor] | None = None
    """Returns the target's state after its final norm at the position before each label, [M, H], of which its head
    makes the distribution that the label was drawn from; None where the batch does not bring them. Where the label is
    not under the loss mask the state may be fill."""
    expects_acceptance: bool = False
    """Whether the terms are to say what is accepted where tokens are drawn, for which there is a teacher."""


@dataclass(frozen=True, kw_only=True)
class SlotTerms:
    """What a variant's objective gives for each slot; only `loss` carries a gradient."""

    loss: Tensor
    """float32 [M]: weighted by slot, summed, and divided by the sum of the weights."""
    ce: Tensor
    """Cross-entropy of the draft's own prediction, float32 [M], by which D-PACE weighs."""
    correct: Tensor
    """Whether the token that is served is the label, the tokens before it in its block being right; bool [M]."""
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    """Parts of the loss before they are weighed against each other, float32 [M]."""
    paths: Mapping[str, Tensor] = field(default_factory=dict)
    """The same as `correct` for other ways to choose the token, bool [M]."""
    acceptance: Tensor | None = None
    """Probability that the slot drafts the label and it stays where tokens are drawn, those before it having stayed, at
    each of `TEMPERATURES`, float32 [M, T]; if that is asked for."""

    def of(self, slots: Tensor) -> "SlotTerms":
        """Return the terms of some of the slots, int64 [m]."""
        return SlotTerms(
            loss=self.loss[slots],
            ce=self.ce[slots],
            correct=self.correct[slots],
            parts={name: part[slots] for name, part in self.parts.items()},
            paths={name: flags[slots] for name, flags in self.paths.items()},
            acceptance=None if self.acceptance is None else self.acceptance[slots],
        )


class TorchVariant(Protocol):
    """The functions of a variant's file; `schemas/variants` has the rest under the same architecture."""

    def extend_layer(self, layer: DraftLayer, config: DraftConfig, /) -> nn.Module:
        """Return the layer with the variant's parts, at first computing the same; it is called as the given one is."""

    def heads(self, config: DraftConfig, /) -> dict[str, nn.Module]:
        """Return what the draft has beyond its layers, by name."""

    def terms(
        self, draft: nn.Module, slots: Slots, head: Head, settings: Mapping[str, float], progress: float, /
    ) -> SlotTerms:
        """Return the objective's terms; `progress` is the share of the run's steps that is done."""

    def propose(
        self,
        draft: nn.Module,
        hidden: Tensor,
        head: nn.Module,
        anchor: Tensor,
        chooser: Chooser,
        threshold: float | None = None,
        /,
    ) -> Tensor:
        """Return the drafted tokens, int64 [1, n], after the anchor, int64 [1], given the states of all slots that
        predict, [1, n, H].

        `head` makes logits of states. The chooser notes what the tokens were drawn from. A variant with a confidence
        ends the block, maybe before its first token, where that is below `threshold`; others are given none.
        """
