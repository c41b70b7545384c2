"""File names that are not UTF-8: Linux allows any bytes, the libraries that read and write tables and models do not."""

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
