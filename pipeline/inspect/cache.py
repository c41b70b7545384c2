"""What `dflash inspect CACHE` prints: the overview, and the layers with `--layers` and `--features N`."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dflash_offline.pipeline.inspect.feature_statistics import (
    BytesByLayer,
    FeatureStatistics,
    bytes_by_layer,
    feature_statistics,
)
from dflash_offline.pipeline.inspect.overview import FinalStates, Overview, overview
from dflash_offline.pipeline.inspect.plan_statistics import Spread
from dflash_offline.pipeline.inspect.sample import print_sample, sample_view
from dflash_offline.pipeline.inspect.shard import (
    layer_cells,
    print_shard,
    print_top,
    shard_view,
    skipped_text,
    top_view,
)
from dflash_offline.pipeline.inspect.shard_statistics import PooledLayer, ShardRun, ShardStatistics
from dflash_offline.pipeline.inspect.warnings import CacheWarning, feature_warnings, layer_warnings, with_warnings
from dflash_offline.pipeline.safe_output import safe
from dflash_offline.pipeline.terminal import columns, facts, named, open_console, print_json, sparkline
from dflash_offline.schemas.draft.anchor_rule import WHOLE
from dflash_offline.schemas.errors import DflashError, dflash_line
from dflash_offline.schemas.manifest import is_compiled
from dflash_offline.stages.progress import readable_bytes
from dflash_offline.stages.store.cache import Cache

_WARNINGS_SHOWN = 6
_RUNS_SHOWN = 6
_DETAIL = 160
"""Characters of a rejected row's detail."""


@dataclass(frozen=True, kw_only=True)
class LayersView:
    """Each layer's statistics and bytes, and what the features of some samples show if they were asked for."""

    cache: str
    shards_done: int
    layers: list[PooledLayer]
    bytes_by_layer: BytesByLayer
    features: FeatureStatistics | None
    warnings: list[CacheWarning] = field(metadata=named("marks"))


def show_cache(
    cache: Path,
    *,
    sample: int | None = None,
    shard: int | None = None,
    layers: bool = False,
    features: int | None = None,
    top: str | None = None,
    as_json: bool = False,
) -> None:
    """Print one view of a cache, the overview if none is named; as JSON if asked for."""
    options = {"--sample": sample, "--shard": shard, "--layers": layers or None, "--top": top}
    chosen = [name for name, value in options.items() if value is not None]
    if len(chosen) > 1:
        raise DflashError(f"{' and '.join(chosen)} are views of their own. Name one of them.")
    if features is not None and not layers:
        raise DflashError("--features reads features for the layers' view. Name --layers with it.")
    opened = Cache.open(cache, hashed=False)
    view: Any
    show: Callable[[Any], None]
    if sample is not None:
        view, show = sample_view(opened, sample), print_sample
    elif shard is not None:
        view, show = shard_view(opened, shard), print_shard
    elif layers:
        view, show = layers_view(opened, features), print_layers_view
    elif top is not None:
        view, show = top_view(opened, top), print_top
    else:
        view, show = overview(opened), print_overview
    print_json(view) if as_json else show(view)


def print_overview(view: Overview) -> None:
    """Print an overview for a person, what looks wrong first."""
    console = open_console()
    console.print(Text.assemble(("Cache", "bold"), f"       {view.cache}"), soft_wrap=True)
    print_warnings(console, view.warnings, "dflash verify reads every byte")
    console.print(facts([*_provenance(view), *_plan(view), *_shards(view)]))
    if view.layers:
        console.print()
        print_layers(console, view.layers)
    console.print()
    for index, command in enumerate(view.next):
        console.print(f"{'Next:' if index == 0 else '     '} {command}", soft_wrap=True)


def print_warnings(console: Console, warnings: list[CacheWarning], otherwise: str) -> None:
    """Print what looks wrong, each with what to do; or that nothing does."""
    if not warnings:
        console.print(f"{'Warnings':<12}none{otherwise and f'; {otherwise}'}")
        return
    things = "1 thing looks" if len(warnings) == 1 else f"{len(warnings)} things look"
    console.print(Text(f"{things} wrong", style="bold red"))
    table = Table.grid(padding=(0, 1, 0, 0))
    for warning in warnings[:_WARNINGS_SHOWN]:
        text = Text(f"{warning.kind}: ", style="bold").append(safe(f"{warning.where} {warning.what}"), "not bold")
        table.add_row(Text("!", style="bold red"), text)
        table.add_row("", Text(f"Next: {warning.next}"))
    console.print(table)
    if len(warnings) > _WARNINGS_SHOWN:
        console.print(f"  and {len(warnings) - _WARNINGS_SHOWN:,} more; all with --json")


