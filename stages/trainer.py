"""The training step of a DFlash draft: anchors, block inputs, one draft pass, the loss and its exact sums."""

# Axes: B rows, S positions, N anchors, K block size, H hidden size, L captured target layers, V vocabulary.

import logging
import math
from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from dflash_offline.schemas.draft.config import FULL, AttentionRule
from dflash_offline.schemas.errors import DflashError, NoValidAnchorsError
from dflash_offline.schemas.settings.losses import LossMixture
from dflash_offline.schemas.settings.train import ATTENTION_BACKENDS
from dflash_offline.schemas.variants.table import BASE
from dflash_offline.stages.draft.anchors import Anchors, document_starts, sample_anchors, sample_document_anchors
from dflash_offline.stages.draft.attention import Blocks, dense_mask, flex_mask, tiled_mask
from dflash_offline.stages.draft.model import DraftModel, Masks, ProjectedContext
from dflash_offline.stages.draft.objective import Head, dpace_weights, slot_weights, supervised_slots
from dflash_offline.stages.draft.pairing import draft_problems
from dflash_offline.stages.draft.step_metrics import DFlashStepMetrics, step_metrics
from dflash_offline.stages.draft.variants import table as torch_variants
from dflash_offline.stages.draft.variants.variant import Slots, SlotTerms

logger = logging.getLogger(__name__)
_FLEX_VARIANTS = 64
"""More variants of flex attention than are ever compiled: for padded rows of any number and length, or of one row, with
and without gradients, for both kinds of layers. Beyond its limit torch runs it uncompiled, which holds all scores."""


