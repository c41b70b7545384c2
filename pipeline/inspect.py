"""`dflash inspect`: what is in a cache, from its small files alone; no feature is read and torch is not loaded."""

import json
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from dflash_offline.schemas.commits import Commit, read_commits
from dflash_offline.schemas.errors import CacheError, DflashError
from dflash_offline.schemas.manifest import SAMPLES, TARGET, Manifest
from dflash_offline.schemas.samples import SampleTable
from dflash_offline.stages.progress import readable_bytes

_BYTES_A_VALUE = 2


def overview(cache: Path) -> dict[str, Any]:
    """Return what the cache holds and how far it is; `CacheError` if it is none or lacks a file."""
    manifest = Manifest.read(cache)
    manifest.check_static_files(cache, hashed=False)  # a large target's embeddings take seconds to hash
    samples = SampleTable.read(cache / SAMPLES)
    layout = manifest.layout
    commits, faults = read_commits(cache, layout.num_shards, manifest.checksum)
    done_tokens = sum(commit.num_tokens for commit in commits.values())
    raw = done_tokens * layout.num_layers * layout.hidden_size * _BYTES_A_VALUE
    stored = _bytes_by_array(commits)
    features = stored.get("hidden_states", 0)
    return {
        "cache": str(cache),
        "target": manifest.origin["target"],
        "layer_ids": manifest.identity["layer_ids"],
        "hidden_size": layout.hidden_size,
        "features": str(layout.features),
        "mask_rule": manifest.identity["mask_rule"],
        "mask_token_id": manifest.plan["mask_token_id"],
        "block_size": manifest.plan["block_size"],
        "samples": len(samples),
        "tokens": int(samples.num_tokens.sum()),
        "supervised": int(samples.num_supervised.sum()),
        "anchors": int(samples.num_anchors.sum()),
        "truncated": manifest.plan["truncated"],
        "formats": manifest.plan.get("formats", {}),  # caches made before other formats were read have none
        "rejects": manifest.plan["rejects"],
        "length": _spread(samples.num_tokens),
        "anchors_per_sample": _spread(samples.num_anchors),
        "shards": layout.num_shards,
        "shards_done": len(commits),
        "shards_left": layout.num_shards - len(commits),
        "skipped": sum(len(commit.skipped) for commit in commits.values()),
        "damaged_records": faults,
        "bytes": stored,
        "raw_feature_bytes": raw,
        "compression": features / raw if raw else None,
        "layers": _layer_statistics(commits),
        "manifest": manifest.checksum,
    }


