"""What is in a cache, as one document: from its manifest, the plan's numbers and the commit records.

No feature is read, and neither torch nor zarr is loaded. `dflash inspect CACHE --json` prints exactly this.
"""

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from dflash_offline.pipeline.inspect.plan_statistics import mask_token_use, reject_examples, spread
from dflash_offline.pipeline.inspect.shard_statistics import (
    bytes_by_array,
    pooled_layers,
    shard_states,
    state_runs,
    statistics_by_shard,
    worker_figures,
)
from dflash_offline.pipeline.inspect.warnings import (
    describe_token,
    half_written_marks,
    layer_marks,
    mask_token_marks,
    plan_marks,
    shard_marks,
)
from dflash_offline.schemas.commits import Commit
from dflash_offline.schemas.errors import dflash_line
from dflash_offline.schemas.manifest import Manifest
from dflash_offline.schemas.samples import SampleTable
from dflash_offline.stages.store.cache import Cache
from dflash_offline.stages.store.leftovers import figures

_TOKENS_SEARCHED = 1 << 22
"""Tokens of the plan that are looked through for the mask token; a quarter of a second."""
_SKIPPED_SHOWN = 1000


def overview(cache: Path) -> dict[str, Any]:
    """Return what the cache holds, how far it is and what looks wrong; `CacheError` if it is none or lacks a file."""
    return overview_of(Cache.open(cache, hashed=False))


def overview_of(records: Cache) -> dict[str, Any]:
    """Return the overview of a cache that is open."""
    cache, manifest, commits = records.path, records.manifest, records.commits
    states = shard_states(cache, manifest.layout, commits)
    filled, statistics = statistics_by_shard(commits)
    layers = pooled_layers(filled, statistics)
    mask_token = int(manifest.plan["mask_token_id"])
    name, problem = describe_token(cache, manifest, mask_token)
    use = mask_token_use(cache, mask_token, _TOKENS_SEARCHED)
    half_written = figures(cache)
    marks = [
        *shard_marks(states, records.faults, str(cache)),
        *layer_marks(filled, statistics, layers, str(cache)),
        *plan_marks(records.samples, manifest.plan["block_size"], str(cache)),
        *mask_token_marks(mask_token, name, problem, use),
        *half_written_marks(half_written),
    ]
    arrays = bytes_by_array(commits, manifest.layout)
    hidden = arrays.get("hidden_states")
    return {
        "cache": str(cache),
        **_what_made_it(manifest),
        "mask_token": name,
        "mask_token_use": use,
        **_plan_figures(cache, manifest, records.samples),
        **_shard_figures(manifest, commits, states),
        "damaged_records": records.faults,
        "half_written": half_written,
        "arrays": arrays,
        "bytes": {name: one["stored"] for name, one in arrays.items()},
        "raw_feature_bytes": hidden["raw"] if hidden else 0,
        "compression": hidden["ratio"] if hidden else None,
        "layers": [row | {"marks": [one.kind for one in marks if one.layer_id == row["layer_id"]]} for row in layers],
        "workers": worker_figures(commits),
        "marks": [asdict(mark) for mark in marks],
        "next": _next(records),
    }


def _next(records: Cache) -> list[str]:
    """Return the commands that are of use now."""
    cache, target = records.path, records.manifest.origin["target"]
    if len(records.commits) < records.manifest.layout.num_shards:
        return ["the `dflash extract` that made it, to go on", dflash_line("inspect", cache, "--sample", 0)]
    return [
        dflash_line("train", cache, "--out", "RUN"),
        f"{dflash_line('verify', cache, '--target', target)}  # is each layer the one it is called?",
        dflash_line("inspect", cache, "--sample", 0),
        dflash_line("inspect", cache, "--layers", "--features", 8),
    ]


def _what_made_it(manifest: Manifest) -> dict[str, Any]:
    layout, identity = manifest.layout, manifest.identity
    return {
        "manifest": manifest.checksum,
        "target": manifest.origin["target"],
        "origin": manifest.origin,
        "identity": identity,
        "layer_ids": identity["layer_ids"],
        "hidden_size": layout.hidden_size,
        "features": str(layout.features),
        "shard_tokens": layout.shard_tokens,
        "chunk_tokens": layout.chunk_tokens,
        "mask_rule": identity["mask_rule"],
        "mask_token_id": manifest.plan["mask_token_id"],
        "block_size": manifest.plan["block_size"],
    }


def _plan_figures(cache: Path, manifest: Manifest, samples: SampleTable) -> dict[str, Any]:
    tokens, supervised = samples.num_tokens, samples.num_supervised
    plan = manifest.plan
    return {
        "samples": len(tokens),
        "tokens": int(tokens.sum()),
        "supervised": int(supervised.sum()),
        "supervised_share": float(supervised.sum() / max(tokens.sum(), 1)),
        "anchors": int(samples.num_anchors.sum()),
        "truncated": plan["truncated"],
        "truncated_supervised": plan.get("truncated_supervised", 0),
        "formats": plan.get("formats", {}),  # caches made before other formats were read have none
        "not_drawn": plan.get("not_drawn", 0),
        "rejects": plan["rejects"],
        "reject_examples": reject_examples(cache, plan["rejects"]),
        "length": spread(tokens),
        "supervised_per_sample": spread(supervised / np.maximum(tokens, 1)),
        "anchors_per_sample": spread(samples.num_anchors),
    }


def _shard_figures(manifest: Manifest, commits: dict[int, Commit], states: dict[int, str]) -> dict[str, Any]:
    num_shards = manifest.layout.num_shards
    skipped = [asdict(one) | {"shard": commit.shard} for commit in commits.values() for one in commit.skipped]
    return {
        "shards": num_shards,
        "shards_done": len(commits),
        "shards_left": num_shards - len(commits),
        "shard_states": dict(Counter(states.get(shard, "left") for shard in range(num_shards))),
        "progress": state_runs(states, num_shards),
        "samples_done": sum(commit.num_samples for commit in commits.values()),
        "tokens_done": sum(commit.num_tokens for commit in commits.values()),
        "skipped": len(skipped),
        "skipped_samples": skipped[:_SKIPPED_SHOWN],
    }
