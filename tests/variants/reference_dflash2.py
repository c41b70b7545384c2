"""A slow reference of DFlash 2, written from the contract: one block, one slot and one candidate at a time, in float64.

It shares no code with the project, and reads a draft's own config.json and tensors. A block is computed as it is
served: context strictly before the anchor, then the block.
"""

# Axes: K block size, H hidden size, V vocabulary, R rank of the selector, L captured target layers, T tokens.

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from slow_layer import PLAIN_CONFIG, Weights, attend, context_of, feed_forward, layer_weights, norm, random_tensors
from torch import Tensor


def convolve(values: Tensor, base: Tensor, delta: Tensor, group: int) -> Tensor:
    """Return y [K, H] of a block's `values` [K, H], `base` [c, H] and its own kernels `delta` [K, c, H / group].

    y_t[ch] = sum over o < c of (base[o, ch] + delta_t[o, ch // group]) * values_{t-o}[ch]; nothing is before slot 0.
    """
    rows = []
    for t in range(len(values)):
        row = torch.zeros_like(values[t])
        for o in range(min(len(base), t + 1)):
            row = row + (base[o] + delta[t, o].repeat_interleave(group)) * values[t - o]
        rows.append(row)
    return torch.stack(rows)


def _hides(config: Mapping[str, Any], layer: int, query: int, key: int) -> bool:
    """Whether a layer hides position `key` from position `query`, for all that lies before the block or in it."""
    if config["layer_types"][layer] != "sliding_attention":
        return bool(config.get("is_causal")) and key > query
    causal = config.get("is_causal", True)
    return query - key >= config["sliding_window"] or (bool(causal) and key > query)


def draft_block(weights: Weights, config: Mapping[str, Any], features: Tensor, block: Tensor) -> Tensor:
    """Return the states [K, H] after the final norm of an embedded block [K, H] after `features` [C, L*H]."""
    eps, group = config["rms_norm_eps"], config["dflash_config"]["conv_group_size"]
    taps = config["dflash_config"]["conv_kernel_size"]
    context, x = context_of(weights, config, features), block.double()
    slots, keys = range(len(context), len(context) + len(x)), range(len(context) + len(x))
    for i in range(config["num_hidden_layers"]):
        w = layer_weights(weights, i)
        hidden = torch.tensor([[_hides(config, i, slot, key) for key in keys] for slot in slots])
        for sublayer, before in (("attention", "input_layernorm"), ("mlp", "post_attention_layernorm")):
            n = norm(x, w[f"{before}.weight"], eps)
            base = w[f"{sublayer}_conv.base_kernel"]
            delta = (n @ w[f"{sublayer}_conv.kernel_projection.weight"].T).view(len(n), 2, taps, -1)
            v = convolve(n, base[0], delta[:, 0], group)
            v = attend(w, config, context, v, hidden) if sublayer == "attention" else feed_forward(w, v)
            x = x + convolve(v, base[1], delta[:, 1], group)
    return norm(x, weights["norm.weight"], eps)


def candidates_of(unary: Tensor, top_k: int) -> list[int]:
    """Return the tokens with the `top_k` largest of the logits [V], best first."""
    logits = unary.tolist()
    return sorted(range(len(logits)), key=lambda token: -logits[token])[:top_k]


def scores_of(weights: Weights, hidden: Tensor, unary: Tensor, predecessor: int, candidates: Sequence[int]) -> Tensor:
    """Return S of every candidate after `predecessor`, float64, given the slot's state [H] and logits [V]."""
    before = weights["candidate_selector.predecessor_codebook"][predecessor].double()
    after = weights["candidate_selector.successor_codebook"].double()
    projected = weights["candidate_selector.hidden_projection.weight"].double() @ hidden
    return torch.stack([unary[b] + torch.sum(before * projected * after[b]) for b in candidates])


