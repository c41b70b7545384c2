"""Training equals serving: the check, the draft as it is served, and the mistakes that must fail the check."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from reference import draft_one_block
from torch import Tensor
from torch.nn import functional as F

from dflash_offline.schemas.draft.config import AttentionRule, DraftConfig
from dflash_offline.stages import trainer as trainer_module
from dflash_offline.stages.draft.attention import Blocks, TiledMask, tiled_mask
from dflash_offline.stages.draft.model import DraftCache, DraftModel
from dflash_offline.stages.draft.objective import supervised_slots
from dflash_offline.stages.trainer import DFlashTrainerModule

TARGET_LAYERS = 6


@dataclass
class Row:
    """One text: tokens [S], the outputs of all target layers [TARGET_LAYERS, S, H], and the anchors tried [A]."""

    tokens: Tensor
    layer_outputs: Tensor
    anchors: Tensor

    def features(self, layer_ids: tuple[int, ...]) -> Tensor:
        """Return [S, L*H]."""
        return torch.cat([self.layer_outputs[i] for i in layer_ids], dim=-1)


Served = list[dict[str, Tensor]]
"""For each row, the block's hidden states [A, K, H] at every anchor: "step" without a cache, "cached", and others."""


def short_rows(config: DraftConfig, first_anchor: int = 0, lengths: tuple[int, ...] = (13, 5, 9)) -> list[Row]:
    generator = torch.Generator().manual_seed(9)
    return [
        Row(
            torch.randint(config.vocab_size - 1, (length,), generator=generator),
            torch.randn(TARGET_LAYERS, length, config.hidden_size, generator=generator),
            torch.arange(first_anchor, length),
        )
        for length in lengths
    ]


@torch.no_grad()
def served_by_own_draft(trainer: DFlashTrainerModule, rows: list[Row], draft: DraftModel | None = None) -> Served:
    """Compute every block alone, again with a cache that is fed in pieces, and again by the slow reference."""
    draft = draft or trainer.draft_model
    config, weights, found = draft.config, dict(draft.named_parameters()), []
    for row in rows:
        features = row.features(config.target_layer_ids)[None]
        step, cached, slow = [], [], []
        for a in row.anchors.tolist():
            block = torch.tensor([[row.tokens[a].item()] + [config.mask_token_id] * (config.block_size - 1)])
            noise = trainer.target_embed_tokens(block)
            positions = torch.arange(a + config.block_size)[None]
            step.append(draft(position_ids=positions, noise_embedding=noise, target_hidden=features[:, :a])[0])
            held, start = DraftCache(), 0
            for stop in sorted({a // 2, max(a - 1, 0), a}):
                hidden = draft(
                    position_ids=positions[:, start : stop + config.block_size],
                    noise_embedding=noise,
                    target_hidden=features[:, start:stop],
                    past_key_values=held,
                )
                held.crop(stop)
                start = stop
            cached.append(hidden[0])
            slow.append(draft_one_block(weights, config, features[0, :a], noise[0], a))
        found.append({"step": torch.stack(step), "cached": torch.stack(cached), "slow": torch.stack(slow)})
    return found


@torch.no_grad()
def check_training_equals_serving(
    trainer: DFlashTrainerModule, rows: list[Row], served: Served, trained_ids: tuple[int, ...] = (1, 3)
) -> None:
    """Fail unless, at every anchor of every row, the training forward and its loss are those of the served draft."""
    K = trainer.block_size

    def padded(items: list[Tensor], fill: int = 0) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(items, batch_first=True, padding_value=fill)

    tokens, features = padded([r.tokens for r in rows]), padded([r.features(trained_ids) for r in rows])
    documents = padded([torch.full_like(r.tokens, i) for i, r in enumerate(rows)], fill=-1)
    anchors = padded([r.anchors for r in rows])
    keep = padded([torch.ones_like(r.anchors, dtype=torch.bool) for r in rows])
    inputs: dict[str, Any] = {"document_ids": documents, "anchors": anchors}
    seen: list[Tensor] = []
    hook = trainer.draft_model.register_forward_hook(lambda module, args, output: seen.append(output))
    trainer(tokens, features, torch.ones_like(tokens), keep_mask=keep, **inputs)
    hook.remove()
    # Of every block the drafted slots that its text reaches: no other is computed to the end.
    lengths = [[min(K, len(row.tokens) - a) for a in row.anchors.tolist()] for row in rows]
    for kind in served[0]:
        wanted = [served[b][kind][n, 1:stop] for b, stops in enumerate(lengths) for n, stop in enumerate(stops)]
        torch.testing.assert_close(seen[0], torch.cat(wanted), atol=1e-5, rtol=1e-5)
    for b, row in enumerate(rows):
        for n, a in enumerate(row.anchors.tolist()):
            one = torch.zeros_like(keep)
            one[b, n] = True
            loss = trainer(tokens, features, torch.ones_like(tokens), keep_mask=one, **inputs).loss_sum
            labels = row.tokens[a + 1 : a + K]
            logits = trainer.target_lm_head(served[b]["step"][n, 1 : 1 + len(labels)])
            expected = F.cross_entropy(logits, labels, reduction="sum")
            torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)


def plant_wrong_layer_ids(trainer: DFlashTrainerModule, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    return {"trained_ids": (2, 4)}


def plant_context_with_the_anchor(trainer: DFlashTrainerModule, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    def off_by_one(blocks: Blocks, rule: AttentionRule) -> TiledMask:
        return tiled_mask(replace(blocks, anchors=blocks.anchors + 1, document_ids=None), rule)

    monkeypatch.setattr(trainer_module, "tiled_mask", off_by_one)
    return {}


def plant_shifted_labels(trainer: DFlashTrainerModule, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    def shifted(*args: Any) -> tuple[Tensor, Tensor]:
        position, supervised = supervised_slots(*args)
        return (position + 1).clamp(max=args[2].shape[1] - 1), supervised

    monkeypatch.setattr(trainer_module, "supervised_slots", shifted)
    return {}


def plant_anchor_relative_positions(trainer: DFlashTrainerModule, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    right = trainer._create_position_ids
    monkeypatch.setattr(trainer, "_create_position_ids", lambda anchors: right(torch.zeros_like(anchors)))
    return {}


MISTAKES: list[Callable[[DFlashTrainerModule, pytest.MonkeyPatch], dict[str, Any]]] = [
    plant_wrong_layer_ids,
    plant_context_with_the_anchor,
    plant_shifted_labels,
    plant_anchor_relative_positions,
]
"""Each gives correct text and low acceptance when it ships. They return what to pass on to the check."""
