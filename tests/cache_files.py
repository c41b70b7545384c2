"""The files of a cache: what must not depend on how it was made, and copies whose manifest says otherwise."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dflash_offline.schemas.manifest import MANIFEST
from dflash_offline.schemas.sealed import read_sealed, sealed_bytes


def content(cache: Path) -> dict[str, bytes]:
    """Return every file that must not depend on who wrote it or after which interruption."""
    files = [*(cache / "features.zarr").rglob("*"), cache / "samples.parquet", cache / "rejects.parquet"]
    return {str(path.relative_to(cache)): path.read_bytes() for path in files if path.is_file()}


def made_otherwise(cache: Path, out: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """Return a copy of a cache whose manifest, sealed anew, says otherwise what it was made from."""
    shutil.copytree(cache, out)
    document = read_sealed(out / MANIFEST)
    del document["checksum"]
    change(document)
    (out / MANIFEST).write_bytes(sealed_bytes(document))
    for path in (out / "commits").iterdir():
        record = read_sealed(path) | {"manifest": read_sealed(out / MANIFEST)["checksum"]}
        del record["checksum"]
        path.write_bytes(sealed_bytes(record))
    return out


def set_field(name: str, value: object) -> Callable[[dict[str, Any]], None]:
    """Return what sets one field of a document, named with a slash between its parts."""

    def change(document: dict[str, Any]) -> None:
        *parents, last = name.split("/")
        for parent in parents:
            document = document.setdefault(parent, {})
        document[last] = value

    return change