def walk(weights: Weights, hidden: Tensor, unary: Tensor, anchor: int, top_k: int) -> list[int]:
    """Return what is drafted greedily, slot after slot, from states [K-1, H] and logits [K-1, V] of slots 1.."""
    drafted, before = [], anchor
    for h, u in zip(hidden, unary, strict=True):
        candidates = candidates_of(u, top_k)
        before = candidates[int(scores_of(weights, h, u, before, candidates).argmax())]
        drafted.append(before)
    return drafted


def proposal(
    weights: Weights, hidden: Tensor, unary: Tensor, before: Sequence[int], top_k: int, temperature: float
) -> list[dict[int, float]]:
    """Return each slot's distribution, token to probability, if the token drafted before it was `before`."""
    slots = []
    for h, u, predecessor in zip(hidden, unary, before, strict=True):
        candidates = candidates_of(u, top_k)
        q = torch.softmax(scores_of(weights, h, u, predecessor, candidates) / temperature, dim=0)
        slots.append(dict(zip(candidates, q.tolist(), strict=True)))
    return slots


@dataclass
class ReferenceStep:
    """What a step comes to; counts by slot are of slots 1..K-1."""

    block_size: int
    loss_sum: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    """Sum of w * (CE + alpha * selector CE), the second where the truth is among the candidates."""
    loss_weight: float = 0.0
    selector_sum: float = 0.0
    """Sum of w * selector CE."""
    valid_by_slot: list[int] = field(default_factory=list)
    plain_by_slot: list[int] = field(default_factory=list)
    """Slots whose best logit is the truth."""
    covered_by_slot: list[int] = field(default_factory=list)
    """Slots whose truth is among the candidates."""
    chosen_by_slot: list[int] = field(default_factory=list)
    """Slots whose best score is the truth's, the predecessor being the true one."""
    accept_lens: list[int] = field(default_factory=list)
    """Of every block with a supervised slot: 1 + leading slots that the scores choose rightly."""
    plain_accept_lens: list[int] = field(default_factory=list)
    """The same by the logits alone."""
    oracle_lens: list[int] = field(default_factory=list)
    """The same if the best choice among the candidates were always made."""

    def __post_init__(self) -> None:
        for name in ("valid", "plain", "covered", "chosen"):
            setattr(self, f"{name}_by_slot", [0] * (self.block_size - 1))

    @property
    def loss(self) -> Tensor:
        """What is to be minimized."""
        return self.loss_sum / (self.loss_weight + 1e-6)


def _leading(right: Sequence[bool]) -> int:
    return next((n for n, one in enumerate(right) if not one), len(right))


def slot_weights(ce: Mapping[int, Tensor], gamma: float | None, dpace_alpha: float | None) -> dict[int, float]:
    """Return w_k of a block's supervised slots: exp(-(k-1) / gamma), or D-PACE's where its alpha is given."""
    if dpace_alpha is None:
        return {k: 1.0 if gamma is None else math.exp(-(k - 1) / gamma) for k in ce}
    q = {k: (1 - dpace_alpha) * math.exp(-one.item()) + dpace_alpha for k, one in ce.items()}
    return {k: sum(math.prod(q[i] for i in ce if i <= t) for t in ce if t >= k) for k in ce}


