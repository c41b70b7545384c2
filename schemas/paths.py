"""File names: free ones, and those that are not UTF-8.

Linux allows any bytes in a name; the libraries that read and write tables and models do not.
"""

import os
from pathlib import Path

from dflash_offline.schemas.errors import DflashError


def utf8_name(path: str | Path) -> str:
    """Return a path as text that can be stored and printed; bytes that are not UTF-8 are spelled, as in \\xe9."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def refuse_other_than_utf8(folder: Path, what: str) -> None:
    """Raise `DflashError` if a folder's path is not UTF-8."""
    if utf8_name(folder) != str(folder):
        raise DflashError(
            f"{utf8_name(folder)} is not UTF-8, and {what} cannot lie there: pyarrow and transformers open no such "
            f"path. Rename it, or name another folder."
        )


def free_name(beside: Path, name: str) -> Path:
    """Return a path beside another one at which nothing is yet: `name`, or `name-2` and so on."""
    paths = (beside.parent / (name if number == 1 else f"{name}-{number}") for number in range(1, 10_000))
    return next(path for path in paths if not path.exists())
