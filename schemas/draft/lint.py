"""Does a draft folder, ours or another's, hold what the clients' loaders demand? Every fault, with the rule it breaks.

Pure Python on config.json, the headers of the weight files and the checksums, and numpy for values that are not finite.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

from dflash_offline.schemas.checked import Count, checked
from dflash_offline.schemas.draft.checksums import checksum_faults
from dflash_offline.schemas.draft.config_rules import (
    SIZES,
    config_faults,
    draft_format,
    flat_config,
    read_document,
    spread_layers,
)
from dflash_offline.schemas.draft.formats import CONTEXT_KEYS
from dflash_offline.schemas.draft.rules import SPECULATORS, TRANSFORMERS, DraftFault, make_fault
from dflash_offline.schemas.draft.values import Found, first, is_int, say
from dflash_offline.schemas.draft.weights import StoredTensor, expected_shapes, read_header, shape_faults
from dflash_offline.schemas.sealed import parse_json
from dflash_offline.schemas.variants.table import find_variant

RECORD = "dflash"
"""Key in the metadata of our weight files, under which stands what the weights were trained with: `RECORDED`."""
RECORDED = {"target_layer_ids": "layer ids as recorded", "block_size": "block size", "mask_token_id": "mask token"}
WEIGHTS = "model.safetensors"
BORROWED = ("embed_tokens.weight", "lm_head.weight", "verifier_lm_head.weight", "verifier_norm.weight")


class _Trained(TypedDict, total=False):
    caches: list[str]
    val_samples: Count
    target: dict[str, Any] | None
    run: str
    step: Count


def trained_with(metadata: Mapping[str, str], path: Path) -> dict[str, Any] | None:
    """Return what a weight file's metadata say of its training, None where they do not; `CacheError` if they lie."""
    if RECORD not in metadata:
        return None
    trained: dict[str, Any] = parse_json(metadata[RECORD].encode(), path)
    checked(trained, _Trained, path, "Export the draft again.")
    return trained


def is_draft(folder: Path) -> bool:
    """Say whether a folder looks like a draft's, sound or not, and not like a cache's."""
    return (folder / "config.json").is_file() or (folder.is_dir() and any(folder.glob("*.safetensors")))


def lint_draft(folder: Path, target: Mapping[str, Any] | None = None) -> list[DraftFault]:
    """Return every fault of a draft folder; `target` is its target's config.json, to be compared with if given."""
    config = read_document(folder)
    kind = "zlab" if isinstance(config, str) else draft_format(config)
    changed = [make_fault(*one, kind) for one in checksum_faults(folder)]
    if isinstance(config, str):
        return [make_fault("config", "config.json", config), *changed]
    weights = _weights(folder, flat_config(config, kind), kind)
    return [*config_faults(config, target), *(make_fault(*one, kind) for one in dict.fromkeys(weights)), *changed]


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
        names = sorted({str(name) for name in json.loads(index.read_text())["weight_map"].values()})
        absent = [name for name in names if not (folder / name).is_file()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
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
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            yield "weights", name, f"has a record of its training that cannot be read ({error!r})"
            return
        for field, rule in RECORDED.items():
            value = trained[field]
            if first(config, field) != value:
                yield rule, field, f"is {say(first(config, field))}, but {name} was trained with {say(value)}"
    elif isinstance(ids, list) and is_int(layers, 5) and ids == [i + 1 for i in spread_layers(layers, len(ids))]:
        usual = [i - 1 for i in ids]
        yield "layer ids shifted", "target_layer_ids", f"is {ids}, each one more than the usual {usual}"


def _tensors(config: dict[str, Any], tensors: dict[str, StoredTensor], kind: str) -> Found:
    ids = first(config, "target_layer_ids")
    variant = find_variant(config)
    if variant is None or any(variant.faults(config)):
        return  # named above, as below; the shapes follow from these
    if any(not is_int(config.get(name), 1) for name in SIZES) or not isinstance(ids, list):
        return
    if config["num_hidden_layers"] > len(tensors):
        what = f"is {config['num_hidden_layers']}, and there are only {len(tensors)} tensors; expected 11 in each layer"
        yield "missing", "num_hidden_layers", what
        return
    expected = expected_shapes({**config, "target_layer_ids": ids}, variant.read(config))
    if config.get("attention_bias"):
        biased = {name: shape for name, shape in expected.items() if ".self_attn." in name and "_proj." in name}
        expected |= {name.replace(".weight", ".bias"): shape[:1] for name, shape in biased.items()}
    if kind == TRANSFORMERS:
        expected = {CONTEXT_KEYS.get(name, name): shape for name, shape in expected.items()}
    prefixed = [name for name in tensors if name.startswith("model.") and name.removeprefix("model.") in expected]
    if prefixed:
        yield "prefix", prefixed[0], f"and {len(prefixed) - 1} more begin with `model.`; expected no prefix"
    plain = {name.removeprefix("model.") if name in prefixed else name: t.shape for name, t in tensors.items()}
    for rule, name, what in shape_faults(plain, expected):
        if not (kind == SPECULATORS and name in BORROWED):
            yield rule, name, what
    for name, tensor in tensors.items():
        if not tensor.is_float:
            yield "dtype", name, f"is {tensor.dtype}; expected BF16, F16 or F32"
        elif count := tensor.count_not_finite():
            yield "finite", name, f"holds {count} values that are not finite"
