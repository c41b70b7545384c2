"""Samples of a cache run again by vLLM, in batches, with the layers beside the captured ones."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from dflash_offline.schemas.settings.extract import ExtractConfig
from dflash_offline.schemas.settings.verify import RerunConfig
from dflash_offline.stages.capture.compare import Rerun
from dflash_offline.stages.capture.engines.installed import vllm_version
from dflash_offline.stages.capture.engines.states import StateEngine
from dflash_offline.stages.capture.inputs import ChosenTarget
from dflash_offline.stages.progress import Progress
from dflash_offline.stages.store.cache import Cache
from dflash_offline.stages.target.borrowed import read_borrowed
from dflash_offline.stages.target.files import TargetFiles

_AT_ONCE = 8


def as_made(rerun: RerunConfig, cache: Cache) -> RerunConfig:
    """Return the settings with those of vLLM that are not given as the cache was made, if vLLM made it."""
    made = cache.manifest.identity.get("engine", {})
    quantization = made.get("quantization") if rerun.quantization is None else rerun.quantization
    kv_cache_dtype = made.get("kv_cache_dtype", "auto") if rerun.kv_cache_dtype is None else rerun.kv_cache_dtype
    return replace(rerun, quantization=quantization, kv_cache_dtype=kv_cache_dtype)


@contextmanager
def rerun_states(
    cache: Cache,
    rerun: RerunConfig,
    files: TargetFiles,
    device: torch.device,
    layer_ids: Sequence[int],
    samples: Sequence[int],
    with_final: set[int],
    progress: Progress,
) -> Iterator[Iterator[Rerun]]:
    """Give what yields the states of the chosen layers for each of a cache's samples, and its final states for some.

    These are the last layer's output after the final norm, which is applied here by the weight in the target's files.
    """
    identity = cache.manifest.identity
    ids = [cache.samples.input_ids(sample).tolist() for sample in samples]
    config = ExtractConfig(
        data=(cache.path,),
        out=cache.path,
        target=rerun.target,
        trust_remote_code=rerun.trust_remote_code,
        engine=rerun.engine,
        tensor_parallel_size=rerun.tensor_parallel_size,
        gpu_memory_utilization=rerun.gpu_memory_utilization,
        quantization=rerun.quantization,
        kv_cache_dtype=rerun.kv_cache_dtype or "auto",
        engine_args=rerun.engine_args,
        batch_tokens=identity["layout"]["batch_tokens"],
        block_size=2,
        max_length=max(2, *map(len, ids)),
    )
    dtype = getattr(torch, identity["target"]["dtype"])
    borrowed = read_borrowed(files, dtype) if with_final else None
    captured = tuple(sorted({*layer_ids, files.num_layers - 1})) if borrowed else tuple(layer_ids)
    engine = StateEngine(config, ChosenTarget(files=files, layer_ids=captured, device=device, dtype=dtype))
    groups = [ids[begin : begin + _AT_ONCE] for begin in range(0, len(ids), _AT_ONCE)]

    def states() -> Iterator[Rerun]:
        found = (state for group in groups for state in engine.states(group))
        for sample, state in zip(samples, found, strict=True):
            final = borrowed.normed(state[:, -1]).numpy() if borrowed and sample in with_final else None
            yield [state[:, captured.index(layer)].numpy() for layer in layer_ids], final

    progress.say(f"Starting vLLM {vllm_version()}.")
    try:
        engine.start(max(sum(map(len, group)) for group in groups))
        yield states()
    finally:
        engine.close()
