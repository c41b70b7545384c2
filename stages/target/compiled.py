"""The target's decoder layers compiled, which fuses what lies between their matrix products.

Axes: B sequences, S positions.
"""

from collections.abc import Sequence
from typing import Any

import torch

from dflash_offline.schemas.errors import DflashError, missing_memory
from dflash_offline.stages.target.checkpoint import quantization_of
from dflash_offline.stages.target.files import TargetFiles
from dflash_offline.stages.target.model import decoder_layers, layer_states

_COMPILED_AT = ((3, 61), (1, 61))
"""B and S of the forwards that compile: torch sets a batch of one apart, and takes sizes that are alike for one."""
_MOST_VARIANTS = 16
"""Kinds of layers and of forwards; a target that needs more would be compiled layer by layer."""
_WINDOWS = ("sliding_window", "attention_chunk_size")
_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}


def reason_not_to_compile(files: TargetFiles) -> str:
    """Return why a target's layers are not compiled unless asked for, or an empty string."""
    others = sorted(set(getattr(files.text_config, "layer_types", None) or ()) - _ATTENTION)
    if others:
        return f"it has layers of {', '.join(others)}, which torch.compile takes apart position by position"
    if quantization_of(files.config) is not None:
        return "its weights are quantized"
    own_code = not type(files.config).__module__.startswith("transformers.")
    return "it brings code of its own" if own_code else ""


def compile_layers(model: Any, files: TargetFiles, layer_ids: Sequence[int], max_length: int) -> None:
    """Compile the decoder layers up to the last of `layer_ids`, at once for every B and S that is to come.

    The forwards that compile have the same shapes in every process, so that all of them run the same kernels. The
    layers' own hooks stay outside. Raises `DflashError` if a layer cannot be compiled whole.
    """
    from torch._dynamo import config as compiler  # takes a second, which nothing else needs at the start

    compiler.recompile_limit = max(compiler.recompile_limit, _MOST_VARIANTS)
    for layer in decoder_layers(model)[: layer_ids[-1] + 1]:
        layer.forward = torch.compile(layer.forward, dynamic=True, fullgraph=True)
    windows = [getattr(files.text_config, name, None) or max_length for name in _WINDOWS]
    # Beyond a window its layers take a mask.
    longer = [(batch, window + 1) for window in windows if window < max_length for batch, _ in _COMPILED_AT]
    try:
        for shape in (*_COMPILED_AT, *longer):
            layer_states(model, torch.zeros(shape, dtype=torch.int64, device=model.device), layer_ids[-1:])
    except RuntimeError as error:
        if missing_memory(error):
            raise
        raise _not_compiled(files.name, error) from error


def _not_compiled(name: str, error: RuntimeError) -> DflashError:
    said = " ".join(str(error).split())[:300] or type(error).__name__
    return DflashError(
        f"torch.compile cannot compile the layers of {name}: {said} Extract without, by --no-compile; a cache "
        f"that was begun with compiled layers goes on only with them."
    )
