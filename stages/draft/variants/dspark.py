"""DSpark: a bias on each slot's logits by the token before it, and a head that foretells the acceptance of each slot.

The logits of the draft and of its teacher are formed some slots at a time, and again in the backward pass: what the
tables' gradients need is the whole distribution, whose weight is known only then.
"""

# Axes: M slots, H hidden size, V vocabulary, r rank of the Markov head, n slots of a block.

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dflash_offline.schemas.draft.config import DraftConfig
from dflash_offline.schemas.variants.dspark import DSpark
from dflash_offline.stages.draft.acceptance import dense_acceptance
from dflash_offline.stages.draft.layers import DraftLayer
from dflash_offline.stages.draft.objective import Head, default_chunk_slots
from dflash_offline.stages.draft.sampling import Chooser, Steps
from dflash_offline.stages.draft.variants.variant import Slots, SlotTerms

MARKOV, CONFIDENCE = "markov_head", "confidence_head"
CODE_STD = 0.02
"""Deviation of the codes of the tokens before at the start; those of the tokens themselves are zero: no bias."""
LOGITS_AT_ONCE = 4
"""Tensors of a chunk's size that a slot's terms hold beside its logits: both distributions and their difference."""


class MarkovHead(nn.Module):
    """The bias W2 e on a slot's logits, e = W1[p] the code of the token before it; low rank, so that it is small."""

    def __init__(self, config: DraftConfig, variant: DSpark) -> None:
        super().__init__()
        # Tables, and no linear layer: neither of them decays or is orthogonalized.
        self.markov_w1 = nn.Embedding(config.vocab_size, variant.markov_rank)
        self.markov_w2 = nn.Embedding(config.vocab_size, variant.markov_rank)
        nn.init.normal_(self.markov_w1.weight, std=CODE_STD)
        nn.init.zeros_(self.markov_w2.weight)

    def codes(self, previous: Tensor) -> Tensor:
        """Return e [M, r] of the tokens before, int64 [M]."""
        codes: Tensor = self.markov_w1(previous)
        return codes

    def bias(self, codes: Tensor) -> Tensor:
        """Return the bias [M, V]."""
        return F.linear(codes, self.markov_w2.weight)


class ConfidenceHead(nn.Module):
    """Foretells, as a logit, the probability that the target accepts a slot's token, from its state and its code."""

    def __init__(self, config: DraftConfig, variant: DSpark) -> None:
        super().__init__()
        self.proj = nn.Linear(config.hidden_size + variant.markov_rank, 1)
        nn.init.zeros_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)

    def forward(self, hidden: Tensor, codes: Tensor) -> Tensor:
        """Return float32 [M] of states [M, H] and codes [M, r]."""
        both = torch.cat((hidden.float(), codes.float()), dim=-1)
        return F.linear(both, self.proj.weight.float(), self.proj.bias.float())[:, 0]


def extend_layer(layer: DraftLayer, config: DraftConfig, /) -> nn.Module:
    """Return the layer as it is."""
    return layer


def heads(config: DraftConfig, /) -> dict[str, nn.Module]:
    """Return both heads, at first without a bias and without an opinion."""
    fields = config.variant
    assert isinstance(fields, DSpark)
    return {MARKOV: MarkovHead(config, fields), CONFIDENCE: ConfidenceHead(config, fields)}


def terms(draft: nn.Module, slots: Slots, head: Head, settings: Mapping[str, float], progress: float, /) -> SlotTerms:
    """Return cross-entropy, distance to the teacher's distribution and the confidence head's loss, each by its weight.

    Of the softmaxes Q of the biased logits and P of the target's: |Q - P|_1, and the binary cross-entropy of the
    confidence with 1 - |Q - P|_1 / 2, the probability that a draw from Q is accepted. Without a teacher, which only a
    walk may lack, P counts as Q.
    """
    markov, confidence_head = _heads(draft)
    codes = markov.codes(slots.previous())
    teacher = None if slots.teacher is None else slots.teacher()
    ce, distance, correct, plain, stays = _distances(markov, slots, codes, teacher, head)
    with torch.autocast(slots.hidden.device.type, enabled=False):
        confidence = confidence_head(slots.hidden, codes)
        acceptance = (1 - 0.5 * distance.detach()).clamp(0, 1)
        confidence_loss = F.binary_cross_entropy_with_logits(confidence, acceptance, reduction="none")
    parts = {"ce_loss": ce, "l1_loss": distance, "confidence_loss": confidence_loss}
    loss = sum((settings[f"{name}_alpha"] * part for name, part in parts.items()), torch.zeros_like(ce))
    parts["mean_confidence"] = confidence.sigmoid()
    return SlotTerms(
        loss=loss,
        ce=ce.detach(),
        correct=correct,
        parts={name: part.detach() for name, part in parts.items()},
        paths={"without_markov": plain},
        acceptance=stays if slots.expects_acceptance and teacher is not None else None,
    )


