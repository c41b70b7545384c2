"""The draft's layers: Qwen3 decoder layers whose keys and values come from two sources with the same weights.

These are the context (the target's features, projected once for all layers) and the block. Queries come from the block
only.
"""

# Axes: B rows, C context positions, Q block tokens, P cached positions, H hidden size.

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dflash_offline.schemas.draft.config import DraftConfig
from dflash_offline.stages.draft.attention import Mask, attend

Rotary = tuple[Tensor, Tensor]
KeysValues = tuple[Tensor, Tensor]
"""Keys, turned by their positions, and values, [B, kv heads, C, head_dim] each."""


class DraftCache:
    """Keys and values of the positions a draft has already seen, for step-by-step decoding.

    A round feeds only the new context features and the block. The draft appends the keys of both; the caller then
    drops the block's with `crop(context_length)`, because the block was a guess. Rows share one length.
    """

    def __init__(self) -> None:
        self.length = 0
        """Positions held, P."""
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store [B, kv heads, new, head_dim] after the first P positions; return all P + new of this layer."""
        end = self.length + keys.shape[2]
        stored_keys = self._room(self._keys, layer, keys, end)
        stored_values = self._room(self._values, layer, values, end)
        stored_keys[:, :, self.length : end] = keys
        stored_values[:, :, self.length : end] = values
        return stored_keys[:, :, :end], stored_values[:, :, :end]

    def _room(self, store: dict[int, Tensor], layer: int, new: Tensor, end: int) -> Tensor:
        held = store.get(layer)
        if held is None or held.shape[2] < end:
            grown = new.new_empty(new.shape[0], new.shape[1], max(256, 2 * end), new.shape[3])
            if held is not None:
                grown[:, :, : self.length] = held[:, :, : self.length]
            store[layer] = grown
        return store[layer]

    def advance(self, num_positions: int) -> None:
        """Count the positions that every layer has appended."""
        self.length += num_positions

    def crop(self, length: int) -> None:
        """Keep only the first `length` positions."""
        assert 0 <= length <= self.length, f"cannot crop {self.length} positions to {length}"
        self.length = length


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, computed in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        # Autocast may lift the norm to float32; what follows it should not be lifted with it.
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps).to(x.dtype)


def rotary_inv_freq(head_dim: int, theta: float, device: torch.device | None = None) -> Tensor:
    """Return the rotary frequencies [head_dim / 2], float32.

    Computed where they are used and kept in no buffer, so that casting the draft to bfloat16 cannot round them.
    """
    powers = torch.arange(0, head_dim, 2, dtype=torch.int64, device=device).float() / head_dim
    return 1.0 / (theta**powers)


def rotary_table(position_ids: Tensor, inv_freq: Tensor, dtype: torch.dtype) -> Rotary:
    """Return cosine and sine [B, 1, positions, head_dim / 2] of int positions [B, positions], computed in float32."""
    angles = position_ids[:, None, :, None].float() * inv_freq
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Return [B, heads, positions, head_dim] turned by its positions; halves are paired, as in Llama and Qwen3."""
    cos, sin = rotary
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class DraftAttention(nn.Module):
    """Attention of the block over context and block, with grouped key/value heads and normed queries and keys."""

    def __init__(self, config: DraftConfig, layer: int) -> None:
        super().__init__()
        hidden, head_dim = config.hidden_size, config.head_dim
        self.layer, self.head_dim = layer, head_dim
        self.q_proj = nn.Linear(hidden, config.num_attention_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(hidden, config.num_key_value_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(hidden, config.num_key_value_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * head_dim, hidden, bias=False)
        self.q_norm = RMSNorm(head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(head_dim, config.rms_norm_eps)

    def forward(
        self,
        block: Tensor,
        context: Tensor | KeysValues,
        rotary: Rotary,
        mask: Mask,
        cache: DraftCache | None,
        backend: str,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Return [B, Q, H] of block [B, Q, H] and context [B, C, H]; `rotary` covers C + Q positions.

        `context` may be its keys and values. `rows`, int64 [M], asks for these of the B * Q rows alone, [M, H].
        """
        num_queries = block.shape[1]
        cos, sin = rotary
        own_rotary = cos[:, :, -num_queries:], sin[:, :, -num_queries:]
        q = rotate(self.q_norm(self._split(self.q_proj(block))).transpose(1, 2), own_rotary)
        if isinstance(context, tuple):
            own = self.keys_values(block, own_rotary)
            k, v = (torch.cat(pair, dim=2) for pair in zip(context, own, strict=True))
        else:
            # Joined after the projections: keys and values are narrower, and no layer keeps a copy of the context.
            k = torch.cat((self.k_proj(context), self.k_proj(block)), dim=1)
            v = torch.cat((self.v_proj(context), self.v_proj(block)), dim=1)
            k, v = self._turned(k, rotary), self._split(v).transpose(1, 2)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        attended = attend(q.to(v.dtype), k.to(v.dtype), v, mask, backend).transpose(1, 2).flatten(2)
        return self.o_proj(attended if rows is None else attended.flatten(0, 1).index_select(0, rows))

    def keys_values(self, x: Tensor, rotary: Rotary) -> KeysValues:
        """Return the keys and values of [B, positions, H]."""
        return self._turned(self.k_proj(x), rotary), self._split(self.v_proj(x)).transpose(1, 2)

    def _turned(self, k: Tensor, rotary: Rotary) -> Tensor:
        return rotate(self.k_norm(self._split(k)).transpose(1, 2), rotary)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))


class DraftMLP(nn.Module):
    """Gated SiLU feed-forward."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DraftLayer(nn.Module):
    """One decoder layer; the context enters its attention and does not pass through `input_layernorm`."""

    def __init__(self, config: DraftConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = DraftAttention(config, layer)
        self.mlp = DraftMLP(config.hidden_size, config.intermediate_size)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        block: Tensor,
        context: Tensor | KeysValues,
        rotary: Rotary,
        mask: Mask,
        cache: DraftCache | None,
        backend: str,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Return the block after the layer; `rows` as in `DraftAttention`."""
        attended = self.self_attn(self.input_layernorm(block), context, rotary, mask, cache, backend, rows)
        block = attended + (block if rows is None else block.flatten(0, 1).index_select(0, rows))
        return block + self.mlp(self.post_attention_layernorm(block))
