"""What a draft's config.json must say for our own reader and every client, one function for each group of rules."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dflash_offline.schemas.draft.rules import SPECULATORS, TRANSFORMERS, DraftFault, make_fault
from dflash_offline.schemas.draft.values import Found, first, is_int, is_number, say, section
from dflash_offline.schemas.variants.table import BASE, VARIANTS, find_variant

FULL, SLIDING = "full_attention", "sliding_attention"
SIZES = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("intermediate_size", "vocab_size", "max_position_embeddings"),
)


def read_document(folder: Path) -> dict[str, Any] | str:
    """Return the object in `folder`/config.json, or what is wrong with that file."""
    try:
        document = json.loads((folder / "config.json").read_text())
    except FileNotFoundError:
        return "is missing"
    except (OSError, ValueError, RecursionError) as error:
        return f"cannot be read: {error}"
    return document if isinstance(document, dict) else f"is a JSON {type(document).__name__}; expected an object"


def draft_format(config: Mapping[str, Any]) -> str:
    """Return which of the export formats a config.json is of."""
    if "speculators_model_type" in config:
        return SPECULATORS
    return TRANSFORMERS if config.get("model_type") == "muse_glimmer_assistant" else "zlab"


def config_faults(config: Mapping[str, Any], target: Mapping[str, Any] | None = None) -> list[DraftFault]:
    """Return every fault of a config.json; `target` is its target's, to be compared with if given."""
    kind = draft_format(config)
    flat = flat_config(config, kind)
    rules = {
        "zlab": (names, nested_fields, attention),
        SPECULATORS: (speculators,),
        TRANSFORMERS: (transformers,),
    }[kind]
    found = [fault for rule in (sizes, layer_ids, block_and_mask, rotary, *rules, variant) for fault in rule(flat)]
    if target is not None:
        found += fits_target(flat, target)
    return [make_fault(*one, kind) for one in dict.fromkeys(found)]


