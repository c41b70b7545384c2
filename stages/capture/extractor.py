"""Whoever runs the target: one interface, with transformers and vLLM behind it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dflash_offline.schemas.manifest import Layout
from dflash_offline.schemas.samples import SampleTable
from dflash_offline.schemas.settings.engine import TRANSFORMERS
from dflash_offline.schemas.settings.extract import ExtractConfig
from dflash_offline.stages.capture.encode import FeatureEncoder
from dflash_offline.stages.capture.inputs import ChosenTarget
from dflash_offline.stages.capture.runner import load_runner
from dflash_offline.stages.capture.shard import QueuedShard, ShardBuffer, Wanted
from dflash_offline.stages.progress import Progress


class Extractor(Protocol):
    """Takes token ids of samples, and puts their features' codes in a shard's buffer."""

    layer_ids: list[int]
    device: torch.device
    """Where the target runs."""
    num_buffers: int
    """Shards that are held at once: one being filled, and where filling and writing overlap the one being written."""

    def embeddings(self) -> dict[str, Tensor]:
        """Return the target's embedding table, and its head unless it is the same."""

    def start(self, samples: SampleTable, progress: Progress) -> None:
        """Be ready to run the plan's samples; raises `DflashError` where what runs the target cannot be trusted."""

    def batches(self, samples: SampleTable, members: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """Return groups of samples that `run_batch` takes."""

    def buffer(self, layout: Layout, fill: int) -> ShardBuffer:
        """Return a new shard buffer."""

    def run_batch(
        self, samples: SampleTable, batch: NDArray[np.int64], encoders: Mapping[str, FeatureEncoder]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Return codes, int16 [N, L, H], and `TOKEN_STATISTICS`, float32 [N, L, 7], of each array that has an encoder.

        Of `HIDDEN` they are those of the samples' tokens, in order; of `FINAL` those of the positions that it holds
        (`stored_spans`), with L = 1.
        """

    def run_shard(
        self,
        samples: SampleTable,
        members: NDArray[np.int64],
        wanted: Sequence[Wanted],
        progress: Callable[[int], None],
    ) -> list[QueuedShard]:
        """Queue a shard's samples; returns a queued shard for each array that is wanted, at least one.

        `progress` is called with tokens as they are run, from any thread.
        """

    def close(self) -> None:
        """End what runs the target, and give back its memory."""


def load_extractor(
    config: ExtractConfig, target: ChosenTarget, identity: dict[str, Any], progress: Progress
) -> Extractor:
    """Return what runs the target, which is loaded and checked to be one that a draft can be served with.

    Raises `MismatchError` if its files are no longer those of the cache's `identity`, which were hashed before.
    """
    if config.engine == TRANSFORMERS:
        return load_runner(config, target, identity, progress)
    from dflash_offline.stages.capture.engines.vllm import load_vllm

    return load_vllm(config, target, identity, progress)
