"""What the training benchmarks share: a packed row, a straightforward step over it, and what a step must compute."""

# Axes: S positions, N anchors, K block size, H hidden size, L captured layers, V vocabulary.

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dflash_offline.schemas.draft.anchor_rule import AnchorRule
from dflash_offline.schemas.draft.config import AttentionRule, DraftConfig
from dflash_offline.stages.draft.anchors import draw_anchors
from dflash_offline.stages.draft.attention import Blocks, dense_mask
from dflash_offline.stages.draft.model import DraftModel
from dflash_offline.stages.draft.objective import slot_weights, supervised_slots
from dflash_offline.stages.trainer import DFlashStepMetrics, DFlashTrainerModule


@dataclass(frozen=True)
class PackedRow:
    """One row of whole documents, no padding."""

    input_ids: Tensor
    """int64 [1, S]."""
    hidden_states: Tensor
    """[1, S, L*H]."""
    loss_mask: Tensor
    """bool [1, S]."""
    document_ids: Tensor
    """int64 [1, S]."""
    anchors: Tensor
    """int64 [1, N]."""
    depth: Tensor
    """int64 [N]: tokens of its own document before each anchor."""

    def step(self, module: DFlashTrainerModule) -> DFlashStepMetrics:
        metrics: DFlashStepMetrics = module(
            self.input_ids,
            self.hidden_states,
            self.loss_mask,
            document_ids=self.document_ids,
            anchors=self.anchors,
        )
        return metrics


def packed_row(
    config: DraftConfig, lengths: Sequence[int], num_anchors: Sequence[int], device: torch.device, dtype: torch.dtype
) -> PackedRow:
    """Return random documents of these lengths with so many anchors each.

    Prompts of 32 tokens, which are not supervised, alternate with answers of 128.
    """
    generator = torch.Generator().manual_seed(0)
    seq_len, width = sum(lengths), len(config.target_layer_ids) * config.hidden_size
    masks = [np.arange(length) % 160 >= 32 for length in lengths]
    asked = enumerate(zip(masks, num_anchors, strict=True))
    drawn = [draw_anchors(mask, AnchorRule(config.block_size), n, 0, 0, i) for i, (mask, n) in asked]
    assert [len(a) for a in drawn] == list(num_anchors), "a document has too few candidates"
    anchors = np.concatenate([a + start for a, start in zip(drawn, np.cumsum([0, *lengths[:-1]]), strict=True)])
    documents = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    return PackedRow(
        input_ids=torch.randint(config.vocab_size - 1, (1, seq_len), generator=generator).to(device),
        hidden_states=torch.randn(1, seq_len, width, generator=generator).to(device, dtype),
        loss_mask=torch.from_numpy(np.concatenate(masks))[None].to(device),
        document_ids=documents[None].to(device),
        anchors=torch.from_numpy(anchors)[None].to(device),
        depth=torch.from_numpy(np.concatenate(drawn)),
    )


def target_ends(config: DraftConfig, device: torch.device, dtype: torch.dtype) -> tuple[nn.Linear, nn.Embedding]:
    """Return a random head and embedding table, frozen."""
    with torch.device(device):
        head = nn.Linear(config.hidden_size, config.vocab_size, bias=False, dtype=dtype)
        table = nn.Embedding(config.vocab_size, config.hidden_size, dtype=dtype)
    return head.requires_grad_(False), table.requires_grad_(False)


def straightforward_loss(
    draft: DraftModel, head: nn.Linear, table: nn.Embedding, row: PackedRow, gamma: float
) -> Tensor:
    """Return the loss of the drafted slots by a dense mask over all keys and one float32 tensor of all their logits."""
    config = draft.config
    size, (_, num) = config.block_size, row.anchors.shape
    keep = torch.ones_like(row.anchors, dtype=torch.bool)
    mask = dense_mask(Blocks(row.anchors, keep, row.document_ids, row.input_ids.shape[1], size), AttentionRule())
    tokens = torch.full((1, num, size), config.mask_token_id, device=row.input_ids.device)
    tokens[:, :, 0] = row.input_ids.gather(1, row.anchors)
    in_document = torch.cat([torch.arange(n) for n in row.document_ids[0].bincount().tolist()]).to(tokens.device)
    blocks = in_document[row.anchors][:, :, None] + torch.arange(size, device=tokens.device)
    hidden = draft(
        position_ids=torch.cat((in_document[None], blocks.flatten(1)), dim=1),
        noise_embedding=table(tokens.flatten(1)),
        target_hidden=row.hidden_states,
        attention_mask=mask,
    )
    logits = head(hidden.unflatten(1, (num, size))[:, :, 1:]).float()
    position, supervised = supervised_slots(row.anchors, keep, row.loss_mask, row.document_ids, size)
    labels = row.input_ids[0][position]
    ce = F.cross_entropy(logits.flatten(0, 2), labels.flatten(), reduction="none").view(labels.shape)
    weight = slot_weights(size, gamma, ce.device) * supervised
    _accuracy = (logits.argmax(dim=-1) == labels)[supervised].float().mean()
    return (weight * ce).sum() / (weight.sum() + 1e-6)


def step_flops(config: DraftConfig, row: PackedRow, projected_slots: int) -> dict[str, float]:
    """Return the floating-point operations of one step's matmuls, two a multiply-add, that no way of computing avoids.

    Linear layers: forward, the weights' gradient and the inputs' (which `fc` does not need). Attention: visible pairs
    only; two matmuls forward, four backward (a kernel that computes the scores again does more, uncounted). Head:
    forward and the inputs' gradient, for the projected slots only.
    """
    hidden, layers, context = config.hidden_size, config.num_hidden_layers, row.input_ids.shape[1]
    queries = row.anchors.shape[1] * config.block_size
    q_width, kv_width = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    by_block_token = 2 * q_width * hidden + 2 * kv_width * hidden + 3 * hidden * config.intermediate_size
    linear = layers * (queries * by_block_token + context * 2 * kv_width * hidden)
    fc = context * len(config.target_layer_ids) * hidden * hidden
    pairs = config.block_size * (int(row.depth.sum()) + queries)
    return {
        "linear layers": 6.0 * linear + 4.0 * fc,
        "attention": 12.0 * layers * pairs * q_width,
        "head": 4.0 * projected_slots * hidden * config.vocab_size,
    }
