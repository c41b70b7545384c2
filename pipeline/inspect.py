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

from dflash_offline.schemas.errors import CacheError, DflashError
from dflash_offline.schemas.manifest import SAMPLES, TARGET, Manifest
from dflash_offline.schemas.samples import SampleTable
from dflash_offline.stages.progress import readable_bytes


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
