"""A new cache on disk: its arrays described, its static files sealed, the whole published by one rename."""

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dflash_offline.schemas.files import sha256_file, sync_folder, write_synced
from dflash_offline.schemas.manifest import (
    COMMITS,
    MANIFEST,
    TMP,
    Layout,
    Manifest,
    StaticFile,
    check_sections,
)
from dflash_offline.schemas.sealed import sealed_bytes
from dflash_offline.stages.store.array_metadata import write_metadata, write_scale
from dflash_offline.stages.store.codec import CENTER, STEP


def create_arrays(
    folder: Path,
    layout: Layout,
    layer_ids: list[int],
    scales: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None,
) -> None:
    """Write the zarr group's metadata, and the scales [L, H] of scaled features; no shard exists yet."""
    write_metadata(folder, layout, layer_ids)
    for name, values in zip((CENTER, STEP), scales or (), strict=False):
        write_scale(folder, name, values)


def publish_cache(folder: Path, cache: Path, **manifest: Any) -> bool:
    """Seal the static files in `folder` with a manifest and rename it to `cache`.

    Returns False, with nothing changed, if another process published first.
    """
    (folder / COMMITS).mkdir()
    (folder / TMP).mkdir()
    names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    files: dict[str, StaticFile] = {
        name: {"size": (folder / name).stat().st_size, "sha256": sha256_file(folder / name)} for name in names
    }
    document = Manifest(files=files, **manifest).to_json()
    check_sections(document, folder / MANIFEST)
    write_synced(folder / MANIFEST, [sealed_bytes(document)])
    for path in folder.rglob("*"):
        if path.is_dir():
            sync_folder(path)
        else:
            with path.open("rb") as file:
                os.fsync(file.fileno())
    sync_folder(folder)
    try:
        folder.rename(cache)
    except OSError:  # not empty: somebody was first
        if (cache / MANIFEST).exists():
            return False
        raise
    sync_folder(cache.parent)
    return True
