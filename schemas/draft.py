"""The draft's shape and its config.json, as z-lab's reference client, vLLM and SGLang read it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dflash_offline.schemas.errors import DflashError


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

    def __post_init__(self) -> None:
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
        return problems

    def to_json(self) -> dict[str, Any]:
        """Return the complete config.json; every field that some client needs, and none that a Qwen3 config lacks.

        Block size, layer ids and mask id stand both at the top and in `dflash_config`, and the rotary base both
        in `rope_theta` and in `rope_parameters`: clients differ in where they look.
        """
        dflash = {
            "block_size": self.block_size,
            "mask_token_id": self.mask_token_id,
            "target_layer_ids": list(self.target_layer_ids),
            "num_target_layers": self.num_target_layers,
        }
        return {
            "architectures": ["DFlashDraftModel"],
            "model_type": "qwen3",
            **dflash,
            "dflash_config": {**dflash, "causal": False},
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
            "layer_types": ["full_attention"] * self.num_hidden_layers,
            "sliding_window": None,
            "use_sliding_window": False,
            "max_window_layers": self.num_hidden_layers,
            "tie_word_embeddings": False,
            "use_cache": True,
            "dtype": "bfloat16",
        }

    @classmethod
    def from_json(cls, config: Mapping[str, Any], where: str) -> "DraftConfig":
        """Return the draft described by a config.json; `where` names the file in errors."""
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
        types = set(config.get("layer_types") or ["full_attention"])
        if types != {"full_attention"}:
            raise DflashError(
                f"{where} has layer_types {sorted(types)}; this version reads drafts with full attention only."
            )
        fields = {name: merged[name] for name in cls.__dataclass_fields__ if name in merged}
        wrong = [
            f"{name} is {value!r}; expected {expected}"
            for name, value in fields.items()
            if (expected := _fault_of_type(name, value))
        ]
        if wrong:
            raise DflashError(f"{where} is not a DFlash draft's config: {'; '.join(wrong)}.")
        fields["target_layer_ids"] = tuple(fields["target_layer_ids"])
        return cls(**fields)

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


def _fault_of_type(name: str, value: object) -> str:
    """Return what a field's value should have been, or an empty string if it is that."""

    def whole(number: object) -> bool:
        return isinstance(number, int) and not isinstance(number, bool)

    if name == "target_layer_ids":
        return "" if isinstance(value, list) and all(map(whole, value)) else "a list of whole numbers"
    if name in ("rms_norm_eps", "rope_theta"):
        return "" if whole(value) or isinstance(value, float) else "a number"
    return "" if whole(value) else "a whole number"