class DFlashTrainerModule(nn.Module):
    """Computes the DFlash loss of a draft against a frozen target's head and embeddings.

    `draft_model` is called as the reference client's is; either can be trained. Head and embeddings are frozen in
    place. On a CPU, where flex attention has no backward, a step with gradients uses sdpa. The cross-entropy forms
    at most `head_chunk_slots` rows of logits at a time; None leaves the number to the vocabulary and the device.
    `compiled` runs the layers of a `DraftModel` and the softmax through `torch.compile`, which fuses the norms, rotary
    embeddings and gates that otherwise go through a GPU's memory one by one; it pays where shapes stay the same.
    Compiled layers keep the share `activation_budget` of what their backward pass needs, and compute the rest again.
    `loss_type` names a loss or a mixture, as in `kl:0.9,dflash:0.1`, all of it weighed slot by slot alike: by decay, or
    where dpace is a part as D-PACE does, by the draft's probability of the label, whatever else it learns from. The
    target's logits are divided by `teacher_temperature`.
    `anchor_kind`, that of an `AnchorRule`, says which positions anchor a block; None leaves it to the draft's variant,
    whose `loss_settings` go by the names that it gives them. `progress`, which the caller sets, is the share of the
    run's steps that is done.
    """

    def __init__(
        self,
        draft_model: nn.Module,
        target_lm_head: nn.Linear,
        target_embed_tokens: nn.Embedding,
        mask_token_id: int,
        block_size: int = 16,
        attention_backend: str = "flex_attention",
        num_anchors: int = 512,
        loss_decay_gamma: float | None = None,
        *,
        loss_type: str = "dflash",
        dpace_alpha: float = 0.5,
        head_chunk_slots: int | None = None,
        compiled: bool = False,
        activation_budget: float = 1.0,
        loss_settings: Mapping[str, float] | None = None,
        anchor_kind: str | None = None,
        teacher_temperature: float = 1.0,
    ) -> None:
        super().__init__()
        self.draft_model = draft_model
        self.target_lm_head = target_lm_head.requires_grad_(False)
        self.target_embed_tokens = target_embed_tokens.requires_grad_(False)
        self.mask_token_id = mask_token_id
        self.block_size = block_size
        self.attention_backend = attention_backend
        self.num_anchors = num_anchors
        self.loss_decay_gamma = loss_decay_gamma
        self.loss_type = loss_type
        self.dpace_alpha = dpace_alpha
        self.teacher_temperature = teacher_temperature
        self.head_chunk_slots = head_chunk_slots
        self.compiled = compiled
        self.variant, self._computes = BASE(), torch_variants.BASE
        if isinstance(draft_model, DraftModel):
            self.variant, self._computes = draft_model.config.variant, torch_variants.variant_of(draft_model.config)
        self.loss_settings = {**self.variant.loss_settings, **(loss_settings or {})}
        self.anchor_rule = self.variant.anchor_rule(anchor_kind or self.variant.anchors[0], block_size)
        self.progress = 1.0
        self._said_fallback = False
        problems = self._setting_problems()
        if problems:
            raise DflashError("This trainer cannot be built:\n  " + "\n  ".join(problems))
        if attention_backend == "flex_attention":
            from torch._dynamo import config as compiler  # takes a second, which nothing else needs at the start

            compiler.recompile_limit = max(compiler.recompile_limit, _FLEX_VARIANTS)
        if isinstance(draft_model, DraftModel):
            draft_model.attention_backend = attention_backend
            if compiled:
                from torch._functorch import config as partitioner

                partitioner.activation_memory_budget = activation_budget  # read when a layer is compiled
                for layer in draft_model.layers:
                    layer.compile()

    @property
    def needs_final(self) -> bool:
        """Whether the loss reads the target's states after its final norm."""
        return self.variant.needs_final or self._mixture.needs_final

    @property
    def _mixture(self) -> LossMixture:
        return LossMixture.read(self.loss_type)

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """Yield what an optimizer may see: the draft's parameters, never the head's or the embeddings'."""
        yield from self.draft_model.parameters()

    def forward(
        self,
        input_ids: Tensor,
        hidden_states: Tensor,
        loss_mask: Tensor,
        *,
        document_ids: Tensor | None = None,
        anchors: Tensor | None = None,
        keep_mask: Tensor | None = None,
        generator: torch.Generator | None = None,
        final: Tensor | None = None,
    ) -> DFlashStepMetrics:
        """Return the loss and metrics of one batch.

        `input_ids` is int64 [B, S], `hidden_states` [B, S, L*H], `loss_mask` [B, S] of 0 and 1. `document_ids`, int
        [B, S] with -1 for padding, marks contiguous documents: then each document is trained as if it stood alone.
        `anchors` int64 [B, N] with `keep_mask` bool [B, N] (all kept if None) replaces the draw; otherwise
        `generator`, on the batch's device, makes it reproducible. `final`, [B, S, H], are the target's states after its
        final norm, for a loss that learns from its distribution; read are those before supervised positions. Raises
        `NoValidAnchorsError` without any anchor.
        """
        seq_len = self._checked_length(input_ids, hidden_states, loss_mask, final)
        if anchors is None:
            anchors, keep = self._draw(loss_mask, document_ids, generator)
        else:
            keep = torch.ones_like(anchors, dtype=torch.bool) if keep_mask is None else keep_mask
        if anchors.shape[1] == 0:
            raise NoValidAnchorsError(
                f"The given anchors are empty: expected at least one supervised position with "
                f"{self.anchor_rule.wanted}, at S = {seq_len} and K = {self.block_size}."
            )
        position, supervised = self._supervised(anchors, keep, loss_mask, document_ids)
        # How many there are is waited for here, where a GPU has little to do, and not behind the draft.
        slots = supervised.flatten().nonzero()[:, 0]
        terms = self._terms(input_ids, hidden_states, document_ids, anchors, keep, position, slots, final)
        return self._metrics(terms, supervised, slots)

    @torch.no_grad()
    def project_context(
        self, input_ids: Tensor, hidden_states: Tensor, document_ids: Tensor | None
    ) -> Tensor | ProjectedContext:
        """Return what several calls of `serve` over one batch may be given in place of its features."""
        if not isinstance(self.draft_model, DraftModel):
            return hidden_states
        none = input_ids.new_empty((len(input_ids), 0))
        positions = self._all_position_ids(input_ids, document_ids, none)
        return self.draft_model.project_context(positions, hidden_states.to(self._dtype(hidden_states)))

    @torch.no_grad()
    def serve(
        self,
        input_ids: Tensor,
        context: Tensor | ProjectedContext,
        loss_mask: Tensor,
        document_ids: Tensor,
        anchors: Tensor,
        keep_mask: Tensor,
        is_trained: Tensor,
        final: Tensor | None = None,
    ) -> tuple[Tensor, DFlashStepMetrics, Tensor | None]:
        """Return how many slots of every block are right before the first wrong one, int64 [1 + P, B, N], and metrics.

        Each block is drafted whole, as serving would; slots beyond its document are never right. Behind the tokens that
        are served stand the P other ways to choose them that the variant measures. Where a choice depends on the
        tokens before it, it is made after the true ones, which up to the first wrong one they are. The metrics are
        those of the blocks that bool [B, N] `is_trained` names, as `forward` gives them.

        With `final`, as `forward` takes it, the third are the probabilities that a slot's label is drafted and stays,
        those before it having stayed, where tokens are drawn at each of `TEMPERATURES`: float32 [T, B, N, n], 0 where
        no state is known.
        """
        anywhere = torch.ones_like(loss_mask)
        position, real = self._supervised(anchors, keep_mask, anywhere, document_ids)
        slots = real.flatten().nonzero()[:, 0]
        terms = self._terms(input_ids, context, document_ids, anchors, keep_mask, position, slots, final)
        chosen = (terms.correct, *(terms.paths[name] for name in self.variant.paths))
        right = torch.stack([torch.zeros_like(real).masked_scatter(real, correct) for correct in chosen])
        _, supervised = self._supervised(anchors, is_trained, loss_mask, document_ids)
        (theirs,) = supervised.flatten()[slots].nonzero(as_tuple=True)
        metrics = self._metrics(terms.of(theirs), supervised, slots[theirs])
        kept = None
        if terms.acceptance is not None:
            none, stays = torch.zeros(real.shape, device=real.device), terms.acceptance.nan_to_num(nan=0.0)
            kept = torch.stack([none.masked_scatter(real, each) for each in stays.unbind(dim=-1)])
        return right.cumprod(dim=-1).sum(dim=-1), metrics, kept

    def _supervised(
        self, anchors: Tensor, keep: Tensor, loss_mask: Tensor, document_ids: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return `supervised_slots` of the draft's variant."""
        geometry = self.variant.first_slot, self.variant.label_offset, self.variant.is_unbroken
        return supervised_slots(anchors, keep, loss_mask, document_ids, self.block_size, *geometry)

    def _sample_anchor_positions(
        self, seq_len: int, loss_mask: Tensor, device: torch.device, generator: torch.Generator | None = None
    ) -> Anchors:
        """Draw anchors [B, N] and their keep mask by the bare rule of a padded batch."""
        return sample_anchors(loss_mask.to(device), seq_len, self.anchor_rule, self.num_anchors, generator)

    def _create_position_ids(self, anchor_positions: Tensor) -> Tensor:
        """Return the absolute positions of block tokens, int64 [B, N*K]: slot k of a block at anchor + k."""
        slots = torch.arange(self.block_size, device=anchor_positions.device)
        return (anchor_positions[:, :, None] + slots).flatten(1)

    def _create_noise_embed(self, input_ids: Tensor, anchor_positions: Tensor, block_keep_mask: Tensor) -> Tensor:
        """Return the embedded blocks [B, N*K, H]: the anchor's token, then MASK; all MASK where not kept."""
        blocks = torch.full(
            (*anchor_positions.shape, self.block_size), self.mask_token_id, dtype=torch.long, device=input_ids.device
        )
        tokens = input_ids.gather(1, anchor_positions)
        blocks[:, :, 0] = torch.where(block_keep_mask, tokens, self.mask_token_id)
        return self.target_embed_tokens(blocks.flatten(1))

    def _draw(self, loss_mask: Tensor, document_ids: Tensor | None, generator: torch.Generator | None) -> Anchors:
        if document_ids is None:
            return self._sample_anchor_positions(loss_mask.shape[1], loss_mask, loss_mask.device, generator)
        return sample_document_anchors(loss_mask, document_ids, self.anchor_rule, self.num_anchors, generator)

    def _dtype(self, features: Tensor) -> torch.dtype:
        """Return the dtype of all between the layers: under autocast its own."""
        device = features.device.type
        if torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device)
        return next((p.dtype for p in self.draft_model.parameters()), features.dtype)

    def _draft(
        self,
        input_ids: Tensor,
        context: Tensor | ProjectedContext,
        document_ids: Tensor | None,
        anchors: Tensor,
        keep: Tensor,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Return the draft's hidden states [B, N*K, H]; those of `rows`, int64 [M], alone, [M, H], where given."""
        noise = self._create_noise_embed(input_ids, anchors, keep)
        dtype = self._dtype(context if isinstance(context, Tensor) else noise)
        # Another project's draft computes all rows.
        asked = {"rows": rows} if isinstance(self.draft_model, DraftModel) else {}
        hidden: Tensor = self.draft_model(
            position_ids=self._all_position_ids(input_ids, document_ids, anchors),
            noise_embedding=noise.to(dtype),
            target_hidden=context.to(dtype) if isinstance(context, Tensor) else context,
            attention_mask=self._masks(Blocks(anchors, keep, document_ids, input_ids.shape[1], self.block_size)),
            **asked,
        )
        return hidden if rows is None or asked else hidden.flatten(0, 1).index_select(0, rows)

    def _all_position_ids(self, input_ids: Tensor, document_ids: Tensor | None, anchors: Tensor) -> Tensor:
        """Return rotary positions [B, S + N*K] of context and blocks, counted within each document."""
        context = torch.arange(input_ids.shape[1], device=input_ids.device).expand(input_ids.shape)
        blocks = self._create_position_ids(anchors)
        if document_ids is not None:
            starts = document_starts(document_ids)
            context = context - starts
            blocks = blocks - starts.gather(1, anchors).repeat_interleave(self.block_size, dim=1)
        return torch.cat((context, blocks), dim=1)

    def _masks(self, blocks: Blocks) -> Masks:
        """Return the mask of all layers, or one for every kind where the draft has several."""
        draft = self.draft_model
        rules = draft.config.attention_rules if isinstance(draft, DraftModel) else {FULL: AttentionRule()}
        flex = self.attention_backend == "flex_attention" and isinstance(draft, DraftModel)
        if flex and blocks.anchors.is_cpu and torch.is_grad_enabled():
            flex = False
            if not self._said_fallback:
                logger.warning("Flex attention has no backward on the CPU: training with sdpa instead.")
                self._said_fallback = True
        tiled = self.attention_backend != "eager" and isinstance(draft, DraftModel)
        make = flex_mask if flex else tiled_mask if tiled else dense_mask
        masks = {kind: make(blocks, rule) for kind, rule in rules.items()}
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def _terms(
        self,
        input_ids: Tensor,
        context: Tensor | ProjectedContext,
        document_ids: Tensor | None,
        anchors: Tensor,
        keep: Tensor,
        position: Tensor,
        slots: Tensor,
        final: Tensor | None,
    ) -> SlotTerms:
        """Return the terms of some slots.

        `position` is int64 [B, N, n], where all slots' labels stand; `slots`, int64 [M], the numbers of some of them.
        """
        # The slots of a block that predict stand behind its others among the hidden states.
        first = self.variant.first_slot
        rows = slots + (slots // (self.block_size - first) + 1) * first
        if self.compiled:
            torch._dynamo.maybe_mark_dynamic(rows, 0)
        hidden = self._draft(input_ids, context, document_ids, anchors, keep, rows)

        def tokens(places: Tensor) -> Tensor:
            return input_ids.gather(1, places.flatten(1)).flatten()[slots]

        def teacher(final: Tensor) -> Tensor:
            row = torch.arange(len(final), device=final.device)[:, None, None]
            return final[row.expand_as(position).flatten()[slots], position.flatten()[slots] - 1]

        head = Head(
            linear=self.target_lm_head,
            chunk_slots=self.head_chunk_slots,
            compiled=self.compiled,
            mixture=self._mixture,
            teacher_temperature=self.teacher_temperature,
        )
        return self._computes.terms(
            self.draft_model,
            Slots(
                hidden=hidden,
                labels=tokens(position),
                previous=lambda: tokens(position - 1),
                teacher=None if final is None else partial(teacher, final),
                expects_acceptance=final is not None and not torch.is_grad_enabled(),
            ),
            head,
            self.loss_settings,
            self.progress,
        )

    def _metrics(self, terms: SlotTerms, supervised: Tensor, slots: Tensor) -> DFlashStepMetrics:
        """Return the metrics of the supervised slots, bool [B, N, n]; their numbers and terms are [M]."""
        return step_metrics(terms, self._weights(terms.ce, supervised).flatten()[slots], supervised)

    def _weights(self, ce: Tensor, supervised: Tensor) -> Tensor:
        """Return the weight of every slot, float32 [B, N, n]; `ce` is the detached cross-entropy [M]."""
        if self._mixture.weighs_by_confidence:
            probability = torch.zeros(supervised.shape, device=ce.device).masked_scatter(supervised, torch.exp(-ce))
            return dpace_weights(probability, supervised, self.dpace_alpha)
        weights = slot_weights(self.block_size, self.loss_decay_gamma, ce.device, self.variant.first_slot)
        return weights.expand(supervised.shape)

    def _checked_length(self, input_ids: Tensor, hidden_states: Tensor, loss_mask: Tensor, final: Tensor | None) -> int:
        if not input_ids.shape == loss_mask.shape == hidden_states.shape[:2]:
            raise DflashError(
                f"input_ids is {list(input_ids.shape)}, hidden_states {list(hidden_states.shape)} and loss_mask "
                f"{list(loss_mask.shape)}; expected [B, S], [B, S, L*H] and [B, S]. Collate all three alike."
            )
        width = self.target_lm_head.weight.shape[1]
        if final is not None and final.shape != (*input_ids.shape, width):
            raise DflashError(f"final is {list(final.shape)}; expected {[*input_ids.shape, width]}: [B, S, H].")
        if final is None and self.needs_final:
            raise DflashError("final is not given, and this draft's loss reads it; expected the states, [B, S, H].")
        return input_ids.shape[1]

    def _setting_problems(self) -> list[str]:
        problems = []
        if self.block_size <= self.variant.first_slot:
            least = self.variant.first_slot + 1
            problems.append(f"block_size is {self.block_size}; expected at least {least}: one slot that predicts.")
        if self.anchor_rule.kind not in self.variant.anchors:
            problems.append(f"anchor_kind is {self.anchor_rule.kind!r}; expected one of {self.variant.anchors}.")
        if self.num_anchors < 1:
            problems.append(f"num_anchors is {self.num_anchors}; expected at least 1.")
        if self.head_chunk_slots is not None and self.head_chunk_slots < 1:
            problems.append(f"head_chunk_slots is {self.head_chunk_slots}; expected at least 1.")
        if self.attention_backend not in ATTENTION_BACKENDS:
            problems.append(f"attention_backend is {self.attention_backend!r}; expected one of {ATTENTION_BACKENDS}.")
        try:
            LossMixture.read(self.loss_type)
        except ValueError as error:
            problems.append(f"loss_type: {error}")
        if not 0 < self.teacher_temperature < math.inf:
            problems.append(f"teacher_temperature is {self.teacher_temperature}; expected more than 0, and finite.")
        if self.loss_decay_gamma is not None and not self.loss_decay_gamma > 0:
            problems.append(f"loss_decay_gamma is {self.loss_decay_gamma}; expected more than 0, or None for no decay.")
        if not 0 <= self.dpace_alpha <= 1:
            problems.append(f"dpace_alpha is {self.dpace_alpha}; expected 0 to 1.")
        if unknown := self.loss_settings.keys() - self.variant.loss_settings.keys():
            known = sorted(self.variant.loss_settings) or "none"
            problems.append(f"loss_settings has {sorted(unknown)}; expected those of this draft's variant: {known}.")
        rows = self.target_embed_tokens.weight.shape[0]
        if not 0 <= self.mask_token_id < rows:
            problems.append(f"mask_token_id is {self.mask_token_id}; expected a row of the table, 0 to {rows - 1}.")
        return problems + draft_problems(self.draft_model, self.block_size, self.mask_token_id)
