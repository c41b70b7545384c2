"""How results are printed: with colour and as wide as a terminal, where stdout is one, and as plain text elsewhere."""

import json
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import fields
from io import TextIOWrapper
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from dflash_offline.pipeline.safe_output import obeyed, safe

FLATTENED = {"flattened": True}
"""Metadata of a dataclass's field whose own fields JSON has in its place; none of them where it is None."""
OMITTED_IF_NONE = {"omitted": True}
_BLOCKS, _PLAIN_BLOCKS = "▁▂▃▄▅▆▇█", "_.-=+*#@"


def open_console() -> Console:
    """Return a console that prints to stdout: as wide as the terminal, or 80 columns; no colour if NO_COLOR is set."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a text may hold signs that the output's encoding has not
    plain = os.environ.get("NO_COLOR") or not sys.stdout.isatty()
    return _SafeConsole(
        file=obeyed(sys.stdout), highlight=False, markup=False, emoji=False, color_system=None if plain else "auto"
    )


def has_colour(console: Console) -> bool:
    """Return whether the console prints in colour."""
    return console.color_system is not None


class _SafeConsole(Console):
    """A console that makes safe whatever it shows, and colours it."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Yield the parts of what is shown; a control of rich's own is none of its text."""
        for part in super().render(renderable, options):
            yield part if part.control else Segment(safe(part.text), part.style)


def facts(rows: Sequence[tuple[str, str]]) -> Table:
    """Return names and what there is to say of each, wrapped beside the name; a line break begins a new line."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, min_width=10)
    table.add_column(overflow="fold")
    for name, text in rows:
        table.add_row(Text(name, style="bold"), Text(safe(text)))
    return table


def columns(rows: Sequence[dict[str, str]], left: Sequence[str] = ()) -> Table:
    """Return rows of the same columns as a table, right-aligned; columns in `left` are left-aligned and may wrap."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold", show_edge=False)
    for name in rows[0] if rows else ():
        if name in left:
            table.add_column(name, overflow="fold")
        else:
            table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(safe(cell)) for cell in row.values()))
    return table


def sparkline(levels: Sequence[float]) -> str:
    """Return numbers from 0 to 1 as a line of blocks, or of other signs where the output's encoding has none."""
    signs = _BLOCKS if (sys.stdout.encoding or "").lower().startswith("utf") else _PLAIN_BLOCKS
    return "".join(signs[min(int(level * len(signs)), len(signs) - 1)] for level in levels)


def named(name: str) -> dict[str, str]:
    """Return the metadata of a dataclass's field that JSON has under another name."""
    return {"name": name}


def to_json(view: Any) -> dict[str, Any]:
    """Return the fields of a dataclass by their names in JSON; values are not copied."""
    document: dict[str, Any] = {}
    for field in fields(view):
        value, how = getattr(view, field.name), field.metadata
        if "flattened" in how:
            document |= {} if value is None else to_json(value)
        elif value is not None or "omitted" not in how:
            document[how.get("name", field.name)] = value
    return document


def print_json(document: Any) -> None:
    """Print a document for a script: plain values, or dataclasses of them."""
    print(json.dumps(document, indent=1, default=to_json))
