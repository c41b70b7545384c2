"""A slow reference of the training step, written from the contract: one block at a time, full logits, no packing.

It shares no code with the project. A block is computed as it is served: context strictly before the anchor, then
the block, nothing hidden because nothing else is there, unless a layer has a window or is causal.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


def visible_by_brute_force(
    anchors: list[list[int]],
    keep: list[list[bool]],
    documents: list[list[int]],
    block_size: int,
    window: int | None = None,
    causal: bool = False,
) -> Tensor:
    """Return bool [B, 1, N*K, S + N*K], decided pair by pair."""
    rows, num, seq_len = len(anchors), len(anchors[0]), len(documents[0])
    mask = torch.zeros(rows, 1, num * block_size, seq_len + num * block_size, dtype=torch.bool)
    for b in range(rows):
        for query in range(num * block_size):
            block, slot = divmod(query, block_size)
            a = anchors[b][block]
            for key in range(seq_len):
                near = window is None or a + slot - key < window
                same = documents[b][key] == documents[b][a]
                mask[b, 0, query, key] = keep[b][block] and key < a and same and near
            for other in range(num * block_size):
                past = other <= query or not causal
                mask[b, 0, query, seq_len + other] = other // block_size == block and past
    return mask


def anchors_by_brute_force(loss_mask: list[int], block_size: int, partial: bool) -> list[int]:
    """Return the positions of one document that anchor a block: supervised, and the block whole or in part so too."""
    found = []
    for a in range(len(loss_mask)):
        behind = [loss_mask[a + k] == 1 for k in range(1, block_size) if a + k < len(loss_mask)]
        if loss_mask[a] == 1 and (any(behind) if partial else len(behind) == block_size - 1):
            found.append(a)
    return found


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)


def _turn(x: Tensor, positions: list[int], theta: float) -> Tensor:
    """Rotate [tokens, head_dim]: pair i is (x[i], x[i + d/2]), turned by position * theta^(-2i/d)."""
    d = x.shape[-1]
    angles = torch.tensor([[position * theta ** (-2 * i / d) for i in range(d // 2)] for position in positions])
    cos, sin = angles.cos(), angles.sin()
    first, second = x[:, : d // 2], x[:, d // 2 :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=1)


def _hidden(config, layer: int, start: int, block_size: int) -> Tensor:
    """Return bool [K, start + K], decided pair by pair: what a layer hides from a block."""
    sliding = layer in config.sliding_layers
    causal = config.causal_layers == "all" or (config.causal_layers == "sliding" and sliding)
    hidden = torch.zeros(block_size, start + block_size, dtype=torch.bool)
    for query in range(block_size):
        for position in range(start + block_size):
            distance = start + query - position
            hidden[query, position] = (sliding and distance >= config.sliding_window) or (causal and distance < 0)
    return hidden


def draft_one_block(weights: dict[str, Tensor], config, context_features: Tensor, block: Tensor, start: int) -> Tensor:
    """Return [K, H] of one block [K, H] at positions start.., after context features [start, L*H] at 0..start-1."""
    eps, d = config.rms_norm_eps, config.head_dim
    groups = config.num_attention_heads // config.num_key_value_heads
    context = _norm(context_features @ weights["fc.weight"].T, weights["hidden_norm.weight"], eps)
    positions = list(range(start + len(block)))
    for i in range(config.num_hidden_layers):
        w = {name.removeprefix(f"layers.{i}."): value for name, value in weights.items()}
        normed = _norm(block, w["input_layernorm.weight"], eps)
        source = torch.cat((context, normed))
        heads, hidden = [], _hidden(config, i, start, len(block))
        for head in range(config.num_attention_heads):
            q_rows = slice(head * d, (head + 1) * d)
            kv_rows = slice(head // groups * d, (head // groups + 1) * d)
            q = _norm(normed @ w["self_attn.q_proj.weight"][q_rows].T, w["self_attn.q_norm.weight"], eps)
            k = _norm(source @ w["self_attn.k_proj.weight"][kv_rows].T, w["self_attn.k_norm.weight"], eps)
            v = source @ w["self_attn.v_proj.weight"][kv_rows].T
            q, k = _turn(q, positions[start:], config.rope_theta), _turn(k, positions, config.rope_theta)
            scores = (q @ k.T / math.sqrt(d)).masked_fill(hidden, -math.inf)
            heads.append(torch.softmax(scores, dim=-1) @ v)
        block = block + torch.cat(heads, dim=-1) @ w["self_attn.o_proj.weight"].T
        normed = _norm(block, w["post_attention_layernorm.weight"], eps)
        gate = normed @ w["mlp.gate_proj.weight"].T
        up = normed @ w["mlp.up_proj.weight"].T
        block = block + (gate * torch.sigmoid(gate) * up) @ w["mlp.down_proj.weight"].T
    return _norm(block, weights["norm.weight"], eps)


@dataclass
class ReferenceStep:
    loss: Tensor
    loss_sum: Tensor
    loss_weight: float
    valid_tokens: int
    correct_tokens: int
    accept_lens: list[int]
    correct_by_slot: list[int]
    valid_by_slot: list[int]


def train_step(
    weights: dict[str, Tensor],
    config,
    head,
    embed,
    documents: list[dict[str, Tensor]],
    gamma: float | None = None,
    dpace_alpha: float | None = None,
    slot_loss: Callable[[Tensor, Tensor, int], Tensor] | None = None,
) -> ReferenceStep:
    """Return one step over `documents`, each with input_ids [T], hidden_states [T, L*H], loss_mask [T], anchors.

    The loss of a slot is cross-entropy, or `slot_loss` of its logits [V], the target's [V] and its label; then each
    document has `final` [T, H].
    """
    K = config.block_size
    step = ReferenceStep(torch.zeros(()), torch.zeros(()), 0.0, 0, 0, [], [0] * (K - 1), [0] * (K - 1))
    for document in documents:
        tokens = document["input_ids"].tolist()
        for a in document["anchors"].tolist():
            block = embed(torch.tensor([tokens[a]] + [config.mask_token_id] * (K - 1)))
            hidden = draft_one_block(weights, config, document["hidden_states"][:a], block, a)
            slots = [k for k in range(1, K) if a + k < len(tokens) and document["loss_mask"][a + k] == 1]
            log_p = {k: torch.log_softmax(head(hidden[k]), dim=-1) for k in slots}
            ce = {k: -log_p[k][tokens[a + k]] for k in slots}
            for k in slots:
                if dpace_alpha is None:
                    w = 1.0 if gamma is None else math.exp(-(k - 1) / gamma)
                else:
                    w = 0.0
                    for t in [t for t in slots if t >= k]:
                        q = [(1 - dpace_alpha) * math.exp(-ce[i].item()) + dpace_alpha for i in slots if i <= t]
                        w += math.prod(q)
                loss = ce[k]
                if slot_loss is not None:
                    loss = slot_loss(head(hidden[k]), head(document["final"][a + k - 1]), tokens[a + k])
                step.loss_sum = step.loss_sum + w * loss
                step.loss_weight += w
            right = {k: int(log_p[k].argmax()) == tokens[a + k] for k in slots}
            for k in slots:
                step.valid_tokens += 1
                step.correct_tokens += right[k]
                step.valid_by_slot[k - 1] += 1
                step.correct_by_slot[k - 1] += right[k]
            if slots:
                first_wrong = next((n for n, k in enumerate(slots) if not right[k]), len(slots))
                step.accept_lens.append(1 + first_wrong)
    step.loss = step.loss_sum / (step.loss_weight + 1e-6)
    return step