def _distances(
    markov: MarkovHead, slots: Slots, codes: Tensor, teacher: Tensor | None, head: Head
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return cross-entropy and distance, float32 [M], and whether the greedy token is the label with and without bias.

    Behind them stands what stays where tokens are drawn, [M, T], or nothing, [M, 0], where that is not asked for. The
    head is frozen; gradients go to states, codes and the second table.
    """
    device, linear = slots.hidden.device.type, head.linear
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else linear.weight.dtype
    weight = linear.weight.detach().to(dtype)
    bias = None if linear.bias is None else linear.bias.detach().to(dtype)

    def chunk(hidden: Tensor, code: Tensor, label: Tensor, taught: Tensor | None) -> tuple[Tensor, ...]:
        own = F.linear(hidden.to(dtype), weight, bias)
        logits = own.float() + markov.bias(code.to(dtype)).float()
        q = logits.softmax(dim=-1)
        ce = logits.logsumexp(dim=-1) - logits.gather(1, label[:, None])[:, 0]
        distance, stays = torch.zeros_like(ce), logits.new_empty((len(label), 0))
        if taught is not None:
            with torch.no_grad():
                taught_logits = F.linear(taught.to(dtype), weight, bias).float()
                p = (taught_logits / head.teacher_temperature).softmax(dim=-1)
            distance = (q - p).abs().sum(dim=-1)
            if slots.expects_acceptance:
                stays = dense_acceptance(logits, taught_logits, label)
        return ce, distance, logits.argmax(dim=-1) == label, own.argmax(dim=-1) == label, stays

    size = head.chunk_slots or max(default_chunk_slots(len(weight), slots.hidden.device) // LOGITS_AT_ONCE, 1)
    found = []
    with torch.autocast(device, enabled=False):
        for begin in range(0, max(len(slots.labels), 1), size):
            here = slice(begin, begin + size)
            part = slots.hidden[here], codes[here], slots.labels[here], None if teacher is None else teacher[here]
            if torch.is_grad_enabled():
                found.append(checkpoint(chunk, *part, use_reentrant=False, preserve_rng_state=False))
            else:
                found.append(chunk(*part))
    ce, distance, correct, plain, stays = (torch.cat(parts) for parts in zip(*found, strict=True))
    return ce, distance, correct, plain, stays


def propose(
    draft: nn.Module,
    hidden: Tensor,
    head: nn.Module,
    anchor: Tensor,
    chooser: Chooser,
    threshold: float | None = None,
    /,
) -> Tensor:
    """Return the tokens chosen one after the other, each biased by the one before it.

    They end before the first slot of whose token the confidence head thinks less than `threshold`.
    """
    markov, confidence_head = _heads(draft)
    own = head(hidden)[0]
    dtype = own.dtype

    def scores(slot: int, previous: Tensor) -> Tensor:
        return own[slot : slot + 1] + markov.bias(markov.codes(previous).to(dtype)).to(dtype)

    def goes_on(slot: int, previous: Tensor) -> bool:
        confidence = confidence_head(hidden[0, slot : slot + 1], markov.codes(previous))
        return float(confidence.sigmoid()) >= float(threshold or 0.0)

    steps = Steps(scores=scores, goes_on=None if threshold is None else goes_on, count=len(own))
    return chooser.walk(steps, anchor)


def _heads(draft: nn.Module) -> tuple[MarkovHead, ConfidenceHead]:
    markov, confidence = draft.get_submodule(MARKOV), draft.get_submodule(CONFIDENCE)
    assert isinstance(markov, MarkovHead) and isinstance(confidence, ConfidenceHead)
    return markov, confidence