def flat_config(config: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Return the config with the fields of every format where the plain one has them."""
    if kind != SPECULATORS:
        return dict(config)
    ids = config.get("aux_hidden_state_layer_ids")
    shifted = [i - 1 if is_int(i) else i for i in ids] if isinstance(ids, list) else ids
    return {**section(config, "transformer_layer_config"), **config, "target_layer_ids": shifted}


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
    if config.get("attention_bias"):
        yield "not computed", "attention_bias", f"is {say(config['attention_bias'])}; expected false"
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


def spread_layers(num_layers: int, count: int) -> list[int]:
    """Return the layers that z-lab's reference client reads by default, `count` of them spread over a target."""
    if count == 1:
        return [num_layers // 2]
    return [round(1 + i * (num_layers - 4) / (count - 1)) for i in range(count)]


def block_and_mask(config: dict[str, Any]) -> Found:
    """Block size and mask token."""
    block, mask, rows = (first(config, name) for name in ("block_size", "mask_token_id", "vocab_size"))
    kind = find_variant(config)
    least = 1 + (kind.first_slot if kind else 1)
    if not is_int(block, least):
        yield "block size", "block_size", f"is {say(block)}; expected a whole number of at least {least}"
    if not is_int(mask, 0) or (is_int(rows) and mask >= rows):
        end = f"0 to {rows - 1}" if is_int(rows) else "a row of the embedding table"
        yield "mask token", "mask_token_id", f"is {say(mask)}; expected {end}, a row of the target's embedding table"


def names(config: dict[str, Any]) -> Found:
    """What makes a client take the folder for a DFlash draft."""
    if config.get("architectures") is None:
        yield "no architecture", "architectures", f"is absent; expected {say([BASE.architecture])}"
    elif find_variant(config) is None:
        known = " or ".join(say([name]) for name in VARIANTS)
        yield "architecture", "architectures", f"is {say(config['architectures'])}; expected {known}"
    if config.get("model_type") != "qwen3":
        yield "model type", "model_type", f'is {say(config.get("model_type"))}; expected "qwen3", for every target'
    for name, harmless in (("input_embedding_scale", 1), ("output_multiplier", 1), ("final_logit_softcapping", None)):
        if (value := first(config, name)) not in (None, harmless):
            yield "logits", name, f"is {say(value)}; expected {harmless or 'nothing'}"


def nested_fields(config: dict[str, Any]) -> Found:
    """What must stand both at the top and in `dflash_config`."""
    nested = section(config, "dflash_config")
    if config.get("dflash_config") is not None and not isinstance(config["dflash_config"], dict):
        yield "config", "dflash_config", f"is {say(config['dflash_config'])}; expected an object"
    kind = find_variant(config)
    for name, rule, where_nested_only in (
        ("block_size", "block size", "one place"),
        ("target_layer_ids", "layer ids", "nested layer ids"),
        ("num_target_layers", "target layers", "one place"),
        ("mask_token_id", "mask token", "nested mask token"),
    ):
        top, inner = config.get(name), nested.get(name)
        if top is None and inner is None:
            yield rule, name, "is absent; expected at the top and in dflash_config"
        elif kind is not None and (
            (top is None and name in kind.nested_only) or (inner is None and name in kind.top_only)
        ):
            continue
        elif top is None:
            yield "one place", name, "is absent; expected at the top as in dflash_config"
        elif inner is None:
            yield where_nested_only, f"dflash_config.{name}", "is absent; expected there as at the top"
        elif top != inner:
            yield rule, name, f"is {say(top)}, and dflash_config says {say(inner)}; expected the same"


def rotary(config: dict[str, Any]) -> Found:
    """The rotary embedding, said the same everywhere, and a plain one."""
    theta, inner = config.get("rope_theta"), section(config, "rope_parameters").get("rope_theta")
    bases = [base for base in (theta, inner) if base is not None]
    if not bases or any(not is_number(base) or base <= 0 for base in bases) or len(set(bases)) > 1:
        what = f"is {say(theta)}, and rope_parameters.rope_theta {say(inner)}; expected one number in both places"
        yield "rotary base", "rope_theta", what
    elif len(bases) == 1:
        missing = "rope_theta" if theta is None else "rope_parameters.rope_theta"
        yield "one place", missing, f"is absent; expected {say(bases[0])}, as in the other place"
    yield from _rotary_keys(config)
    yield from _rotary_scaling(config.get("rope_scaling"), config.get("rope_parameters"))


def _rotary_keys(config: dict[str, Any]) -> Found:
    for place in ("", "rope_parameters", "rope_scaling"):
        values = section(config, place) if place else config
        for name, value in values.items():
            is_partial = name == "partial_rotary_factor" and value != 1
            if value is not None and (is_partial or (name.startswith("mrope_") and value is not False)):
                yield "rotary keys", f"{place}.{name}".lstrip("."), f"is {say(value)}; expected no such key"


def _rotary_scaling(old: Any, new: Any) -> Found:
    """`rope_scaling` and `rope_parameters`, the older and the newer name of one thing."""
    said = {"rope_scaling": old, "rope_parameters": new}
    if wrong := [name for name, value in said.items() if value is not None and not isinstance(value, dict)]:
        for name in wrong:
            yield "rotary scaling", name, f"is {say(said[name])}; expected an object or nothing"
        return
    scaling = {name: _scaling(value or {}) for name, value in said.items()}
    if old and new and scaling["rope_scaling"] != scaling["rope_parameters"]:
        what = f"is {say(old)}, and rope_parameters {say(new)}; expected both to say the same"
        yield "rotary scaling", "rope_scaling", what
    elif not old and scaling["rope_parameters"] != _scaling({}):
        yield "one place", "rope_scaling", f"is absent; expected {say(new)}, as rope_parameters says"
    elif old and not new:
        yield "one place", "rope_parameters", f"is absent; expected {say(old)}, as rope_scaling says"
    for name in said:
        if (kind := scaling[name]["rope_type"]) != "default":
            yield "not computed", f"{name}.rope_type", f'is {say(kind)}; expected "default"'


def _scaling(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a rotary scaling under the names of today, without the base."""
    kind = values.get("rope_type", values.get("type", "default"))
    return {**{k: v for k, v in values.items() if k not in ("rope_theta", "type")}, "rope_type": kind}


def attention(config: dict[str, Any]) -> Found:
    """Windows and causality, meant the same by every client."""
    types, number = config.get("layer_types"), config.get("num_hidden_layers")
    if types is None and is_int(number, 1):
        yield "no layer types", "layer_types", f'is absent; expected {number} entries, each "{FULL}" or "{SLIDING}"'
        types = layer_types(config)
    if not isinstance(types, list) or len(types) != number or any(kind not in (FULL, SLIDING) for kind in types):
        what = f'is {say(types)}; expected {say(number)} entries, each "{FULL}" or "{SLIDING}"'
        yield "layer types", "layer_types", what
        return
    if SLIDING in types:
        window, block = config.get("sliding_window"), first(config, "block_size")
        if not is_int(window, 1) or config.get("use_sliding_window") is not True:
            what = f"is {say(window)}, and use_sliding_window {say(config.get('use_sliding_window'))}"
            yield "window", "sliding_window", f"{what}; expected a number and true, as layer_types has sliding layers"
        elif is_int(block) and window < block:
            yield "window size", "sliding_window", f"is {window}; expected at least a block of {block}"
    nested = section(config, "dflash_config")
    if FULL in types and nested.get("use_swa"):
        yield "hidden window", "dflash_config.use_swa", "is true; expected the sliding layers to stand in layer_types"
    said = {"is_causal": config.get("is_causal"), "dflash_config.causal": nested.get("causal")}
    if wrong := [name for name, value in said.items() if not (value is None or isinstance(value, bool))]:
        for name in wrong:
            yield "causality", name, f"is {say(said[name])}; expected true, false or nothing"
        return
    means = [causal_by_layer(types, value) for value in said.values()]
    if means[0] != means[1]:
        what = f"is {say(said['is_causal'])}, and dflash_config.causal {say(said['dflash_config.causal'])}"
        yield "causality", "is_causal", f"{what}; expected both to mean the same for every layer"
    elif means[0] != causal_by_layer(types, None):
        yield "causality in SGLang", "is_causal", f"is {say(said['is_causal'])} with layer_types {say(types)}"


def layer_types(config: Mapping[str, Any]) -> list[str]:
    """Return the kind of every draft layer; full ones where the config names none."""
    named = config.get("layer_types")
    return [FULL] * config["num_hidden_layers"] if named is None else list(named)


def causal_by_layer(types: list[str], said: object) -> list[bool]:
    """Return which layers a value of `is_causal` makes causal: all or none, and without one those that slide."""
    return [kind == SLIDING if said is None else bool(said) for kind in types]


def speculators(config: dict[str, Any]) -> Found:
    """What the speculators format adds."""
    methods = section(config, "speculators_config").get("proposal_methods")
    verifier = section(section(config, "speculators_config"), "verifier")
    if find_variant(config) is None or not isinstance(config.get("transformer_layer_config"), dict):
        known = " or ".join(say(kind.speculators) for kind in VARIANTS.values() if kind.speculators)
        what = f"is {say(config.get('speculators_model_type'))}; expected {known} and a transformer_layer_config"
        yield "speculators config", "speculators_model_type", what
    architectures = verifier.get("architectures")
    named = isinstance(architectures, list) and architectures and all(isinstance(name, str) for name in architectures)
    if not isinstance(verifier.get("name_or_path"), str) or not named:
        what = f"has architectures {say(architectures)}; expected name_or_path and a list of the target's architectures"
        yield "speculators config", "speculators_config.verifier", what
    method = methods[0] if isinstance(methods, list) and methods and isinstance(methods[0], dict) else {}
    tokens, block, kind = method.get("speculative_tokens"), config.get("block_size"), find_variant(config)
    first_slot = kind.first_slot if kind else 1
    if not is_int(block) or tokens != block - first_slot:
        what = f"is {say(tokens)}; expected {'one less than ' if first_slot else ''}block_size {say(block)}"
        yield "speculative tokens", "speculators_config.proposal_methods[0].speculative_tokens", what
    if bool(config.get("sample_from_anchor")) != (first_slot == 0):
        what = f"is {say(config.get('sample_from_anchor'))}; expected {say(first_slot == 0)}"
        yield "anchor", "sample_from_anchor", what
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


def variant(config: dict[str, Any]) -> Found:
    """The fields of the draft's own variant."""
    kind = find_variant(config)
    if kind is not None:
        yield from kind.faults(config)


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
    kind = find_variant(config)
    if kind is not None and kind.needs_plain_head and _quantizes_head(section(text, "quantization_config")):
        yield "head in vLLM", "quantization_config", "of the target covers lm_head; expected a head in plain numbers"


def _quantizes_head(quantization: dict[str, Any]) -> bool:
    """Say whether a target's quantization_config covers its head, in the two formats that may."""
    ignored = quantization.get("ignore")
    spared = [str(name) for name in ignored] if isinstance(ignored, list) else []
    packed = quantization.get("quant_method") == "compressed-tensors" and not any("lm_head" in name for name in spared)
    return packed or quantization.get("lm_head") is True
