"""JSON documents that carry the checksum of their own content."""

import hashlib
import json
import math
import re
import stat
from pathlib import Path
from typing import Any

from dflash_offline.schemas.errors import CacheError
from dflash_offline.schemas.files import NOT_THE_FILES, sha256_bytes

MOST_LEVELS = 32
"""Objects and lists within each other that a document may have."""
_MOST_BYTES = 256 << 20
"""Of a sealed document. A manifest holds a line for each file of data, of the target and of the cache."""


def canonical_json(document: Any) -> bytes:
    """Return the one byte string that stands for a JSON document: sorted keys, no spaces, no NaN."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def seal(document: dict[str, Any]) -> dict[str, Any]:
    """Return the document with the checksum of its canonical content added."""
    return {**document, "checksum": sha256_bytes(canonical_json(document))}


def sealed_bytes(document: dict[str, Any]) -> bytes:
    """Return the readable file content of a sealed document."""
    return (json.dumps(seal(document), indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


_CHECKSUM_FIRST = b'{\n "checksum": "'
_STRING = rb'"[^"\\\s]*+"'
_LAID_OUT = re.compile(
    rb"\{\n"
    rb"(?:( *) "  # what a line is indented by, but for one space
    rb"(?:(?:" + _STRING + rb": )?+(?:" + _STRING + rb"|[-+.\w]++|\{\}|\[\]|[{\[](?=\n\1  [^ }\]]))|[}\]])"
    rb"(?:,\n(?=\1 [^ }\]])|\n(?:(?<=[{\[]\n)|(?=\1[}\]]))))+"  # the next line's indent follows from how this one ends
    rb"\}\n"
)
"""A document line by line as `sealed_bytes` lays it out, if no string in it holds a space or a backslash."""


def _holds(content: bytes) -> bool:
    """Say whether a sealed document's checksum holds, from its text alone: a fifth of the time of writing it anew.

    Without spaces and line breaks, the text is the canonical content. False does not mean that it is damaged: names may
    sort before the checksum, or a string hold a space.
    """
    start, (claimed, _, body) = content[: len(_CHECKSUM_FIRST)], content[len(_CHECKSUM_FIRST) :].partition(b'",')
    if start != _CHECKSUM_FIRST or not _LAID_OUT.fullmatch(content):
        return False
    return hashlib.sha256(b"{" + body.translate(None, b"\n ")).hexdigest().encode() == claimed


def read_bounded(path: Path, most: int) -> bytes:
    """Return a file's content; `CacheError` if it is no file, cannot be read, or has more than `most` bytes."""
    try:
        state = path.stat()
        is_file = stat.S_ISREG(state.st_mode)  # to open a pipe would wait
        if is_file and state.st_size <= most:
            with path.open("rb") as file:
                return file.read(most)
    except (OSError, ValueError) as error:  # a ValueError: a name with a NUL
        if isinstance(error, OSError) and error.errno in NOT_THE_FILES:
            raise
        raise CacheError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}.") from error
    found = f"has {state.st_size:,} bytes" if is_file else "is no file"
    raise CacheError(f"{path} {found}, expected a file of at most {most:,}. Restore it from a copy.")


def parse_json(content: bytes, path: Path) -> Any:
    """Return the value of a JSON text; `CacheError` naming `path` unless it is plain.

    Plain are finite numbers, text that can be encoded, no key twice in an object, and at most `MOST_LEVELS` levels.
    """
    try:
        value = _PLAIN.decode(content.decode())
        if content.count(b"[") + content.count(b"{") > MOST_LEVELS:
            _refuse_deep(value)
        if b"\\u" in content:
            json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair has no bytes
    except (ValueError, RecursionError) as error:
        raise CacheError(f"{path} cannot be read as JSON: {error}. Restore it from a copy.") from error
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r:.60} stands twice")
    return document


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text:.40} is no finite number")
    return number


def _refuse_deep(value: Any) -> None:
    level, depth = [value], 0
    while level := [item for item in level if isinstance(item, dict | list)]:
        depth += 1
        if depth > MOST_LEVELS:
            raise ValueError(f"it is nested deeper than {MOST_LEVELS} levels")
        level = [part for item in level for part in (item.values() if isinstance(item, dict) else item)]


_PLAIN = json.JSONDecoder(object_pairs_hook=_object, parse_float=_finite, parse_constant=_finite)


def read_sealed(path: Path) -> dict[str, Any]:
    """Return a sealed document, its checksum included and checked; `CacheError` if it does not hold."""
    return parse_sealed(read_bounded(path, _MOST_BYTES), path)


def parse_sealed(content: bytes, path: Path) -> dict[str, Any]:
    """Return the sealed document that a file at `path` holds, as `read_sealed` does."""
    document = parse_json(content, path)
    if not isinstance(document, dict) or not isinstance(document.get("checksum"), str):
        raise CacheError(f"{path} cannot be read as a sealed document: it has no checksum. Restore it from a copy.")
    if _holds(content):
        return document
    body = {key: value for key, value in document.items() if key != "checksum"}
    claimed, actual = document["checksum"], sha256_bytes(canonical_json(body))
    if claimed != actual or content != sealed_bytes(body):
        raise CacheError(
            f"{path} is damaged: its checksum says {claimed:.64}, its content gives {actual}. Restore it from a copy."
        )
    return document
