"""The draft's shape and its config.json, as z-lab's reference client, vLLM and SGLang read it."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from dflash_offline.schemas.draft.rules import SPECULATORS, TRANSFORMERS
from dflash_offline.schemas.errors import DflashError

FULL, SLIDING = "full_attention", "sliding_attention"
CAUSAL_LAYERS = ("none", "sliding", "all")


class AttentionRule(NamedTuple):
    """What a token of a block may see in one kind of layer."""

    window: int | None = None
    """W: context less than W positions before the token, which counts itself; None for the whole context."""
    causal: bool = False
    """Whether the later tokens of its own block are hidden from it."""


@dataclass(frozen=True, kw_only=True)
class DraftConfig:
    """The shape of a DFlash draft and what it must know of its target."""

    hidden_size: int
    """H; equal to the target's, whose embeddings and head the draft borrows."""
    num_hidden_layers: int
    """Number of draft layers."""
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    """Rows of the target's embedding table."""
    target_layer_ids: tuple[int, ...]
    """Captured target layers, ascending; id i is the output of decoder layer i."""
    num_target_layers: int
    block_size: int
    """K: one anchor and K - 1 drafted tokens."""
    mask_token_id: int
    """Token that fills the slots to be predicted."""
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1_000_000.0
    max_position_embeddings: int = 40_960
    sliding_window: int | None = None
    """W of the sliding layers; at least a block, so that a window cuts context only. None without such layers."""
    sliding_layers: tuple[int, ...] = ()
    """Draft layers with a sliding window, ascending."""
    causal_layers: str = "none"
    """Layers in which a block's token does not see the later ones of its block: none, sliding or all."""

    @property
    def layer_types(self) -> tuple[str, ...]:
        """The kind of every draft layer, as config.json names it."""
        return tuple(SLIDING if i in self.sliding_layers else FULL for i in range(self.num_hidden_layers))

    @property
    def attention_rules(self) -> dict[str, AttentionRule]:
        """The rule of every kind of layer that this draft has."""
        causal = {FULL: self.causal_layers == "all", SLIDING: self.causal_layers != "none"}
        windows = {FULL: None, SLIDING: self.sliding_window}
        return {kind: AttentionRule(windows[kind], causal[kind]) for kind in sorted(set(self.layer_types))}

    def __post_init__(self) -> None:
        every_layer_slides = self.sliding_layers == tuple(range(self.num_hidden_layers)) != ()
        if self.causal_layers == "sliding" and every_layer_slides:
            object.__setattr__(self, "causal_layers", "all")  # one name for one meaning: config.json has no other
        problems = self._problems()
        if problems:
            raise DflashError("This draft cannot be built:\n  " + "\n  ".join(problems))

    def _problems(self) -> list[str]:
        ids, problems = self.target_layer_ids, []
        if not ids or list(ids) != sorted(set(ids)) or ids[0] < 0:
            problems.append(f"target_layer_ids is {list(ids)}; expected unique, ascending, not negative ids.")
        elif ids[-1] > self.num_target_layers - 2:
            problems.append(
                f"target_layer_ids ends with {ids[-1]}; the largest usable id of {self.num_target_layers} layers "
                f"is {self.num_target_layers - 2} (the last layer is never captured)."
            )
        if self.num_key_value_heads < 1 or self.num_attention_heads % self.num_key_value_heads:
            problems.append(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}."
            )
        if self.head_dim % 2:
            problems.append(f"head_dim is {self.head_dim}; rotary embedding needs an even one.")
        if self.num_hidden_layers < 1:
            problems.append(f"num_hidden_layers is {self.num_hidden_layers}; expected at least 1.")
        if self.block_size < 2:
            problems.append(f"block_size is {self.block_size}; expected at least 2 (an anchor and one slot).")
        if not 0 <= self.mask_token_id < self.vocab_size:
            problems.append(
                f"mask_token_id is {self.mask_token_id}; expected a row of the embedding table, "
                f"0 to {self.vocab_size - 1}."
            )
        return problems + self._attention_problems()

    def _attention_problems(self) -> list[str]:
        layers, window, problems = self.sliding_layers, self.sliding_window, []
        if list(layers) != sorted(set(layers)) or any(not 0 <= i < self.num_hidden_layers for i in layers):
            problems.append(
                f"sliding_layers is {list(layers)}; expected unique, ascending layers of 0 to "
                f"{self.num_hidden_layers - 1}."
            )
        if bool(layers) != (window is not None):
            problems.append(
                f"sliding_window is {window} and sliding_layers {list(layers)}; expected both or neither of them."
            )
        if window is not None and window < self.block_size:
            problems.append(
                f"sliding_window is {window}; expected at least a block of {self.block_size}: below that, clients "
                f"differ in what a block sees of itself."
            )
        if self.causal_layers not in CAUSAL_LAYERS:
            problems.append(f"causal_layers is {self.causal_layers!r}; expected one of {CAUSAL_LAYERS}.")
        if self.causal_layers == "sliding" and not layers:
            problems.append(
                "causal_layers is 'sliding', and no layer slides; expected a sliding_window, or none or all."
            )
        return problems

    def to_json(self) -> dict[str, Any]:
        """Return the complete config.json; every field that some client needs, and none that a Qwen3 config lacks.

        Block size, layer ids and mask id stand both at the top and in `dflash_config`, and the rotary base both
        in `rope_theta` and in `rope_parameters`: clients differ in where they look. So does causality, in `is_causal`
        and `dflash_config.causal`, except where it differs between layers: that, all clients take a config to mean
        which says neither.
        """
        dflash = {
            "block_size": self.block_size,
            "mask_token_id": self.mask_token_id,
            "target_layer_ids": list(self.target_layer_ids),
            "num_target_layers": self.num_target_layers,
        }
        causal = {rule.causal for rule in self.attention_rules.values()}
        said = causal.pop() if len(causal) == 1 else None
        plain = self.attention_rules == {FULL: AttentionRule()}
        return {
            "architectures": ["DFlashDraftModel"],
            "model_type": "qwen3",
            **dflash,
            "dflash_config": dflash if said is None else {**dflash, "causal": said},
            **({} if plain or said is None else {"is_causal": said}),
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.intermediate_size,
            "hidden_act": "silu",
            "rms_norm_eps": self.rms_norm_eps,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.max_position_embeddings,
            "rope_theta": self.rope_theta,
            "rope_scaling": None,
            "rope_parameters": {"rope_theta": self.rope_theta, "rope_type": "default"},
            "layer_types": list(self.layer_types),
            "sliding_window": self.sliding_window,
            "use_sliding_window": bool(self.sliding_layers),
            "max_window_layers": self.num_hidden_layers,
            "tie_word_embeddings": False,
            "use_cache": True,
            "dtype": "bfloat16",
        }

    @classmethod
    def from_json(cls, config: Mapping[str, Any], where: str) -> "DraftConfig":
        """Return the draft described by a config.json; `where` names the file in errors."""
        if (kind := draft_format(config)) != "zlab":
            raise DflashError(
                f"{where} is of the {kind} format; this command reads the zlab format. Export the run again with "
                f"`dflash export --format zlab`, and name that folder."
            )
        _refuse_not_computed(config, where)
        nested = config.get("dflash_config") or {}
        rope = config.get("rope_parameters") or {}
        merged = {**config, **nested}
        if "rope_theta" not in merged and "rope_theta" in rope:
            merged["rope_theta"] = rope["rope_theta"]
        required = [n for n, f in cls.__dataclass_fields__.items() if n not in merged and n not in cls.__dict__]
        if required:
            raise DflashError(
                f"{where} is not a DFlash draft's config: it lacks {', '.join(required)}. "
                f"Name a folder written by `dflash export`, or another DFlash draft."
            )
        plain = [name for name in cls.__dataclass_fields__ if name not in _ATTENTION_FIELDS]
        fields = {name: merged[name] for name in plain if name in merged}
        wrong = [
            f"{name} is {value!r}; expected {expected}"
            for name, value in fields.items()
            if (expected := _fault_of_type(name, value))
        ]
        if wrong:
            raise DflashError(f"{where} is not a DFlash draft's config: {'; '.join(wrong)}.")
        fields["target_layer_ids"] = tuple(fields["target_layer_ids"])
        return cls(**fields, **_attention_fields(config, where))

    @classmethod
    def read(cls, folder: Path) -> "DraftConfig":
        """Return the draft described by `folder`/config.json."""
        path = folder / "config.json"
        if not path.is_file():
            raise DflashError(f"{path} does not exist, so {folder} is not a draft. Make one with `dflash export`.")
        try:
            document = json.loads(path.read_text())
        except ValueError as error:
            raise DflashError(f"{path} is not JSON ({error}). Export the draft again.") from error
        if not isinstance(document, dict):
            raise DflashError(
                f"{path} is a JSON {type(document).__name__}; expected an object. Export the draft again."
            )
        return cls.from_json(document, str(path))


