"""`dflash inspect CACHE --html`: a cache as one page, with a table of its samples and some of them token by token.

Axes: T tokens, L captured layers.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dflash_offline.pipeline.inspect.feature_statistics import (
    BytesByLayer,
    FeatureStatistics,
    bytes_by_layer,
    feature_statistics,
)
from dflash_offline.pipeline.inspect.overview import Overview, PlanStatistics, overview
from dflash_offline.pipeline.inspect.sample import open_tokenizer, sample_norms
from dflash_offline.pipeline.inspect.shard_statistics import STATES, ShardRun
from dflash_offline.pipeline.inspect.warnings import feature_warnings
from dflash_offline.pipeline.pages.cache_plots import cache_plots
from dflash_offline.pipeline.pages.page import fitting, write_page
from dflash_offline.pipeline.pages.plots import draw, require_matplotlib
from dflash_offline.pipeline.token_text import Decode, token_texts, visible
from dflash_offline.schemas.errors import CacheError
from dflash_offline.schemas.samples import document_anchors
from dflash_offline.stages.progress import readable_bytes
from dflash_offline.stages.store.cache import Cache

NUM_ROWS = 100_000
"""Samples in the table; of more, as many are drawn."""
NUM_SHOWN = 24
"""Samples shown token by token."""
NUM_MEASURED = 8
"""Samples whose features are read for the plots and tables of layers."""
TOKENS_SHOWN = 2048
"""Of one sample, from its first."""
MOST_BYTES = 5 << 20
"""Of the samples shown token by token, all together."""
NUM_CELLS = 1000
"""Cells of the shard map; of more shards, a cell stands for several."""


def write_cache_page(folder: Path, path: Path) -> tuple[int, int]:
    """Write the page and return how many samples it lists and how many it shows; `CacheError` if it is no cache."""
    require_matplotlib()
    cache = Cache.open(folder, hashed=False)
    view, by_layer = overview(cache), bytes_by_layer(cache)
    warnings = list(view.warnings)
    try:
        features = feature_statistics(cache, NUM_MEASURED)
        warnings += feature_warnings(features, str(folder))
        note = _features_note(features)
    except CacheError as error:
        features, note = None, f"Norms, channels and similarity are missing: {error}"
    rows = _drawn(np.arange(len(cache.samples)), NUM_ROWS)
    shown = _shown_samples(cache, rows)
    plan, progress = view.plan, view.progress
    write_page(
        path,
        "cache.html",
        ("browse.js", "cache.js"),
        title=f"Cache {folder.resolve().name}",
        lead=f"{folder}, features of {view.provenance.target}",
        warnings=list(map(str, warnings)),
        facts=_facts(view),
        plots=[draw(plot) for plot in cache_plots(view, features, by_layer)],
        rejects=[[reason, count, _example(plan, reason)] for reason, count in plan.rejects.items()],
        cells=_cells(progress.progress, progress.shards),
        states=progress.shard_states,
        layers=_layer_rows(view, features, by_layer),
        similarity=features and features.similarity,
        features_note=note,
        samples_note=_samples_note(len(cache.samples), len(rows), shown),
        table_data=_table(cache, rows),
        shown=shown,
        layer_ids=view.provenance.layer_ids,
    )
    return len(rows), len(shown)


def _drawn(values: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """Return all values, or a draw of `most`, always the same, in order."""
    if len(values) <= most:
        return values
    return np.sort(np.random.default_rng(0).choice(values, most, replace=False))


def _facts(view: Overview) -> list[tuple[str, Any]]:
    made, plan, progress = view.provenance, view.plan, view.progress
    return [
        ("samples", plan.samples),
        ("tokens", plan.tokens),
        ("supervised tokens", plan.supervised),
        ("anchors", plan.anchors),
        ("shards done", f"{progress.shards_done:,} of {progress.shards:,}"),
        ("length", plan.length.range_text()),
        ("anchors a sample", plan.anchors_per_sample.range_text()),
        ("cut at the maximum length", plan.truncated),
        ("rows left out", sum(plan.rejects.values())),
        ("answers left out", sum(plan.answers_left_out.values())),
        ("samples without features", progress.skipped),
        ("captured layers", ", ".join(map(str, made.layer_ids))),
        ("width", made.hidden_size),
        ("feature layout", made.features),
        ("mask", f"{made.mask_rule}; mask token {made.mask_token_id}"),
        ("block size", made.block_size),
        ("manifest", made.manifest[:12]),
        *((f"bytes, {name}", readable_bytes(size)) for name, size in view.bytes.items()),
        ("features stored / raw", view.compression),
    ]


def _example(plan: PlanStatistics, reason: str) -> str:
    rows = plan.reject_examples.get(reason, [])[:1]
    return "".join(visible(f"{row.source}:{row.row} {row.detail}"[:200]) for row in rows)


def _cells(progress: list[ShardRun], shards: int) -> list[dict[str, str]]:
    """Return the cells of the shard map in order, each with the gravest state of its shards."""
    states = np.empty(shards, np.int64)
    for run in progress:
        states[run.first : run.last + 1] = STATES.index(run.state)
    each = -(-shards // NUM_CELLS)
    cells = []
    for first in range(0, shards, each):
        last = min(first + each, shards) - 1
        state = STATES[int(states[first : last + 1].min())]
        cells.append({"state": state, "shards": f"{first}" if first == last else f"{first} to {last}"})
    return cells


def _layer_rows(view: Overview, features: FeatureStatistics | None, by_layer: BytesByLayer) -> list[list[Any]]:
    """Return a row a layer: statistics of the records, norms and channels of the samples read, stored over raw."""
    rows: list[list[Any]] = []
    for i, layer in enumerate(view.layers):
        norm = features.layers[i].norm.median if features else None
        largest = features.layers[i].channels.largest[:1] if features else []
        channel = "".join(f"{x.channel} ({x.ratio or 0:,.1f} times)" for x in largest) or None
        statistics = [layer.layer_id, layer.mean, layer.std, layer.max_abs, layer.zeros]
        ratio = by_layer.ratio[i] if by_layer.ratio else None
        rows.append([*statistics, norm, channel, ratio, ", ".join(layer.warnings) or None])
    return rows


def _features_note(features: FeatureStatistics) -> str:
    return (
        f"Norms, channels and similarity are of the {features.tokens:,} tokens of {len(features.samples)} samples "
        f"whose features were read, spread over the finished shards (samples {', '.join(map(str, features.samples))}). "
        f"The other numbers are of all shards' records."
    )


def _samples_note(samples: int, listed: int, shown: list[dict[str, Any]]) -> str:
    part = f"all {samples:,} samples" if listed == samples else f"{listed:,} of {samples:,} samples, drawn with seed 0"
    cut = sum(sample["tokens"] > len(sample["ids"]) for sample in shown)
    text = f"The table lists {part}. {len(shown)} of them, drawn with seed 0, open below token by token"
    text += f", {cut} of them only their first {TOKENS_SHOWN:,} tokens." if cut else "."
    return f"{text} Any other: dflash inspect CACHE --sample I."


def _table(cache: Cache, rows: NDArray[np.int64]) -> dict[str, Any]:
    """Return the numbers of the samples that are listed, column by column."""
    samples = cache.samples
    return {
        "sample": rows.tolist() if len(rows) < len(samples) else None,
        "count": len(rows),
        "sources": [visible(source) for source in samples.sources],
        "source": samples.source_index[rows].tolist(),
        "row": samples.row[rows].tolist(),
        **({"answer": samples.answer[rows].tolist()} if samples.answer.any() else {}),
        "tokens": samples.num_tokens[rows].tolist(),
        "supervised": samples.num_supervised[rows].tolist(),
        "anchors": samples.num_anchors[rows].tolist(),
        "shard": samples.shard[rows].tolist(),
    }


def _shown_samples(cache: Cache, listed: NDArray[np.int64]) -> list[dict[str, Any]]:
    """Return the samples that are shown token by token: of those with features, or where there are none of all."""
    tokenizer = open_tokenizer(cache.path)
    usable = np.intersect1d(cache.usable(), listed)
    drawn = _drawn(usable if len(usable) else listed, NUM_SHOWN).tolist()

    def decode(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=False)

    return fitting((_shown_sample(cache, sample, decode) for sample in drawn), MOST_BYTES)


def _shown_sample(cache: Cache, sample: int, decode: Decode) -> dict[str, Any]:
    """Return one sample as the page's script reads it; norms are [L][T]."""
    samples = cache.samples
    length = int(samples.num_tokens[sample])
    ids, mask = samples.input_ids(sample)[:TOKENS_SHOWN].tolist(), samples.loss_mask(sample)
    anchors = np.zeros_like(mask)
    anchors[document_anchors(mask, cache.manifest.anchor_rule)] = True
    norms, why = sample_norms(cache, sample)
    shown = None if norms is None else norms[:, : len(ids)].tolist()
    return {
        "sample": sample,
        "tokens": length,
        "start": int(samples.start[sample]),
        "ids": ids,
        "texts": [visible(text) for text in token_texts(ids, decode)],
        "mask": mask[:TOKENS_SHOWN].astype(int).tolist(),
        "anchors": anchors[:TOKENS_SHOWN].astype(int).tolist(),
        "norms": shown and [[float(f"{norm:.4g}") for norm in layer] for layer in shown],
        "no_features": why,
    }
