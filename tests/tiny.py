"""Tiny models and batches for tests: no downloads, seconds on one CPU core."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dflash_offline.schemas.draft.config import DraftConfig
from dflash_offline.stages.draft.model import DraftModel, RMSNorm
from dflash_offline.stages.trainer import DFlashTrainerModule

ATTENTION: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal_layers": "all"},
    "sliding": {"sliding_window": 5, "sliding_layers": (0, 1)},
    "causal sliding": {"sliding_window": 5, "sliding_layers": (0, 1), "causal_layers": "all"},
    "one sliding": {"sliding_window": 4, "sliding_layers": (1,)},
    "one causal sliding": {"sliding_window": 4, "sliding_layers": (0,), "causal_layers": "sliding"},
}
"""Settings of a draft for every way in which its layers may look."""


def tiny_draft_config(**overrides: Any) -> DraftConfig:
    """Return a draft of two layers, H = 32, K = 4, two captured layers of a six-layer target."""
    fields: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 48,
        "vocab_size": 40,
        "target_layer_ids": (1, 3),
        "num_target_layers": 6,
        "block_size": 4,
        "mask_token_id": 39,
        "rope_theta": 10_000.0,
    }
    return DraftConfig(**{**fields, **overrides})


def tiny_draft(seed: int = 0, attention_backend: str = "sdpa", **overrides: Any) -> DraftModel:
    """Return a draft with weights large enough that every input matters to every output."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        draft = DraftModel(tiny_draft_config(**overrides), attention_backend)
        for module in draft.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.3)
            elif isinstance(module, RMSNorm):
                nn.init.uniform_(module.weight, 0.5, 1.5)
            else:
                for parameter in module.parameters(recurse=False):  # a variant's tables and kernels
                    nn.init.normal_(parameter, std=0.7)
    return draft


def tiny_target_ends(config: DraftConfig, seed: int = 1, bias: bool = False) -> tuple[nn.Linear, nn.Embedding]:
    """Return a target's head and embedding table."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        head = nn.Linear(config.hidden_size, config.vocab_size, bias=bias)
        embed = nn.Embedding(config.vocab_size, config.hidden_size)
    return head, embed


def tiny_trainer(draft: DraftModel | None = None, bias: bool = False, **settings: Any) -> DFlashTrainerModule:
    """Return a trainer around a tiny draft; `settings` are the trainer's own."""
    draft = draft or tiny_draft()
    head, embed = tiny_target_ends(draft.config, bias=bias)
    settings = {"attention_backend": "sdpa", "num_anchors": 6, **settings}
    return DFlashTrainerModule(
        draft, head, embed, draft.config.mask_token_id, block_size=draft.config.block_size, **settings
    )


@dataclass
class TinyBatch:
    """Inputs of a training step; `document_ids` is -1 on padding."""

    input_ids: Tensor
    hidden_states: Tensor
    loss_mask: Tensor
    document_ids: Tensor


def tiny_batch(config: DraftConfig, lengths: list[int], seed: int = 2, seq_len: int | None = None) -> TinyBatch:
    """Return a padded batch, a document of each length per row; a fifth of its positions are not supervised."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), seq_len or max(lengths))
    index = torch.arange(shape[1])
    real = index < torch.tensor(lengths)[:, None]
    width = len(config.target_layer_ids) * config.hidden_size
    return TinyBatch(
        input_ids=torch.randint(config.vocab_size - 1, shape, generator=generator) * real,
        hidden_states=torch.randn(*shape, width, generator=generator) * real[..., None],
        loss_mask=((torch.rand(shape, generator=generator) < 0.8) & real).long(),
        document_ids=torch.where(real, torch.arange(len(lengths))[:, None], -1),
    )


def pack(batch: TinyBatch, padding: int = 0) -> TinyBatch:
    """Return the same documents in one row, one after the other, with `padding` positions at the end."""
    real = batch.document_ids >= 0

    def packed(x: Tensor, fill: int) -> Tensor:
        row = x[real]
        return torch.cat((row, row.new_full((padding, *row.shape[1:]), fill)))[None]

    return TinyBatch(
        packed(batch.input_ids, 0),
        packed(batch.hidden_states, 0),
        packed(batch.loss_mask, 0),
        packed(batch.document_ids, -1),
    )
