"""Plots for the pages: SVG by matplotlib, in the page's own colours, with the numbers beside them for the reader."""

import colorsys
import io
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

from dflash_offline.schemas.errors import DflashError

NUM_COLOURS = 8
"""Series colours that the page's style defines, as --series-1 and so on; further series take them again, dashed."""
_INK, _FAINT = "#010203", "#040506"
_SERIES = [f"#0a0b{i:02x}" for i in range(NUM_COLOURS)]
"""Colours that no plot uses for themselves; in the SVG each becomes a colour of the page, light or dark."""
_PAGE_COLOURS = {_INK: "--ink", _FAINT: "--faint"} | {c: f"--series-{i}" for i, c in enumerate(_SERIES, start=1)}
_DASHES = ("-", "--", ":", "-.")
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "dflash",
    "text.parse_math": False,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _FAINT,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "grid.color": _FAINT,
    "grid.linewidth": 0.5,
    "grid.alpha": 0.6,
    "font.size": 10,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.6,
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
}


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line, or one bar of every group."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int = 0
    """Place among the page's series colours."""
    shade: float | None = None
    """Instead of them: a place in the order of the lines, 0 (blue) to 1 (red)."""
    dash: int = 0
    points: bool = False
    """Mark each point: few, far apart and each measured by itself."""


@dataclass(frozen=True, kw_only=True)
class Plot:
    """What a figure shows."""

    title: str
    note: str = ""
    """What exactly is plotted, in a sentence."""
    x_label: str
    y_label: str
    series: Sequence[Series]
    kind: str = "line"
    """line or bar."""
    log_y: bool = False
    y_from_zero: bool = False
    y_range: tuple[float, float] | None = None
    x_range: tuple[float, float] | None = None
    size: tuple[float, float] = (5.4, 3.1)
    """Inches; a page shows it as wide as there is room."""
    x_ticks: dict[float, str] = field(default_factory=dict)
    """Names of places on the x axis; empty for numbers."""


def require_matplotlib() -> None:
    """Raise `DflashError` if there is no matplotlib; it is looked for, not loaded."""
    if find_spec("matplotlib") is None:
        raise DflashError("--html needs matplotlib for its plots. Install it: pip install 'dflash-offline[plot]'.")


def draw(plot: Plot) -> dict[str, Any]:
    """Return the SVG of a plot, and its numbers for the reader that follows the pointer and the arrow keys."""
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        from matplotlib.figure import Figure

        width, height = plot.size
        columns = _columns(plot)
        height += 0.19 * max(0, -(-len(plot.series) // columns) - 2)  # room for long lists of names
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.subplots()
        (_draw_bars if plot.kind == "bar" else _draw_lines)(axes, plot)
        axes.set(xlabel=plot.x_label, ylabel=plot.y_label)
        if plot.log_y:
            _set_log(axes)
        _set_ranges(axes, plot)
        if plot.x_ticks:
            axes.set_xticks(list(plot.x_ticks), list(plot.x_ticks.values()))
        if len(plot.series) > 1:
            figure.legend(loc="outside upper left", ncols=columns)
        svg = _svg(figure)
        box, (low, high) = axes.get_position(), axes.get_xlim()
        width, height = width * 72, height * 72
    return {
        "title": plot.title,
        "note": plot.note,
        "svg": svg,
        "reader": {
            "left": _short(box.x0 * width),
            "right": _short(box.x1 * width),
            "top": _short((1 - box.y1) * height),
            "bottom": _short((1 - box.y0) * height),
            "x_from": _short(low),
            "x_to": _short(high),
            "x_label": plot.x_label,
            "x_names": plot.x_ticks,
            "series": [
                {"name": series.name, "x": [_short(x) for x in series.x], "y": [_short(y) for y in series.y]}
                for series in plot.series
            ],
        },
    }


def _colour(series: Series) -> str | tuple[float, float, float]:
    if series.shade is None:
        return _SERIES[series.colour % NUM_COLOURS]
    # From blue over violet to red: no hue on the way is too light for a white page or too dark for a black series.
    return colorsys.hls_to_rgb((220 + 140 * series.shade) % 360 / 360, 0.55, 0.75)


def _label(series: Series) -> str:
    """Return the name as the legend has it, which leaves out names that begin with an underscore."""
    return f" {series.name}" if series.name.startswith("_") else series.name


def _columns(plot: Plot) -> int:
    """Return how many names of the longest kind fit side by side above the plot."""
    longest = max(len(series.name) for series in plot.series)
    return max(1, min(len(plot.series), int(plot.size[0] * 11 / (longest + 5))))


def _draw_lines(axes: Any, plot: Plot) -> None:
    for series in plot.series:
        dash = series.dash + series.colour // NUM_COLOURS
        axes.plot(
            series.x,
            series.y,
            color=_colour(series),
            linestyle=_DASHES[dash % len(_DASHES)],
            marker="o" if series.points or len(series.x) == 1 else None,
            markersize=3.5,
            label=_label(series),
        )


def _draw_bars(axes: Any, plot: Plot) -> None:
    gaps = (b - a for series in plot.series for a, b in itertools.pairwise(series.x))
    width = 0.85 * min(gaps, default=1.0)
    share = width / len(plot.series)
    for i, series in enumerate(plot.series):
        places = [x - width / 2 + share * (i + 0.5) for x in series.x]
        axes.bar(places, series.y, share, color=_colour(series), label=_label(series))
    axes.grid(visible=False, axis="x")


def _set_log(axes: Any) -> None:
    """Make the y axis logarithmic, its numbers written plainly."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    # Within a decade or two the powers of ten alone would leave an axis without numbers.
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5) if high / low < 300 else (1,)))
    axes.yaxis.set_major_formatter("{x:,g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def _set_ranges(axes: Any, plot: Plot) -> None:
    if plot.y_range:
        axes.set_ylim(*plot.y_range)
    elif plot.y_from_zero or plot.kind == "bar":
        axes.set_ylim(bottom=None if plot.log_y else 0)
    if plot.x_range:
        axes.set_xlim(*plot.x_range)


def _svg(figure: Any) -> str:
    """Return the figure as an inline SVG element in the page's colours, as wide as there is room."""
    target = io.StringIO()
    figure.savefig(target, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = target.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<svg [^>]*?viewBox="([^"]+)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', svg, count=1)
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)
    # A style element would hold for the whole page; fonts and colours are the page's.
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' style="([^"]*)"', _page_style, svg)
    return re.sub(r"\n\s*", "\n", svg)


def _page_style(match: re.Match[str]) -> str:
    style = re.sub(r"font-family: [^;]*; ?", "", match[1])
    for colour, name in _PAGE_COLOURS.items():
        style = style.replace(colour, f"var({name})")
    return f' style="{style}"'


def _short(value: float) -> float:
    return float(f"{value:.6g}")
