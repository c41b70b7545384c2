"""Paths: output folders, free names, names that are not UTF-8, and the addresses of caches in object stores.

Linux allows any bytes in a name; the libraries that read and write tables and models do not.
"""

import os
import re
from pathlib import Path

from dflash_offline.schemas.errors import DflashError
from dflash_offline.schemas.locks import LOCK

_STORE = re.compile(r"(s3|gs|az):/{1,2}([^/].*)")
_FILE = re.compile(r"file:/+(.*)")


def store_url(path: str | Path) -> str | None:
    """Return the URL of what lies in an object store, or None for a path; as a path, a URL has lost a slash."""
    named = _STORE.fullmatch(str(path))
    return named and f"{named[1]}://{named[2].rstrip('/')}"


def local_path(path: Path) -> Path:
    """Return the path that a URL with `file://` names; any other as it is."""
    named = _FILE.fullmatch(str(path))
    return Path("/", named[1]) if named else path


def shown(path: str | Path) -> str:
    """Return a path or the URL of an object store as a user writes it."""
    return store_url(path) or str(path)


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
    """Return a path beside another one at which nothing is yet: `name`, or `name-2` and so on.

    Beside what lies in an object store it is one in the working directory.
    """
    beside = Path(name) if store_url(beside) else beside
    paths = (beside.parent / (name if number == 1 else f"{name}-{number}") for number in range(1, 10_000))
    return next(path for path in paths if not path.exists())


def _of_a_stopped_command(name: str, marker: str) -> bool:
    return name in (LOCK, f".{marker}") or name.startswith(f".{marker}.building-")


def output_folder(path: Path, *, marker: str, kind: str, renamed: bool) -> Path:
    """Return the real path of an output folder; `DflashError` if it cannot become one.

    It may be absent, hold nothing but what a stopped command leaves, or hold `marker`: then it is a `kind` already. A
    folder that will be put in place by a rename can be neither a mount point nor the working directory.
    """
    folder = path.resolve()
    parent = next(p for p in folder.parents if p.exists())
    if not parent.is_dir():
        raise DflashError(f"{path} lies inside {parent}, which is not a folder. Name another --out.")
    if not folder.exists() or (folder / marker).is_file():
        return folder
    if not folder.is_dir() or any(
        renamed or not _of_a_stopped_command(entry.name, marker) for entry in folder.iterdir()
    ):
        raise DflashError(f"{path} exists and is not a {kind}. Name a new folder, or empty it.")
    if renamed and (os.path.ismount(folder) or folder == Path.cwd()):
        raise DflashError(
            f"{path} is a mount point or the working directory, and a {kind} is put in place by a rename. Name a "
            f"folder inside it, as in --out {path / 'new'}."
        )
    return folder
