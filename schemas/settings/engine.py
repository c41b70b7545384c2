"""What the settings of several commands share: the engine that runs the target, and what is set of vLLM."""

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Annotated, Any

from dflash_offline.schemas.settings.option import AT_LEAST_1, Bounds, Option, options

TRANSFORMERS, VLLM = ENGINES = ("transformers", "vllm")
_HEADING = "Engine"
_ARGUMENTS: dict[str, str] = {
    "model": "target",
    "tokenizer": "target",
    **{name: name for name in "revision trust_remote_code dtype tensor_parallel_size".split()},
    **{name: name for name in "gpu_memory_utilization quantization kv_cache_dtype".split()},
    **dict.fromkeys("skip_tokenizer_init speculative_config kv_transfer_config".split(), ""),
}
"""Arguments of vLLM's engine that every command has a setting for, or sets itself."""
_OTHER_LAYOUTS = ("pipeline_parallel_size", "data_parallel_size")
"""Arguments that spread the target so that no worker has all states."""

# The formatter would give every word of an option a line of its own.
# fmt: off
Engine = Annotated[str, Option(
    "What runs the target: transformers, or vllm, which is to be installed besides.",
    _HEADING, "identity", "NAME", choices=ENGINES)]
TensorParallelSize = Annotated[int, Option(
    "GPUs that vllm spreads the target over; each worker takes as many.",
    _HEADING, "identity", "GPUS", bounds=AT_LEAST_1)]
GpuMemoryUtilization = Annotated[float, Option(
    "Share of each GPU's memory that vllm may take.",
    _HEADING, "free", "SHARE", bounds=Bounds("above 0, and at most 1", lambda value: 0 < value <= 1))]
QUANTIZATION = Option(
    "Quantization in which vllm loads the target, as vllm names it.",
    _HEADING, "identity", "NAME", unset="the checkpoint's own", completions=("fp8", "bitsandbytes"))
KV_CACHE_DTYPE = Option(
    "Data type of vllm's key/value cache, as vllm names it; auto is the target's.",
    _HEADING, "identity", "NAME", completions=("auto", "bfloat16", "fp8"))
Quantization = Annotated[str | None, QUANTIZATION]
KvCacheDtype = Annotated[str, KV_CACHE_DTYPE]
EngineArgs = Annotated[dict[str, Any], Option(
    """Other arguments of vllm's engine, as in '{"enable_prefix_caching": false}'.""",
    _HEADING, "identity", "JSON")]
# fmt: on


def engine_problems(config: Any, arguments: Mapping[str, str], instead: Mapping[str, str]) -> list[str]:
    """Return what is wrong with a command's settings of the engine, each with the others.

    `arguments` names further arguments of vLLM's engine that the command has a setting for, each with that setting, or
    sets itself; `instead` the settings that are of transformers alone, each with what holds of vllm in their place.
    """
    declared = {field.name: field for field in fields(config)}
    changed = {name for name, field in declared.items() if getattr(config, name) != _default(field)}
    if config.engine == TRANSFORMERS:
        engine = [name for name, option in options(config.__class__).items() if option.group == _HEADING]
        return [f"{name} is a setting of vllm, and the engine is transformers." for name in engine if name in changed]
    found = []
    for name in sorted(config.engine_args):
        if (setting := {**_ARGUMENTS, **arguments}.get(name)) is not None:
            what = f"is the setting {setting}" if setting else "this program sets itself"
            found.append(f"engine_args holds {name}, which {what}.")
        elif name in _OTHER_LAYOUTS:
            found.append(f"engine_args holds {name}, which no command supports; take tensor_parallel_size.")
    found += [f"{name} is a setting of transformers; {instead[name]}." for name in instead if name in changed]
    if config.device not in ("auto", "cpu", "cuda"):
        found.append(f"device is {config.device!r}, and vllm takes the first GPUs; use CUDA_VISIBLE_DEVICES.")
    return found


def _default(field: Any) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()
