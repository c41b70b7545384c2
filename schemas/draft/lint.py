"""Does a draft folder, ours or another's, hold what the clients' loaders demand? Every fault, with the rule it breaks.

Pure Python on config.json and the headers of the weight files, and numpy for values that are not finite.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from dflash_offline.schemas.draft import config_rules as on_config
from dflash_offline.schemas.draft.config import draft_format
from dflash_offline.schemas.draft.config_rules import SIZES, Found, first, is_int, say
from dflash_offline.schemas.draft.formats import CONTEXT_KEYS
from dflash_offline.schemas.draft.rules import RULES, SPECULATORS, TRANSFORMERS, VLLM
from dflash_offline.schemas.draft.weights import StoredTensor, expected_shapes, read_header

RECORD = "dflash"
"""Key in the metadata of our weight files, under which stands what the weights were trained with: `RECORDED`."""
RECORDED = {"target_layer_ids": "layer ids as recorded", "block_size": "block size", "mask_token_id": "mask token"}
WEIGHTS = "model.safetensors"
BORROWED = ("embed_tokens.weight", "lm_head.weight", "verifier_lm_head.weight", "verifier_norm.weight")


@dataclass(frozen=True, kw_only=True)
class DraftFault:
    """One demand that a draft folder does not meet."""

    rule: str
    """Its name in `RULES`."""
    place: str
    what: str
    """What was found and what was expected."""
    why: str
    breaks: tuple[str, ...]
    """The clients that refuse the draft or serve it wrongly; none where only older readers may."""


def is_draft(folder: Path) -> bool:
    """Say whether a folder looks like a draft's, sound or not, and not like a cache's."""
    return (folder / "config.json").is_file() or (folder.is_dir() and any(folder.glob("*.safetensors")))


def lint_draft(folder: Path, target: Mapping[str, Any] | None = None) -> list[DraftFault]:
    """Return every fault of a draft folder; `target` is its target's config.json, to be compared with if given."""
    try:
        config = json.loads((folder / "config.json").read_text())
        if not isinstance(config, dict):
            raise ValueError(f"is a JSON {type(config).__name__}; expected an object")
    except (OSError, ValueError) as error:
        why = RULES["config"]
        what = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read: {error}"
        return [DraftFault(rule="config", place="config.json", what=what, why=why.why, breaks=why.breaks)]
    kind = draft_format(config)
    flat = _flat(config, kind)
    rules = {
        "zlab": (on_config.names, on_config.nested_fields, on_config.attention),
        SPECULATORS: (on_config.speculators,),
        TRANSFORMERS: (on_config.transformers,),
    }[kind]
    always = (on_config.sizes, on_config.layer_ids, on_config.block_and_mask, on_config.rotary)
    found = [fault for rule in (*always, *rules) for fault in rule(flat)]
    found += _weights(folder, flat, kind)
    if target is not None:
        found += on_config.fits_target(flat, target)
    return [_fault(rule, place, what, kind) for rule, place, what in dict.fromkeys(found)]


def _fault(name: str, place: str, what: str, kind: str) -> DraftFault:
    rule = RULES[name]
    if not rule.breaks:
        return DraftFault(rule=name, place=place, what=what, why=rule.why, breaks=())
    clients = {"zlab": rule.breaks, SPECULATORS: (VLLM, SPECULATORS), TRANSFORMERS: (TRANSFORMERS,)}[kind]
    return DraftFault(rule=name, place=place, what=what, why=rule.why, breaks=clients)


