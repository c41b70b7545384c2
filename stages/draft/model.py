"""The draft model: a small non-causal stack that reads the target's hidden states and predicts a block in one pass."""

# Axes: B rows, C context positions, Q block tokens, P cached positions, H hidden size, L captured target layers.

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dflash_offline.schemas.draft.config import DraftConfig
from dflash_offline.schemas.errors import DflashError
from dflash_offline.schemas.settings.train import ATTENTION_BACKENDS
from dflash_offline.stages.draft.attention import Mask, served_mask
from dflash_offline.stages.draft.layers import (
    DraftAttention,
    DraftCache,
    DraftLayer,
    KeysValues,
    RMSNorm,
    Rotary,
    rotary_inv_freq,
    rotary_table,
)
from dflash_offline.stages.draft.variants.table import variant_of

Masks = Mask | Mapping[str, Mask]
"""One for all layers, or one for every kind of layer."""


@dataclass(frozen=True)
class ProjectedContext:
    """Keys and values of a context in every layer, for several passes over the same one."""

    layers: tuple[KeysValues, ...]

    @property
    def length(self) -> int:
        """Positions, C."""
        return self.layers[0][0].shape[2]


class DraftModel(nn.Module):
    """A draft; its state dict has exactly the keys of its config's `shapes`.

    What a variant has beyond the base draft is added to one that is drawn as the base's: with the same seed, both begin
    with the same weights.
    """

    def __init__(self, config: DraftConfig, attention_backend: str = "sdpa") -> None:
        super().__init__()
        if attention_backend not in ATTENTION_BACKENDS:
            raise DflashError(f"attention_backend is {attention_backend!r}; expected one of {ATTENTION_BACKENDS}.")
        self.config = config
        self.attention_backend = attention_backend
        self.gradient_checkpointing = False
        """Keep only each layer's input for the backward pass, which computes the rest again."""
        self.fc = nn.Linear(len(config.target_layer_ids) * config.hidden_size, config.hidden_size, bias=False)
        self.hidden_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.layers = nn.ModuleList(DraftLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        init_weights(self)
        variant = variant_of(config)
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, DraftLayer)
            self.layers[i] = variant.extend_layer(layer, config)
        for name, module in variant.heads(config).items():
            self.add_module(name, module)

    def forward(
        self,
        position_ids: Tensor,
        attention_mask: Masks = None,
        noise_embedding: Tensor | None = None,
        target_hidden: Tensor | ProjectedContext | None = None,
        past_key_values: DraftCache | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Return the block's hidden states after the final norm, [B, Q, H].

        `position_ids` is int [B, C + Q] (or [1, C + Q]): the new context's positions, then the block's.
        `noise_embedding` is [B, Q, H], `target_hidden` [B, C, L*H]. `attention_mask` is None (one block sees what
        the config's rules show it, as served), bool [B, 1, Q, P + C + Q] with True for visible, a flex `BlockMask`, a
        `TiledMask`, or one of these for every kind of layer. With `past_key_values` the block also sees the P
        positions held there, and the cache grows by C + Q. `target_hidden` may be what `project_context` returns, which
        a cache does not take. `rows`, int64 [M], asks for these of the B * Q rows alone, [M, H]; the last layer then
        computes no others that they do not need.
        """
        assert noise_embedding is not None and target_hidden is not None
        rotary = self._rotary(position_ids, noise_embedding.dtype)
        block = noise_embedding
        contexts: Sequence[Tensor | KeysValues]
        if isinstance(target_hidden, ProjectedContext):
            contexts, length = target_hidden.layers, target_hidden.length
        else:
            context = self.hidden_norm(self.fc(target_hidden))
            # A view for each layer, so that gradients are added within a layer first, as where ranks hold the layers.
            contexts, length = [context.view_as(context) for _ in self.layers], context.shape[1]
        if attention_mask is None:
            held = 0 if past_key_values is None else past_key_values.length
            attention_mask = self._served_masks(held + length, block)
        for layer, kind, context in zip(self.layers, self.config.layer_types, contexts, strict=True):
            mask = attention_mask[kind] if isinstance(attention_mask, Mapping) else attention_mask
            read = rows if layer is self.layers[-1] else None
            inputs = (block, context, rotary, mask, past_key_values, self.attention_backend, read)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                block = checkpoint(layer, *inputs, use_reentrant=False)
            else:
                block = layer(*inputs)
        if past_key_values is not None:
            past_key_values.advance(length + noise_embedding.shape[1])
        return self.norm(block)

    def project_context(self, position_ids: Tensor, target_hidden: Tensor) -> ProjectedContext:
        """Return a context's keys and values in every layer, given its positions [B, C] and features [B, C, L*H]."""
        context = self.hidden_norm(self.fc(target_hidden))
        rotary = self._rotary(position_ids, target_hidden.dtype)
        return ProjectedContext(tuple(attention.keys_values(context, rotary) for attention in self._attentions()))

    def _attentions(self) -> Iterator[DraftAttention]:
        for layer in self.layers:
            assert isinstance(layer.self_attn, DraftAttention)
            yield layer.self_attn

    def _rotary(self, position_ids: Tensor, dtype: torch.dtype) -> Rotary:
        inv_freq = rotary_inv_freq(self.config.head_dim, self.config.rope_theta, position_ids.device)
        return rotary_table(position_ids, inv_freq, dtype)

    def _served_masks(self, num_context: int, block: Tensor) -> dict[str, Mask]:
        rules = self.config.attention_rules
        return {kind: served_mask(num_context, block.shape[1], rule, block.device) for kind, rule in rules.items()}


@torch.no_grad()
def init_weights(draft: nn.Module) -> None:
    """Draw every linear weight from a normal of deviation 1 / sqrt(inputs); set every norm to one.

    At the widths of large models that is the customary 0.02; narrow drafts start several times faster with it.
    """
    for module in draft.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)
