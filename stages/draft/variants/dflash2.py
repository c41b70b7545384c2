"""DFlash 2: grouped convolutions around attention and MLP, and a selector among each slot's best candidates.

Both begin as if they were not there: a draft that starts from a base draft's weights drafts what that one does.

What they add to a step on a GPU at least, for Qwen3-8B's shape (H 4096, five layers, c 2, G 256, r 256, k 16) and
32,768 block tokens, at 680 TFLOP/s of bfloat16 matmuls and 2.9 TB/s; counted, not run:
- kernel projections: 8.4 M multiply-adds a token and layer, 6 operations each with both gradients, 8.2 TFLOP: 12 ms;
- convolutions, elementwise: 17 KB read and written a token, layer and side forward and 26 KB backward, 28 GB: 10 ms,
  if they are fused; a kernel of a tap that is written out costs as much again;
- top k of 30,720 slots' logits: one more read of 9.3 GB: 3 ms;
- selector, float32: P h and its gradients 0.2 TFLOP at 60 TFLOP/s, codes 0.5 GB three times: 4 ms;
- AdamW of 120 M further parameters: 1 ms.
Together 30 ms beside the 485 of the base draft's step: 6 %. A drafted block costs 4 % more operations in the layers,
and 15 steps of the walk, each of a few kernels over 16 candidates.
"""

# Axes: B rows, Q block tokens (in training N blocks of K), G channel groups, M slots, H hidden size, V vocabulary,
# c slots that a convolution reads, k candidates, r rank of the selector.

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dflash_offline.schemas.draft.config import DraftConfig
from dflash_offline.schemas.variants.dflash2 import DFlash2
from dflash_offline.stages.draft.acceptance import sparse_acceptance
from dflash_offline.stages.draft.attention import Mask
from dflash_offline.stages.draft.layers import DraftCache, DraftLayer, KeysValues, Rotary
from dflash_offline.stages.draft.objective import Head, top_candidates
from dflash_offline.stages.draft.sampling import Chooser, Steps
from dflash_offline.stages.draft.variants.variant import Slots, SlotTerms

SELECTOR = "candidate_selector"
SLOTS_AT_ONCE = 2048
"""Slots whose candidates' codes are held at once: 32 MiB for 16 candidates of rank 256."""
CODE_STD = 0.02
"""Deviation of the predecessors' codes at the start; the successors' are zero, so that no score changes."""


