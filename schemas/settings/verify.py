"""What a user may set for `dflash verify --target`. Each text and default exists here and nowhere else."""

from dataclasses import dataclass, field, replace
from typing import Annotated

from dflash_offline.schemas.settings.engine import (
    KV_CACHE_DTYPE,
    QUANTIZATION,
    TRANSFORMERS,
    Engine,
    EngineArgs,
    GpuMemoryUtilization,
    TensorParallelSize,
    engine_problems,
)
from dflash_offline.schemas.settings.option import AT_LEAST_0, AT_LEAST_1, Option, problems, refuse
from dflash_offline.schemas.settings.shared import ATTENTION, TARGET, Device, TrustRemoteCode

_ARGUMENTS = {"max_model_len": "", "max_num_batched_tokens": ""}
"""Further arguments of vLLM's engine that this program sets itself."""
_INSTEAD = {"device_map": "vllm takes tensor_parallel_size", "attn_implementation": "vllm chooses its own"}
"""Settings of transformers alone."""


@dataclass(frozen=True, kw_only=True)
class RerunConfig:
    """Settings of `dflash verify --target`: how a target is run again; what is None is as the cache was made.

    Nothing is kept to go on with: a role here says what the comparison depends on.
    """

    # The formatter would give every word of an option a line of its own.
    # fmt: off

    target: Annotated[str, TARGET]
    samples: Annotated[int, Option(
        "Samples to run the target on.", "Target", "identity", "SAMPLES", bounds=AT_LEAST_1)] = 8
    seed: Annotated[int, Option(
        "Seed by which those samples are drawn.", "Target", "identity", "SEED", bounds=AT_LEAST_0)] = 0
    revision: Annotated[str | None, Option(
        "Revision of the target's hub id.", "Target", "resolved", "NAME", unset="the extraction's")] = None
    trust_remote_code: TrustRemoteCode = False
    attn_implementation: Annotated[str | None, replace(
        ATTENTION, unset="the extraction's")] = None
    device: Device = "auto"
    device_map: Annotated[str | None, Option(
        "How transformers spreads the target over devices, as for `dflash extract`.",
        "Target", "identity", "NAME", unset="the extraction's")] = None
    engine: Engine = TRANSFORMERS
    tensor_parallel_size: TensorParallelSize = 1
    gpu_memory_utilization: GpuMemoryUtilization = 0.9
    quantization: Annotated[str | None, replace(QUANTIZATION, unset="the extraction's, if vllm made it")] = None
    kv_cache_dtype: Annotated[str | None, replace(KV_CACHE_DTYPE, unset="the extraction's, if vllm made it")] = None
    engine_args: EngineArgs = field(default_factory=dict)

    # fmt: on

    def __post_init__(self) -> None:
        refuse("verify", problems(self) + engine_problems(self, _ARGUMENTS, _INSTEAD))