def _provenance(view: Overview) -> list[tuple[str, str]]:
    made = view.provenance
    target, software = made.identity["target"], made.origin.get("software", {})
    name = f" {view.mask_token}" if view.mask_token else ""
    versions = [f"{key} {software[key]}" for key in ("dflash-offline", "torch", "transformers") if key in software]
    if engine := made.identity.get("engine"):
        quantized = f", {engine['quantization']}" if engine["quantization"] else ""
        versions.append(f"{engine['name']} {engine['version']}, which ran the target{quantized}")
    compiled = ", compiled" if is_compiled(made.identity) else ""
    return [
        ("Target", f"{made.target} ({target['dtype']}, {target['attn_implementation']}{compiled})"),
        ("Features", f"layers {', '.join(map(str, made.layer_ids))}; width {made.hidden_size:,}; {made.features}"),
        ("Mask", f"{made.mask_rule}; mask token {made.mask_token_id}{name}"),
        ("Made with", ", ".join(versions) or "unknown versions"),
    ]


def _plan(view: Overview) -> list[tuple[str, str]]:
    plan, share = view.plan, view.plan.supervised_per_sample
    rows = [("Data", f"{count:,} rows of {kind}") for kind, count in plan.formats.items()]
    if plan.not_drawn:
        rows.append(("", f"{plan.not_drawn:,} rows not drawn, by weight"))
    for reason, count in plan.rejects.items():
        rows.append(("Left out", f"{count:,} rows: {reason}"))
        for row in plan.reject_examples.get(reason, [])[:1]:
            rows.append(("", f"e.g. {row.source}:{row.row} {row.detail[:_DETAIL]}"))
    rows += [("", f"{count:,} answers: {reason}") for reason, count in plan.answers_left_out.items()]
    if plan.split:
        conversations, samples, more = (plan.split[name] for name in ("conversations", "samples", "more_tokens"))
        rows.append(("Split", f"{conversations:,} conversations into {samples:,} samples, {more:,} tokens more"))
    rows += [("Not in text", f"{kind} of {count:,} samples") for kind, count in plan.dropped.items()]
    rows += [("Noted", f"{kind} in {count:,} samples") for kind, count in plan.notes.items()]
    cut = f"; {plan.truncated:,} cut at the maximum length" if plan.truncated else ""
    shares = f"supervised {plan.supervised_share:.0%}, of a sample {share.least:.0%} to {share.most:.0%}"
    partial = "" if view.provenance.anchor_kind == WHOLE else ", partial ones too"
    anchors = f"{_spread_text(plan.anchors_per_sample)} for blocks of {view.provenance.block_size}{partial}"
    return [
        *rows,
        ("Samples", f"{plan.samples:,}{cut}"),
        ("Tokens", f"{plan.tokens:,}; {shares}"),
        ("Length", _spread_text(plan.length)),
        ("Anchors", anchors),
    ]


def _spread_text(spread: Spread) -> str:
    counts = spread.histogram.counts
    most = max(counts, default=0) or 1
    return f"{spread.range_text()}  {sparkline([count / most for count in counts])}"


def _shards(view: Overview) -> list[tuple[str, str]]:
    done = view.progress
    listed = ", ".join(f"{count:,} {state}" for state, count in done.shard_states.items() if state != "done")
    rows = [("Shards", f"{done.shards_done:,} of {done.shards:,} done" + (f"; {listed}" if listed else ""))]
    if 1 < len(done.progress) <= _RUNS_SHOWN:
        rows.append(("", "; ".join(map(_run_text, done.progress))))
    if view.half_written.files:
        rows.append(("In tmp/", str(view.half_written)))
    if done.skipped:
        first = done.skipped_samples[0].sample
        rows.append(("Left out", f"{done.skipped:,} samples whose features were bad"))
        rows.append(("", f"e.g. {skipped_text(first)}"))
    if view.workers:
        seconds = sum(worker.seconds for worker in view.workers)
        rate = f", {done.tokens_done / seconds:,.0f} tokens/s each" if seconds else ""
        rows.append(("Workers", f"{len(view.workers):,}{rate}"))
    for name, size in view.arrays.items():
        ratio = f", {size.ratio:.3f} of raw" if size.ratio is not None else ""
        rows.append(("Bytes", f"{name}: {readable_bytes(size.stored)}{ratio}"))
    return rows + (_final(view.final, done.shards) if view.final else [])