def convolve(values: Tensor, base: Tensor, dynamic: Tensor, block_size: int) -> Tensor:
    """Return y_t = sum over o < c of (base[o] + dynamic[t, o]) * v_{t-o} within each block, zero before its first slot.

    `values` is [B, Q, H], `base` [c, H], `dynamic` [B, Q, c, G], one number for the H / G channels of a group. Q is a
    number of whole blocks, or a part of one.
    """
    taps, groups = dynamic.shape[-2:]
    size = min(values.shape[1], block_size)
    blocks = values.reshape(-1, size, groups, values.shape[-1] // groups)
    kernels = dynamic.reshape(-1, size, taps, groups, 1)
    base = base.to(values.dtype).view(taps, *blocks.shape[2:])
    mixed = (base[0] + kernels[:, :, 0]) * blocks
    for offset in range(1, min(taps, size)):
        earlier = F.pad(blocks[:, :-offset], (0, 0, 0, 0, offset, 0))
        mixed = mixed + (base[offset] + kernels[:, :, offset]) * earlier
    return mixed.view_as(values)


class BlockConvolution(nn.Module):
    """Two convolutions, before and after a sublayer, whose kernels follow from the tokens that enter the sublayer."""

    def __init__(self, config: DraftConfig, variant: DFlash2) -> None:
        super().__init__()
        taps, hidden = variant.conv_kernel_size, config.hidden_size
        self.block_size, self.groups = config.block_size, hidden // variant.conv_group_size
        self.base_kernel = nn.Parameter(torch.zeros(2, taps, hidden))
        self.kernel_projection = nn.Linear(hidden, 2 * taps * self.groups, bias=False)
        with torch.no_grad():
            self.base_kernel[:, 0] = 1.0
        nn.init.zeros_(self.kernel_projection.weight)

    def forward(self, normed: Tensor, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        """Return what leaves the sublayer, given what enters it, [B, Q, H] each; both are convolved."""
        taps = self.base_kernel.shape[1]
        before, after = self.kernel_projection(normed).unflatten(-1, (2, taps, self.groups)).unbind(dim=2)
        left = sublayer(convolve(normed, self.base_kernel[0], before, self.block_size))
        return convolve(left, self.base_kernel[1], after, self.block_size)


class ConvolvedLayer(nn.Module):
    """A draft layer with convolutions around its attention and its MLP; the context does not pass through them."""

    def __init__(self, layer: DraftLayer, config: DraftConfig, variant: DFlash2) -> None:
        super().__init__()
        self.self_attn, self.mlp = layer.self_attn, layer.mlp
        self.input_layernorm, self.post_attention_layernorm = layer.input_layernorm, layer.post_attention_layernorm
        self.attention_conv = BlockConvolution(config, variant)
        self.mlp_conv = BlockConvolution(config, variant)

    def forward(
        self,
        block: Tensor,
        context: Tensor | KeysValues,
        rotary: Rotary,
        mask: Mask,
        cache: DraftCache | None,
        backend: str,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Return the block after the layer, of its B * Q rows those of `rows` alone if given; they need the others."""

        def attend(entering: Tensor) -> Tensor:
            return self.self_attn(entering, context, rotary, mask, cache, backend)

        block = block + self.attention_conv(self.input_layernorm(block), attend)
        block = block + self.mlp_conv(self.post_attention_layernorm(block), self.mlp)
        return block if rows is None else block.flatten(0, 1).index_select(0, rows)


class CandidateSelector(nn.Module):
    """Scores a slot's candidates by the token before it: S(p, b) = U(b) + <A[p] * (P h), B[b]>, in float32."""

    def __init__(self, config: DraftConfig, variant: DFlash2) -> None:
        super().__init__()
        self.top_k = variant.selector_top_k
        shape = config.vocab_size, variant.selector_rank
        self.predecessor_codebook = nn.Parameter(torch.empty(shape))
        self.successor_codebook = nn.Parameter(torch.zeros(shape))
        self.hidden_projection = nn.Linear(config.hidden_size, variant.selector_rank, bias=False)
        nn.init.normal_(self.predecessor_codebook, std=CODE_STD)
        nn.init.normal_(self.hidden_projection.weight, std=config.hidden_size**-0.5)

    def projected(self, hidden: Tensor) -> Tensor:
        """Return P h as float32 [..., r], given h [..., H]."""
        return F.linear(hidden.float(), self.hidden_projection.weight.float())

    def scores(self, values: Tensor, ids: Tensor, projected: Tensor, previous: Tensor) -> Tensor:
        """Return S [M, k] of the candidates `ids` with logits `values` after the tokens `previous` [M].

        `projected`, [M, r], is P h of each slot.
        """
        wanted = F.embedding(previous, self.predecessor_codebook).float() * projected
        codes = F.embedding(ids, self.successor_codebook).float()
        return values + (codes @ wanted[:, :, None])[:, :, 0]


def extend_layer(layer: DraftLayer, config: DraftConfig, /) -> nn.Module:
    """Return the layer with convolutions, at first identities."""
    return ConvolvedLayer(layer, config, _fields(config))


def heads(config: DraftConfig, /) -> dict[str, nn.Module]:
    """Return the selector, at first silent."""
    return {SELECTOR: CandidateSelector(config, _fields(config))}


def terms(draft: nn.Module, slots: Slots, head: Head, settings: Mapping[str, float], progress: float, /) -> SlotTerms:
    """Return the draft's loss and the selector's, which is cross-entropy among the candidates after the true token.

    Slots whose label is no candidate add nothing to the selector's. It reads hidden states and logits without a
    gradient, so the draft below learns from its own loss alone.
    """
    selector = _selector(draft)
    loss, ce, correct, values, ids = head.loss(slots.hidden, slots.labels, slots.teacher, selector.top_k)
    with torch.autocast(slots.hidden.device.type, enabled=False):
        scores = _scores(selector, slots, values, ids)
    acceptance = None
    if slots.expects_acceptance and slots.teacher is not None:
        label_log_p = head.log_probabilities(slots.teacher(), slots.labels)
        acceptance = sparse_acceptance(scores, ids, label_log_p, slots.labels)
    is_truth = ids == slots.labels[:, None]
    covered = is_truth.any(dim=-1)
    selector_ce = torch.where(covered, scores.logsumexp(dim=-1) - (scores * is_truth).sum(dim=-1), 0.0)
    return SlotTerms(
        loss=loss + selector_weight(settings, progress) * selector_ce,
        ce=ce,
        correct=_chosen(scores, ids) == slots.labels,
        parts={"draft_loss": loss.detach(), "selector_loss": selector_ce.detach()},
        paths={"without_selector": correct, "oracle": covered},
        acceptance=acceptance,
    )


def selector_weight(settings: Mapping[str, float], progress: float) -> float:
    """Return the weight of the selector's loss: a linear warm-up over its share of the steps, then a constant."""
    warmup = settings["selector_warmup_ratio"]
    return settings["selector_loss_alpha"] * (min(1.0, progress / warmup) if warmup else 1.0)


def propose(
    draft: nn.Module,
    hidden: Tensor,
    head: nn.Module,
    anchor: Tensor,
    chooser: Chooser,
    threshold: float | None = None,
    /,
) -> Tensor:
    """Return the tokens of a walk over the slots' candidates, each scored after the token chosen before it."""
    selector = _selector(draft)
    values, ids = top_candidates(head(hidden)[0], selector.top_k)
    projected = selector.projected(hidden[0])

    def scores(slot: int, previous: Tensor) -> Tensor:
        here = slice(slot, slot + 1)
        return selector.scores(values[here], ids[here], projected[here], previous)

    return chooser.walk(Steps(scores=scores, ids=ids, count=len(ids)), anchor)


def _scores(selector: CandidateSelector, slots: Slots, values: Tensor, ids: Tensor) -> Tensor:
    """Return the scores [M, k]; their codes are looked up again in the backward pass, some slots at a time."""
    projected = selector.projected(slots.hidden.detach())
    parts = zip(*(part.split(SLOTS_AT_ONCE) for part in (values, ids, projected, slots.previous())), strict=True)
    if not torch.is_grad_enabled():
        return torch.cat([selector.scores(*part) for part in parts])
    return torch.cat(
        [checkpoint(selector.scores, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
    )


def _chosen(scores: Tensor, ids: Tensor) -> Tensor:
    return ids.gather(-1, scores.argmax(dim=-1, keepdim=True))[..., 0]


def _selector(draft: nn.Module) -> CandidateSelector:
    selector = draft.get_submodule(SELECTOR)
    assert isinstance(selector, CandidateSelector)
    return selector


def _fields(config: DraftConfig) -> DFlash2:
    assert isinstance(config.variant, DFlash2)
    return config.variant