def train_step(
    weights: Weights,
    config: Mapping[str, Any],
    head: Tensor,
    table: Tensor,
    documents: Sequence[Mapping[str, Tensor]],
    *,
    selector_alpha: float = 1.0,
    gamma: float | None = None,
    dpace_alpha: float | None = None,
) -> ReferenceStep:
    """Return one step over `documents`, each with input_ids [T], hidden_states [T, L*H], loss_mask [T] and anchors.

    `head` and `table` are [V, H]. The selector reads states and logits without passing a gradient to them.
    """
    own = config["dflash_config"]
    K, step = own["block_size"], ReferenceStep(own["block_size"])
    for document in documents:
        tokens = document["input_ids"].tolist()
        for a in document["anchors"].tolist():
            ids = torch.tensor([tokens[a]] + [own["mask_token_id"]] * (K - 1))
            hidden = draft_block(weights, config, document["hidden_states"][:a], table[ids])
            slots = [k for k in range(1, K) if a + k < len(tokens) and document["loss_mask"][a + k] == 1]
            unary = {k: head.double() @ hidden[k] for k in slots}
            ce = {k: torch.logsumexp(unary[k], 0) - unary[k][tokens[a + k]] for k in slots}
            w = slot_weights(ce, gamma, dpace_alpha)
            plain, covered, chosen = [], [], []
            for k in slots:
                truth, before = tokens[a + k], tokens[a + k - 1]
                candidates = candidates_of(unary[k], own["selector_top_k"])
                scores = scores_of(weights, hidden[k].detach(), unary[k].detach(), before, candidates)
                step.loss_sum = step.loss_sum + w[k] * ce[k]
                step.loss_weight += w[k]
                if truth in candidates:
                    its = torch.logsumexp(scores, 0) - scores[candidates.index(truth)]
                    step.loss_sum = step.loss_sum + selector_alpha * w[k] * its
                    step.selector_sum += w[k] * its.item()
                plain.append(candidates[0] == truth)
                covered.append(truth in candidates)
                chosen.append(candidates[int(scores.argmax())] == truth)
                step.valid_by_slot[k - 1] += 1
                step.plain_by_slot[k - 1] += plain[-1]
                step.covered_by_slot[k - 1] += covered[-1]
                step.chosen_by_slot[k - 1] += chosen[-1]
            if slots:
                step.accept_lens.append(1 + _leading(chosen))
                step.plain_accept_lens.append(1 + _leading(plain))
                step.oracle_lens.append(1 + _leading(covered))
    return step


def config_json(**changes: Any) -> dict[str, Any]:
    """Return the config.json of a tiny draft as the contract has it: H 32, 2 layers, K 4, V 40; `changes` go on top."""
    own = {
        "block_size": 4,
        "mask_token_id": 39,
        "target_layer_ids": [1, 3],
        "num_target_layers": 6,
        "causal": False,
        "conv_kernel_size": 2,
        "conv_group_size": 8,
        "selector_rank": 6,
        "selector_top_k": 12,
    }
    plain = {**PLAIN_CONFIG, "architectures": ["DFlash2DraftModel"], "is_causal": False}
    inside = {name: value for name, value in changes.items() if name in own}
    outside = {name: value for name, value in changes.items() if name not in own}
    both = {"num_target_layers": {**own, **inside}["num_target_layers"]}
    return {**plain, **outside, **both, "dflash_config": {**own, **inside}}


def random_weights(config: Mapping[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Return float32 tensors of every name and shape, none of them at its start value, all large enough to matter."""
    own, draw = config["dflash_config"], torch.Generator().manual_seed(seed)
    hidden, rank = config["hidden_size"], own["selector_rank"]
    taps, groups = own["conv_kernel_size"], config["hidden_size"] // own["conv_group_size"]
    shapes: dict[str, tuple[int, ...]] = {}
    for i, sublayer in product(range(config["num_hidden_layers"]), ("attention_conv", "mlp_conv")):
        shapes[f"layers.{i}.{sublayer}.base_kernel"] = (2, taps, hidden)
        shapes[f"layers.{i}.{sublayer}.kernel_projection.weight"] = (2 * taps * groups, hidden)
    shapes["candidate_selector.predecessor_codebook"] = (config["vocab_size"], rank)
    shapes["candidate_selector.successor_codebook"] = (config["vocab_size"], rank)
    shapes["candidate_selector.hidden_projection.weight"] = (rank, hidden)
    weights = random_tensors(config, len(own["target_layer_ids"]), shapes, draw)
    for name, weight in weights.items():
        if name.endswith("base_kernel"):
            weight[:, 0] += 1
        elif name.endswith("kernel_projection.weight"):
            weight *= 0.3
        elif name.endswith("codebook"):
            weight *= 3  # as much as the logits, so that the choice depends on the predecessor
    return weights
