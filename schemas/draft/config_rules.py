"""What a draft's config.json must say, one function for each group of rules; `draft_lint` puts them together."""

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any, TypeGuard

FULL, SLIDING = "full_attention", "sliding_attention"
SIZES = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("intermediate_size", "vocab_size", "max_position_embeddings"),
)
_ROTARY = ("partial_rotary_factor", "mrope_section", "mrope_interleaved")
Found = Iterator[tuple[str, str, str]]
"""Rule, place, what."""


def is_int(value: object, least: int | None = None) -> TypeGuard[int]:
    """Say whether a value is a whole number, of at least `least`."""
    return isinstance(value, int) and not isinstance(value, bool) and (least is None or value >= least)


def is_number(value: object) -> TypeGuard[float]:
    """Say whether a value is a number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def section(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return an object within a config; empty if there is none."""
    value = config.get(name)
    return value if isinstance(value, dict) else {}


def say(value: object) -> str:
    """Return a value as messages name it."""
    return "absent" if value is None else json.dumps(value)


def sizes(config: dict[str, Any]) -> Found:
    """Sizes that every client needs, and the activation."""
    for name in SIZES:
        if not is_int(config.get(name), 1):
            yield "shape", name, f"is {say(config.get(name))}; expected a whole number of at least 1"
    heads, groups = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if is_int(heads, 1) and is_int(groups, 1) and heads % groups:
        yield "shape", "num_attention_heads", f"is {heads}; expected a multiple of num_key_value_heads {groups}"
    if is_int(config.get("head_dim")) and config["head_dim"] % 2:
        yield "shape", "head_dim", f"is {config['head_dim']}; expected an even number, for the rotary embedding"
    eps = config.get("rms_norm_eps")
    if not is_number(eps) or eps <= 0:
        yield "shape", "rms_norm_eps", f"is {say(eps)}; expected a number above 0"
    stored = config.get("dtype", config.get("torch_dtype"))
    if stored not in (None, "bfloat16", "float16", "float32"):
        yield "dtype", "dtype", f"is {say(stored)}; expected bfloat16, float16 or float32"
    if config.get("quantization_config") is not None:
        yield "quantization", "quantization_config", "is given; expected none"
    if config.get("hidden_act") != "silu":
        yield "activation", "hidden_act", f'is {say(config.get("hidden_act"))}; expected "silu"'


def layer_ids(config: dict[str, Any]) -> Found:
    """Which target layers are read."""
    ids, layers = first(config, "target_layer_ids"), first(config, "num_target_layers")
    if layers is not None and not is_int(layers, 1):
        yield "target layers", "num_target_layers", f"is {say(layers)}; expected a whole number of at least 1"
    if not isinstance(ids, list) or not ids or not all(is_int(i, 0) for i in ids):
        yield "layer ids", "target_layer_ids", f"is {say(ids)}; expected a list of layer numbers"
        return
    if ids != sorted(set(ids)):
        yield "layer ids", "target_layer_ids", f"is {ids}; expected unique, ascending ids"
    if is_int(layers, 1) and ids[-1] > layers - 2:
        what = f"ends with {max(ids)}; the largest usable id of {layers} target layers is {layers - 2}"
        yield "last layer", "target_layer_ids", what


def first(config: Mapping[str, Any], name: str) -> Any:
    """Return a field as most clients read it: from `dflash_config`, else from the top."""
    nested = section(config, "dflash_config")
    return nested[name] if name in nested else config.get(name)


def block_and_mask(config: dict[str, Any]) -> Found:
    """Block size and mask token."""
    block, mask, rows = (first(config, name) for name in ("block_size", "mask_token_id", "vocab_size"))
    if not is_int(block, 2):
        yield "block size", "block_size", f"is {say(block)}; expected a whole number of at least 2"
    if not is_int(mask, 0) or (is_int(rows) and mask >= rows):
        end = f"0 to {rows - 1}" if is_int(rows) else "a row of the embedding table"
        yield "mask token", "mask_token_id", f"is {say(mask)}; expected {end}, a row of the target's embedding table"


