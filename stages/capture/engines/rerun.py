"""Samples of a cache run again by vLLM, in batches, with the layers beside the captured ones."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from dflash_offline.schemas.settings.extract import ExtractConfig
from dflash_offline.schemas.settings.verify import RerunConfig
from dflash_offline.stages.capture.compare import ChosenSamples, Rerun
from dflash_offline.stages.capture.engines.installed import vllm_version
from dflash_offline.stages.capture.engines.states import StateEngine
from dflash_offline.stages.capture.engines.vllm import with_last_layer
from dflash_offline.stages.capture.inputs import ChosenTarget
from dflash_offline.stages.progress import Progress
from dflash_offline.stages.store.cache import Cache
from dflash_offline.stages.target.borrowed import read_borrowed

_AT_ONCE = 8


def as_made(rerun: RerunConfig, cache: Cache) -> RerunConfig:
    """Return the settings with those of vLLM that are not given as the cache was made, if vLLM made it."""
    made = cache.manifest.identity.get("engine", {})
    quantization = made.get("quantization") if rerun.quantization is None else rerun.quantization
    kv_cache_dtype = made.get("kv_cache_dtype", "auto") if rerun.kv_cache_dtype is None else rerun.kv_cache_dtype
    return replace(rerun, quantization=quantization, kv_cache_dtype=kv_cache_dtype)


@contextmanager
def rerun_states(chosen: ChosenSamples, progress: Progress) -> Iterator[Iterator[Rerun]]:
    """Give what yields each sample's states.

    The final ones are the last layer's output after the final norm, which is applied here by the weight in the target's
    files.
    """
    rerun, cache, files = chosen.rerun, chosen.cache, chosen.files
    ids = list(map(chosen.input_ids, chosen.samples))
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
        final=bool(chosen.with_final),
        batch_tokens=cache.manifest.identity["layout"]["batch_tokens"],
        block_size=2,
        max_length=max(2, *map(len, ids)),
    )
    norm = read_borrowed(files, chosen.dtype).norm if config.final else None
    target = ChosenTarget(files=files, layer_ids=tuple(chosen.layer_ids), device=chosen.device, dtype=chosen.dtype)
    target = with_last_layer(config, target)
    columns = [target.layer_ids.index(layer) for layer in chosen.layer_ids]
    engine = StateEngine(config, target)
    groups = [ids[begin : begin + _AT_ONCE] for begin in range(0, len(ids), _AT_ONCE)]

    def states() -> Iterator[Rerun]:
        found = (state for group in groups for state in engine.states(group))
        for sample, state in zip(chosen.samples, found, strict=True):
            final = norm(state[:, -1]).numpy() if norm and sample in chosen.with_final else None
            yield [state[:, column].numpy() for column in columns], final

    progress.say(f"Starting vLLM {vllm_version()}.")
    try:
        engine.start(max(sum(map(len, group)) for group in groups))
        yield states()
    finally:
        engine.close()
