"""The weights of a draft: gathered from a module, checked against its config, written, loaded from its folder."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from dflash_offline.schemas.draft.checksums import refuse_changed
from dflash_offline.schemas.draft.config import DraftConfig
from dflash_offline.schemas.draft.weights import shape_faults
from dflash_offline.schemas.errors import DflashError, MismatchError
from dflash_offline.schemas.files import Piece, write_synced
from dflash_offline.stages.draft.model import DraftModel


def check_draft_weights(weights: Mapping[str, Tensor], config: DraftConfig, where: str) -> None:
    """Raise `MismatchError` naming every missing key, unexpected key and wrong shape; `where` names the file."""
    shapes = {name: tuple(w.shape) for name, w in weights.items()}
    problems = [f"{name} {what}" for _, name, what in shape_faults(shapes, config.shapes)]
    if problems:
        raise MismatchError(
            f"{where} does not hold the weights its config.json describes:\n  "
            + "\n  ".join(problems)
            + "\nExport the draft again, or name the folder of an unmodified one."
        )


def draft_state_dict(draft: nn.Module, config: DraftConfig, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Return the draft's weights as contiguous CPU tensors, checked against `expected_shapes`; cast if asked."""
    weights = {
        name: w.detach().to(device="cpu", dtype=dtype or w.dtype).contiguous() for name, w in draft.state_dict().items()
    }
    check_draft_weights(weights, config, "The draft in memory")
    return weights


_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
"""What safetensors calls those that are written."""


def save_weights(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> str:
    """Write CPU tensors as a new safetensors file, synced; returns its sha256.

    The same tensors and metadata always give the same bytes, with the rights that the umask leaves: safetensors' own
    writer orders metadata anew in every process, makes files that their owner alone can read, and raises a class of
    its own on a full disk.
    """
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    for name, tensor in ordered:
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}

    def pieces() -> Iterator[Piece]:
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        yield len(text).to_bytes(8, "little") + text
        for _, tensor in ordered:
            if tensor.numel():
                yield tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()

    return write_synced(path, pieces())


def run_as(draft: DraftModel, config: DraftConfig) -> DraftModel:
    """Return a draft of the same weights, which both share, that computes as another config of their shapes says."""
    with torch.device("meta"):
        other = DraftModel(config, draft.attention_backend)
    other.load_state_dict(draft.state_dict(), assign=True)
    return other.eval()


def load_draft(folder: Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> DraftModel:
    """Return the draft stored in `folder` (config.json and model.safetensors), in evaluation mode.

    Raises `DflashError` if a file is not as the folder's checksums say, where it has some.
    """
    refuse_changed(folder)
    config = DraftConfig.read(folder)
    path = folder / "model.safetensors"
    if not path.is_file():
        raise DflashError(f"{path} does not exist, so {folder} holds no draft weights. Export the draft again.")
    try:
        weights = load_file(path)
    except SafetensorError as error:
        raise DflashError(f"{path} is not a readable safetensors file: {error}. Export the draft again.") from error
    check_draft_weights(weights, config, str(path))
    if damaged := [name for name, tensor in weights.items() if not tensor.isfinite().all()]:
        raise DflashError(
            f"{path} holds values that are not finite in {', '.join(damaged)}. Name another draft, or export an "
            f"earlier checkpoint."
        )
    with torch.device("meta"):
        draft = DraftModel(config)
    weights = {name: w.to(device=device, dtype=dtype) for name, w in weights.items()}
    draft.load_state_dict(weights, assign=True)
    return draft.eval()