def names(config: dict[str, Any]) -> Found:
    """What makes a client take the folder for a DFlash draft."""
    if config.get("architectures") != ["DFlashDraftModel"]:
        what = f'is {say(config.get("architectures"))}; expected ["DFlashDraftModel"]'
        yield "architecture", "architectures", what
    if config.get("model_type") != "qwen3":
        yield "model type", "model_type", f'is {say(config.get("model_type"))}; expected "qwen3", for every target'
    nested = section(config, "dflash_config")
    for name in ("input_embedding_scale", "output_multiplier", "final_logit_softcapping"):
        if nested.get(name, config.get(name)) not in (None, 1, 1.0):
            yield "logits", name, f"is {nested.get(name, config.get(name))}; expected 1 or nothing"


def nested_fields(config: dict[str, Any]) -> Found:
    """What must stand both at the top and in `dflash_config`."""
    nested = section(config, "dflash_config")
    for name, rule, where_nested_only in (
        ("block_size", "block size", "one place"),
        ("target_layer_ids", "layer ids", "nested layer ids"),
        ("num_target_layers", "target layers", "one place"),
        ("mask_token_id", "mask token", "nested mask token"),
    ):
        top, inner = config.get(name), nested.get(name)
        if top is None and inner is None:
            yield rule, name, "is absent; expected at the top and in dflash_config"
        elif top is None:
            yield "one place", name, "is absent; expected at the top as in dflash_config"
        elif inner is None:
            yield where_nested_only, f"dflash_config.{name}", "is absent; expected there as at the top"
        elif top != inner:
            yield rule, name, f"is {say(top)}, and dflash_config says {say(inner)}; expected the same"


def rotary(config: dict[str, Any]) -> Found:
    """The rotary embedding, said the same everywhere."""
    theta, scaling = config.get("rope_theta"), config.get("rope_scaling")
    parameters = section(config, "rope_parameters")
    inner = parameters.get("rope_theta")
    bases = [base for base in (theta, inner) if base is not None]
    if not bases or any(not is_number(base) or not 0 < base < math.inf for base in bases) or len(set(bases)) > 1:
        what = f"is {say(theta)}, and rope_parameters.rope_theta {say(inner)}; expected one number in both places"
        yield "rotary base", "rope_theta", what
    elif len(bases) == 1:
        missing = "rope_theta" if theta is None else "rope_parameters.rope_theta"
        yield "one place", missing, f"is absent; expected {say(bases[0])}, as in the other place"
    said = section(config, "rope_scaling")
    for place, values in (("", config), ("rope_parameters.", parameters), ("rope_scaling.", said)):
        for name in _ROTARY:
            if values.get(name) not in (None, 1, 1.0):
                yield "rotary keys", f"{place}{name}", f"is {say(values[name])}; expected no such key"
    old, new = _scaling(said), _scaling(parameters)
    if scaling is not None and not isinstance(scaling, dict):
        yield "rotary scaling", "rope_scaling", f"is {say(scaling)}; expected an object or nothing"
    elif scaling and parameters and old != new:
        what = f"is {say(scaling)}, and rope_parameters {say(parameters)}; expected both to say the same"
        yield "rotary scaling", "rope_scaling", what
    elif not scaling and new != _scaling({}):
        yield "one place", "rope_scaling", f"is absent; expected {say(parameters)}, as rope_parameters says"
    elif scaling and not parameters:
        yield "one place", "rope_parameters", f"is absent; expected {say(scaling)}, as rope_scaling says"


