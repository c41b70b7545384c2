"""What `dflash inspect CACHE` prints: the overview, and the layers with `--layers` and `--features N`."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dflash_offline.pipeline.inspect.feature_statistics import bytes_by_layer, feature_figures, feature_marks
from dflash_offline.pipeline.inspect.overview import overview
from dflash_offline.pipeline.inspect.sample import print_sample, sample_view
from dflash_offline.pipeline.inspect.shard import print_shard, print_top, shard_view, skipped_text, top_view
from dflash_offline.pipeline.inspect.shard_statistics import pooled_layers, statistics_by_shard
from dflash_offline.pipeline.inspect.warnings import layer_marks
from dflash_offline.pipeline.terminal import columns, facts, open_console, print_json, safe, sparkline
from dflash_offline.schemas.errors import DflashError, dflash_line
from dflash_offline.stages.progress import readable_bytes
from dflash_offline.stages.store.cache import Cache
from dflash_offline.stages.store.leftovers import told

_MARKS_SHOWN = 6
_RUNS_SHOWN = 6
_DETAIL = 160
"""Characters of a rejected row's detail."""


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
    named = {"--sample": sample is not None, "--shard": shard is not None, "--layers": layers, "--top": top is not None}
    chosen = [name for name, is_named in named.items() if is_named]
    if len(chosen) > 1:
        raise DflashError(f"{' and '.join(chosen)} are views of their own. Name one of them.")
    if features is not None and not layers:
        raise DflashError("--features reads features for the layers' view. Name --layers with it.")
    show: Callable[[Any], None]
    if sample is not None:
        view, show = sample_view(cache, sample), print_sample
    elif shard is not None:
        view, show = shard_view(cache, shard), print_shard
    elif layers:
        view, show = layers_view(cache, features), print_layers_view
    elif top is not None:
        view, show = top_view(cache, top), print_top
    else:
        view, show = overview(cache), print_overview
    print_json(view) if as_json else show(view)


def print_overview(found: dict[str, Any]) -> None:
    """Print an overview for a person, what looks wrong first."""
    console = open_console()
    console.print(Text.assemble(("Cache", "bold"), f"       {found['cache']}"), soft_wrap=True)
    print_marks(console, found["marks"], "dflash verify reads every byte")
    console.print(facts([*_made_of(found), *_plan(found), *_shards(found)]))
    if found["layers"]:
        console.print()
        print_layers(console, found["layers"])
    console.print()
    for index, command in enumerate(found["next"]):
        console.print(f"{'Next:' if index == 0 else '     '} {command}", soft_wrap=True)


def print_marks(console: Console, marks: list[dict[str, Any]], otherwise: str) -> None:
    """Print what looks wrong, each with what to do; or that nothing does."""
    if not marks:
        console.print(f"{'Marks':<12}none{otherwise and f'; {otherwise}'}")
        return
    things = "1 thing looks" if len(marks) == 1 else f"{len(marks)} things look"
    console.print(Text(f"{things} wrong", style="bold red"))
    table = Table.grid(padding=(0, 1, 0, 0))
    for mark in marks[:_MARKS_SHOWN]:
        text = Text(f"{mark['kind']}: ", style="bold").append(safe(f"{mark['where']} {mark['what']}"), "not bold")
        table.add_row(Text("!", style="bold red"), text)
        table.add_row("", Text(f"Next: {mark['next']}"))
    console.print(table)
    if len(marks) > _MARKS_SHOWN:
        console.print(f"  and {len(marks) - _MARKS_SHOWN:,} more; all with --json")


def _made_of(found: dict[str, Any]) -> list[tuple[str, str]]:
    target = found["identity"]["target"]
    layers = ", ".join(map(str, found["layer_ids"]))
    name = f" {found['mask_token']}" if found["mask_token"] else ""
    software = found["origin"].get("software", {})
    versions = [f"{one} {software[one]}" for one in ("dflash-offline", "torch", "transformers") if one in software]
    return [
        ("Target", f"{found['target']} ({target['dtype']}, {target['attn_implementation']})"),
        ("Features", f"layers {layers}; width {found['hidden_size']:,}; {found['features']}"),
        ("Mask", f"{found['mask_rule']}; mask token {found['mask_token_id']}{name}"),
        ("Made with", ", ".join(versions) or "unknown versions"),
    ]


