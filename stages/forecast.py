"""What an extraction will cost on this machine, measured on a few of its own micro-batches."""

import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dflash_offline.schemas.config import ExtractConfig
from dflash_offline.schemas.errors import DflashError
from dflash_offline.schemas.manifest import FEATURE_KINDS, FeatureLayout, Layout
from dflash_offline.schemas.samples import SampleTable
from dflash_offline.stages.capture import Capturer, micro_batches, spread_out
from dflash_offline.stages.cores import usable_cores
from dflash_offline.stages.encoding import FeatureEncoder, calibrate
from dflash_offline.stages.features import FeatureCodec
from dflash_offline.stages.progress import readable_bytes
from dflash_offline.stages.shards import encode_chunk

_TIMED_BATCHES = 4
_TIMED_S = 2.0
"""Seconds after which no further batch is timed."""
_PACKED_TOKENS = 2048
"""Tokens whose features are compressed to learn the ratio."""


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Time and disk that a plan's features will take."""

    features: FeatureLayout
    tokens_per_s: float
    """Of one process, measured."""
    seconds: float
    """For all shards, with the workers and ranks that were asked for."""
    ratios: dict[str, float]
    """Bytes on disk over raw bfloat16, for each feature layout."""
    bytes_by_kind: dict[str, int]
    free_bytes: int

    @property
    def num_bytes(self) -> int:
        """Bytes on disk in the layout asked for."""
        return self.bytes_by_kind[self.features.kind]

    def __str__(self) -> str:
        """Return the forecast in one line."""
        return (
            f"{readable_bytes(self.num_bytes)} on disk ({self.ratios[self.features.kind]:.2f} of raw bfloat16, "
            f"{readable_bytes(self.free_bytes)} free), {readable_seconds(self.seconds)} at {self.tokens_per_s:,.0f} "
            f"tokens/s"
        )


def measure(
    config: ExtractConfig, capturer: Capturer, samples: SampleTable, layout: Layout, progress: Callable[[int], None]
) -> Forecast:
    """Run a few micro-batches spread over the plan, and compress some of their features in each layout.

    `progress` is called after each batch.
    """
    lossless = FeatureEncoder(FeatureCodec(FeatureLayout()))
    members = spread_out(samples, np.arange(len(samples)), _TIMED_BATCHES * config.batch_tokens)
    capturer.run(samples, members[:1], lossless)[0].cpu()  # warms up
    tokens, began, codes = 0, time.perf_counter(), torch.empty(0)
    for batch in list(micro_batches(samples, members, config.batch_tokens))[:_TIMED_BATCHES]:
        codes = capturer.run(samples, batch, lossless)[0].cpu()
        tokens += len(codes)
        seconds = time.perf_counter() - began
        progress(1)
        if seconds > _TIMED_S:
            break
    ratios = {kind: _ratio(codes[:_PACKED_TOKENS], config.feature_layout_of(kind), layout) for kind in FEATURE_KINDS}
    raw = int(samples.num_tokens.sum()) * layout.slot_bytes
    rate = tokens / seconds
    processes = config.world_size * (config.workers if capturer.device.type == "cuda" else 1)
    return Forecast(
        features=config.feature_layout,
        tokens_per_s=rate,
        seconds=float(samples.num_tokens.sum()) / rate / processes,
        ratios=ratios,
        bytes_by_kind={kind: int(ratio * raw) for kind, ratio in ratios.items()},
        free_bytes=_free_bytes(config.out),
    )


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
        return sum(chunk.num_bytes for chunk in pool.map(encode_chunk, chunks)) / (2 * codes.numel())


def _free_bytes(out: Path) -> int:
    return shutil.disk_usage(next(path for path in (out, *out.parents) if path.exists())).free


def refuse_too_large(out: Path, needed: int, free: int) -> None:
    """Raise `DflashError` if what is still to be written does not fit the disk."""
    if needed > free:
        raise DflashError(
            f"{out} needs {readable_bytes(needed)} more and its disk has {readable_bytes(free)} free. Name an --out "
            f"elsewhere, take fewer samples, or a compact layout by --features rounded or --features scaled; "
            f"--ignore-free-space starts all the same."
        )


def readable_seconds(seconds: float) -> str:
    """Return a duration as people say it."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 100 else f"{minutes / 60:.1f} h"