def _bytes_by_array(commits: dict[int, Commit]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for commit in commits.values():
        for name, record in commit.files.items():
            array = name.split("/")[1]
            sizes[array] = sizes.get(array, 0) + record.size
    return sizes


def _spread(values: NDArray[np.int64]) -> dict[str, float]:
    low, median, high = np.percentile(values, [0, 50, 100])
    return {"least": int(low), "median": float(median), "mean": float(values.mean()), "most": int(high)}


def _layer_statistics(commits: dict[int, Commit]) -> list[dict[str, float]]:
    """Pool each layer's statistics over the finished shards, weighted by their tokens."""
    if not commits:
        return []
    weight = np.array([commit.num_tokens for commit in commits.values()], np.float64)
    weight /= weight.sum()
    rows = []
    for layer in zip(*(commit.layers for commit in commits.values()), strict=True):
        means = np.array([shard.mean for shard in layer])
        squares = np.array([shard.std**2 + shard.mean**2 for shard in layer])
        mean = float(weight @ means)
        rows.append(
            {
                "layer_id": layer[0].layer_id,
                "mean": mean,
                "std": float(np.sqrt(max(weight @ squares - mean**2, 0.0))),
                "max_abs": max(shard.max_abs for shard in layer),
                "zeros": float(weight @ np.array([shard.zeros for shard in layer])),
            }
        )
    return rows


def print_overview(found: dict[str, Any]) -> None:
    """Print an overview for a person, 80 columns wide."""
    tokens, length, anchors = found["tokens"], found["length"], found["anchors_per_sample"]
    print(f"Cache       {found['cache']}")
    print(f"Target      {found['target']}")
    layers = ", ".join(map(str, found["layer_ids"]))
    print(f"Features    layers {layers}; width {found['hidden_size']}; {found['features']}")
    print(f"Mask        {found['mask_rule']}; mask token {found['mask_token_id']}")
    for kind, rows in found["formats"].items():
        print(f"Data        {rows:,} rows of {kind}")
    print(f"Samples     {found['samples']:,}; {found['truncated']:,} cut at the maximum length")
    for reason, count in found["rejects"].items():
        print(f"            left out: {count:,} rows: {reason}")
    print(f"Tokens      {tokens:,}; supervised {found['supervised']:,} ({found['supervised'] / tokens:.0%})")
    print(f"Length      {length['least']} to {length['most']}, median {length['median']:.0f}")
    print(
        f"Anchors     {found['anchors']:,} for blocks of {found['block_size']}; {anchors['least']} to "
        f"{anchors['most']} a sample, median {anchors['median']:.0f}"
    )
    print(f"Shards      {found['shards_done']:,} of {found['shards']:,} done, {found['shards_left']:,} left")
    if found["skipped"]:
        print(f"            left out: {found['skipped']:,} samples whose features were bad")
    for fault in found["damaged_records"]:
        print(f"            damaged: {fault}")
    for name, size in found["bytes"].items():
        note = f", {found['compression']:.3f} of raw" if name == "hidden_states" else ""
        print(f"Bytes       {name}: {readable_bytes(size)}{note}")
    if found["layers"]:
        print("Layer         mean        std    largest    zeros")
        for row in found["layers"]:
            print(
                f"{row['layer_id']:>5}  {row['mean']:>10.4f} {row['std']:>10.4f} {row['max_abs']:>10.2f} "
                f"{row['zeros']:>8.2%}"
            )


def sample_view(cache: Path, sample: int) -> dict[str, Any]:
    """Return one sample of the plan: its place, its numbers, and its text in runs, supervised or not."""
    manifest = Manifest.read(cache)
    samples = SampleTable.read(cache / SAMPLES)
    if not 0 <= sample < len(samples):
        raise DflashError(f"{cache} has samples 0 to {len(samples) - 1}; {sample} is not one of them.")
    path = cache / TARGET / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise CacheError(f"{path} cannot be read: {error}. Restore it from a copy, or extract again.") from error
    ids, mask = samples.input_ids(sample), samples.loss_mask(sample)
    return {
        "sample": sample,
        "source": samples.source(sample),
        "row": int(samples.row[sample]),
        "tokens": len(ids),
        "supervised": int(mask.sum()),
        "anchors": int(samples.num_anchors[sample]),
        "block_size": manifest.plan["block_size"],
        "shard": int(samples.shard[sample]),
        "start": int(samples.start[sample]),
        "runs": marked_runs(ids, mask, lambda ids: tokenizer.decode(ids, skip_special_tokens=False)),
    }


MARKS = {True: ("\033[32m", "\033[0m"), False: ("[[", "]]")}
"""Around supervised text: on a terminal, and elsewhere."""


def marked_runs(
    ids: NDArray[np.uint32], mask: NDArray[np.bool_], decode: Callable[[list[int]], str]
) -> list[dict[str, Any]]:
    """Return the text of each run of tokens that are all supervised, or all not."""
    edges = [0, *(np.flatnonzero(mask[1:] != mask[:-1]) + 1).tolist(), len(ids)]
    return [
        {"supervised": bool(mask[begin]), "tokens": end - begin, "text": decode(ids[begin:end].tolist())}
        for begin, end in pairwise(edges)
    ]


def print_sample(view: dict[str, Any]) -> None:
    """Print a sample's text with the supervised part marked: green on a terminal, in [[ ]] elsewhere."""
    opening, closing = MARKS[sys.stdout.isatty()]
    print(
        f"Sample {view['sample']} ({view['source']}:{view['row']}): {view['tokens']} tokens, {view['supervised']} "
        f"supervised, {view['anchors']} anchors,\nshard {view['shard']}, first slot {view['start']}; the supervised "
        f"part is {'green' if sys.stdout.isatty() else 'in [[ ]]'}\n"
    )
    print("".join(f"{opening}{run['text']}{closing}" if run["supervised"] else run["text"] for run in view["runs"]))


def print_json(document: Any) -> None:
    """Print a document for a script."""
    print(json.dumps(document, indent=1))
