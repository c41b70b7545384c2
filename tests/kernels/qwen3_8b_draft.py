"""The shape of a draft for Qwen3-8B."""

from dflash_offline.schemas.draft.config import DraftConfig

CONFIG = DraftConfig(
    hidden_size=4096,
    num_hidden_layers=5,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    intermediate_size=12_288,
    vocab_size=151_936,
    target_layer_ids=(1, 9, 17, 25, 33),
    num_target_layers=36,
    block_size=16,
    mask_token_id=151_935,
    rope_theta=1e6,
)
