"""What a draft takes from its cache: its shape, and the frozen embedding table and head that it borrows."""

from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from dflash_offline.schemas.config import TrainConfig
from dflash_offline.schemas.draft import DraftConfig
from dflash_offline.schemas.errors import MismatchError
from dflash_offline.schemas.manifest import EMBEDDINGS, TARGET
from dflash_offline.stages.cache import CacheReader


def draft_shape(config: TrainConfig, reader: CacheReader) -> DraftConfig:
    """Return the draft's shape: the target's, where the settings do not say otherwise.

    Raises `MismatchError` if a block is longer than the cache was planned for, or a layer is not in the cache.
    """
    target = reader.manifest.decoder
    planned = int(reader.manifest.plan["block_size"])
    block_size = planned if config.block_size is None else config.block_size
    if block_size > planned:
        raise MismatchError(
            f"{reader.cache} was planned for blocks of {planned}, and this draft has blocks of {block_size}. Train "
            f"with --block-size {planned} or less, or extract again with --block-size {block_size}."
        )
    layers = config.layers or reader.layer_ids
    if not set(layers) <= set(reader.layer_ids):
        raise MismatchError(
            f"{reader.cache} holds layers {list(reader.layer_ids)}, but this draft reads {list(layers)}. Extract "
            f"again with --layers {','.join(map(str, layers))} into a new folder, or train with layers it holds."
        )
    asked: dict[str, Any] = {
        "num_attention_heads": config.draft_heads,
        "num_key_value_heads": config.draft_kv_heads,
        "head_dim": config.draft_head_dim,
        "intermediate_size": config.draft_intermediate_size,
        "rope_theta": config.draft_rope_theta,
        "rms_norm_eps": config.draft_rms_norm_eps,
        "max_position_embeddings": config.draft_max_position_embeddings,
    }
    num_layers = len(layers) if config.draft_layers is None else config.draft_layers
    sliding = config.sliding_layers
    if sliding is None:
        sliding = () if config.sliding_window is None else tuple(range(num_layers))
    return DraftConfig(
        hidden_size=target["hidden_size"],
        vocab_size=target["vocab_size"],
        num_target_layers=target["num_hidden_layers"],
        num_hidden_layers=num_layers,
        target_layer_ids=tuple(layers),
        block_size=block_size,
        mask_token_id=int(reader.manifest.plan["mask_token_id"]),
        sliding_window=config.sliding_window,
        sliding_layers=sliding,
        causal_layers=config.causal_layers,
        **{name: target[name] if value is None else value for name, value in asked.items()},
    )


def borrowed_parts(reader: CacheReader, device: torch.device) -> tuple[nn.Linear, nn.Embedding]:
    """Return the target's head and embedding table from the cache; float32 on the CPU, as stored on a GPU."""
    tensors = load_file(reader.cache / TARGET / EMBEDDINGS, device=str(device))
    if device.type == "cpu":
        tensors = {name: tensor.float() for name, tensor in tensors.items()}
    table = tensors["embed_tokens.weight"]
    weight, bias = tensors.get("lm_head.weight", table), tensors.get("lm_head.bias")
    head = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    head.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        head.bias = nn.Parameter(bias, requires_grad=False)
    return head, nn.Embedding.from_pretrained(table)
