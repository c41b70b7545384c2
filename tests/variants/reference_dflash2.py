"""A slow reference of DFlash 2, written from the contract: one block, one slot and one candidate at a time, in float64.

It shares no code with the project, and reads a draft's own config.json and tensors. A block is computed as it is
served: context strictly before the anchor, then the block.
"""

# Axes: K block size, H hidden size, V vocabulary, R rank of the selector, L captured target layers, T tokens.

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Weights = Mapping[str, Tensor]
"""By the names of the draft's file."""


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight.double() * x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)


def _turn(x: Tensor, first: int, theta: float) -> Tensor:
    """Rotate [T, d] at positions first.. : pair i is (x[i], x[i + d/2]), turned by position * theta^(-2i/d)."""
    d = x.shape[1]
    angles = [[position * theta ** (-2 * i / d) for i in range(d // 2)] for position in range(first, first + len(x))]
    cos, sin = (
        torch.tensor([[f(one) for one in row] for row in angles], dtype=torch.float64) for f in (math.cos, math.sin)
    )
    left, right = x[:, : d // 2], x[:, d // 2 :]
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=1)


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


def _attention(w: Weights, config: Mapping[str, Any], layer: int, context: Tensor, block: Tensor) -> Tensor:
    """Return [K, H] of normed and convolved block states [K, H] and the context [C, H] at positions 0..C-1."""
    eps, d, theta = config["rms_norm_eps"], config["head_dim"], config["rope_theta"]
    per_key_head = config["num_attention_heads"] // config["num_key_value_heads"]
    start, source = len(context), torch.cat((context, block))
    pairs = [[_hides(config, layer, start + q, key) for key in range(len(source))] for q in range(len(block))]
    hidden, heads = torch.tensor(pairs), []
    for head in range(config["num_attention_heads"]):
        q_rows = slice(head * d, (head + 1) * d)
        kv_rows = slice(head // per_key_head * d, (head // per_key_head + 1) * d)
        q = _norm(block @ w["self_attn.q_proj.weight"][q_rows].T, w["self_attn.q_norm.weight"], eps)
        k = _norm(source @ w["self_attn.k_proj.weight"][kv_rows].T, w["self_attn.k_norm.weight"], eps)
        v = source @ w["self_attn.v_proj.weight"][kv_rows].T
        scores = _turn(q, start, theta) @ _turn(k, 0, theta).T / math.sqrt(d)
        heads.append(torch.softmax(scores.masked_fill(hidden, -math.inf), dim=-1) @ v)
    return torch.cat(heads, dim=-1) @ w["self_attn.o_proj.weight"].T


def draft_block(weights: Weights, config: Mapping[str, Any], features: Tensor, block: Tensor) -> Tensor:
    """Return the states [K, H] after the final norm of an embedded block [K, H] after `features` [C, L*H]."""
    weights = {name: weight.double() for name, weight in weights.items()}
    eps, group = config["rms_norm_eps"], config["dflash_config"]["conv_group_size"]
    taps = config["dflash_config"]["conv_kernel_size"]
    context = _norm(features.double() @ weights["fc.weight"].T, weights["hidden_norm.weight"], eps)
    x = block.double()
    for i in range(config["num_hidden_layers"]):
        w = {n.removeprefix(f"layers.{i}."): t for n, t in weights.items() if n.startswith(f"layers.{i}.")}
        for sublayer, norm in (("attention", "input_layernorm"), ("mlp", "post_attention_layernorm")):
            n = _norm(x, w[f"{norm}.weight"], eps)
            base = w[f"{sublayer}_conv.base_kernel"]
            delta = (n @ w[f"{sublayer}_conv.kernel_projection.weight"].T).view(len(n), 2, taps, -1)
            v = convolve(n, base[0], delta[:, 0], group)
            if sublayer == "attention":
                v = _attention(w, config, i, context, v)
            else:
                gate = v @ w["mlp.gate_proj.weight"].T
                v = (gate * torch.sigmoid(gate) * (v @ w["mlp.up_proj.weight"].T)) @ w["mlp.down_proj.weight"].T
            x = x + convolve(v, base[1], delta[:, 1], group)
    return _norm(x, weights["norm.weight"], eps)


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
    plain = {
        "architectures": ["DFlash2DraftModel"],
        "model_type": "qwen3",
        "is_causal": False,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 48,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "vocab_size": 40,
        "max_position_embeddings": 512,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "layer_types": ["full_attention"] * 2,
        "sliding_window": None,
        "use_sliding_window": False,
        "max_window_layers": 2,
        "tie_word_embeddings": False,
        "use_cache": True,
        "dtype": "bfloat16",
    }
    inside = {name: value for name, value in changes.items() if name in own}
    outside = {name: value for name, value in changes.items() if name not in own}
    both = {"num_target_layers": {**own, **inside}["num_target_layers"]}
    return {**plain, **outside, **both, "dflash_config": {**own, **inside}}


def random_weights(config: Mapping[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Return float32 tensors of every name and shape, none of them at its start value, all large enough to matter."""
    own, draw = config["dflash_config"], torch.Generator().manual_seed(seed)
    hidden, d, inner = config["hidden_size"], config["head_dim"], config["intermediate_size"]
    queries, keys = config["num_attention_heads"] * d, config["num_key_value_heads"] * d
    taps, groups, rank = own["conv_kernel_size"], hidden // own["conv_group_size"], own["selector_rank"]
    layer: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj.weight": (queries, hidden),
        "self_attn.k_proj.weight": (keys, hidden),
        "self_attn.v_proj.weight": (keys, hidden),
        "self_attn.o_proj.weight": (hidden, queries),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }
    for sublayer in ("attention_conv", "mlp_conv"):
        layer[f"{sublayer}.base_kernel"] = (2, taps, hidden)
        layer[f"{sublayer}.kernel_projection.weight"] = (2 * taps * groups, hidden)
    norms = {"input_layernorm.weight": hidden, "post_attention_layernorm.weight": hidden}
    norms |= {"self_attn.q_norm.weight": d, "self_attn.k_norm.weight": d}
    layers = range(config["num_hidden_layers"])
    shapes = {f"layers.{i}.{name}": shape for i in layers for name, shape in layer.items()}
    shapes["fc.weight"] = (hidden, len(own["target_layer_ids"]) * hidden)
    shapes["candidate_selector.predecessor_codebook"] = (config["vocab_size"], rank)
    shapes["candidate_selector.successor_codebook"] = (config["vocab_size"], rank)
    shapes["candidate_selector.hidden_projection.weight"] = (rank, hidden)
    sizes = {f"layers.{i}.{name}": size for i in layers for name, size in norms.items()}
    sizes |= {"hidden_norm.weight": hidden, "norm.weight": hidden}
    weights = {name: 0.3 * torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    weights |= {name: 0.5 + torch.rand(size, generator=draw) for name, size in sizes.items()}
    for name, weight in weights.items():
        if name.endswith("base_kernel"):
            weight[:, 0] += 1
        elif name.endswith("kernel_projection.weight"):
            weight *= 0.3
        elif name.endswith("codebook"):
            weight *= 3  # as much as the logits, so that the choice depends on the predecessor
    return weights
