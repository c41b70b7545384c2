"""A new cache on disk: its arrays described, its static files sealed, the whole published by one rename."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BloscCodec, Crc32cCodec

from dflash_offline.schemas.files import sha256_file, sync_folder, write_synced
from dflash_offline.schemas.manifest import (
    CAPTURE_RULE,
    COMMITS,
    HIDDEN,
    IDS,
    MANIFEST,
    MASK,
    TMP,
    Layout,
    Manifest,
    StaticFile,
    check_sections,
)
from dflash_offline.schemas.sealed import sealed_bytes
from dflash_offline.stages.buckets.mirror import mirror_of
from dflash_offline.stages.buckets.publish import publish_static
from dflash_offline.stages.store.array_metadata import BLOSC, check_metadata
from dflash_offline.stages.store.codec import CENTER, STEP, FeatureCodec


def create_arrays(
    folder: Path,
    layout: Layout,
    layer_ids: list[int],
    scales: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None,
) -> None:
    """Write the zarr group's metadata, and the scales [L, H] of scaled features; no shard exists yet.

    Raises `CacheError` if this version of zarr-python writes other metadata than readers expect.
    """
    group = zarr.create_group(folder, zarr_format=3, attributes={"format": "dflash-features"})

    def create(
        name: str, dtype: str, item: tuple[int, ...], chunk: tuple[int, ...], fill: int, **attributes: Any
    ) -> None:
        codec = BloscCodec(**BLOSC, typesize=np.dtype(dtype).itemsize)
        group.create_array(
            name,
            shape=(layout.num_slots, *item),
            shards=(layout.shard_tokens, *item),
            chunks=chunk,
            dtype=dtype,
            compressors=[codec, Crc32cCodec()],
            fill_value=fill,
            dimension_names=["token", "layer", "feature"][: 1 + len(item)],
            attributes=attributes,
            config={"write_empty_chunks": True},
        )

    item = (layout.num_layers, layout.hidden_size)
    chunk = (layout.chunk_tokens, 1, layout.hidden_size)
    codec = FeatureCodec(layout.features)
    known = {"target_layer_ids": layer_ids, "capture": CAPTURE_RULE}
    create(HIDDEN, "uint16", item, chunk, codec.fill, **known, **codec.attributes())
    create(IDS, "uint32", (), (layout.shard_tokens,), 0, description="token ids; slots between samples hold 0")
    create(MASK, "bool", (), (layout.shard_tokens,), 0, description="true where the token is supervised")
    for name, values in zip((CENTER, STEP), scales or (), strict=False):
        group.create_array(name, data=values, dimension_names=["layer", "feature"])
    check_metadata(folder, layout, layer_ids)


def publish_cache(folder: Path, cache: Path, **manifest: Any) -> bool:
    """Seal the static files in `folder` with a manifest and rename it to `cache`; first they are put into its bucket.

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
    if (mirror := mirror_of(cache)) is not None:
        publish_static(mirror.bucket, folder)
        if mirror.bucket.read(MANIFEST) != (folder / MANIFEST).read_bytes():
            return not mirror.pull()
    try:
        folder.rename(cache)
    except OSError:  # not empty: somebody was first
        if (cache / MANIFEST).exists():
            return False
        raise
    sync_folder(cache.parent)
    return True