def draft_format(config: Mapping[str, Any]) -> str:
    """Return which of the export formats a config.json is of."""
    if "speculators_model_type" in config:
        return SPECULATORS
    return TRANSFORMERS if config.get("model_type") == "muse_glimmer_assistant" else "zlab"


_NOT_COMPUTED: dict[str, tuple[Any, ...]] = {
    "hidden_act": (None, "silu"),
    "attention_bias": (None, False),
    "final_logit_softcapping": (None,),
    "output_multiplier": (None, 1),
    "input_embedding_scale": (None, 1),
}
"""Settings of other drafts, with the values under which they change nothing."""


def _refuse_not_computed(config: Mapping[str, Any], where: str) -> None:
    """Raise `DflashError` naming every setting of a config.json that asks for what this program does not compute."""
    sections = {name: config.get(name) or {} for name in ("dflash_config", "rope_parameters", "rope_scaling")}
    wrong = [f"{name} is {value!r}; expected an object" for name, value in sections.items() if type(value) is not dict]
    if wrong:
        raise DflashError(f"{where} is not a DFlash draft's config: {'; '.join(wrong)}.")
    merged = {**config, **sections["dflash_config"]}
    for name, harmless in _NOT_COMPUTED.items():
        if merged.get(name) not in harmless:
            wrong.append(f"{name} is {merged[name]!r}; expected {harmless[-1]!r}")
    for place, values in {"": config, **{f"{name}.": section for name, section in sections.items()}}.items():
        if place.startswith("rope") and (kind := values.get("rope_type", values.get("type", "default"))) != "default":
            wrong.append(f"{place}rope_type is {kind!r}; expected 'default'")
        if (share := values.get("partial_rotary_factor")) not in (None, 1):
            wrong.append(f"{place}partial_rotary_factor is {share!r}; expected none")
        several = [name for name in values if name.startswith("mrope_") and values[name] not in (None, False)]
        wrong += [f"{place}{name} is {values[name]!r}; expected none" for name in several]
    bases = merged.get("rope_theta"), sections["rope_parameters"].get("rope_theta")
    if None not in bases and bases[0] != bases[1]:
        wrong.append(f"rope_theta is {bases[0]!r} and rope_parameters.rope_theta {bases[1]!r}; expected one base")
    if wrong:
        raise DflashError(
            f"{where} asks for what this program does not compute: {'; '.join(wrong)}. Serve this draft by its own "
            f"client, or train one with `dflash train`."
        )


