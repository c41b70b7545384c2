"""What a target's weight files hold, and what of it a load would leave out: scales, packed weights, whole layers."""

import json
import pickle
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dflash_offline.schemas.errors import DflashError, UnsupportedTargetError

_LAYOUTS = ("model.safetensors", "pytorch_model.bin")
"""Names of whole checkpoints, in the order in which transformers looks for them; a sharded one has an index beside."""
_PART_OF_QUANTIZATION = re.compile(
    r"\.(qweight|qzeros|scales|g_idx|SCB|weight_format|weight_packed|weight_shape|weight\.(absmax|quant_\w+).*)$"
    r"|[._](weight|input|act|activation|pre_quant)_((global_)?scale(_inv|_2)?|zero_point)$"
    r"|_proj_(blocks|scales)$"
)
_NARROW = re.compile(r"(F8|F6|F4|I8|U8|I16|U16|I32|U32|float8|float4|int8|uint8|int16|uint16|int32|uint32|q).*")
"""Types of stored numbers that mean something only together with a scale."""
_MASK_BUFFER = re.compile(r"\.(masked_)?bias$")
"""Causal masks that old checkpoints keep as bytes."""
_HARMLESS = re.compile(r"rotary_emb\.inv_freq$|\.(k_scale|v_scale|kv_scale)$")
"""Tables that a model computes itself, and scales by which a server may store its key-value cache."""


class UnreadableCheckpointError(UnsupportedTargetError):
    """The weights are quantized in a way that transformers does not undo."""


def quantization_of(config: Any) -> Mapping[str, Any] | None:
    """Return what a config says of its weights' quantization, or None; a nested config may say it in its text part."""
    said = getattr(config, "quantization_config", None)
    said = said or getattr(config.get_text_config(decoder=True), "quantization_config", None)
    return said if said is None or isinstance(said, Mapping) else said.to_dict()


def refuse_unreadable_checkpoint(folder: Path, config: Any) -> None:
    """Refuse weight files that transformers would read in part or not at all; only their headers are read.

    A folder without weights passes: commands that read only its tokenizer need none.
    """
    quantization = quantization_of(config)
    method = None if quantization is None else _known_method(quantization)
    if method is not None:
        return
    tensors = [tensor for path in _weight_files(folder) for tensor in _tensors(path)]
    quantized = sorted(name for name, kind, axes in tensors if _is_quantized(name, kind, axes))
    if quantization is None and not quantized:
        return
    said = "names no quantization" if quantization is None else f"names the quantization {_method(quantization)!r}"
    stored = f"{len(quantized)} tensors of its weights are stored in few bits or are scales of such: {_some(quantized)}"
    raise UnreadableCheckpointError(
        f"{folder / 'config.json'} {said}, which transformers cannot undo{f'; {stored}' if quantized else ''}. "
        f"The scales would be left out and every hidden state be wrong. Expected: weights of 16 or 32 bits, or a "
        f"quant_method among {', '.join(_methods())}. Name the unquantized checkpoint, or one in such a format."
    )


def refuse_incomplete_load(folder: Path, model: Any, decoder: Any, loaded: Mapping[str, Any]) -> list[str]:
    """Refuse a load that lacks weights, has them in other shapes or left some out that belong to the decoder or head.

    `loaded` is transformers' `output_loading_info`. Returns the names that belong to no part of this model (a vision
    tower, layers that predict further tokens), sorted.
    """
    family = type(model).__name__
    other = sorted(
        f"{name} {list(found)}, expected {list(wanted)}" for name, found, wanted in loaded["mismatched_keys"]
    )
    if other:
        raise UnsupportedTargetError(
            f"{folder} holds {len(other)} weights in other shapes than its config.json gives {family}: "
            f"{_some(other, '; ')}. Packed weights of a quantization that config.json does not name look so, and "
            f"weights of another model. Name a folder whose config.json describes its weights."
        )
    unread = sorted(name for name in loaded["unexpected_keys"] if not _HARMLESS.search(name))
    lost = [name for name in unread if _belongs(name, model, decoder)]
    missing = sorted(map(str, loaded["missing_keys"]))
    if missing:
        instead = f" It holds {len(lost)} that have no place there instead: {_some(lost)}." if lost else ""
        raise DflashError(
            f"{folder} lacks {len(missing)} weights of {family}: {_some(missing)}.{instead} Name a complete model "
            f"folder whose config.json describes its weights."
        )
    narrow = sorted(_left_narrow(model))
    if narrow:
        raise UnsupportedTargetError(
            f"{folder} holds {len(narrow)} weights in few bits that the quantization of its config.json left as they "
            f"are, without scales: {_some(narrow)}. Name the unquantized checkpoint, or a complete quantized one."
        )
    if lost:
        why = (
            "Scales and zero points are of a quantization that transformers does not undo: name the unquantized "
            "checkpoint, or one in a format that it reads."
            if any(_PART_OF_QUANTIZATION.search(name) for name in lost)
            else "Its config.json describes another model (fewer layers, no biases, another model_type): restore the "
            "one that belongs to the weights."
        )
        raise UnsupportedTargetError(
            f"{folder} holds {len(lost)} weights that {family}, as its config.json describes it, has no place for, so "
            f"that they would be left out: {_some(lost)}. {why}"
        )
    return unread