def _flat(config: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Return the config with the fields of every format where the plain one has them."""
    if kind != SPECULATORS:
        return dict(config)
    layer, ids = config.get("transformer_layer_config"), config.get("aux_hidden_state_layer_ids")
    shifted = [i - 1 if is_int(i) else i for i in ids] if isinstance(ids, list) else ids
    return {**(layer if isinstance(layer, dict) else {}), **config, "target_layer_ids": shifted}


def _weights(folder: Path, config: dict[str, Any], kind: str) -> Found:
    paths = sorted(folder.glob("*.safetensors"))
    yield from _weight_files(folder)
    tensors: dict[str, StoredTensor] = {}
    for path in paths:
        try:
            held, metadata = read_header(path)
        except ValueError as error:
            yield "weights", path.name, f"cannot be read: {error}"
            return
        tensors |= held
        if "format" not in metadata:
            yield "format", path.name, 'has no metadata "format"; expected "pt"'
        yield from _recorded(config, metadata, path.name)
    if paths:
        yield from _tensors(config, tensors, kind)


def _weight_files(folder: Path) -> Found:
    """Whether a client finds the weights: under the one name, or by an index of several files."""
    index = folder / f"{WEIGHTS}.index.json"
    if (folder / WEIGHTS).is_file():
        return
    if not index.is_file():
        yield "weights", WEIGHTS, "is missing; expected the draft's weights there, or an index of several files"
        return
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        absent = [name for name in names if not (folder / name).is_file()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        yield "weights", index.name, f"cannot be read ({error!r}); expected a weight_map of tensors to files"
        return
    for name in absent:
        yield "weights", name, f"is missing; {index.name} names it"


def _recorded(config: dict[str, Any], metadata: dict[str, str], name: str) -> Found:
    """What the weights were trained with, where their file says it; else whether the ids look shifted."""
    ids, layers = first(config, "target_layer_ids"), first(config, "num_target_layers")
    if RECORD in metadata:
        try:
            trained = {field: json.loads(metadata[RECORD])[field] for field in RECORDED}
        except (ValueError, KeyError, TypeError) as error:
            yield "weights", name, f"has a record of its training that cannot be read ({error!r})"
            return
        for field, rule in RECORDED.items():
            value = trained[field]
            if first(config, field) != value:
                yield rule, field, f"is {say(first(config, field))}, but {name} was trained with {say(value)}"
    elif isinstance(ids, list) and is_int(layers, 5) and ids == [i + 1 for i in _spread(layers, len(ids))]:
        usual = [i - 1 for i in ids]
        yield "layer ids shifted", "target_layer_ids", f"is {ids}, each one more than the usual {usual}"


def _spread(num_layers: int, count: int) -> list[int]:
    """The reference client's default ids, which most drafts are trained with."""
    if count == 1:
        return [num_layers // 2]
    return [round(1 + i * (num_layers - 4) / (count - 1)) for i in range(count)]


def _tensors(config: dict[str, Any], tensors: dict[str, StoredTensor], kind: str) -> Found:
    ids = first(config, "target_layer_ids")
    if any(not is_int(config.get(name), 1) for name in SIZES) or not isinstance(ids, list):
        return  # named above; the shapes follow from these
    if config["num_hidden_layers"] > len(tensors):
        what = f"is {config['num_hidden_layers']}, and there are only {len(tensors)} tensors; expected 11 in each layer"
        yield "missing", "num_hidden_layers", what
        return
    sizes = SimpleNamespace(**{name: config[name] for name in SIZES}, target_layer_ids=ids)
    expected = expected_shapes(sizes)
    if config.get("attention_bias"):
        biased = {name: shape for name, shape in expected.items() if ".self_attn." in name and "_proj." in name}
        expected |= {name.replace(".weight", ".bias"): shape[:1] for name, shape in biased.items()}
    if kind == TRANSFORMERS:
        expected = {CONTEXT_KEYS.get(name, name): shape for name, shape in expected.items()}
    prefixed = [name for name in tensors if name.startswith("model.") and name.removeprefix("model.") in expected]
    if prefixed:
        yield "prefix", prefixed[0], f"and {len(prefixed) - 1} more begin with `model.`; expected no prefix"
    for name, shape in expected.items():
        if name not in tensors and f"model.{name}" not in tensors:
            yield "missing", name, f"is missing; expected {list(shape)}"
    for name, tensor in tensors.items():
        wanted = expected.get(name.removeprefix("model."))
        if wanted is None and not (kind == SPECULATORS and name in BORROWED):
            yield "unexpected", name, f"{list(tensor.shape)} is in no client's draft"
        elif wanted is not None and tensor.shape != wanted:
            yield "tensor shape", name, f"is {list(tensor.shape)}; expected {list(wanted)}"
        if not tensor.is_float:
            yield "dtype", name, f"is {tensor.dtype}; expected BF16, F16 or F32"
        elif count := tensor.count_not_finite():
            yield "finite", name, f"holds {count} values that are not finite"
