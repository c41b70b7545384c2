"""What the slow references of the variants share: a plain Qwen3 layer over context and block, one head at a time.

It computes in float64, shares no code with the project, and reads a draft's own config.json and tensors.
"""

# Axes: K slots of a block, C positions of its context, H hidden size, T tokens, d a head's size.

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Weights = Mapping[str, Tensor]
"""By the names of the draft's file."""
PLAIN_CONFIG: dict[str, Any] = {
    "model_type": "qwen3",
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
"""The fields of a tiny draft's config.json that every variant has: H 32, two layers, V 40."""


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return RMSNorm of [T, H]."""
    return weight.double() * x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)


def turn(x: Tensor, first: int, theta: float) -> Tensor:
    """Rotate [T, d] at positions first.. : pair i is (x[i], x[i + d/2]), turned by position * theta^(-2i/d)."""
    d = x.shape[1]
    rows = [[position * theta ** (-2 * i / d) for i in range(d // 2)] for position in range(first, first + len(x))]
    angles = torch.tensor(rows, dtype=torch.float64)
    left, right = x[:, : d // 2], x[:, d // 2 :]
    return torch.cat((left * angles.cos() - right * angles.sin(), right * angles.cos() + left * angles.sin()), dim=1)


def layer_weights(weights: Weights, layer: int) -> dict[str, Tensor]:
    """Return a layer's tensors by their names within it, float64."""
    start = f"layers.{layer}."
    return {name.removeprefix(start): one.double() for name, one in weights.items() if name.startswith(start)}


def context_of(weights: Weights, config: Mapping[str, Any], features: Tensor) -> Tensor:
    """Return the context [C, H] that features [C, L*H] become."""
    projected = features.double() @ weights["fc.weight"].double().T
    return norm(projected, weights["hidden_norm.weight"], config["rms_norm_eps"])


def attend(
    w: Weights, config: Mapping[str, Any], context: Tensor, block: Tensor, hidden: Tensor | None = None
) -> Tensor:
    """Return [K, H] of normed block states [K, H] and the context [C, H] at positions 0..C-1.

    `hidden` [K, C + K] is true where a slot may not look; without it nothing is hidden.
    """
    eps, d, theta = config["rms_norm_eps"], config["head_dim"], config["rope_theta"]
    per_key_head = config["num_attention_heads"] // config["num_key_value_heads"]
    source, heads = torch.cat((context, block)), []
    for head in range(config["num_attention_heads"]):
        q_rows = slice(head * d, (head + 1) * d)
        kv_rows = slice(head // per_key_head * d, (head // per_key_head + 1) * d)
        q = norm(block @ w["self_attn.q_proj.weight"][q_rows].T, w["self_attn.q_norm.weight"], eps)
        k = norm(source @ w["self_attn.k_proj.weight"][kv_rows].T, w["self_attn.k_norm.weight"], eps)
        v = source @ w["self_attn.v_proj.weight"][kv_rows].T
        scores = turn(q, len(context), theta) @ turn(k, 0, theta).T / math.sqrt(d)
        if hidden is not None:
            scores = scores.masked_fill(hidden, -math.inf)
        heads.append(torch.softmax(scores, dim=-1) @ v)
    return torch.cat(heads, dim=-1) @ w["self_attn.o_proj.weight"].T


def feed_forward(w: Weights, x: Tensor) -> Tensor:
    """Return the gated feed-forward of normed states [K, H]."""
    gate = x @ w["mlp.gate_proj.weight"].T
    return (gate * torch.sigmoid(gate) * (x @ w["mlp.up_proj.weight"].T)) @ w["mlp.down_proj.weight"].T


def random_tensors(
    config: Mapping[str, Any], num_taps: int, own: Mapping[str, tuple[int, ...]], draw: torch.Generator
) -> dict[str, Tensor]:
    """Return a plain draft's tensors and the `own` ones, float32, none at its start value, all of some size."""
    hidden, d, inner = config["hidden_size"], config["head_dim"], config["intermediate_size"]
    queries, keys = config["num_attention_heads"] * d, config["num_key_value_heads"] * d
    layer: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj.weight": (queries, hidden),
        "self_attn.k_proj.weight": (keys, hidden),
        "self_attn.v_proj.weight": (keys, hidden),
        "self_attn.o_proj.weight": (hidden, queries),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }
    norms = {"input_layernorm.weight": hidden, "post_attention_layernorm.weight": hidden}
    norms |= {"self_attn.q_norm.weight": d, "self_attn.k_norm.weight": d}
    layers = range(config["num_hidden_layers"])
    shapes = {f"layers.{i}.{name}": shape for i in layers for name, shape in layer.items()}
    shapes |= {"fc.weight": (hidden, num_taps * hidden), **own}
    sizes = {f"layers.{i}.{name}": size for i in layers for name, size in norms.items()}
    sizes |= {"hidden_norm.weight": hidden, "norm.weight": hidden}
    weights = {name: 0.3 * torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    return weights | {name: 0.5 + torch.rand(size, generator=draw) for name, size in sizes.items()}