def _left_narrow(model: Any) -> Iterator[str]:
    """Yield the weights of plain linear layers and tables that are held in fewer than 16 bits or as integers."""
    from torch import nn

    for path, module in model.named_modules():
        if type(module) in (nn.Linear, nn.Embedding):
            dtype = module.weight.dtype
            if dtype.itemsize < 2 or not dtype.is_floating_point:
                yield f"{path}.weight"


def _some(names: list[str], between: str = ", ") -> str:
    return between.join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _methods() -> list[str]:
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    return sorted({name.removesuffix("_4bit").removesuffix("_8bit") for name in AUTO_QUANTIZATION_CONFIG_MAPPING})


def _method(quantization: Mapping[str, Any]) -> str | None:
    method = quantization.get("quant_method")
    return None if method is None else str(getattr(method, "value", method))


def _known_method(quantization: Mapping[str, Any]) -> str | None:
    """Return the quantization that transformers undoes or runs, or None."""
    if quantization.get("load_in_8bit") or quantization.get("load_in_4bit"):
        return "bitsandbytes"
    method = _method(quantization)
    return method if method in _methods() else None


def _is_quantized(name: str, kind: str, axes: int) -> bool:
    if _PART_OF_QUANTIZATION.search(name):
        return True
    return axes >= 2 and _NARROW.fullmatch(kind) is not None and not _MASK_BUFFER.search(name)


def _belongs(name: str, model: Any, decoder: Any) -> bool:
    """Say whether a name lies within the model's layers, norms, table or head, not beside them as another part."""
    config = model.config.get_text_config(decoder=True)
    layer = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
    further = int(getattr(config, "num_nextn_predict_layers", None) or 0)
    if layer and config.num_hidden_layers <= int(layer[1]) < config.num_hidden_layers + further:
        return False
    modules = dict(model.named_modules())
    parents = name.split(".")[:-1]
    while parents and ".".join(parents) not in modules:
        parents.pop()
    owner = ".".join(parents)
    at_decoder = next((path for path, module in modules.items() if module is decoder), "")
    return bool(owner) and owner != at_decoder and not at_decoder.startswith(f"{owner}.")


def _weight_files(folder: Path) -> list[Path]:
    """Return the files that transformers reads the weights from; `DflashError` if its index names absent ones."""
    for name in _LAYOUTS:
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return [folder / name]
        if not index.is_file():
            continue
        try:
            shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DflashError(f"{index} is no index of weights: {error!r}. Restore it.") from error
        absent = [shard for shard in shards if not (folder / shard).is_file()]
        if absent:
            raise DflashError(
                f"{folder} lacks {len(absent)} of the {len(shards)} weight files that {index.name} names: "
                f"{_some(absent)}. Fetch them, or name a complete model folder."
            )
        return [folder / shard for shard in shards]
    return []


def _tensors(path: Path) -> Iterator[tuple[str, str, int]]:
    """Yield name, type and number of axes of each tensor in a weight file, whose values are not read."""
    if path.suffix == ".bin":
        for name, tensor in _unpickled(path).items():
            yield str(name), str(getattr(tensor, "dtype", "")).removeprefix("torch."), getattr(tensor, "ndim", 0)
        return
    with path.open("rb") as file:
        try:
            header = json.loads(file.read(min(int.from_bytes(file.read(8), "little"), path.stat().st_size)))
            for name, entry in header.items():
                if name != "__metadata__":
                    yield name, entry["dtype"], len(entry["shape"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DflashError(
                f"{path} is no sound safetensors file: its header cannot be read ({type(error).__name__}). "
                f"Fetch it again."
            ) from error


def _unpickled(path: Path) -> Mapping[str, Any]:
    """Return the tensors of a pickled checkpoint without values; no code in it is run."""
    import torch

    try:
        found = torch.load(path, map_location="meta", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError, OSError) as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise DflashError(
            f"{path} is a pickle that torch cannot read as tensors alone ({said[0][:120].rstrip('.')}). "
            f"A pickle may run any code when it is opened, so none is opened here that asks for more than tensors. "
            f"Fetch the model as safetensors, or save it so where you trust it: save_pretrained(FOLDER)."
        ) from error
    return found if isinstance(found, Mapping) else {}
