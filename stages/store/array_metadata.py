"""The zarr v3 metadata of features.zarr: what zarr-python writes for a layout, and on reading nothing else.

No zarr library reads them: what a stranger's metadata names, such as a filter that unpickles, a codec or a shape, must
not be obeyed before it is compared. Axes: T token slots, L captured layers, H hidden size.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dflash_offline.schemas.errors import CacheError
from dflash_offline.schemas.manifest import (
    CAPTURE_RULE,
    FEATURES,
    FINAL,
    FINAL_RULE,
    HIDDEN,
    IDS,
    MASK,
    Layout,
    Manifest,
)
from dflash_offline.schemas.sealed import parse_json, read_bounded
from dflash_offline.stages.store.chunks import DamagedFrameError, expand
from dflash_offline.stages.store.codec import CENTER, STEP, FeatureCodec

BLOSC: dict[str, Any] = {"cname": "zstd", "clevel": 1, "shuffle": "shuffle", "blocksize": 1 << 19}
"""What the arrays' metadata says, and what zarr-python would write with."""
METADATA = "zarr.json"
_CRC32C, _LITTLE = {"name": "crc32c"}, {"name": "bytes", "configuration": {"endian": "little"}}
_MOST_BYTES = 1 << 20
"""Of one metadata file; it takes two KiB."""
_MEND = "Restore it from a copy of this cache, or extract again into a new folder."


def metadata_documents(layout: Layout, layer_ids: Sequence[int]) -> dict[str, dict[str, Any]]:
    """Return every metadata document of features.zarr by its folder within; the group's by an empty string."""
    codec = FeatureCodec(layout.features)
    attributes = {"target_layer_ids": list(layer_ids), "capture": CAPTURE_RULE, **codec.attributes()}
    item, chunk = [layout.num_layers, layout.hidden_size], [layout.chunk_tokens, 1, layout.hidden_size]
    whole = [layout.shard_tokens]
    documents = {
        "": {"attributes": {"format": "dflash-features"}, "zarr_format": 3, "node_type": "group"},
        HIDDEN: _sharded(layout, item, "uint16", chunk, codec.fill, attributes),
        IDS: _sharded(layout, [], "uint32", whole, 0, {"description": "token ids; slots between samples hold 0"}),
        MASK: _sharded(layout, [], "bool", whole, False, {"description": "true where the token is supervised"}),
    }
    if layout.features.kind == "scaled":
        documents |= {name: _scale(layout) for name in (CENTER, STEP)}
    return documents


def final_document(manifest: Manifest) -> dict[str, Any]:
    """Return the metadata of the array `final` [T, H], which `Manifest.final` describes.

    Its shards are those of hidden states of one layer, chunk for chunk.
    """
    layout, codec = manifest.layout, FeatureCodec(manifest.layout.features)
    attributes = {"capture": FINAL_RULE, **codec.attributes()}
    chunk = [layout.chunk_tokens, layout.hidden_size]
    return _sharded(layout, [layout.hidden_size], "uint16", chunk, codec.fill, attributes, ["token", "feature"])


def _sharded(
    layout: Layout,
    item: list[int],
    dtype: str,
    chunk: list[int],
    fill: int,
    attributes: dict[str, Any],
    names: Sequence[str] = ("token", "layer", "feature"),
) -> dict[str, Any]:
    """Return the metadata of an array [T, *item] whose shards hold chunks of a Blosc frame and its crc32c."""
    size = np.dtype(dtype).itemsize
    inner = [
        _LITTLE if size > 1 else {"name": "bytes"},
        {"name": "blosc", "configuration": {"typesize": size, **BLOSC}},
        _CRC32C,
    ]
    configuration = {
        "chunk_shape": chunk,
        "codecs": inner,
        "index_codecs": [_LITTLE, _CRC32C],
        "index_location": "end",
    }
    codecs = [{"name": "sharding_indexed", "configuration": configuration}]
    shape = [layout.shard_tokens, *item]
    return _array([layout.num_slots, *item], dtype, shape, fill, codecs, attributes, list(names[: len(shape)]))


