"""The types and ranges of what documents hold, and the one check of a document against them.

A right checksum says that a file is as it was written, and not who wrote it. Fields that a type does not name are left
alone: newer versions may add some.
"""

import threading
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from dflash_offline.schemas.errors import CacheError

Count = Annotated[int, Meta(ge=0, le=1 << 53)]
Size = Annotated[int, Meta(ge=1, le=1 << 26)]
"""Of a matrix, a block or a window."""
Seconds = Annotated[float, Meta(gt=0, le=1e6)]
"""Of a step of work."""
Index = Annotated[int, Meta(ge=0, le=1 << 31)]
LayerIndex = Annotated[int, Meta(ge=0, lt=4096)]
Sha256 = Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]
PathWithin = Annotated[str, Meta(pattern=r"\A(?!/)(?!(?:.*/)?\.{0,2}(?:/|\Z))[^\0\\]+\Z", max_length=4096)]
"""Of a file in the document's folder, with slashes between its parts, none of which is `.` or `..`."""
FilePath = Annotated[str, Meta(pattern=r"\A[^\0]+\Z", max_length=4096)]
"""Of any file."""
Counts = dict[str, Count]

T = TypeVar("T")
_RESTORE = "Restore it from a copy, or make it again."
_first_use = threading.Lock()
_used: set[type] = set()


def checked(document: Any, kind: type[T], path: Path, what_to_do: str = _RESTORE) -> T:
    """Return a document as a dataclass or dictionary of typed fields; `CacheError` naming `path` and the field."""
    try:
        if kind in _used:
            return msgspec.convert(document, kind)
        with _first_use:  # the process dies where two threads at once are the first to give msgspec 0.22 a type
            found = msgspec.convert(document, kind)
            _used.add(kind)
            return found
    except (msgspec.ValidationError, OverflowError, RecursionError) as error:
        raise unlike(path, str(error), what_to_do) from error


def unlike(path: Path | str, what: str, what_to_do: str = _RESTORE) -> CacheError:
    """Return the error of a document that is whole, but not one of this program."""
    return CacheError(
        f"{path} is not what this version reads: {what}. Another version wrote it, or it was changed by hand. "
        f"{what_to_do}"
    )