_ATTENTION_FIELDS = ("sliding_window", "sliding_layers", "causal_layers")


def _attention_fields(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the fields of the layers' attention. Raises where clients would not agree on what the config means.

    A value of `is_causal` or `dflash_config.causal` holds for every layer; where none is given, sliding layers are
    causal and full ones are not. z-lab's client reads only the first, older vLLM only the second.
    """
    nested, number = config.get("dflash_config") or {}, config["num_hidden_layers"]
    types = config.get("layer_types") or [FULL] * number
    problems = []
    if not isinstance(types, list) or len(types) != number or any(kind not in (FULL, SLIDING) for kind in types):
        raise DflashError(f"{where} has layer_types {types!r}; expected {number} of {FULL!r} or {SLIDING!r}.")
    sliding = tuple(i for i, kind in enumerate(types) if kind == SLIDING)
    window = config.get("sliding_window") if sliding else None
    if sliding and (_fault_of_type("sliding_window", window) or config.get("use_sliding_window") is not True):
        problems.append(
            f"sliding_window is {window!r} and use_sliding_window {config.get('use_sliding_window')!r}; expected a "
            f"whole number and true, since layer_types has sliding layers"
        )
    if nested.get("use_swa"):
        problems.append("dflash_config.use_swa is true; expected the sliding layers to be named in layer_types")
    said = {"is_causal": config.get("is_causal"), "dflash_config.causal": nested.get("causal")}
    for name, value in said.items():
        if value is not None and not isinstance(value, bool):
            problems.append(f"{name} is {value!r}; expected true, false or nothing")
    meanings = [tuple(kind == SLIDING if value is None else bool(value) for kind in types) for value in said.values()]
    if meanings[0] != meanings[1]:
        problems.append(
            f"is_causal is {said['is_causal']!r} and dflash_config.causal {said['dflash_config.causal']!r}, which "
            f"clients would serve differently; expected both to be what the draft was trained with"
        )
    if problems:
        raise DflashError(f"{where} leaves open what its layers see: {'; '.join(problems)}.")
    causal = "all" if all(meanings[0]) else "sliding" if any(meanings[0]) else "none"
    return {"sliding_window": window, "sliding_layers": sliding, "causal_layers": causal}


def _fault_of_type(name: str, value: Any) -> str:
    """Return what a field's value should have been, or an empty string if it is that."""

    def whole(number: object) -> bool:
        return isinstance(number, int) and not isinstance(number, bool)

    if name == "target_layer_ids":
        return "" if isinstance(value, list) and all(map(whole, value)) else "a list of whole numbers"
    if name in ("rms_norm_eps", "rope_theta"):
        is_number = whole(value) or isinstance(value, float)
        return "" if is_number and 0 < value < math.inf else "a number above 0"
    return "" if whole(value) else "a whole number"
