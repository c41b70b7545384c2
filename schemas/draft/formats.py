"""The config.json of the formats a draft is exported in, and the names its tensors have there."""

from typing import Any

from dflash_offline.schemas.draft.config import DraftConfig
from dflash_offline.schemas.draft.config_rules import FULL, SLIDING
from dflash_offline.schemas.draft.rules import SPECULATORS, TRANSFORMERS
from dflash_offline.schemas.errors import DflashError

ZLAB = "zlab"
FORMATS = (ZLAB, SPECULATORS, TRANSFORMERS)
CONTEXT_KEYS = {"fc.weight": "encoder.fc.weight", "hidden_norm.weight": "encoder.output_norm_enc.weight"}
"""The two tensors that transformers' own draft class names otherwise."""
_LAYER_FIELDS = (
    *("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("intermediate_size", "hidden_act", "rms_norm_eps", "attention_bias", "attention_dropout", "vocab_size"),
    *("max_position_embeddings", "rope_theta", "rope_scaling", "rope_parameters", "layer_types", "sliding_window"),
    *("use_sliding_window", "max_window_layers", "tie_word_embeddings", "use_cache"),
)
"""What a plain Qwen3 decoder's config has."""


def config_json(config: DraftConfig, kind: str, target: str, architectures: list[str]) -> dict[str, Any]:
    """Return the config.json of a draft in one of `FORMATS`; `DflashError` if that format cannot say what it does.

    `target` names the target and `architectures` are its config's, which only the speculators format holds.
    """
    if kind == ZLAB:
        return config.to_json()
    document, variant = config.shared_json(), config.variant
    known = {SPECULATORS: variant.speculators is not None, TRANSFORMERS: variant.transformers}
    if not known[kind]:
        raise DflashError(
            f"The {kind} format has no draft of the variant {variant.name} ({variant.architecture}). Export it with "
            f"--format zlab."
        )
    types, causal = document["layer_types"], _causal(document)
    if kind == TRANSFORMERS:
        if any(causal) or SLIDING in types:
            raise DflashError(
                "transformers' own generator shows every layer the whole context and the whole block, but this draft "
                f"has layer_types {types} and causal layers {causal}. Export it with --format zlab."
            )
        return _transformers(document)
    if any(layer for layer, name in zip(causal, types, strict=True) if name == FULL):
        raise DflashError(
            "The speculators format has no word for causal layers with full attention, as this draft has. Export it "
            "with --format zlab."
        )
    if not architectures:
        raise DflashError(
            f"The speculators format names the target's architectures, and neither the run nor the config.json of "
            f"{target} in its cache says them. Put the cache back where the run was started from, or export it with "
            f"--format zlab."
        )
    found = _speculators(document, config.num_draft_tokens, not any(causal), target, architectures)
    return {**variant.speculators_fields(), **found}


def tensor_name(name: str, kind: str) -> str:
    """Return what a tensor of the plain format is called in another."""
    return CONTEXT_KEYS.get(name, name) if kind == TRANSFORMERS else name


def _causal(document: dict[str, Any]) -> list[bool]:
    said = document.get("is_causal", document["dflash_config"].get("causal"))
    return [name == SLIDING if said is None else said for name in document["layer_types"]]


def _transformers(document: dict[str, Any]) -> dict[str, Any]:
    """For `MuseGlimmerAssistantModel` of transformers 5.23; its defaults are another model's, so all is said."""
    kept = {name: document[name] for name in _LAYER_FIELDS if name not in ("model_type", "use_sliding_window")}
    return {
        **kept,
        "architectures": ["MuseGlimmerAssistantModel"],
        "model_type": "muse_glimmer_assistant",
        "sliding_window": document["max_position_embeddings"],  # an int by its class; no layer slides
        **{name: document[name] for name in ("block_size", "mask_token_id", "target_layer_ids", "num_target_layers")},
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
        "dtype": document["dtype"],
    }


def _speculators(
    document: dict[str, Any], num_draft_tokens: int, non_causal: bool, target: str, architectures: list[str]
) -> dict[str, Any]:
    """The layer ids there are entries of transformers' hidden states, one more than a draft's own ids."""
    return {
        "speculators_version": "0.9.0",
        "transformer_layer_config": {name: document[name] for name in _LAYER_FIELDS},
        "draft_vocab_size": document["vocab_size"],
        "block_size": document["block_size"],
        "aux_hidden_state_layer_ids": [i + 1 for i in document["target_layer_ids"]],
        "mask_token_id": document["mask_token_id"],
        "sliding_window_non_causal": non_causal,
        "sample_from_anchor": num_draft_tokens == document["block_size"],
        "speculators_config": {
            "algorithm": "dflash",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": num_draft_tokens}],
            "default_proposal_method": "greedy",
            "verifier": {"name_or_path": target, "architectures": architectures},
        },
        "tie_word_embeddings": False,
        "dtype": document["dtype"],
    }
