"""What the finished shards' records say together: progress, bytes, workers, and each layer's statistics.

Axes: S finished shards with features, L captured layers.
"""

import os
import socket
from collections import defaultdict
from datetime import datetime
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dflash_offline.schemas.commits import Commit
from dflash_offline.schemas.manifest import COMMITS, FEATURES, Layout
from dflash_offline.stages.store.leftovers import half_written

STATISTICS = ("mean", "std", "max_abs", "zeros")
_ARRAYS = ("hidden_states", "input_ids", "loss_mask")


def shard_states(cache: Path, layout: Layout, commits: dict[int, Commit]) -> dict[int, str]:
    """Return the state of every shard that is not simply left to do.

    done: a valid record and files of its sizes. damaged: a record without that. half-finished: files without a
    record. half-written: a part in tmp/ whose worker no longer runs. being written: one whose worker runs here.
    unknown: one of another machine's worker.
    """
    states = dict.fromkeys(_shards_with_files(cache), "half-finished")
    for part in half_written(cache):
        if part.host != socket.gethostname():
            states[part.shard] = "unknown"
        else:
            states[part.shard] = "being written" if _runs(part.process) else "half-written"
    states |= dict.fromkeys(_recorded(cache), "damaged")
    states |= dict.fromkeys(commits, "done")
    return {shard: state for shard, state in states.items() if shard < layout.num_shards}


def state_runs(states: dict[int, str], num_shards: int) -> list[dict[str, Any]]:
    """Return the shards' states as runs of equal ones, in order: state, first and last shard."""
    runs = []
    for state, shards in groupby(range(num_shards), lambda shard: states.get(shard, "left")):
        members = list(shards)
        runs.append({"state": state, "first": members[0], "last": members[-1]})
    return runs


def _shards_with_files(cache: Path) -> set[int]:
    found: set[int] = set()
    for array in _ARRAYS:
        found |= _numbers(cache / FEATURES / array / "c", "")
    return found


def _recorded(cache: Path) -> set[int]:
    return _numbers(cache / COMMITS, ".json")


def _numbers(folder: Path, suffix: str) -> set[int]:
    try:
        names = os.listdir(folder)  # noqa: PTH208 - a Path for each of 20,000 takes longer
    except OSError:
        return set()
    return {int(name.removesuffix(suffix)) for name in names if name.removesuffix(suffix).isdecimal()}


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def bytes_by_array(commits: dict[int, Commit], layout: Layout) -> dict[str, dict[str, Any]]:
    """Return bytes stored, bytes of the same tokens as raw arrays, and their ratio, of each array."""
    tokens = sum(commit.num_tokens for commit in commits.values())
    raw = {"hidden_states": tokens * layout.slot_bytes, "input_ids": 4 * tokens, "loss_mask": tokens}
    stored: dict[str, int] = defaultdict(int)
    for commit in commits.values():
        for name, record in commit.files.items():
            stored[name.split("/")[1]] += record.size
    return {
        name: {"stored": size, "raw": raw[name], "ratio": size / raw[name] if raw[name] else None}
        for name, size in stored.items()
    }


def worker_figures(commits: dict[int, Commit]) -> list[dict[str, Any]]:
    """Return what each worker has done: shards, tokens, seconds spent on them, and when it began and ended."""
    by_worker: dict[str, list[Commit]] = defaultdict(list)
    for commit in commits.values():
        by_worker[commit.worker].append(commit)
    return [
        {
            "worker": worker,
            "shards": len(done),
            "tokens": sum(commit.num_tokens for commit in done),
            "seconds": sum(map(commit_seconds, done)),
            "began": min(commit.started for commit in done),
            "ended": max(commit.finished for commit in done),
        }
        for worker, done in sorted(by_worker.items())
    ]


def commit_seconds(commit: Commit) -> float:
    """Return how long a shard took, from its first forward to its record."""
    return (datetime.fromisoformat(commit.finished) - datetime.fromisoformat(commit.started)).total_seconds()


def statistics_by_shard(commits: dict[int, Commit]) -> tuple[list[Commit], NDArray[np.float64]]:
    """Return the shards that hold features, and their statistics [S, L, 4] in the order of `STATISTICS`."""
    filled = [commit for commit in commits.values() if commit.num_tokens]
    values = [[(layer.mean, layer.std, layer.max_abs, layer.zeros) for layer in commit.layers] for commit in filled]
    return filled, np.array(values, np.float64) if filled else np.zeros((0, 0, len(STATISTICS)))


def pooled_layers(filled: list[Commit], statistics: NDArray[np.float64]) -> list[dict[str, Any]]:
    """Return each layer's statistics over all tokens of the finished shards, and between which shards they range."""
    if not filled:
        return []
    weight = np.array([commit.num_tokens for commit in filled], np.float64)
    weight /= weight.sum()
    means, stds, largest, zeros = statistics.transpose(2, 0, 1)  # [S, L] each
    mean = weight @ means
    std = np.sqrt(np.maximum(weight @ (stds**2 + means**2) - mean**2, 0))
    rows = []
    for column, layer in enumerate(filled[0].layers):
        rows.append(
            {
                "layer_id": layer.layer_id,
                "mean": float(mean[column]),
                "std": float(std[column]),
                "max_abs": float(largest[:, column].max()),
                "max_abs_shard": filled[int(largest[:, column].argmax())].shard,
                "zeros": float(weight @ zeros[:, column]),
                "std_least": float(stds[:, column].min()),
                "std_least_shard": filled[int(stds[:, column].argmin())].shard,
                "std_most": float(stds[:, column].max()),
                "std_most_shard": filled[int(stds[:, column].argmax())].shard,
            }
        )
    return rows
