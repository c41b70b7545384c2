"""`dflash inspect CACHE --shard K` and `--top`: one shard's record and samples; the longest or rarest samples."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from dflash_offline.pipeline.inspect.plan_statistics import read_tokens
from dflash_offline.pipeline.inspect.shard_statistics import bytes_by_array, commit_seconds, shard_states
from dflash_offline.pipeline.terminal import columns, facts, open_console
from dflash_offline.schemas.commits import read_finished
from dflash_offline.schemas.errors import CacheError, DflashError, dflash_line
from dflash_offline.schemas.samples import NUMBERS, SampleTable
from dflash_offline.stages.progress import readable_bytes
from dflash_offline.stages.store.cache import Cache

TOP = ("longest", "shortest", "rare")
NUM_TOP = 20
_SHOWN = 20


def shard_view(cache: Path, shard: int) -> dict[str, Any]:
    """Return one shard: its state, its record's figures, its files' bytes, and every sample that lies in it."""
    opened = Cache.open(cache, hashed=False)
    manifest, samples = opened.manifest, opened.samples
    layout = manifest.layout
    if not 0 <= shard < layout.num_shards:
        raise DflashError(f"{cache} has shards 0 to {layout.num_shards - 1}; {shard} is not one of them.")
    members = samples.samples_of_shard(shard)
    fault = ""
    try:
        commit = read_finished(cache, shard, manifest.checksum)
    except CacheError as error:
        commit, fault = None, str(error)
    state = shard_states(cache, layout, {} if commit is None else {shard: commit}).get(shard, "left")
    view = {
        "cache": str(cache),
        "shard": shard,
        "state": state,
        "fault": fault,
        "slots": layout.shard_tokens,
        "tokens": int(samples.num_tokens[members].sum()),
        "samples": _sample_rows(samples, members),
    }
    if commit is None:
        return view
    return view | {
        "worker": commit.worker,
        "started": commit.started,
        "finished": commit.finished,
        "seconds": commit_seconds(commit),
        "skipped": [asdict(one) for one in commit.skipped],
        "arrays": bytes_by_array({shard: commit}, layout),
        "files": {name: asdict(record) for name, record in commit.files.items()},
        "layers": [asdict(layer) for layer in commit.layers],
    }


def _sample_rows(samples: SampleTable, members: NDArray[np.int64]) -> list[dict[str, Any]]:
    return [
        {
            "sample": sample,
            "source": samples.source(sample),
            **{name: int(getattr(samples, name)[sample]) for name in NUMBERS},
        }
        for sample in members.tolist()
    ]


def print_shard(view: dict[str, Any]) -> None:
    """Print a shard for a person."""
    console = open_console()
    rows = [("Shard", f"{view['shard']}: {view['state']}")]
    if view["fault"]:
        rows.append(("Fault", view["fault"]))
    rows.append(("Samples", f"{len(view['samples']):,}, {view['tokens']:,} tokens in {view['slots']:,} slots"))
    if "worker" in view:
        rate = view["tokens"] / view["seconds"] if view["seconds"] else 0
        rows.append(("Worker", f"{view['worker']}, {view['seconds']:.1f} s, {rate:,.0f} tokens/s"))
        rows.append(("Times", f"{view['started']} to {view['finished']}"))
        rows += [("Left out", skipped_text(one)) for one in view["skipped"]]
        for name, one in view["arrays"].items():
            rows.append(("Bytes", f"{name}: {readable_bytes(one['stored'])}, {one['ratio'] or 0:.3f} of raw"))
    console.print(facts(rows))
    if view.get("layers"):
        console.print(
            columns(("layer", "mean", "std", "largest", "zeros"), [_layer_cells(row) for row in view["layers"]])
        )
    console.print()
    print_samples(console, view["samples"][:_SHOWN])
    if len(view["samples"]) > _SHOWN:
        console.print(f"and {len(view['samples']) - _SHOWN:,} more; all with --json")
    if view["samples"]:
        first = view["samples"][0]["sample"]
        console.print(f"Next: {dflash_line('inspect', view['cache'], '--sample', first)}", soft_wrap=True)


def skipped_text(one: dict[str, Any]) -> str:
    """Return a sample that was left out, why, and where in it."""
    return f"sample {one['sample']}: {one['reason']} at layer {one['layer_id']}, position {one['position']}"


def _layer_cells(row: dict[str, Any]) -> list[str]:
    return [
        str(row["layer_id"]),
        f"{row['mean']:.4g}",
        f"{row['std']:.4g}",
        f"{row['max_abs']:.4g}",
        f"{row['zeros']:.2%}",
    ]


def print_samples(console: Console, rows: list[dict[str, Any]]) -> None:
    """Print samples as a table; `bits` is there for the rare ones."""
    names = [
        "sample",
        "tokens",
        "superv.",
        "anchors",
        "shard",
        *(["bits"] if rows and "bits" in rows[0] else []),
        "from",
    ]
    cells = [
        [
            str(row["sample"]),
            f"{row['num_tokens']:,}",
            f"{row['num_supervised']:,}",
            f"{row['num_anchors']:,}",
            str(row["shard"]),
            *([f"{row['bits']:.2f}"] if "bits" in row else []),
            f"{row['source']}:{row['row']}",
        ]
        for row in rows
    ]
    console.print(columns(names, cells, left=("from",)))


def top_view(cache: Path, kind: str) -> dict[str, Any]:
    """Return the twenty longest or shortest samples, or those of the rarest tokens.

    How rare a sample is: the mean over its tokens of -log2(the token's share of all tokens of the cache), in bits a
    token. Text in another language or script, tables and noise come first.
    """
    if kind not in TOP:
        raise DflashError(f"--top is {kind!r}; expected one of {', '.join(TOP)}.")
    samples = Cache.open(cache, hashed=False).samples
    if kind == "rare":
        score = token_bits(cache)
        order = np.argsort(-score, kind="stable")[:NUM_TOP]
    else:
        length = samples.num_tokens
        order = np.argsort(-length if kind == "longest" else length, kind="stable")[:NUM_TOP]
    rows = _sample_rows(samples, order)
    if kind == "rare":
        rows = [row | {"bits": float(score[row["sample"]])} for row in rows]
    return {"cache": str(cache), "top": kind, "samples": rows}


def token_bits(cache: Path) -> NDArray[np.float64]:
    """Return each sample's mean of -log2(share of its tokens among all tokens of the cache), [samples]."""
    counts = np.zeros(0, np.int64)
    for _, ids in read_tokens(cache):
        found = np.bincount(ids)
        counts = np.pad(counts, (0, max(len(found) - len(counts), 0)))
        counts[: len(found)] += found
    bits = -np.log2(np.maximum(counts, 1) / max(counts.sum(), 1))
    parts = []
    for lengths, ids in read_tokens(cache):
        sums = np.concatenate([[0.0], np.cumsum(bits[ids])])
        ends = np.cumsum(lengths)
        parts.append((sums[ends] - sums[ends - lengths]) / np.maximum(lengths, 1))
    return np.concatenate(parts) if parts else np.zeros(0)


def print_top(view: dict[str, Any]) -> None:
    """Print the samples for a person."""
    console = open_console()
    said = {
        "longest": "The longest samples",
        "shortest": "The shortest samples",
        "rare": "The samples of the rarest tokens: bits a token by the tokens' shares in this cache",
    }
    console.print(said[view["top"]])
    print_samples(console, view["samples"])
    if view["samples"]:
        first = view["samples"][0]["sample"]
        console.print(f"Next: {dflash_line('inspect', view['cache'], '--sample', first)}", soft_wrap=True)
