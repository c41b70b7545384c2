"""One self-contained page: a template, its style, script, plots and data in one file that opens without network."""

import base64
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from jinja2.utils import htmlsafe_json_dumps

from dflash_offline.schemas.files import write_output

TEMPLATES = Path(__file__).parent / "templates"


def write_page(path: Path, template: str, scripts: tuple[str, ...] = (), **values: Any) -> None:
    """Write the page whole or not at all; every value is escaped, and nothing but the page's own scripts can run."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    script = "\n".join((TEMPLATES / name).read_text() for name in ("page.js", *scripts))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    text = environment.get_template(template).render(
        script=script, script_hash=digest, style=(TEMPLATES / "page.css").read_text(), **values
    )
    write_output(path, text.encode("utf-8", "replace"))


def fitting(values: Iterable[dict[str, Any]], most_bytes: int) -> list[dict[str, Any]]:
    """Return the first values, one at least, that a page's data has room for, with what could end it escaped."""
    spent, kept = 0, list[dict[str, Any]]()
    for value in values:
        spent += len(htmlsafe_json_dumps(value, separators=(",", ":")))
        if spent > most_bytes and kept:
            break
        kept.append(value)
    return kept


def link(page: Path, to: Path) -> str | None:
    """Return the address of a file as seen from a page, or None if there is no such file."""
    if not to.is_file():
        return None
    return quote(os.path.relpath(to.resolve(), page.resolve().parent))
