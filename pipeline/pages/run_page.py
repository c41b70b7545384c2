"""`dflash inspect RUN ... --html`: runs as one page, several of them on the same axes."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dflash_offline.pipeline.inspect.run import EVALUATION, bucket_means, compare, settings_table
from dflash_offline.pipeline.inspect.run_report import BY_SLOT, CURVES, best_text, evaluation_text, progress_text
from dflash_offline.pipeline.inspect.run_view import RunView
from dflash_offline.pipeline.pages.page import link, write_page
from dflash_offline.pipeline.pages.plots import Plot, Series, draw, require_matplotlib
from dflash_offline.schemas.errors import dflash_line
from dflash_offline.schemas.paths import store_url
from dflash_offline.schemas.results.expected import TEMPERATURES, WHAT_IT_IS, expected_metric
from dflash_offline.schemas.variants.table import VARIANTS

CACHE_PAGE, EVALUATION_PAGE = "report.html", "eval.html"
"""Pages that are linked if they are there: in the cache's folder, and in the run's."""
POINTS = 300
"""Points of one curve; a longer one shows means of as many runs of rows."""
VALIDATION_COLUMNS = {
    "step": "step",
    "val_loss": "loss",
    "val_accuracy": "accuracy",
    "val_accept_len_over_anchors": "acceptance length, mean over all anchors",
    "val_serving_walk": "acceptance length, serving walk (pooled)",
    "val_serving_walk_mean_of_samples": "acceptance length, serving walk (mean of samples)",
}
MOST_VALIDATIONS = 1000
"""Rows of the table of validations; the newest."""
SERVING_NOTE = "Held-out samples walked as serving would: what a user of the draft sees."
ANCHORS_NOTE = "From every drawn anchor alike, so not what serving sees, where rounds start after what was accepted."


def write_run_page(views: list[RunView], path: Path) -> None:
    """Write the page of one or more runs."""
    require_matplotlib()
    names, alone = _names(views), len(views) == 1
    rows = [
        ([] if alone else [name]) + [row.get(column) for column in VALIDATION_COLUMNS]
        for name, view in zip(names, views, strict=True)
        for row in view.validation[-MOST_VALIDATIONS:]
    ]
    write_page(
        path,
        "run.html",
        title=f"Run {names[0]}" if alone else f"{len(views)} runs compared",
        lead=", ".join(view.run for view in views),
        alone=alone,
        names=names if not alone else ["value"],
        warnings=[
            line if alone else f"{name}: {line}"
            for name, view in zip(names, views, strict=True)
            for line in view.warnings
        ],
        summary=_summary(views, path),
        hint=_hint(views, path),
        differing=_rows(compare(views).differing_settings),
        curves_note=_curves_note(views),
        plots=[draw(plot) for plot in _plots(views, names)],
        evaluation_plot=_evaluation_plot(views, names),
        validation_columns=([] if alone else ["run"]) + list(VALIDATION_COLUMNS.values()),
        validations=rows,
        settings=_rows(settings_table([{**view.settings, "draft": view.draft} for view in views])),
    )


def _names(views: list[RunView]) -> list[str]:
    """Return short names of the runs, all different: what is left of their paths without the part all share."""
    paths = [Path(view.run).resolve() for view in views]
    if len(views) == 1:
        return [paths[0].name]
    shared = os.path.commonpath([path.parent for path in paths])
    short = [os.path.relpath(path, shared) for path in paths]
    return [name if short.count(name) == 1 else f"{name} ({i})" for i, name in enumerate(short, start=1)]


def _rows(table: dict[str, list[Any]]) -> list[list[Any]]:
    return [[name, *(_plain(value) for value in values)] for name, values in table.items()]


def _plain(value: Any) -> Any:
    return ", ".join(map(str, value)) if isinstance(value, list) else value


def _summary(views: list[RunView], page: Path) -> list[tuple[str, list[Any]]]:
    def last(view: RunView, kind: str, name: str) -> Any:
        return ((view.last_training if kind == "training" else view.last_validation) or {}).get(name)

    return [
        ("state", [progress_text(view) for view in views]),
        ("best checkpoint", [best_text(view) for view in views]),
        *((f"{label}, last", [last(view, kind, name) for view in views]) for kind, name, label in CURVES),
        ("checkpoints", [", ".join(f"{step:,}" for step in view.checkpoints) or None for view in views]),
        ("parameters", [view.parameters for view in views]),
        ("target", [view.target for view in views]),
        *(
            ("cache", [_cache_cell(view, i, page) for view in views])
            for i in range(max(len(view.caches) for view in views))
        ),
        ("evaluation", [_evaluation_cell(view, page) for view in views]),
    ]


def _cache_cell(view: RunView, i: int, page: Path) -> Any:
    if i >= len(view.caches):
        return None
    path = view.caches[i].path
    return {"text": path, "link": None if store_url(path) else link(page, Path(path) / CACHE_PAGE)}


def _evaluation_cell(view: RunView, page: Path) -> Any:
    address = link(page, Path(view.run) / EVALUATION_PAGE)
    none = "decoded prompts" if address else "no figures saved"
    return {"text": evaluation_text(view.evaluation) if view.evaluation else none, "link": address}


def _hint(views: list[RunView], page: Path) -> str:
    """Return how to make pages that this one would link to, where one is not there yet."""
    caches = [Path(cache.path) for view in views for cache in view.caches if not (cache.fault or store_url(cache.path))]
    runs = [Path(view.run) for view in views]
    lines = [
        dflash_line("inspect", cache, "--html", cache / CACHE_PAGE)
        for cache in [cache for cache in caches if not link(page, cache / CACHE_PAGE)][:1]
    ]
    lines += [
        dflash_line("eval", run, "...", "--save", run / EVALUATION, "--html", run / EVALUATION_PAGE)
        for run in [run for run in runs if not link(page, run / EVALUATION_PAGE)][:1]
    ]
    return f"A page made so is linked here: {'; '.join(lines)}." if lines else ""


def _curves_note(views: list[RunView]) -> str:
    most = max(len(view.training) for view in views)
    if most <= POINTS:
        return "Every logged row is a point; a training row is the mean of the steps since the one before."
    return f"Of up to {most:,} training rows, each curve shows the means of {POINTS} equal runs of rows."


def _plots(views: list[RunView], names: list[str]) -> Iterator[Plot]:
    """Yield the plots that the runs have metrics for."""
    anchors = {"accept_len_over_anchors": "training", "val_accept_len_over_anchors": "held-out"}
    walks = {"val_serving_walk": "pooled", "val_serving_walk_mean_of_samples": "mean of samples"}
    plots = {
        "Loss": ({"loss": "training", "val_loss": "held-out"}, "loss", ""),
        "Acceptance length, serving walk": (walks, "tokens a round", SERVING_NOTE),
        "Acceptance length, mean over all anchors": (anchors, "tokens a block", ANCHORS_NOTE),
    }
    drawn = {f"val_{expected_metric(one)}": f"temperature {one:g}" for one in TEMPERATURES}
    plots["Expected acceptance length where tokens are drawn, without a target"] = (drawn, "tokens a round", WHAT_IT_IS)
    for each in [each for kind in VARIANTS.values() for each in kind.curves]:
        plots.setdefault(each.plot, ({}, "share", ""))[0][each.metric] = each.name
    for title, (curves, unit, note) in plots.items():
        yield from _plot(views, names, title, curves, unit, note)
    yield from _slot_plots(views, names)
    for name, title, unit in (
        ("learning_rate", "Learning rate", "learning rate"),
        ("grad_norm", "Gradient norm, before clipping", "norm"),
        ("tokens_per_s", "Throughput", "tokens/s"),
        ("data_wait_share", "Data wait", "share of the time"),
        ("peak_memory_gib", "Peak memory", "GiB"),
    ):
        yield from _plot(views, names, title, {name: unit}, unit, from_zero=name != "grad_norm")


def _plot(
    views: list[RunView],
    names: list[str],
    title: str,
    curves: dict[str, str],
    unit: str,
    note: str = "",
    from_zero: bool = False,
) -> Iterator[Plot]:
    """Yield one plot of all runs: a colour a run, or of one run a colour a curve; nothing without a value."""
    series = []
    for i, (run, view) in enumerate(zip(names, views, strict=True)):
        for j, (name, label) in enumerate(curves.items()):
            held_out = name.startswith("val_")
            x, y = bucket_means(view.validation if held_out else view.training, name, POINTS)
            full = label if len(views) == 1 else run if len(curves) == 1 else f"{run}, {label}"
            style = {"colour": j} if len(views) == 1 else {"colour": i, "dash": j}
            if x:
                series.append(Series(name=full, x=x, y=y, points=held_out, **style))
    if series:
        yield Plot(title=title, note=note, x_label="step", y_label=unit, series=series, y_from_zero=from_zero)


def _slot_plots(views: list[RunView], names: list[str]) -> Iterator[Plot]:
    for metric, title in BY_SLOT.items():
        yield from _slot_plots_of(views, names, metric, title)


def _slot_plots_of(views: list[RunView], names: list[str], metric: str, title: str) -> Iterator[Plot]:
    """Yield a plot of each run that has the metric, all on one scale."""
    everything = [row for view in views for row in view.validation if metric in row]
    last = max((row["step"] for row in everything), default=0)
    most = max((share or 0 for row in everything for share in row[metric]), default=0)
    for name, view in zip(names, views, strict=True):
        rows = [row for row in view.validation if metric in row]
        slots = len(rows[-1][metric]) if rows else 0
        series = []
        for slot in range(slots):
            by_step = [{"step": row["step"], "y": row[metric][slot]} for row in rows]
            x, y = bucket_means(by_step, "y", POINTS)
            series.append(Series(name=f"{slot + 1}", x=x, y=y, shade=slot / max(slots - 1, 1), points=len(x) < 30))
        if series:
            yield Plot(
                title=title + ("" if len(views) == 1 else f", {name}"),
                note="Held-out samples; blue is the first slot after the anchor, red the last.",
                x_label="step",
                y_label="share",
                series=series,
                y_range=(0, min(1.0, most * 1.08 + 0.02)),
                x_range=(0, last * 1.03 + 1),
            )


def _evaluation_plot(views: list[RunView], names: list[str]) -> dict[str, Any] | None:
    """Return acceptance by slot of the saved evaluations, if there are any."""
    series = []
    for i, (name, view) in enumerate(zip(names, views, strict=True)):
        if view.evaluation:
            slots = zip(*(view.evaluation.get(f"{name}_by_slot", ()) for name in ("accepted", "drafted")), strict=True)
            shares = [accepted / max(drafted, 1) for accepted, drafted in slots]
            series.append(Series(name=name, x=range(1, len(shares) + 1), y=shares, colour=i))
    if not series:
        return None
    return draw(
        Plot(
            title="Drafted tokens in the answer, by slot",
            note="From the result of dflash eval beside the run.",
            x_label="slot",
            y_label="share accepted",
            series=series,
            kind="bar",
            y_range=(0, 1),
        )
    )
