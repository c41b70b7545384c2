"""vLLM's start: what it reads of the environment, the arguments that every engine has, and what its end means."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dflash_offline.schemas.errors import DflashError
from dflash_offline.stages.capture.engines.installed import PREFIX_CACHING, EngineConfig, vllm_version

_SAID_LINES, _SAID_LETTERS = 3, 500
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process: it ends with it, whatever ends it
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",  # a sample may fill all positions, and one token is drawn behind it
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
"""What vLLM reads as it starts, where the user says nothing else."""


def set_environment() -> None:
    """Set what vLLM reads as it is imported and started."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def common_arguments(
    config: EngineConfig, folder: Path, device: torch.device, dtype: torch.dtype, **defaults: Any
) -> dict[str, Any]:
    """Return the arguments that vLLM's engine has whatever it is for; the user's own go before `defaults`."""
    return {
        "enforce_eager": device.type == "cpu",
        "distributed_executor_backend": "uni" if config.tensor_parallel_size == 1 else "mp",
        "disable_log_stats": True,
        PREFIX_CACHING: True,
        **defaults,
        **config.engine_args,
        "model": str(folder),
        "skip_tokenizer_init": True,
        "trust_remote_code": config.trust_remote_code,
        "dtype": str(dtype).removeprefix("torch."),
        "tensor_parallel_size": config.tensor_parallel_size,
        "gpu_memory_utilization": config.gpu_memory_utilization,
        "quantization": config.quantization,
        "kv_cache_dtype": config.kv_cache_dtype,
    }


def started(folder: Path, less_memory: str, build: Callable[[], Any]) -> Any:
    """Return the engine that `build` makes; `DflashError` says what keeps it from starting, and what to change.

    `less_memory` says by which settings it takes less.
    """
    set_environment()
    try:
        return build()
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        said = " ".join(lines[:_SAID_LINES])[:_SAID_LETTERS]  # a settings error of vLLM's names the setting second
        memory = isinstance(error, torch.OutOfMemoryError | MemoryError) or "memory" in said.lower()
        advice = (
            f"Let it have more (--gpu-memory-utilization, more GPUs by --tensor-parallel-size), or let it take less: "
            f"{less_memory}, or --quantization"
            if memory
            else "Change what it names, or leave --engine out: transformers may run this target"
        )
        raise DflashError(f"vLLM {vllm_version()} does not start with {folder}: {said}\n{advice}.") from error


def engine_fault(error: Exception, kept: str, less_memory: str) -> DflashError:
    """Return what to say of an engine that stopped in the middle; `kept` says what is not lost."""
    said = next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), "")
    fault = DflashError(
        f"vLLM's engine stopped: {type(error).__name__}{f': {said}' if said else ''}. {kept}: repeat the command to go "
        f"on. If it stops there again, {less_memory}, or lower --gpu-memory-utilization."
    )
    fault.__cause__ = error
    return fault
