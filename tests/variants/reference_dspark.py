"""A slow reference of DSpark, written from its formulas: one block, one slot and one token at a time, in float64.

It shares no code with the project, and reads a draft's own config.json and tensors. A block is computed as it is
served: context strictly before the anchor, then the block, nothing hidden.
"""

# Axes: B slots of a block, H hidden size, V vocabulary, R rank of the Markov head, L captured target layers, T tokens.

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from slow_layer import PLAIN_CONFIG, Weights, attend, context_of, feed_forward, layer_weights, norm, random_tensors
from torch import Tensor


def draft_block(weights: Weights, config: Mapping[str, Any], features: Tensor, block: Tensor) -> Tensor:
    """Return the states [B, H] after the final norm of an embedded block [B, H] after `features` [C, L*H]."""
    context, x, eps = context_of(weights, config, features), block.double(), config["rms_norm_eps"]
    for i in range(config["num_hidden_layers"]):
        w = layer_weights(weights, i)
        x = x + attend(w, config, context, norm(x, w["input_layernorm.weight"], eps))
        x = x + feed_forward(w, norm(x, w["post_attention_layernorm.weight"], eps))
    return norm(x, weights["norm.weight"], eps)


def biased(weights: Weights, unary: Tensor, before: int) -> Tensor:
    """Return F = U + W2 W1[before], float64 [V], of a slot's logits."""
    code = weights["markov_head.markov_w1.weight"][before].double()
    return unary + torch.stack([torch.sum(row * code) for row in weights["markov_head.markov_w2.weight"].double()])


def confidence(weights: Weights, hidden: Tensor, before: int) -> Tensor:
    """Return the confidence head's logit for a slot of state [H] after the token `before`."""
    both = torch.cat((hidden, weights["markov_head.markov_w1.weight"][before].double()))
    row, bias = weights["confidence_head.proj.weight"][0].double(), weights["confidence_head.proj.bias"][0].double()
    return torch.sum(row * both) + bias


def walk(weights: Weights, hidden: Tensor, unary: Tensor, anchor: int, threshold: float | None = None) -> list[int]:
    """Return what is drafted greedily, slot after slot, from states [B, H] and logits [B, V] of all slots."""
    drafted, before = [], anchor
    for h, u in zip(hidden, unary, strict=True):
        if threshold is not None and 1 / (1 + math.exp(-confidence(weights, h, before).item())) < threshold:
            break
        before = int(biased(weights, u, before).argmax())
        drafted.append(before)
    return drafted


def anchors_of(loss_mask: Sequence[int]) -> list[int]:
    """Return the positions of a document that anchor a block: two supervised tokens in a row."""
    return [i for i in range(len(loss_mask) - 1) if loss_mask[i] == 1 and loss_mask[i + 1] == 1]


def supervised(loss_mask: Sequence[int], anchor: int, block_size: int) -> list[int]:
    """Return the slots whose label counts: in the document, under the mask, and so are all before it in the block."""
    slots = []
    for k in range(block_size):
        if anchor + 1 + k >= len(loss_mask) or loss_mask[anchor + 1 + k] != 1:
            break
        slots.append(k)
    return slots


@dataclass
class ReferenceStep:
    """What a step comes to."""

    block_size: int
    loss_sum: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    loss_weight: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)
    """Sum of u * each part."""
    valid_by_slot: list[int] = field(default_factory=list)
    correct_by_slot: list[int] = field(default_factory=list)
    plain_by_slot: list[int] = field(default_factory=list)
    """Slots whose best logit without the bias is the truth."""
    accept_lens: list[int] = field(default_factory=list)
    """Of every block with a supervised slot: 1 + leading right ones."""

    def __post_init__(self) -> None:
        for name in ("valid", "correct", "plain"):
            setattr(self, f"{name}_by_slot", [0] * self.block_size)

    @property
    def loss(self) -> Tensor:
        """What is to be minimized."""
        return self.loss_sum / (self.loss_weight + 1e-6)


def train_step(
    weights: Weights,
    config: Mapping[str, Any],
    head: Tensor,
    table: Tensor,
    documents: Sequence[Mapping[str, Tensor]],
    *,
    gamma: float | None = None,
    alphas: tuple[float, float, float] = (0.1, 0.9, 1.0),
) -> ReferenceStep:
    """Return one step over `documents`: input_ids [T], hidden_states [T, L*H], final [T, H], loss_mask [T], anchors.

    `head` and `table` are [V, H]; `alphas` weigh cross-entropy, distance and confidence.
    """
    B, step = config["block_size"], ReferenceStep(config["block_size"])
    for document in documents:
        tokens, mask = document["input_ids"].tolist(), document["loss_mask"].tolist()
        for a in document["anchors"].tolist():
            ids = torch.tensor([tokens[a]] + [config["mask_token_id"]] * (B - 1))
            hidden = draft_block(weights, config, document["hidden_states"][:a], table[ids])
            right = []
            for k in supervised(mask, a, B):
                truth, before, u = tokens[a + 1 + k], tokens[a + k], 1.0 if gamma is None else math.exp(-k / gamma)
                unary = head.double() @ hidden[k]
                logits = biased(weights, unary, before)
                q, p = logits.softmax(0), (head.double() @ document["final"][a + k].double()).softmax(0)
                ce = torch.logsumexp(logits, 0) - logits[truth]
                distance = torch.abs(q - p).sum()
                c = min(max(1 - 0.5 * distance.item(), 0.0), 1.0)
                said = torch.sigmoid(confidence(weights, hidden[k], before))
                bce = -(c * torch.log(said) + (1 - c) * torch.log(1 - said))
                step.loss_sum = step.loss_sum + u * (alphas[0] * ce + alphas[1] * distance + alphas[2] * bce)
                step.loss_weight += u
                found = {"ce_loss": ce, "l1_loss": distance, "confidence_loss": bce, "mean_confidence": said}
                for name, value in found.items():
                    step.parts[name] = step.parts.get(name, 0.0) + u * value.item()
                right.append(int(logits.argmax()) == truth)
                step.valid_by_slot[k] += 1
                step.correct_by_slot[k] += right[-1]
                step.plain_by_slot[k] += int(unary.argmax()) == truth
            if right:
                step.accept_lens.append(1 + next((n for n, one in enumerate(right) if not one), len(right)))
    return step


def config_json(**changes: Any) -> dict[str, Any]:
    """Return the config.json of a tiny draft as published ones are: H 32, 2 layers, B 4, V 40; `changes` go on top."""
    return {
        **PLAIN_CONFIG,
        "architectures": ["Qwen3DSparkModel"],
        "block_size": 4,
        "mask_token_id": 39,
        "target_layer_ids": [1, 3],
        "num_target_layers": 6,
        "markov_rank": 6,
        "markov_head_type": "vanilla",
        "enable_confidence_head": True,
        "confidence_head_with_markov": True,
        **changes,
    }


def random_weights(config: Mapping[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Return float32 tensors of every name and shape, none of them at its start value, all large enough to matter."""
    draw = torch.Generator().manual_seed(seed)
    tables = (config["vocab_size"], config["markov_rank"])
    shapes: dict[str, tuple[int, ...]] = {
        "confidence_head.proj.weight": (1, config["hidden_size"] + config["markov_rank"]),
        "confidence_head.proj.bias": (1,),
    }
    weights = random_tensors(config, len(config["target_layer_ids"]), shapes, draw)
    # As much as the logits, so that the choice depends on the token before.
    weights |= {f"markov_head.markov_w{i}.weight": 0.9 * torch.randn(tables, generator=draw) for i in (1, 2)}
    return weights
