"""What a draft takes from its cache: its shape, and the frozen embedding table and head that it borrows."""

import torch
from safetensors.torch import load_file
from torch import nn

from dflash_offline.schemas.config import TrainConfig
from dflash_offline.schemas.draft import DraftConfig
from dflash_offline.schemas.errors import MismatchError
from dflash_offline.stages.cache import CacheReader


def draft_shape(config: TrainConfig, reader: CacheReader) -> DraftConfig:
    """Return the draft's shape: the target's, where the settings do not say otherwise.

    Raises `MismatchError` if a block is longer than the cache was planned for, or a layer is not in the cache.
    """
    target = reader.target_config()
    text = target.get("text_config") or target
    planned = int(reader.manifest.plan["block_size"])
    block_size = config.block_size or planned
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
    heads = config.draft_heads or int(text["num_attention_heads"])
    hidden_size = reader.manifest.layout.hidden_size
    rope = text.get("rope_parameters") or text
    return DraftConfig(
        hidden_size=hidden_size,
        num_hidden_layers=config.draft_layers or len(layers),
        num_attention_heads=heads,
        num_key_value_heads=config.draft_kv_heads or int(text.get("num_key_value_heads") or heads),
        head_dim=config.draft_head_dim or int(text.get("head_dim") or hidden_size // heads),
        intermediate_size=config.draft_intermediate_size or int(text.get("intermediate_size") or 4 * hidden_size),
        vocab_size=int(text["vocab_size"]),
        target_layer_ids=tuple(layers),
        num_target_layers=int(text["num_hidden_layers"]),
        block_size=block_size,
        mask_token_id=int(reader.manifest.plan["mask_token_id"]),
        rms_norm_eps=config.draft_rms_norm_eps or float(text.get("rms_norm_eps", DraftConfig.rms_norm_eps)),
        rope_theta=config.draft_rope_theta or float(rope.get("rope_theta", DraftConfig.rope_theta)),
        max_position_embeddings=config.draft_max_position_embeddings
        or int(text.get("max_position_embeddings", DraftConfig.max_position_embeddings)),
    )


def borrowed_parts(reader: CacheReader, device: torch.device) -> tuple[nn.Linear, nn.Embedding]:
    """Return the target's head and embedding table from the cache; float32 on the CPU, as stored on a GPU."""
    tensors = load_file(reader.cache / "target" / "embeddings.safetensors", device=str(device))
    if device.type == "cpu":
        tensors = {name: tensor.float() for name, tensor in tensors.items()}
    table = tensors["embed_tokens.weight"]
    weight, bias = tensors.get("lm_head.weight", table), tensors.get("lm_head.bias")
    head = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    head.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        head.bias = nn.Parameter(bias, requires_grad=False)
    return head, nn.Embedding.from_pretrained(table)
