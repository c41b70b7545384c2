"""The files of a cache: what must not depend on how it was made, and copies whose manifest says otherwise."""

import shutil
import struct
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

from crc32c import crc32c

from dflash_offline.schemas.files import sha256_bytes
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


def sealed_anew(cache: Path) -> None:
    """Let manifest and records of a cache say what its files are now, as a stranger would who changed them."""
    document = unsealed(cache / MANIFEST)
    for name, known in document["files"].items():
        content = (cache / name).read_bytes()
        known.update(size=len(content), sha256=sha256_bytes(content))
    (cache / MANIFEST).write_bytes(sealed_bytes(document))
    for path in sorted((cache / "commits").iterdir()):
        record = unsealed(path) | {"manifest": read_sealed(cache / MANIFEST)["checksum"]}
        for name, known in record["files"].items():
            known.update(_shard_file_record((cache / name).read_bytes(), "hidden_states" in name, document["layout"]))
        path.write_bytes(sealed_bytes(record))


def unsealed(path: Path) -> dict[str, Any]:
    """Return a sealed document without its checksum."""
    document = read_sealed(path)
    del document["checksum"]
    return document


def _shard_file_record(content: bytes, is_hidden: bool, layout: dict[str, Any]) -> dict[str, Any]:
    num_chunks = layout["shard_tokens"] // layout["chunk_tokens"] * layout["num_layers"] if is_hidden else 1
    offset, length = struct.unpack("<2Q", content[-4 - 16 * num_chunks :][:16])
    return {
        "size": len(content),
        "sha256": sha256_bytes(content),
        "index_crc32c": int.from_bytes(content[-4:], "little"),
        "first_chunk_crc32c": int.from_bytes(content[: offset + length][-4:], "little"),
    }


def with_chunks(content: bytes, num_chunks: int, change: Callable[[list[bytes]], None]) -> bytes:
    """Return a shard file whose chunks' frames, without their checksums, are changed; checksums and index are right."""
    index = struct.iter_unpack("<2Q", content[-4 - 16 * num_chunks : -4])
    frames = [content[offset : offset + size - 4] for offset, size in index]
    change(frames)
    chunks = [frame + crc32c(frame).to_bytes(4, "little") for frame in frames]
    ends = [*accumulate(map(len, chunks))]
    places = b"".join(struct.pack("<2Q", end - len(chunk), len(chunk)) for end, chunk in zip(ends, chunks, strict=True))
    return b"".join(chunks) + places + crc32c(places).to_bytes(4, "little")
