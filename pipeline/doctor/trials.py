"""What torch does on this machine: run as a program of its own, which may crash or hang without harm to who asks.

Prints one JSON object a line: `{"trying": ...}` before each trial, and what it found after it.
"""

import json
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

BACKENDS = ("sdpa", "eager", "flex_attention")
_LENGTHS = (60, 37)
"""Tokens of the two documents that the attention trials train on."""
_TOLERANCE, _BFLOAT16_TOLERANCE = 1e-3, 5e-2
"""Relative difference of a step's loss and gradients from eager attention's, and of its loss in bfloat16 from that."""


def main(what: str, target: str | None) -> None:
    """Run the trials: torch with devices and attention, the compiler, or a target."""
    warnings.simplefilter("ignore")
    trials: dict[str, Callable[[], None]] = {
        "torch": _try_torch,
        "compile": _try_compile,
        "target": partial(_try_target, str(target)),
    }
    trials[what]()


def _tell(**found: Any) -> None:
    print(json.dumps(found), flush=True)


def _tried(name: str, trial: Callable[[], dict[str, Any]], **fields: Any) -> bool:
    """Print what a trial found; whatever it raises is what it found. Returns whether it raised nothing."""
    _tell(trying=name, **fields)
    began = time.perf_counter()
    try:
        found = trial() | {"error": None}
    except Exception as error:
        found = {"error": (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")}
    _tell(trial=name, seconds=round(time.perf_counter() - began, 3), **fields, **found)
    return found["error"] is None


def _devices() -> list[str]:
    import torch

    return ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]


def _one_of_each_kind() -> list[str]:
    return _devices()[:2]


def _try_torch() -> None:
    if not _tried("torch", _torch_build):
        return
    for device in _devices():
        _tried("device", partial(_device, device), device=device)
    for device in _one_of_each_kind():
        for backend in BACKENDS:
            _tried("attention", partial(_attention, device, backend), device=device, backend=backend)


def _torch_build() -> dict[str, Any]:
    import torch

    return {"version": torch.__version__, "cuda": torch.version.cuda or torch.version.hip}


def _device(device: str) -> dict[str, Any]:
    import torch

    if device == "cpu":
        return {"name": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads()}
    properties = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    with torch.cuda.device(device):
        bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "bytes": total,
        "free_bytes": free,
        "bfloat16": bfloat16,
    }


def _attention(device: str, backend: str) -> dict[str, Any]:
    """Compare a training step's loss and gradients with eager attention's, on a GPU also its loss in bfloat16.

    Flex attention has no gradients on a CPU; its loss alone is compared there.
    """
    with_gradients = (device, backend) != ("cpu", "flex_attention")
    expected, found = (_step(device, one, with_gradients) for one in ("eager", backend))
    _compare(found, expected, _TOLERANCE)
    if device != "cpu":
        found = _step(device, backend, with_gradients, bfloat16=True)
        _compare(found[:1], expected[:1], _BFLOAT16_TOLERANCE)
    return {"backward": with_gradients}


def _compare(found: Any, expected: Any, tolerance: float) -> None:
    off = float((found - expected).norm() / expected.norm())
    if not (off <= tolerance and bool(found.isfinite().all())):
        raise ArithmeticError(f"differs from eager attention by {off:.1e}; expected at most {tolerance:.0e}")


def _step(device: str, backend: str, with_gradients: bool, bfloat16: bool = False) -> Any:
    """Return the loss, and behind it all gradients if asked for, of a tiny draft on packed documents."""
    import torch
    from torch import nn

    from dflash_offline.schemas.draft.config import DraftConfig
    from dflash_offline.stages.draft.model import DraftModel
    from dflash_offline.stages.trainer import DFlashTrainerModule

    torch.manual_seed(0)
    config = DraftConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=96,
        vocab_size=64,
        target_layer_ids=(1, 3),
        num_target_layers=6,
        block_size=8,
        mask_token_id=63,
    )
    head, table = nn.Linear(64, 64, bias=False), nn.Embedding(64, 64)
    trainer = DFlashTrainerModule(
        DraftModel(config), head, table, 63, block_size=8, attention_backend=backend, num_anchors=16
    )
    length = sum(_LENGTHS)
    inputs = torch.randint(63, (1, length)), torch.randn(1, length, 128), torch.ones(1, length, dtype=torch.long)
    documents = torch.repeat_interleave(torch.arange(len(_LENGTHS)), torch.tensor(_LENGTHS))[None]
    anchors = torch.tensor([[4, 21, 40, 64, 80]])
    trainer.to(device)
    kind = device.split(":")[0]
    with torch.set_grad_enabled(with_gradients), torch.autocast(kind, torch.bfloat16, enabled=bfloat16):
        metrics = trainer(
            *(one.to(device) for one in inputs), document_ids=documents.to(device), anchors=anchors.to(device)
        )
    if not with_gradients:
        return metrics.loss.float()[None]
    metrics.loss.backward()
    gradients = [p.grad.float().flatten() for p in trainer.draft_model.parameters() if p.grad is not None]
    return torch.cat([metrics.loss.detach().float()[None], *gradients])


def _try_compile() -> None:
    for device in _one_of_each_kind():
        _tried("compile", partial(_compile, device), device=device)


def _compile(device: str) -> dict[str, Any]:
    """Compile a small function, forward and backward, and compare it with itself."""
    import torch

    def gated(x: torch.Tensor) -> torch.Tensor:
        return (torch.nn.functional.rms_norm(x, x.shape[-1:]) * x.sigmoid()).sum()

    one = torch.randn(64, 64, device=device, requires_grad=True)
    expected = torch.autograd.grad(gated(one), one)[0]
    found = torch.autograd.grad(torch.compile(gated)(one), one)[0]
    if not torch.allclose(found, expected, rtol=1e-3, atol=1e-4):
        raise ArithmeticError("what was compiled computes something else")
    return {}


def _try_target(name: str) -> None:
    _tried("target", partial(_target, name))


def _target(name: str) -> dict[str, Any]:
    from dflash_offline.schemas.errors import DflashError
    from dflash_offline.stages.target.files import open_target
    from dflash_offline.stages.target.layer_ids import default_layer_ids
    from dflash_offline.stages.target.model import quiet_libraries

    quiet_libraries()
    try:
        files = open_target(name)
    except DflashError:
        if Path(name).expanduser().is_dir():
            raise
        raise ValueError(f"{name} is neither a folder here nor a hub id that was fetched before") from None
    weights = [path.stat().st_size for path in Path(files.folder).iterdir() if path.suffix in (".safetensors", ".bin")]
    if not weights:
        raise ValueError(f"{files.folder} holds no weights")
    return {
        "folder": str(files.folder),
        "model_type": files.config.model_type,
        "layers": files.num_layers,
        "hidden_size": int(files.text_config.hidden_size),
        "layer_ids": list(default_layer_ids(files.num_layers, None)),
        "weight_bytes": sum(weights),
        "generation_tags": "generation" in files.template,
    }


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None)
