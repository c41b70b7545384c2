"""Time and disk that an extraction will take on this machine, measured on a few of its own micro-batches."""

import shutil
import time
from collections.abc import Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from dflash_offline.schemas.errors import DflashError
from dflash_offline.schemas.manifest import FEATURE_KINDS, FINAL, HIDDEN, FeatureLayout, Layout
from dflash_offline.schemas.samples import SampleTable, before_supervised
from dflash_offline.stages.buckets.bucket import MOST_OBJECT_BYTES
from dflash_offline.stages.buckets.mirror import mirror_of
from dflash_offline.stages.capture.encode import FeatureEncoder, calibrate
from dflash_offline.stages.capture.extractor import Extractor
from dflash_offline.stages.capture.inputs import Inputs
from dflash_offline.stages.capture.runner import evenly_spaced
from dflash_offline.stages.conversations.plan import Plan
from dflash_offline.stages.cores import usable_cores
from dflash_offline.stages.progress import Progress, readable_bytes, readable_seconds
from dflash_offline.stages.store.cache import Cache
from dflash_offline.stages.store.chunks import encode_chunk
from dflash_offline.stages.store.codec import FeatureCodec

_TIMED_BATCHES = 4
_TIMED_S = 2.0
"""Seconds after which no further batch is timed."""
_COMPRESSED_TOKENS = 2048
"""Tokens whose features are compressed to measure the ratio."""
_UNEVEN = 1.1
"""Largest shard over what the measured ratio gives."""
_RECORD_BYTES, _LAYER_RECORD_BYTES = 1400, 180
"""Bytes of a commit record, and of each layer in it."""


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Time and disk that a plan's cache will take."""

    features: FeatureLayout
    tokens_per_s: float
    """Measured, of one process."""
    seconds: float
    """For the shards that are left, with the workers and ranks that were asked for."""
    ratios: dict[str, float]
    """Bytes on disk over raw bfloat16, for each feature layout."""
    bytes_by_kind: dict[str, int]
    """Bytes of the shards and their records on disk, for each feature layout."""
    final_bytes: int
    """Bytes of the final states and their records, in the layout asked for; 0 where they are not."""
    plan_bytes: int
    target_bytes: int
    """Bytes of the embeddings that a draft borrows, and of the tokenizer."""
    free_bytes: int | None
    """Free on the disk of the cache, as if the plan were not written yet; None in a bucket, which has no bound."""
    shards_done: int = 0
    rest_bytes: int | None = None
    """Bytes that a cache which was begun still needs, about; None for a new one."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole cache on disk, in the layout asked for."""
        return self.bytes_by_kind[self.features.kind] + self.final_bytes + self.plan_bytes + self.target_bytes

    @property
    def bytes_left(self) -> int:
        """Bytes that are still to be written."""
        return self.num_bytes if self.rest_bytes is None else self.rest_bytes

    def of_rest(self, cache: Cache) -> "Forecast":
        """Return the forecast for what is left of a cache that was begun."""
        tokens, rest = cache.manifest.plan["tokens"], rest_bytes(cache)
        done: Set[int] = cache.commits.keys()
        rest = self.bytes_by_kind[self.features.kind] if rest is None else rest
        if self.final_bytes:
            has_final = cache.final.commits.keys() if cache.final else set()
            rest += rest_bytes(cache.final) or 0 if cache.final and has_final else self.final_bytes
            done = done & has_final
        return replace(
            self,
            seconds=self.seconds * (tokens - _tokens_of(cache, done)) / tokens,
            shards_done=len(done),
            rest_bytes=rest,
        )

    @property
    def fits(self) -> bool:
        """Whether there is room for what is still to be written."""
        return self.free_bytes is None or self.bytes_left <= self.free_bytes

    def __str__(self) -> str:
        """Return the forecast in one line."""
        free = "" if self.free_bytes is None else f", {readable_bytes(self.free_bytes)} free"
        return (
            f"{readable_bytes(self.num_bytes)} {'on disk' if free else 'in all'} "
            f"({self.ratios[self.features.kind]:.2f} of raw bfloat16{free}), {readable_seconds(self.seconds)} at "
            f"{self.tokens_per_s:,.0f} tokens/s"
        )


