"""The draft's shape and its config.json, as z-lab's reference client, vLLM and SGLang read it."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from msgspec import Meta

from dflash_offline.schemas.checked import Index, LayerIndex, Size, checked, unlike
from dflash_offline.schemas.draft.config_rules import (
    FULL,
    SIZES,
    SLIDING,
    causal_by_layer,
    config_faults,
    draft_format,
    layer_types,
    read_document,
)
from dflash_offline.schemas.draft.rules import RULES, DraftFault
from dflash_offline.schemas.draft.values import first, section
from dflash_offline.schemas.draft.weights import expected_shapes
from dflash_offline.schemas.errors import DflashError
from dflash_offline.schemas.variants.table import BASE, VARIANTS, find_variant
from dflash_offline.schemas.variants.variant import Variant

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

    hidden_size: Size
    """H; equal to the target's, whose embeddings and head the draft borrows."""
    num_hidden_layers: Annotated[int, Meta(ge=1, le=4096)]
    """Number of draft layers."""
    num_attention_heads: Size
    num_key_value_heads: Size
    head_dim: Size
    intermediate_size: Size
    vocab_size: Size
    """Rows of the target's embedding table."""
    target_layer_ids: tuple[LayerIndex, ...]
    """Captured target layers, ascending; id i is the output of decoder layer i."""
    num_target_layers: Annotated[int, Meta(ge=1, le=4096)]
    block_size: Size
    """K: the anchor's slot and those of masks behind it."""
    mask_token_id: Index
    """Token that fills the slots to be predicted."""
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1_000_000.0
    max_position_embeddings: Index = 40_960
    sliding_window: Index | None = None
    """W of the sliding layers; at least a block, so that a window cuts context only. None without such layers."""
    sliding_layers: tuple[LayerIndex, ...] = ()
    """Draft layers with a sliding window, ascending."""
    causal_layers: str = "none"
    """Layers in which a block's token does not see the later ones of its block: none, sliding or all."""
    variant: Variant = field(default_factory=BASE)
    """What the draft has beyond the parts of every draft."""

    @property
    def num_draft_tokens(self) -> int:
        """Tokens that a block drafts: one of each slot that predicts, of the base draft K - 1."""
        return self.block_size - self.variant.first_slot

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

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The exact key set of the draft's weights, with every shape."""
        return expected_shapes(vars(self), self.variant)

    def __post_init__(self) -> None:
        every_layer_slides = self.sliding_layers == tuple(range(self.num_hidden_layers)) != ()
        if self.causal_layers == "sliding" and every_layer_slides:
            object.__setattr__(self, "causal_layers", "all")  # one name for one meaning: config.json has no other
        problems = self._attention_problems()
        problems += [f"{fault.place} {fault.what}." for fault in _unreadable(self.to_json())]
        if problems:
            raise DflashError("This draft cannot be built:\n  " + "\n  ".join(problems))

    def _attention_problems(self) -> list[str]:
        """Return the faults of the fields that config.json does not have; its own rules judge all others."""
        layers, problems = self.sliding_layers, []
        if list(layers) != sorted(set(layers)) or any(not 0 <= i < self.num_hidden_layers for i in layers):
            problems.append(
                f"sliding_layers is {list(layers)}; expected unique, ascending layers of 0 to "
                f"{self.num_hidden_layers - 1}."
            )
        if self.sliding_window is not None and not layers:
            problems.append(f"sliding_window is {self.sliding_window} and no layer slides; expected both or neither.")
        if self.causal_layers not in CAUSAL_LAYERS:
            problems.append(f"causal_layers is {self.causal_layers!r}; expected one of {CAUSAL_LAYERS}.")
        if self.causal_layers == "sliding" and not layers:
            problems.append(
                "causal_layers is 'sliding', and no layer slides; expected a sliding_window, or none or all."
            )
        return problems

    def shared_json(self) -> dict[str, Any]:
        """Return the config.json of a base draft of this shape.

        It has every field that some client needs, and none that a Qwen3 config lacks.

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
            "architectures": [BASE.architecture],
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

    def to_json(self) -> dict[str, Any]:
        """Return the complete config.json, as the clients of the draft's variant read it."""
        return self.variant.written(self.shared_json())

    def to_record(self) -> dict[str, Any]:
        """Return all fields as a run's record holds them; those of a variant stand beside the others."""
        own = {"architecture": self.variant.architecture, **vars(self.variant)}
        shared = {name: value for name, value in vars(self).items() if name != "variant"}
        return shared if isinstance(self.variant, BASE) else shared | own

    @classmethod
    def from_record(cls, record: dict[str, Any], path: Path) -> "DraftConfig":
        """Return the draft of a run's record; `CacheError` naming `path` and what cannot be right."""
        name = record.get("architecture", BASE.architecture)
        if name not in VARIANTS:
            raise unlike(path, f"the draft's architecture is {name!r}, and known are {', '.join(VARIANTS)}")
        shared = checked({name: value for name, value in record.items() if name != "variant"}, cls, path)
        try:
            return replace(shared, variant=checked(record, VARIANTS[name], path))
        except DflashError as error:
            raise unlike(path, str(error)) from error

    @classmethod
    def from_json(cls, config: Mapping[str, Any], where: str) -> "DraftConfig":
        """Return the draft described by a config.json; `where` names the file in errors."""
        kind, variant = draft_format(config), find_variant(config)
        if kind != "zlab":
            raise DflashError(
                f"{where} is of the {kind} format; this command reads the zlab format. Export the run again with "
                f"`dflash export --format zlab`, and name that folder."
            )
        if faults := _unreadable(config):
            listed = "\n  ".join(f"{fault.place} {fault.what}: {fault.why}." for fault in faults)
            raise DflashError(
                f"{where} cannot be read as a DFlash draft's:\n  {listed}\n"
                f"Name a folder written by `dflash export`, or another sound DFlash draft."
            )
        assert variant is not None, "an unknown one is a fault"
        types = layer_types(config)
        causal = causal_by_layer(types, config.get("is_causal"))
        theta = config.get("rope_theta")
        try:
            return cls(
                **{name: config[name] for name in SIZES},
                **{name: first(config, name) for name in ("num_target_layers", "block_size", "mask_token_id")},
                target_layer_ids=tuple(first(config, "target_layer_ids")),
                rms_norm_eps=config["rms_norm_eps"],
                rope_theta=section(config, "rope_parameters")["rope_theta"] if theta is None else theta,
                sliding_window=config["sliding_window"] if SLIDING in types else None,
                sliding_layers=tuple(i for i, kind in enumerate(types) if kind == SLIDING),
                causal_layers="all" if all(causal) else "sliding" if any(causal) else "none",
                variant=variant.read(config),
            )
        except DflashError as error:
            raise DflashError(f"{where}: {error}") from error

    @classmethod
    def read(cls, folder: Path) -> "DraftConfig":
        """Return the draft described by `folder`/config.json."""
        document = read_document(folder)
        if isinstance(document, str):
            raise DflashError(f"{folder / 'config.json'} {document}. Name a draft's folder; `dflash export` makes one.")
        return cls.from_json(document, str(folder / "config.json"))


def _unreadable(config: Mapping[str, Any]) -> list[DraftFault]:
    """Return the faults of a config.json that leave open what the draft computes, or that are not computed here."""
    return [fault for fault in config_faults(config) if not RULES[fault.rule].clear]
