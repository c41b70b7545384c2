"""What the finished shards' records say together: progress, bytes, workers, and each layer's statistics.

Axes: S finished shards with features, L captured layers.
"""

import os
import socket
from collections import defaultdict
from dataclasses import dataclass, field
from datetime import datetime
from itertools import groupby
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dflash_offline.pipeline.terminal import named
from dflash_offline.schemas.commits import Commit
from dflash_offline.schemas.locks import is_running
from dflash_offline.schemas.manifest import COMMITS, FEATURES, Layout
from dflash_offline.stages.store.leftovers import half_written

STATES = ("damaged", "half-finished", "half-written", "unknown", "being written", "left", "done")
"""What a shard may be, the gravest first."""
_ARRAYS = ("hidden_states", "input_ids", "loss_mask")


@dataclass(frozen=True)
class ShardRun:
    """Consecutive shards in the same state."""

    state: str
    first: int
    last: int


@dataclass(frozen=True)
class ArrayBytes:
    """Bytes of one array's finished shards, and of the same tokens as a raw array."""

    stored: int
    raw: int
    ratio: float | None


@dataclass(frozen=True)
class WorkerStatistics:
    """What one worker has done."""

    worker: str
    shards: int
    tokens: int
    seconds: float
    """Spent on these shards."""
    began: str
    ended: str


@dataclass(frozen=True, kw_only=True)
class PooledLayer:
    """A layer's statistics over all tokens of the finished shards, and between which shards they range."""

    layer_id: int
    mean: float
    std: float
    max_abs: float
    max_abs_shard: int
    zeros: float
    std_least: float
    std_least_shard: int
    std_most: float
    std_most_shard: int
    warnings: list[str] = field(default_factory=list, metadata=named("marks"))
    """Kinds of the warnings of this layer."""


@dataclass(frozen=True)
class ShardStatistics:
    """The statistics of each layer in each finished shard that holds features."""

    layer_ids: list[int]
    shards: list[int]
    tokens: NDArray[np.int64]
    """[S]"""
    values: NDArray[np.float64]
    """[S, L, 4]: mean, standard deviation, largest magnitude, share of zeros."""

    @classmethod
    def of(cls, commits: dict[int, Commit]) -> "ShardStatistics":
        """Return the statistics of the finished shards' records."""
        filled = [commit for commit in commits.values() if commit.num_tokens]
        values = [[(layer.mean, layer.std, layer.max_abs, layer.zeros) for layer in commit.layers] for commit in filled]
        return cls(
            [layer.layer_id for layer in filled[0].layers] if filled else [],
            [commit.shard for commit in filled],
            np.array([commit.num_tokens for commit in filled], np.int64),
            np.array(values, np.float64),
        )

    def pooled(self) -> list[PooledLayer]:
        """Return the layers in their order; none where no shard holds features."""
        if not self.shards:
            return []
        weight = self.tokens / self.tokens.sum()
        means, stds, largest, zeros = self.values.transpose(2, 0, 1)  # [S, L] each
        mean = weight @ means
        std = np.sqrt(np.maximum(weight @ (stds**2 + means**2) - mean**2, 0))
        most, least_std, most_std = (places.tolist() for places in (largest.argmax(0), stds.argmin(0), stds.argmax(0)))
        return [
            PooledLayer(
                layer_id=layer_id,
                mean=float(mean[i]),
                std=float(std[i]),
                max_abs=float(largest[most[i], i]),
                max_abs_shard=self.shards[most[i]],
                zeros=float(weight @ zeros[:, i]),
                std_least=float(stds[least_std[i], i]),
                std_least_shard=self.shards[least_std[i]],
                std_most=float(stds[most_std[i], i]),
                std_most_shard=self.shards[most_std[i]],
            )
            for i, layer_id in enumerate(self.layer_ids)
        ]


def shard_states(cache: Path, layout: Layout, commits: dict[int, Commit]) -> dict[int, str]:
    """Return the state of every shard that is not simply left to do.

    done: a valid record and files of its sizes. damaged: a record without that. half-finished: files without a
    record. half-written: a part in tmp/ whose worker no longer runs. being written: one whose worker runs here.
    unknown: one of another machine's worker.
    """
    with_files = (shard for array in _ARRAYS for shard in _numbers(cache / FEATURES / array / "c", ""))
    states = dict.fromkeys(with_files, "half-finished")
    for part in half_written(cache):
        if part.host != socket.gethostname():
            states[part.shard] = "unknown"
        else:
            states[part.shard] = "being written" if is_running(part.process) else "half-written"
    states |= dict.fromkeys(_numbers(cache / COMMITS, ".json"), "damaged")
    states |= dict.fromkeys(commits, "done")
    return {shard: state for shard, state in states.items() if shard < layout.num_shards}


def state_runs(states: dict[int, str], num_shards: int) -> list[ShardRun]:
    """Return the states of all shards as runs of equal ones, in order."""
    grouped = groupby(range(num_shards), lambda shard: states.get(shard, "left"))
    runs = [(state, list(shards)) for state, shards in grouped]
    return [ShardRun(state, shards[0], shards[-1]) for state, shards in runs]


def _numbers(folder: Path, suffix: str) -> set[int]:
    try:
        names = os.listdir(folder)  # noqa: PTH208 - a Path for each of 20,000 takes longer
    except OSError:
        return set()
    return {int(name.removesuffix(suffix)) for name in names if name.removesuffix(suffix).isdecimal()}


def bytes_by_array(commits: dict[int, Commit], layout: Layout) -> dict[str, ArrayBytes]:
    """Return the bytes of each array."""
    tokens = sum(commit.num_tokens for commit in commits.values())
    raw = {"hidden_states": tokens * layout.slot_bytes, "input_ids": 4 * tokens, "loss_mask": tokens}
    stored: dict[str, int] = defaultdict(int)
    for commit in commits.values():
        for name, record in commit.files.items():
            stored[name.split("/")[1]] += record.size
    return {name: ArrayBytes(size, raw[name], size / raw[name] if raw[name] else None) for name, size in stored.items()}


def worker_statistics(commits: dict[int, Commit]) -> list[WorkerStatistics]:
    """Return what each worker has done, by its name."""
    by_worker: dict[str, list[Commit]] = defaultdict(list)
    for commit in commits.values():
        by_worker[commit.worker].append(commit)
    return [
        WorkerStatistics(
            worker,
            shards=len(done),
            tokens=sum(commit.num_tokens for commit in done),
            seconds=sum(map(commit_seconds, done)),
            began=min(commit.started for commit in done),
            ended=max(commit.finished for commit in done),
        )
        for worker, done in sorted(by_worker.items())
    ]


def commit_seconds(commit: Commit) -> float:
    """Return how long a shard took, from its first forward to its record."""
    return (datetime.fromisoformat(commit.finished) - datetime.fromisoformat(commit.started)).total_seconds()
