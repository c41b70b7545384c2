"""The plots of a cache's page: lengths and anchors of its samples, norms, channels and bytes of its layers."""

import itertools
from collections.abc import Iterator

from dflash_offline.pipeline.inspect.feature_statistics import BytesByLayer, FeatureStatistics
from dflash_offline.pipeline.inspect.overview import Overview
from dflash_offline.pipeline.inspect.plan_statistics import Spread
from dflash_offline.pipeline.pages.plots import Plot, Series


def cache_plots(view: Overview, features: FeatureStatistics | None, by_layer: BytesByLayer) -> Iterator[Plot]:
    """Yield the plots of an overview, of the features that were read, and of each layer's bytes."""
    yield _histogram("Length of samples", "tokens", view.plan.length)
    yield _histogram("Anchors a sample", "anchors", view.plan.anchors_per_sample, colour=1)
    yield _histogram("Supervised share of samples", "share", view.plan.supervised_per_sample, colour=2)
    names = {float(i): str(layer_id) for i, layer_id in enumerate(view.provenance.layer_ids)}
    if features:
        yield _norms(features, names)
        yield _channels(features, names)
    elif view.layers:
        yield Plot(
            title="Standard deviation by layer",
            note="From the shards' records.",
            x_label="layer",
            y_label="standard deviation",
            x_ticks=names,
            series=[Series(name="std", x=list(names), y=[layer.std for layer in view.layers], points=True)],
        )
    if by_layer.ratio:
        yield Plot(
            title="Compression by layer",
            note=f"Stored bytes over raw ones, of {by_layer.shards} shards' indexes; 1 is no saving.",
            x_label="layer",
            y_label="stored / raw",
            kind="bar",
            x_ticks=names,
            series=[Series(name="stored / raw", x=list(names), y=by_layer.ratio, colour=5)],
        )


def _histogram(title: str, unit: str, spread: Spread, colour: int = 0) -> Plot:
    edges = spread.histogram.edges
    low, median, high = (f"{x:,.3g}" if x < 1000 else f"{x:,.0f}" for x in (spread.p05, spread.median, spread.p95))
    width = f"{edges[1] - edges[0]:,.3g}" if len(edges) > 1 else "0"
    middles = [(left + right) / 2 for left, right in itertools.pairwise(edges)]
    return Plot(
        title=title,
        note=f"Median {median}; 9 in 10 lie between {low} and {high}. A bar stands for {width} {unit}.",
        x_label=unit,
        y_label="samples",
        kind="bar",
        series=[Series(name="samples", x=middles, y=spread.histogram.counts, colour=colour)],
    )


def _norms(features: FeatureStatistics, names: dict[float, str]) -> Plot:
    norms = [layer.norm for layer in features.layers]
    curves = {
        "median": [norm.median for norm in norms],
        "5th percentile": [norm.p05 for norm in norms],
        "95th percentile": [norm.p95 for norm in norms],
        "largest": [norm.most for norm in norms],
    }
    return Plot(
        title="Norms of tokens by layer",
        note="Root mean square over channels, first tokens left out: the middle token, and where 9 in 10 lie.",
        x_label="layer",
        y_label="norm",
        x_ticks=names,
        log_y=all(norm.least > 0 for norm in norms),
        series=[Series(name=n, x=list(names), y=y, colour=i, points=True) for i, (n, y) in enumerate(curves.items())],
    )


def _channels(features: FeatureStatistics, names: dict[float, str]) -> Plot:
    largest = [layer.channels.largest for layer in features.layers]
    series = []
    for rank, name in enumerate(("largest", "second", "third")[: min(map(len, largest))]):
        ratios = {x: channels[rank].ratio for x, channels in zip(names, largest, strict=True)}
        shown = {x: ratio for x, ratio in ratios.items() if ratio}
        series.append(Series(name=name, x=list(shown), y=list(shown.values()), colour=rank, points=True))
    return Plot(
        title="Outlier channels by layer",
        note="Usual magnitude of the channels that stand out most, over the layer's middle channel.",
        x_label="layer",
        y_label="times the middle",
        x_ticks=names,
        log_y=True,
        series=series,
    )