def _plan(found: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [("Data", f"{count:,} rows of {kind}") for kind, count in found["formats"].items()]
    if found["not_drawn"]:
        rows.append(("", f"{found['not_drawn']:,} rows not drawn, by weight"))
    for reason, count in found["rejects"].items():
        rows.append(("Left out", f"{count:,} rows: {reason}"))
        for one in found["reject_examples"].get(reason, [])[:1]:
            rows.append(("", f"e.g. {one['source']}:{one['row']} {one['detail'][:_DETAIL]}"))
    cut = f"; {found['truncated']:,} cut at the maximum length" if found["truncated"] else ""
    rows.append(("Samples", f"{found['samples']:,}{cut}"))
    share = found["supervised_per_sample"]
    rows.append(
        (
            "Tokens",
            f"{found['tokens']:,}; supervised {found['supervised_share']:.0%}, of a sample {share['least']:.0%} to "
            f"{share['most']:.0%}",
        )
    )
    rows.append(("Length", _spread_text(found["length"])))
    rows.append(("Anchors", f"{_spread_text(found['anchors_per_sample'])} for blocks of {found['block_size']}"))
    return rows


def _spread_text(spread: dict[str, Any]) -> str:
    counts = spread["histogram"]["counts"]
    most = max(counts, default=0) or 1
    line = sparkline([count / most for count in counts])
    return f"{spread['least']:,} to {spread['most']:,}, median {spread['median']:,.0f}  {line}"


def _shards(found: dict[str, Any]) -> list[tuple[str, str]]:
    states = found["shard_states"]
    listed = ", ".join(f"{count:,} {state}" for state, count in states.items() if state != "done")
    rows = [("Shards", f"{found['shards_done']:,} of {found['shards']:,} done" + (f"; {listed}" if listed else ""))]
    if 1 < len(found["progress"]) <= _RUNS_SHOWN:
        rows.append(("", "; ".join(_run_text(run) for run in found["progress"])))
    if found["half_written"]["files"]:
        rows.append(("In tmp/", told(found["half_written"])))
    if found["skipped"]:
        rows.append(("Left out", f"{found['skipped']:,} samples whose features were bad"))
        rows.append(("", f"e.g. {skipped_text(found['skipped_samples'][0])}"))
    if found["workers"]:
        seconds = sum(one["seconds"] for one in found["workers"])
        rate = f", {found['tokens_done'] / seconds:,.0f} tokens/s each" if seconds else ""
        rows.append(("Workers", f"{len(found['workers']):,}{rate}"))
    for name, one in found["arrays"].items():
        ratio = f", {one['ratio']:.3f} of raw" if one["ratio"] is not None else ""
        rows.append(("Bytes", f"{name}: {readable_bytes(one['stored'])}{ratio}"))
    return rows


def _run_text(run: dict[str, Any]) -> str:
    place = f"{run['first']:,}" if run["first"] == run["last"] else f"{run['first']:,} to {run['last']:,}"
    return f"{place} {run['state']}"


def print_layers(console: Console, layers: list[dict[str, Any]], ratios: list[float] | None = None) -> None:
    """Print the pooled statistics of each layer, marked where one looks wrong."""
    names = ["layer", "mean", "std", "std by shard", "largest", "zeros"]
    rows = []
    for index, row in enumerate(layers):
        cells = [
            str(row["layer_id"]),
            f"{row['mean']:.4g}",
            f"{row['std']:.4g}",
            f"{row['std_least']:.3g} to {row['std_most']:.3g}",
            f"{row['max_abs']:.4g}",
            f"{row['zeros']:.2%}",
        ]
        if ratios:
            cells.append(f"{ratios[index]:.3f}")
        rows.append([*cells, ("! " + ", ".join(dict.fromkeys(row["marks"]))) if row["marks"] else ""])
    marked = any(row["marks"] for row in layers)
    names = [*names, *(["of raw"] if ratios else []), *(["looks wrong"] if marked else [])]
    console.print(columns(names, [row[: len(names)] for row in rows], left=("looks wrong",)))


def layers_view(cache: Path, num_samples: int | None) -> dict[str, Any]:
    """Return each layer's statistics and bytes; with `num_samples`, also what that many samples' features show."""
    records = Cache.open(cache, hashed=False)
    filled, statistics = statistics_by_shard(records.commits)
    pooled = pooled_layers(filled, statistics)
    marks = layer_marks(filled, statistics, pooled, str(cache))
    features = None
    if num_samples is not None:
        features = feature_figures(records, num_samples)
        marks += feature_marks(features, str(cache))
    return {
        "cache": str(cache),
        "shards_done": len(records.commits),
        "layers": [row | {"marks": [one.kind for one in marks if one.layer_id == row["layer_id"]]} for row in pooled],
        "bytes_by_layer": bytes_by_layer(records),
        "features": features,
        "marks": [asdict(mark) for mark in marks],
    }


def print_layers_view(view: dict[str, Any]) -> None:
    """Print the layers for a person."""
    console = open_console()
    console.print(f"Layers of {view['cache']}, over {view['shards_done']:,} finished shards", soft_wrap=True)
    if not view["layers"]:
        console.print("No shard with features is finished yet. Next: the `dflash extract` that made the cache.")
        return
    more = "" if view["features"] is not None else "--features N reads features of N samples"
    print_marks(console, view["marks"], more)
    print_layers(console, view["layers"], view["bytes_by_layer"]["ratio"])
    if view["features"] is not None:
        console.print()
        _print_features(console, view["features"])
    else:
        console.print(f"Next: {dflash_line('inspect', view['cache'], '--layers', '--features', 8)}", soft_wrap=True)


def _print_features(console: Console, features: dict[str, Any]) -> None:
    read, asked = len(features["samples"]), features["samples_asked"]
    more = f"; the other {asked - read} of {asked} would take too much memory" if read < asked else ""
    console.print(f"Features of {read} samples, {features['tokens']:,} tokens{more}")
    rows = []
    for row in features["layers"]:
        norm = row["norm"]
        first = row["first_token_ratio"]
        named = [f"{one['channel']} x{one['ratio']:,.1f}" for one in row["channels"]["largest"][:3] if one["ratio"]]
        rows.append(
            [
                str(row["layer_id"]),
                f"{norm['median']:.4g}",
                f"{norm['p95']:.4g}",
                f"{norm['most']:.4g}",
                "" if first is None else f"x{first:,.1f}",
                ", ".join(named),
            ]
        )
    names = ["layer", "median norm", "95 %", "most", "first token", "largest channels"]
    console.print(columns(names, rows, left=("largest channels",)))
    console.print()
    console.print("Similarity of layers: mean correlation of their channels")
    ids = [row["layer_id"] for row in features["layers"]]
    shown = max(1, (console.width - 8) // 7)
    cells = [
        [str(i), *(f"{value:.3f}" for value in line[:shown])]
        for i, line in zip(ids, features["similarity"], strict=True)
    ]
    console.print(columns(["layer", *map(str, ids[:shown])], cells))
