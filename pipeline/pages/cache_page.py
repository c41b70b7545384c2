"""`dflash inspect CACHE --html`: a cache as one page, with a table of its samples and some of them token by token.

Axes: T tokens, L captured layers.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dflash_offline.pipeline.inspect.feature_statistics import bytes_by_layer, feature_figures, feature_marks
from dflash_offline.pipeline.inspect.overview import overview_of
from dflash_offline.pipeline.inspect.sample import open_tokenizer
from dflash_offline.pipeline.pages.cache_plots import cache_plots
from dflash_offline.pipeline.pages.page import page_bytes, write_page
from dflash_offline.pipeline.pages.plots import draw, require_matplotlib
from dflash_offline.pipeline.token_text import token_texts, visible
from dflash_offline.schemas.errors import CacheError
from dflash_offline.stages.progress import readable_bytes
from dflash_offline.stages.store.cache import Cache

NUM_ROWS = 100_000
"""Samples in the table; of more, as many are drawn."""
NUM_SHOWN = 24
"""Samples shown token by token."""
NUM_MEASURED = 8
"""Samples whose features give the figures of layers."""
TOKENS_SHOWN = 2048
"""Of one sample, from its first."""
MOST_BYTES = 5 << 20
"""Of the samples shown token by token, all together."""
NUM_CELLS = 1000
"""Cells of the shard map; of more shards, a cell stands for several."""
_GRAVEST = ("damaged", "half-finished", "unknown", "being written", "left", "done")
"""States of shards: a cell that stands for several shows the first of these among them."""


def write_cache_page(cache: Path, path: Path) -> dict[str, int]:
    """Write the page and return how many samples it lists and how many it shows; `CacheError` if it is no cache."""
    require_matplotlib()
    records = Cache.open(cache, hashed=False)
    found, by_layer = overview_of(records), bytes_by_layer(records)
    marks = [f"{one['kind']}: {one['where']} {one['what']}. Next: {one['next']}." for one in found["marks"]]
    figures, unread = None, ""
    try:
        figures = feature_figures(records, NUM_MEASURED)
        marks += [
            f"{one.kind}: {one.where} {one.what}. Next: {one.next}." for one in feature_marks(figures, str(cache))
        ]
    except CacheError as error:
        unread = str(error)
    rows = _drawn(np.arange(len(records.samples)), NUM_ROWS)
    shown = _shown_samples(records)
    write_page(
        path,
        "cache.html",
        ("browse.js", "cache.js"),
        title=f"Cache {cache.resolve().name}",
        lead=f"{cache}, features of {found['target']}",
        marks=marks,
        facts=_facts(found),
        plots=[draw(plot) for plot in cache_plots(found, figures, by_layer)],
        rejects=[[reason, count, _example(found, reason)] for reason, count in found["rejects"].items()],
        cells=_cells(found["progress"], found["shards"]),
        states=found["shard_states"],
        layers=_layer_rows(found, figures, by_layer),
        similarity=figures,
        features_note=_features_note(figures, unread),
        samples_note=_samples_note(len(records.samples), len(rows), shown),
        table_data=_table(records, rows),
        shown=shown,
        layer_ids=found["layer_ids"],
        block_size=found["block_size"],
    )
    return {"listed": len(rows), "shown": len(shown)}


def _drawn(values: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """Return all values, or a draw of `most`, always the same, in order."""
    if len(values) <= most:
        return values
    return np.sort(np.random.default_rng(0).choice(values, most, replace=False))


def _facts(found: dict[str, Any]) -> list[tuple[str, Any]]:
    length, anchors = found["length"], found["anchors_per_sample"]
    facts = [
        ("samples", found["samples"]),
        ("tokens", found["tokens"]),
        ("supervised tokens", found["supervised"]),
        ("anchors", found["anchors"]),
        ("shards done", f"{found['shards_done']:,} of {found['shards']:,}"),
        ("length", f"{length['least']:,} to {length['most']:,}, median {length['median']:,.0f}"),
        ("anchors a sample", f"{anchors['least']:,} to {anchors['most']:,}, median {anchors['median']:,.0f}"),
        ("cut at the maximum length", found["truncated"]),
        ("rows left out", sum(found["rejects"].values())),
        ("samples without features", found["skipped"]),
        ("captured layers", ", ".join(map(str, found["layer_ids"]))),
        ("width", found["hidden_size"]),
        ("feature layout", found["features"]),
        ("mask", f"{found['mask_rule']}; mask token {found['mask_token_id']}"),
        ("block size", found["block_size"]),
        ("manifest", found["manifest"][:12]),
    ]
    facts += [(f"bytes, {name}", readable_bytes(size)) for name, size in found["bytes"].items()]
    return [*facts, ("features stored / raw", found["compression"])]


def _example(found: dict[str, Any], reason: str) -> str:
    examples = found["reject_examples"].get(reason, [])
    return visible(f"{examples[0]['source']}:{examples[0]['row']} {examples[0]['detail']}"[:200]) if examples else ""


def _cells(progress: list[dict[str, Any]], shards: int) -> list[dict[str, Any]]:
    """Return the cells of the shard map in order, each with the gravest state of its shards."""
    states = np.empty(shards, np.int64)
    for run in progress:
        states[run["first"] : run["last"] + 1] = _GRAVEST.index(run["state"])
    each = -(-shards // NUM_CELLS)
    cells = []
    for first in range(0, shards, each):
        last = min(first + each, shards) - 1
        state = _GRAVEST[int(states[first : last + 1].min())]
        cells.append({"state": state, "shards": f"{first}" if first == last else f"{first} to {last}"})
    return cells


def _layer_rows(
    found: dict[str, Any], figures: dict[str, Any] | None, by_layer: dict[str, Any]
) -> list[list[int | float | str | None]]:
    """Return a row a layer: statistics of the records, norms and channels of the samples read, stored over raw."""
    rows: list[list[int | float | str | None]] = []
    for i, one in enumerate(found["layers"]):
        read = figures["layers"][i] if figures else None
        channel = read["channels"]["largest"][0] if read and read["channels"]["largest"] else None
        rows.append(
            [
                one["layer_id"],
                one["mean"],
                one["std"],
                one["max_abs"],
                one["zeros"],
                read["norm"]["median"] if read else None,
                f"{channel['channel']} ({channel['ratio'] or 0:,.1f} times)" if channel else None,
                by_layer["ratio"][i] if by_layer["ratio"] else None,
                ", ".join(one["marks"]) or None,
            ]
        )
    return rows


def _features_note(figures: dict[str, Any] | None, unread: str) -> str:
    if figures is None:
        return f"Norms, channels and similarity are missing: {unread}"
    samples = figures["samples"]
    return (
        f"Norms, channels and similarity are of the {figures['tokens']:,} tokens of {len(samples)} samples whose "
        f"features were read, spread over the finished shards (samples {', '.join(map(str, samples))}). The other "
        f"figures are of all shards' records."
    )


def _samples_note(samples: int, listed: int, shown: list[dict[str, Any]]) -> str:
    part = f"all {samples:,} samples" if listed == samples else f"{listed:,} of {samples:,} samples, drawn with seed 0"
    cut = sum(one["tokens"] > len(one["ids"]) for one in shown)
    text = f"The table lists {part}. {len(shown)} of them, drawn with seed 0, open below token by token"
    text += f", {cut} of them only their first {TOKENS_SHOWN:,} tokens." if cut else "."
    return f"{text} Any other: dflash inspect CACHE --sample I."


def _table(records: Cache, rows: NDArray[np.int64]) -> dict[str, Any]:
    """Return the numbers of the samples that are listed, column by column."""
    samples = records.samples
    return {
        "sample": rows.tolist() if len(rows) < len(samples) else None,
        "count": len(rows),
        "sources": [visible(source) for source in samples.sources],
        "source": samples.source_index[rows].tolist(),
        "row": samples.row[rows].tolist(),
        "tokens": samples.num_tokens[rows].tolist(),
        "supervised": samples.num_supervised[rows].tolist(),
        "anchors": samples.num_anchors[rows].tolist(),
        "shard": samples.shard[rows].tolist(),
    }


def _shown_samples(records: Cache) -> list[dict[str, Any]]:
    """Return the samples that are shown token by token: of those with features, or where there are none of all."""
    tokenizer = open_tokenizer(records.path)
    listed = _drawn(np.arange(len(records.samples)), NUM_ROWS)
    usable = np.intersect1d(records.usable(), listed)
    shown: list[dict[str, Any]] = []
    spent = 0
    for sample in _drawn(usable if len(usable) else listed, NUM_SHOWN).tolist():
        view = _shown_sample(records, sample, lambda ids: tokenizer.decode(ids, skip_special_tokens=False))
        spent += page_bytes(view)
        if spent > MOST_BYTES and shown:
            break
        shown.append(view)
    return shown


def _shown_sample(records: Cache, sample: int, decode: Any) -> dict[str, Any]:
    """Return one sample as the page's script reads it; norms are the root mean square over channels, [L][T]."""
    samples, block = records.samples, records.manifest.plan["block_size"]
    length = int(samples.num_tokens[sample])
    ids = samples.input_ids(sample)[:TOKENS_SHOWN].tolist()
    norms, why = None, ""
    try:
        values = records.values(sample)[: len(ids)]
        rms = np.sqrt(np.square(values, dtype=np.float64).mean(axis=2)).T
        norms = [[float(f"{one:.4g}") for one in layer] for layer in np.nan_to_num(rms, posinf=0.0).tolist()]
    except CacheError as error:
        why = str(error)
    return {
        "sample": sample,
        "tokens": length,
        "anchor_end": max(length - block + 1, 0),
        "start": int(samples.start[sample]),
        "ids": ids,
        "texts": [visible(text) for text in token_texts(ids, decode)],
        "mask": samples.loss_mask(sample)[:TOKENS_SHOWN].astype(int).tolist(),
        "norms": norms,
        "no_features": why,
    }