def forecast_cost(inputs: Inputs, runner: Extractor, plan: Plan, layout: Layout, progress: Progress) -> Forecast:
    """Return the forecast, from a few micro-batches spread over the plan that are run and compressed in each layout."""
    config, samples, lossless = inputs.config, plan.samples, FeatureEncoder(FeatureCodec(FeatureLayout()))
    progress.start("Measuring", None, "batches")
    batches = _some_batches(runner, samples, plan.num_shards)
    encoders = dict.fromkeys((HIDDEN, FINAL) if config.final else (HIDDEN,), lossless)
    runner.run_batch(samples, batches[0][:1], encoders)[HIDDEN][0].cpu()  # warms up
    tokens, codes, began = 0, dict[str, torch.Tensor](), time.perf_counter()
    for batch in batches:
        of_batch = {array: found[0].cpu() for array, found in runner.run_batch(samples, batch, encoders).items()}
        if not tokens:  # so that the sizes, which the manifest keeps, do not depend on how many batches are timed
            codes = of_batch
        tokens += len(of_batch[HIDDEN])
        seconds = time.perf_counter() - began
        progress.advance(1)
        if seconds > _TIMED_S:
            break
    ratios = {
        kind: _ratio(codes[HIDDEN][:_COMPRESSED_TOKENS], config.feature_layout_of(kind), layout)
        for kind in FEATURE_KINDS
    }
    final_bytes = _final_bytes(samples, codes[FINAL], config.feature_layout.of_final, layout) if FINAL in codes else 0
    progress.finish()
    num_tokens = int(samples.num_tokens.sum())
    same_bytes = int(_token_bytes(samples, batches[0]) * num_tokens) + _index_bytes(layout)
    rate = tokens / seconds
    processes = config.world_size * (config.workers if runner.device.type == "cuda" else 1)
    if config.ray is not None:
        processes = config.workers_min
    plan_bytes = sum(path.stat().st_size for path in plan.folder.iterdir())
    free = free_bytes(config.out)
    return Forecast(
        features=config.feature_layout,
        tokens_per_s=rate,
        seconds=num_tokens / rate / processes,
        ratios=ratios,
        bytes_by_kind={
            kind: int(ratio * num_tokens * layout.slot_bytes) + same_bytes for kind, ratio in ratios.items()
        },
        final_bytes=final_bytes,
        plan_bytes=plan_bytes,
        target_bytes=sum(tensor.nbytes for tensor in runner.embeddings().values())
        + len(inputs.target.files.tokenizer.backend_tokenizer.to_str(pretty=True)),
        free_bytes=None if free is None else free + plan_bytes,  # the plan lies on that disk already
    )


def _final_bytes(samples: SampleTable, codes: torch.Tensor, features: FeatureLayout, layout: Layout) -> int:
    """Return the bytes that a plan's final states take, of which `codes` [N, 1, H] are some, lossless."""
    alone = replace(layout, num_layers=1)
    kept = sum(int(np.count_nonzero(before_supervised(samples.loss_mask(sample)))) for sample in range(len(samples)))
    ratio = _ratio(codes[:_COMPRESSED_TOKENS], features, alone) if len(codes) else 0.0
    return int(ratio * kept * alone.slot_bytes) + _index_bytes(alone)


@dataclass(frozen=True)
class Share:
    """What one rank of an array job would do."""

    shards: int
    tokens: int


def shares(samples: SampleTable, num_shards: int, world_size: int) -> list[Share]:
    """Return each rank's share of a plan."""
    tokens = np.bincount(samples.shard, weights=samples.num_tokens, minlength=num_shards)
    ranks = (range(num_shards)[rank::world_size] for rank in range(world_size))
    return [Share(len(rank), int(tokens[rank.start : rank.stop : rank.step].sum())) for rank in ranks]


def _some_batches(runner: Extractor, samples: SampleTable, num_shards: int) -> list[NDArray[np.int64]]:
    """Return a few of the plan's micro-batches, spread over its shards."""
    shards = evenly_spaced(num_shards, _TIMED_BATCHES).tolist()
    batches = [batch for shard in shards for batch in runner.batches(samples, samples.samples_of_shard(shard))]
    chosen = evenly_spaced(len(batches), _TIMED_BATCHES).tolist()
    return [batches[place] for place in chosen]


def _token_bytes(samples: SampleTable, batch: NDArray[np.int64]) -> float:
    """Return the bytes that one token's id and mask take in the arrays."""
    ids = np.concatenate([samples.input_ids(sample) for sample in batch.tolist()])
    mask = np.concatenate([samples.loss_mask(sample) for sample in batch.tolist()])
    return (len(encode_chunk(ids).data) + len(encode_chunk(mask).data)) / len(ids)


