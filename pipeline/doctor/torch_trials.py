"""What torch does on this machine: run as a program of its own, which may crash or hang without harm to who asks.

Prints each trial as a line of JSON twice: when it begins, and what came of it.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from dflash_offline.pipeline.doctor.machine import nvidia_driver
from dflash_offline.pipeline.doctor.trials import BEGUN, Trial
from dflash_offline.schemas.draft.config import DraftConfig
from dflash_offline.schemas.errors import DflashError
from dflash_offline.schemas.settings.train import ATTENTION_BACKENDS
from dflash_offline.stages.cores import usable_memory_bytes
from dflash_offline.stages.draft.attention import default_backend
from dflash_offline.stages.draft.model import DraftModel
from dflash_offline.stages.progress import readable_bytes
from dflash_offline.stages.trainer import DFlashTrainerModule

_WEIGHTS = (".safetensors", ".bin")
_LENGTHS = (60, 37)
"""Tokens of the two documents that the attention trials train on."""
_TOLERANCE, _BFLOAT16_TOLERANCE = 1e-3, 5e-2
"""Relative difference of a step's loss and gradients from eager attention's, and of its loss in bfloat16 from that."""


def main(target: str | None) -> None:
    """Try the devices, a target if one is named, then attention and the compiler on one device of each type."""
    devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    _try(Trial(name="torch"), _describe_build)
    if driver := nvidia_driver():
        do = "Install the build of torch for that driver: https://pytorch.org/get-started."
        _try(Trial(name="GPU", needed=False, do=do), partial(_find_gpu, driver))
    for device in devices:
        _try(Trial(name=device, do="Hide it: CUDA_VISIBLE_DEVICES."), partial(_describe_device, device))
    do = "Name its folder, or fetch it first: hf download NAME."
    if target and _try(Trial(name="target", do=do), partial(_describe_target, target)):
        do = "Extract with --device-map auto over several GPUs, or on a larger machine."
        _try(Trial(name="its weights", needed=False, do=do), partial(_find_room, target))
    for device in devices[:2]:
        default = default_backend(torch.device(device))
        for backend in ATTENTION_BACKENDS:
            do = f"Leave it: {default} is the default there."
            if backend == default:
                do = f"Train with --attention-backend {'eager' if backend == 'sdpa' else 'sdpa'}."
            trial = Trial(name=f"{backend} on {device}", needed=backend == default, do=do)
            _try(trial, partial(compare_attention, device, backend))
        do = "Leave it: it is not the default on a CPU" if device == "cpu" else "Train with --no-compile"
        do += "; or install a C++ compiler, as in apt install g++."
        _try(Trial(name=f"torch.compile on {device}", needed=device != "cpu", do=do), partial(_compile, device))


def _try(trial: Trial, work: Callable[[], str]) -> bool:
    """Print a trial, then what `work` returned or raised; returns whether it raised nothing."""
    print(json.dumps(asdict(replace(trial, error=BEGUN))), flush=True)
    try:
        done = replace(trial, result=work())
    except Exception as error:
        done = replace(trial, error=(str(error).strip().splitlines() or [type(error).__name__])[0].rstrip("."))
    print(json.dumps(asdict(done)), flush=True)
    return done.error is None


def _describe_build() -> str:
    build = torch.version.cuda or torch.version.hip
    return f"{torch.__version__}, {f'built for {build}' if build else 'a CPU build'}"


def _find_gpu(driver: str) -> str:
    if torch.cuda.device_count() == 0:
        raise RuntimeError(f"its driver {driver} is installed, but torch {_describe_build()}, does not see it")
    return f"driver {driver}"


def _describe_device(device: str) -> str:
    if device == "cpu":
        return f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    properties = torch.cuda.get_device_properties(device)
    free, total = map(readable_bytes, torch.cuda.mem_get_info(device))
    with torch.cuda.device(device):
        bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    dtypes = "bfloat16" if bfloat16 else "NO bfloat16: train with --dtype float32"
    return f"{properties.name}, capability {properties.major}.{properties.minor}: {total}, {free} free, {dtypes}"


def _describe_target(name: str) -> str:
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
    layers, width = default_layer_ids(files.num_layers, None), int(files.text_config.hidden_size)
    return (
        f"{files.config.model_type} in {files.folder}; {files.num_layers} layers of width {width:,}, captured by "
        f"default {', '.join(map(str, layers))}: {readable_bytes(2 * width * len(layers))} a token; a chat template "
        f"{'with' if 'generation' in files.template else 'without'} generation tags"
    )


def _find_room(name: str) -> str:
    from dflash_offline.stages.target.files import target_folder

    weights = sum(path.stat().st_size for path in target_folder(name).iterdir() if path.suffix in _WEIGHTS)
    gpus = [torch.cuda.get_device_properties(index).total_memory for index in range(torch.cuda.device_count())]
    most, place = (max(gpus), "one GPU") if gpus else (usable_memory_bytes(), "this machine")
    found = f"{readable_bytes(weights)} of weights, {readable_bytes(most)} on {place}"
    if not 0 < weights <= most:
        raise MemoryError(found)
    return found


def compare_attention(device: str, backend: str) -> str:
    """Compare a training step's loss and gradients with eager attention's, on a GPU also its loss in bfloat16.

    Flex attention has no gradients on a CPU; its loss alone is compared there.
    """
    with_gradients = (device, backend) != ("cpu", "flex_attention")
    expected = step(device, "eager", with_gradients)
    _compare(step(device, backend, with_gradients), expected, _TOLERANCE)
    if device != "cpu":
        _compare(step(device, backend, with_gradients, bfloat16=True)[:1], expected[:1], _BFLOAT16_TOLERANCE)
    return "works" if with_gradients else "works forward only, as everywhere on a CPU"


def _compare(found: Tensor, expected: Tensor, tolerance: float) -> None:
    off = float((found - expected).norm() / expected.norm())
    if not (off <= tolerance and bool(found.isfinite().all())):
        raise ArithmeticError(f"differs from eager attention by {off:.1e}; expected at most {tolerance:.0e}")


def step(device: str, backend: str, with_gradients: bool, bfloat16: bool = False) -> Tensor:
    """Return the loss, and behind it all gradients if asked for, of a tiny draft on packed documents."""
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
    device_type = device.split(":")[0]
    with torch.set_grad_enabled(with_gradients), torch.autocast(device_type, torch.bfloat16, enabled=bfloat16):
        metrics = trainer(
            *(tensor.to(device) for tensor in inputs), document_ids=documents.to(device), anchors=anchors.to(device)
        )
    if not with_gradients:
        return metrics.loss.float()[None]
    metrics.loss.backward()
    gradients = [p.grad.float().flatten() for p in trainer.draft_model.parameters() if p.grad is not None]
    return torch.cat([metrics.loss.detach().float()[None], *gradients])


def _compile(device: str) -> str:
    """Compile a small function, forward and backward, and compare it with itself."""

    def gated(x: Tensor) -> Tensor:
        return (torch.nn.functional.rms_norm(x, x.shape[-1:]) * x.sigmoid()).sum()

    x = torch.randn(64, 64, device=device, requires_grad=True)
    expected = torch.autograd.grad(gated(x), x)[0]
    began = time.perf_counter()
    found = torch.autograd.grad(torch.compile(gated)(x), x)[0]
    if not torch.allclose(found, expected, rtol=1e-3, atol=1e-4):
        raise ArithmeticError("the compiled function computes something else")
    return f"works, {time.perf_counter() - began:.0f} s for a small function"


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