def _final(final: FinalStates, num_shards: int) -> list[tuple[str, str]]:
    """Return what is shown of a cache's final states."""
    left = f"; {num_shards - final.shards_done:,} shards are left: repeat `dflash extract --final`"
    rows = [("Final", f"{final.features}{left if final.shards_done < num_shards else ''}")]
    if final.kept_share is not None:
        share = f"kept for {final.kept_share:.0%} of tokens"
        rows.append(("", f"{readable_bytes(final.stored)}, {final.ratio or 0:.3f} of raw; {share}"))
    if one := final.statistics:
        rows.append(("", f"mean {one.mean:.3g}, deviation {one.std:.3g}, largest {one.max_abs:.3g}"))
    return rows + [("", f"damaged: {fault}") for fault in final.damaged_records]


def _run_text(run: ShardRun) -> str:
    place = f"{run.first:,}" if run.first == run.last else f"{run.first:,} to {run.last:,}"
    return f"{place} {run.state}"


def print_layers(console: Console, layers: list[PooledLayer], ratios: list[float] | None = None) -> None:
    """Print the pooled statistics of each layer, and what looks wrong with it."""
    table = []
    for index, layer in enumerate(layers):
        row = layer_cells(layer)
        if ratios:
            row["of raw"] = f"{ratios[index]:.3f}"
        if any(other.warnings for other in layers):
            row["looks wrong"] = "! " + ", ".join(dict.fromkeys(layer.warnings)) if layer.warnings else ""
        table.append(row)
    console.print(columns(table, left=("looks wrong",)))


def layers_view(cache: Cache, num_samples: int | None) -> LayersView:
    """Return each layer's statistics and bytes; with `num_samples`, also what that many samples' features show."""
    statistics = ShardStatistics.of(cache.commits)
    layers = statistics.pooled()
    warnings = list(layer_warnings(statistics, layers, cache.name))
    features = None
    if num_samples is not None:
        features = feature_statistics(cache, num_samples)
        warnings += feature_warnings(features, cache.name)
    return LayersView(
        cache=cache.name,
        shards_done=len(cache.commits),
        layers=with_warnings(layers, warnings),
        bytes_by_layer=bytes_by_layer(cache),
        features=features,
        warnings=warnings,
    )


def print_layers_view(view: LayersView) -> None:
    """Print the layers for a person."""
    console = open_console()
    console.print(f"Layers of {view.cache}, over {view.shards_done:,} finished shards", soft_wrap=True)
    if not view.layers:
        console.print("No shard with features is finished yet. Next: the `dflash extract` that made the cache.")
        return
    print_warnings(console, view.warnings, "" if view.features else "--features N reads features of N samples")
    print_layers(console, view.layers, view.bytes_by_layer.ratio)
    if view.features:
        console.print()
        _print_features(console, view.features)
    else:
        console.print(f"Next: {dflash_line('inspect', view.cache, '--layers', '--features', 8)}", soft_wrap=True)


def _print_features(console: Console, features: FeatureStatistics) -> None:
    read, asked = len(features.samples), features.samples_asked
    more = f"; the other {asked - read} of {asked} would take too much memory" if read < asked else ""
    console.print(f"Features of {read} samples, {features.tokens:,} tokens{more}")
    table = []
    for layer in features.layers:
        norm, first = layer.norm, layer.first_token_ratio
        numbers = {"median norm": norm.median, "95 %": norm.p95, "most": norm.most}
        largest = [f"{x.channel} x{x.ratio:,.1f}" for x in layer.channels.largest[:3] if x.ratio]
        texts = {"first token": "" if first is None else f"x{first:,.1f}", "largest channels": ", ".join(largest)}
        table.append({"layer": str(layer.layer_id)} | {name: f"{x:.4g}" for name, x in numbers.items()} | texts)
    console.print(columns(table, left=("largest channels",)))
    console.print()
    console.print("Similarity of layers: mean correlation of their channels")
    ids = [str(layer.layer_id) for layer in features.layers]
    shown = max(1, (console.width - 8) // 7)
    lines = [dict(zip(ids[:shown], line, strict=False)) for line in features.similarity]
    cells = [{name: f"{value:.3f}" for name, value in line.items()} for line in lines]
    console.print(columns([{"layer": i} | row for i, row in zip(ids, cells, strict=True)]))
