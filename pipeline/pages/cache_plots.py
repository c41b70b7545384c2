"""The plots of a cache's page: lengths and anchors of its samples, norms, channels and bytes of its layers."""

import itertools
from collections.abc import Iterator
from typing import Any

from dflash_offline.pipeline.pages.plots import Plot, Series


def cache_plots(found: dict[str, Any], figures: dict[str, Any] | None, by_layer: dict[str, Any]) -> Iterator[Plot]:
    """Yield the plots of an overview, of the features that were read, and of each layer's bytes."""
    yield _histogram("Length of samples", "tokens", found["length"])
    yield _histogram("Anchors a sample", "anchors", found["anchors_per_sample"], colour=1)
    yield _histogram("Supervised share of samples", "share", found["supervised_per_sample"], colour=2)
    names = {float(i): str(layer_id) for i, layer_id in enumerate(found["layer_ids"])}
    if figures:
        yield _norms(figures, names)
        yield _channels(figures, names)
    elif found["layers"]:
        yield _deviations(found, names)
    if by_layer["ratio"]:
        yield Plot(
            title="Compression by layer",
            note=f"Stored bytes over raw ones, of {by_layer['shards']} shards' indexes; 1 is no saving.",
            x_label="layer",
            y_label="stored / raw",
            kind="bar",
            x_ticks=names,
            series=[Series(name="stored / raw", x=list(names), y=by_layer["ratio"], colour=5)],
        )


def _histogram(title: str, unit: str, spread: dict[str, Any], colour: int = 0) -> Plot:
    edges, counts = spread["histogram"]["edges"], spread["histogram"]["counts"]
    middles = [(low + high) / 2 for low, high in itertools.pairwise(edges)]
    numbers = (spread[name] for name in ("p05", "median", "p95"))
    low, median, high = (f"{number:,.3g}" if number < 1000 else f"{number:,.0f}" for number in numbers)
    return Plot(
        title=title,
        note=f"Median {median}; 9 in 10 lie between {low} and {high}. A bar stands for {_width(edges)} {unit}.",
        x_label=unit,
        y_label="samples",
        kind="bar",
        series=[Series(name="samples", x=middles, y=counts, colour=colour)],
    )


def _width(edges: list[float]) -> str:
    return f"{edges[1] - edges[0]:,.3g}" if len(edges) > 1 else "0"


def _norms(figures: dict[str, Any], names: dict[float, str]) -> Plot:
    return Plot(
        title="Norms of tokens by layer",
        note="Root mean square over channels, first tokens left out: the middle token, and where 9 in 10 lie.",
        x_label="layer",
        y_label="norm",
        x_ticks=names,
        log_y=all(layer["norm"]["least"] > 0 for layer in figures["layers"]),
        series=[
            Series(
                name=name,
                x=list(names),
                y=[layer["norm"][key] for layer in figures["layers"]],
                colour=colour,
                points=True,
            )
            for colour, (name, key) in enumerate(
                (("median", "median"), ("5th percentile", "p05"), ("95th percentile", "p95"), ("largest", "most"))
            )
        ],
    )


def _channels(figures: dict[str, Any], names: dict[float, str]) -> Plot:
    largest = [layer["channels"]["largest"] for layer in figures["layers"]]
    ranks = min(3, *map(len, largest))
    return Plot(
        title="Outlier channels by layer",
        note="Usual magnitude of the channels that stand out most, over the layer's middle channel.",
        x_label="layer",
        y_label="times the middle",
        x_ticks=names,
        log_y=True,
        series=[
            Series(
                name=("largest", "second", "third")[rank],
                x=[i for i, layer in zip(names, largest, strict=True) if layer[rank]["ratio"]],
                y=[layer[rank]["ratio"] for layer in largest if layer[rank]["ratio"]],
                colour=rank,
                points=True,
            )
            for rank in range(ranks)
        ],
    )


def _deviations(found: dict[str, Any], names: dict[float, str]) -> Plot:
    return Plot(
        title="Standard deviation by layer",
        note="From the shards' records.",
        x_label="layer",
        y_label="standard deviation",
        x_ticks=names,
        series=[Series(name="std", x=list(names), y=[layer["std"] for layer in found["layers"]], points=True)],
    )