def _scaling(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a rotary scaling under the names of today, without the base."""
    kind = values.get("rope_type", values.get("type", "default"))
    return {**{k: v for k, v in values.items() if k not in ("rope_theta", "type")}, "rope_type": kind}


def attention(config: dict[str, Any]) -> Found:
    """Windows and causality, meant the same by every client."""
    types, number = config.get("layer_types"), config.get("num_hidden_layers")
    if not isinstance(types, list) or len(types) != number or any(kind not in (FULL, SLIDING) for kind in types):
        what = f'is {say(types)}; expected {number} entries, each "{FULL}" or "{SLIDING}"'
        yield "layer types", "layer_types", what
        return
    nested = section(config, "dflash_config")
    if SLIDING in types:
        window, block = config.get("sliding_window"), first(config, "block_size")
        if not is_int(window, 1) or config.get("use_sliding_window") is not True:
            what = f"is {say(window)}, and use_sliding_window {say(config.get('use_sliding_window'))}"
            yield "window", "sliding_window", f"{what}; expected a number and true, as layer_types has sliding layers"
        elif is_int(block) and window < block:
            yield "window size", "sliding_window", f"is {window}; expected at least a block of {block}"
    elif nested.get("use_swa"):
        yield "hidden window", "dflash_config.use_swa", "is true; expected the sliding layers to stand in layer_types"
    said = {"is_causal": config.get("is_causal"), "dflash_config.causal": nested.get("causal")}
    means = [[kind == SLIDING if value is None else bool(value) for kind in types] for value in said.values()]
    if means[0] != means[1]:
        what = f"is {say(said['is_causal'])}, and dflash_config.causal {say(said['dflash_config.causal'])}"
        yield "causality", "is_causal", f"{what}; expected both to mean the same for every layer"
    elif means[0] != [kind == SLIDING for kind in types]:
        yield "causality in SGLang", "is_causal", f"is {say(said['is_causal'])} with layer_types {say(types)}"


def speculators(config: dict[str, Any]) -> Found:
    """What the speculators format adds."""
    methods = section(config, "speculators_config").get("proposal_methods")
    verifier = section(section(config, "speculators_config"), "verifier")
    if config.get("speculators_model_type") != "dflash" or not isinstance(config.get("transformer_layer_config"), dict):
        what = f'is {say(config.get("speculators_model_type"))}; expected "dflash" and a transformer_layer_config'
        yield "speculators config", "speculators_model_type", what
    architectures = verifier.get("architectures")
    named = isinstance(architectures, list) and architectures and all(isinstance(name, str) for name in architectures)
    if not isinstance(verifier.get("name_or_path"), str) or not named:
        what = f"has architectures {say(architectures)}; expected name_or_path and a list of the target's architectures"
        yield "speculators config", "speculators_config.verifier", what
    method = methods[0] if isinstance(methods, list) and methods and isinstance(methods[0], dict) else {}
    tokens, block = method.get("speculative_tokens"), config.get("block_size")
    if not is_int(block) or tokens != block - 1:
        what = f"is {say(tokens)}; expected one less than block_size {say(block)}"
        yield "speculative tokens", "speculators_config.proposal_methods[0].speculative_tokens", what
    if config.get("sample_from_anchor"):
        yield "anchor", "sample_from_anchor", "is true; expected false"
    types = config.get("layer_types")
    slides = isinstance(types, list) and SLIDING in types
    if not slides and config.get("sliding_window_non_causal") is not True:
        what = f"is {say(config.get('sliding_window_non_causal'))}; expected true"
        yield "window causality", "sliding_window_non_causal", what
    if config.get("draft_vocab_size") != config.get("vocab_size"):
        what = f"is {say(config.get('draft_vocab_size'))}; expected vocab_size {say(config.get('vocab_size'))}"
        yield "vocabulary", "draft_vocab_size", what


def transformers(config: dict[str, Any]) -> Found:
    """What transformers' own draft class needs."""
    if config.get("architectures") != ["MuseGlimmerAssistantModel"]:
        yield "architecture", "architectures", f"is {say(config.get('architectures'))}"
    types, number = config.get("layer_types"), config.get("num_hidden_layers")
    if not isinstance(types, list) or len(types) != number or any(kind not in (FULL, SLIDING) for kind in types):
        yield "default layers", "layer_types", f"is {say(types)}; expected {number} entries, none by default"


def fits_target(config: dict[str, Any], target: Mapping[str, Any]) -> Found:
    """Whether the draft was made for this target."""
    text = {**target, **section(target, "text_config")}
    for ours, theirs in (
        ("hidden_size", "hidden_size"),
        ("vocab_size", "vocab_size"),
        ("num_target_layers", "num_hidden_layers"),
    ):
        found, wanted = first(config, ours), text.get(theirs)
        if None not in (found, wanted) and found != wanted:
            yield "target", ours, f"is {found}; expected {wanted}, the target's {theirs}"
