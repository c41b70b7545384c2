"""What a draft borrows of a target, read from its weight files alone: for a target that transformers cannot hold.

Axes: T tokens, V vocabulary, H hidden size.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dflash_offline.schemas.errors import DflashError, UnsupportedTargetError
from dflash_offline.stages.target.files import TargetFiles
from dflash_offline.stages.target.model import changes_logits

_TABLE, _HEAD, _NORM = "embed_tokens.weight", "lm_head.weight", "norm.weight"


@dataclass(frozen=True)
class FinalNorm:
    """The root mean square norm behind a target's last layer."""

    weight: Tensor
    """[H]"""
    epsilon: float

    def __call__(self, states: Tensor) -> Tensor:
        """Return the final states, float32 [..., H], of the last layer's output [..., H]."""
        states = states.float()
        scale = torch.rsqrt(states.square().mean(dim=-1, keepdim=True) + self.epsilon)
        return states * scale * self.weight.float()


@dataclass(frozen=True)
class Borrowed:
    """The embedding table, the final norm and the head of a target."""

    table: Tensor
    """[V, H]"""
    norm: FinalNorm
    head: Tensor | None
    """[V, H], None if it is the table."""

    def tensors(self) -> dict[str, Tensor]:
        """Return the embedding table, and the head unless it is the same, by the names that a cache has for them."""
        return {_TABLE: self.table} | ({} if self.head is None else {_HEAD: self.head})

    def log_probabilities(self, state: Tensor) -> Tensor:
        """Return those of the next token, float32 [V], that the last layer's output [H] at a place leads to."""
        head = self.table if self.head is None else self.head
        return (head.float() @ self.norm(state)).log_softmax(0)


def read_borrowed(files: TargetFiles, dtype: torch.dtype) -> Borrowed:
    """Return what a draft borrows; `DflashError` if the files do not hold it plainly, or the target uses it otherwise.

    Tensors are of `dtype`, as the target would be loaded.
    """
    text, places = files.text_config, _places(files.folder)
    if changes_logits(text):
        raise UnsupportedTargetError(
            f"{files.name} ({text.model_type}) scales or caps its logits after the head; a DFlash draft is trained "
            f"through the plain head and would be served another one. Use another target."
        )
    table = _only(files.folder, [name for name in places if name.endswith(_TABLE)], _TABLE)
    prefix = table.removesuffix(_TABLE)
    norm = _only(files.folder, [name for name in places if name == f"{prefix}{_NORM}"], f"{prefix}{_NORM}")
    heads = [name for name in places if name.split(".")[-2:] == _HEAD.split(".")]
    tied = bool(getattr(files.config, "tie_word_embeddings", False) or getattr(text, "tie_word_embeddings", False))
    if any(name.endswith(("lm_head.bias", f"{prefix}norm.bias")) for name in places):
        raise UnsupportedTargetError(f"{files.name}: its head or final norm has a bias, which only transformers reads.")
    head = None if tied else _only(files.folder, heads, _HEAD)
    read = {name: _tensor(places[name], name) for name in (table, norm, *([] if head is None else [head]))}
    return Borrowed(
        table=read[table].to(dtype),
        norm=FinalNorm(read[norm].to(dtype), float(getattr(text, "rms_norm_eps", 1e-6))),
        head=None if head is None else read[head].to(dtype),
    )


def _places(folder: Path) -> dict[str, Path]:
    """Return the file that holds each tensor, by its name."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return {name: folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
    places: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with _opened(path) as file:
            places |= dict.fromkeys(file.keys(), path)
    return places


def _opened(path: Path) -> safe_open:
    try:
        return safe_open(path, "pt")
    except (OSError, SafetensorError) as error:
        raise DflashError(f"{path} is no sound safetensors file: {error}. Fetch it again.") from error


def _tensor(path: Path, name: str) -> Tensor:
    with _opened(path) as file:
        tensor: Tensor = file.get_tensor(name)
    if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
        raise UnsupportedTargetError(
            f"{path}: {name} is stored as {tensor.dtype}; a draft borrows it in 16 or 32 bits. Name a checkpoint that "
            f"leaves it unquantized."
        )
    return tensor


def _only(folder: Path, names: list[str], wanted: str) -> str:
    if len(names) != 1:
        raise UnsupportedTargetError(
            f"{folder} holds {len(names)} tensors named {wanted}; expected one, which drafts borrow. Only transformers "
            f"could tell which it is."
        )
    return names[0]