def _scale(layout: Layout) -> dict[str, Any]:
    shape = [layout.num_layers, layout.hidden_size]
    codecs = [_LITTLE, {"name": "zstd", "configuration": {"level": 0, "checksum": False}}]
    return _array(shape, "float32", shape, 0.0, codecs, {}, ["layer", "feature"])


def _array(
    shape: list[int],
    dtype: str,
    chunk: list[int],
    fill: float,
    codecs: list[dict[str, Any]],
    attributes: dict[str, Any],
    names: list[str],
) -> dict[str, Any]:
    return {
        "shape": shape,
        "data_type": dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": fill,
        "codecs": codecs,
        "attributes": attributes,
        "dimension_names": names,
        "zarr_format": 3,
        "node_type": "array",
        "storage_transformers": [],
    }


def check_metadata(folder: Path, layout: Layout, layer_ids: Sequence[int]) -> None:
    """Raise `CacheError` naming file and field if a metadata document of features.zarr is not the one expected."""
    for name, wanted in metadata_documents(layout, layer_ids).items():
        _check_document(folder, name, wanted)


def check_final_metadata(folder: Path, manifest: Manifest) -> None:
    """Raise `CacheError` naming file and field if the metadata of the array `final` are not those expected."""
    _check_document(folder, FINAL, final_document(manifest))


def _check_document(folder: Path, name: str, wanted: dict[str, Any]) -> None:
    path = folder / name / METADATA
    found = parse_json(read_bounded(path, _MOST_BYTES), path)
    if not isinstance(found, dict):
        raise CacheError(f"{path} holds {str(found)[:60]}, expected an object. {_MEND}")
    if name == "" and found.get("consolidated_metadata", 0) is None:
        del found["consolidated_metadata"]  # older versions of zarr-python say that there is none
    if name in (CENTER, STEP):
        found = found | {"chunk_grid": _whole_grid(found.get("chunk_grid"), wanted)}
    for field in {**wanted, **found}:
        if field not in found or field not in wanted or not _same(found[field], wanted[field]):
            have, want = (repr(side.get(field, "nothing"))[:200] for side in (found, wanted))
            raise CacheError(f"{path}: {field!r:.60} is {have}, expected {want}. {_MEND}")


def _same(found: Any, wanted: Any) -> bool:
    """Say whether two JSON values are one; a number is no truth value."""
    return json.dumps(found, sort_keys=True) == json.dumps(wanted, sort_keys=True)


def _whole_grid(grid: Any, wanted: dict[str, Any]) -> Any:
    """Return the grid of one chunk in place of one that cuts the same array: zarr-python chose how to cut scales."""
    whole: list[int] = wanted["chunk_grid"]["configuration"]["chunk_shape"]
    match grid:
        case {"configuration": {"chunk_shape": [int(rows), int(columns)], **rest}, **others} if not rest:
            if type(rows) is type(columns) is int and 1 <= rows <= whole[0] and 1 <= columns <= whole[1]:
                return {**others, "configuration": {"chunk_shape": whole}}
    return grid


def read_scale(cache: Path, name: str, layout: Layout) -> NDArray[np.float32]:
    """Return a scale [L, H] of a cache whose metadata was checked; `CacheError` if its chunks do not hold it."""
    folder = cache / FEATURES / name
    document = parse_json(read_bounded(folder / METADATA, _MOST_BYTES), folder / METADATA)
    rows, columns = document["chunk_grid"]["configuration"]["chunk_shape"]
    scale = np.empty((layout.num_layers, layout.hidden_size), np.float32)
    for row in range(0, scale.shape[0], rows):
        for column in range(0, scale.shape[1], columns):
            path = folder / "c" / str(row // rows) / str(column // columns)
            chunk = np.empty((rows, columns), "<f4")
            try:
                frame = read_bounded(path, 2 * chunk.nbytes + _MOST_BYTES)
                expand(memoryview(frame), chunk.reshape(-1).view(np.uint8).data)
            except DamagedFrameError as error:
                raise CacheError(f"{path} is no chunk of {rows} x {columns} numbers: {error}. {_MEND}") from error
            part = scale[row : row + rows, column : column + columns]
            part[...] = chunk[: part.shape[0], : part.shape[1]]
    return scale