def _index_bytes(layout: Layout) -> int:
    """Return the bytes of the shard indexes and the commit records."""
    chunks = layout.num_slots // layout.chunk_tokens * layout.num_layers
    return 16 * chunks + layout.num_shards * (_RECORD_BYTES + _LAYER_RECORD_BYTES * layout.num_layers)


def _ratio(codes: torch.Tensor, features: FeatureLayout, layout: Layout) -> float:
    """Return compressed bytes over raw bfloat16 bytes of lossless codes [N, L, H] in a feature layout."""
    values = codes.view(torch.bfloat16).float()
    codec = FeatureCodec(features)
    if features.step is not None:
        scales = [calibrate(values[:, layer], features.step) for layer in range(layout.num_layers)]
        codec = FeatureCodec(features, *(np.stack(part) for part in zip(*scales, strict=True)))
    encoder = FeatureEncoder(codec)
    stored = [encoder.encode(values[:, layer], layer).numpy() for layer in range(layout.num_layers)]
    chunks = [layer[i : i + layout.chunk_tokens] for layer in stored for i in range(0, len(layer), layout.chunk_tokens)]
    with ThreadPoolExecutor(usable_cores()) as pool:
        return sum(len(chunk.data) for chunk in pool.map(encode_chunk, chunks)) / (2 * codes.numel())


def free_bytes(out: Path) -> int | None:
    """Return the bytes free on the disk of a folder, which may not be there yet; None for a bucket."""
    if mirror_of(out) is not None:
        return None
    return shutil.disk_usage(next(path for path in (out, *out.parents) if path.exists())).free


def rest_bytes(cache: Cache) -> int | None:
    """Return about how many bytes the other shards will take, at the finished shards' bytes per token.

    Without a finished shard it is what the plan expected, of final states what they take raw; None where the plan does
    not say, as in older caches.
    """
    done = _tokens_done(cache)
    if not done and cache.array == FINAL:
        return int(cache.manifest.plan["supervised"]) * cache.layout.slot_bytes
    if not done:
        expected: int | None = cache.manifest.plan.get("feature_bytes")
        return expected
    written = sum(file.size for commit in cache.commits.values() for file in commit.files.values())
    return int(written * (cache.manifest.plan["tokens"] - done) // done)


def _tokens_done(cache: Cache) -> int:
    """Return the tokens of the finished shards, those of samples that were left out included."""
    return _tokens_of(cache, cache.commits.keys())


def _tokens_of(cache: Cache, shards: Set[int]) -> int:
    return int(cache.samples.num_tokens[np.isin(cache.samples.shard, list(shards))].sum())


def refuse_too_large(out: Path, needed: int, free: int | None, *, is_begun: bool) -> None:
    """Raise `DflashError` if what is still to be written does not fit the disk."""
    if free is not None and needed > free:
        advice = more_room(is_begun=is_begun)
        raise DflashError(
            f"{out} needs {readable_bytes(needed)} more and its disk has {readable_bytes(free)} free. "
            f"{advice[0].upper()}{advice[1:]}; --ignore-free-space starts all the same."
        )


def refuse_large_objects(out: Path, layout: Layout, forecast: Forecast) -> None:
    """Raise `DflashError` if a shard of a bucket's cache would be an object that cannot be put at once."""
    raw = layout.shard_tokens * layout.slot_bytes
    size = int(raw * min(1.0, _UNEVEN * forecast.ratios[forecast.features.kind]))
    if mirror_of(out) is not None and size > MOST_OBJECT_BYTES:
        raise DflashError(
            f"A shard has {layout.shard_tokens:,} token slots, about {readable_bytes(size)} of hidden states, and a "
            f"store takes {readable_bytes(MOST_OBJECT_BYTES)} in one object that must not be there yet. Lower "
            f"--shard-mib; where one sample alone is as large, lower --max-length or take fewer --layers."
        )


def more_room(*, is_begun: bool) -> str:
    """Return the advice for a cache that does not fit its disk; a begun cache cannot take other settings."""
    if is_begun:
        return "make room there, or move the cache to a larger disk and name its new place with --out"
    return "name an --out elsewhere, take fewer samples, or a compact layout by --features rounded or --features scaled"
