"""Shard files against zarr-python, in both directions and at real widths."""

import hashlib
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count, product
from pathlib import Path
from threading import Event, current_thread, main_thread
from typing import Any

import numpy as np
import pytest
import zarr
from numpy.typing import NDArray

from dflash_offline.schemas.commits import ShardFileRecord
from dflash_offline.schemas.errors import CacheError
from dflash_offline.schemas.files import publish
from dflash_offline.schemas.manifest import HIDDEN, Layout
from dflash_offline.stages.store.chunks import encode_chunk
from dflash_offline.stages.store.create import create_arrays
from dflash_offline.stages.store.shard_file import ShardFile, ShardSummary

WIDTHS = [32, 1000, 4096]
LAYER_IDS = [1, 2, 4]


def features(num_tokens: int, num_layers: int, width: int, seed: int = 0) -> NDArray[np.uint16]:
    """Return bfloat16 bits of normal values."""
    values = np.random.default_rng(seed).standard_normal((num_tokens, num_layers, width), dtype=np.float32)
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def layout(width: int, num_shards: int = 2, num_layers: int = 3) -> Layout:
    return Layout(num_shards=num_shards, shard_tokens=256, chunk_tokens=64, num_layers=num_layers, hidden_size=width)


def chunk_slices(shape: tuple[int, ...], chunk: tuple[int, ...]) -> Iterator[tuple[slice, ...]]:
    """Yield the place of every inner chunk of a shard, in the order of its index."""
    counts = [-(-size // step) for size, step in zip(shape, chunk, strict=True)]
    for position in product(*map(range, counts)):
        yield tuple(slice(p * step, (p + 1) * step) for p, step in zip(position, chunk, strict=True))


@dataclass(frozen=True)
class EncodedShard:
    """The content of one shard file and its record."""

    pieces: list[Any]
    record: ShardFileRecord


def encode_shard(values: NDArray[np.uint16], chunk: tuple[int, ...], pool: ThreadPoolExecutor) -> EncodedShard:
    summary, pieces = ShardSummary(), []
    for chunks in pool.map(lambda where: encode_chunk(values[where]), chunk_slices(values.shape, chunk)):
        summary.add(chunks)
        pieces.append(chunks.data)
    pieces = [*pieces, summary.index()]
    return EncodedShard(pieces, summary.record(hashlib.sha256(b"".join(pieces)).hexdigest()))


def write(folder: Path, shape: Layout, shard: int, values: NDArray[np.uint16]) -> tuple[Path, EncodedShard]:
    with ThreadPoolExecutor(3) as pool:
        encoded = encode_shard(values, (shape.chunk_tokens, 1, shape.hidden_size), pool)
    folder.mkdir(exist_ok=True)
    path = folder / HIDDEN / "c" / str(shard) / "0" / "0"
    publish(encoded.pieces, temporary=folder / "tmp", path=path)
    return path, encoded


def opened(path: Path, encoded: EncodedShard, shape: Layout) -> ShardFile:
    return ShardFile(path, encoded.record, shape, LAYER_IDS)


@pytest.mark.parametrize("width", WIDTHS)
def test_zarr_python_reads_what_we_write(tmp_path: Path, width: int) -> None:
    shape, folder = layout(width), tmp_path / "z"
    create_arrays(folder, shape, LAYER_IDS)
    values = features(512, 3, width)
    for shard in range(2):
        write(folder, shape, shard, values[shard * 256 : (shard + 1) * 256])
    array = zarr.open_group(str(folder), mode="r")[HIDDEN]
    assert isinstance(array, zarr.Array)
    np.testing.assert_array_equal(array[:], values)
    np.testing.assert_array_equal(array[100:300, 1], values[100:300, 1])


@pytest.mark.parametrize("width", WIDTHS)
def test_we_read_what_zarr_python_writes(tmp_path: Path, width: int) -> None:
    shape, folder = layout(width, num_shards=1), tmp_path / "z"
    create_arrays(folder, shape, LAYER_IDS)
    values = features(256, 3, width, seed=1)
    array = zarr.open_group(str(folder), mode="r+")[HIDDEN]
    assert isinstance(array, zarr.Array)
    array[:] = values
    path = folder / HIDDEN / "c" / "0" / "0" / "0"
    ours = write(tmp_path / "other", shape, 0, values)[1].record
    content = path.read_bytes()
    index = np.frombuffer(content[-4 - 12 * 16 : -4], "<u8").reshape(-1, 2)
    first = int(index[0].sum())
    theirs = EncodedShard(
        [],
        type(ours)(
            size=len(content),
            sha256="",
            index_crc32c=int.from_bytes(content[-4:], "little"),
            first_chunk_crc32c=int.from_bytes(content[first - 4 : first], "little"),
        ),
    )
    out = np.empty((130, 2, width), np.uint16)
    opened(path, theirs, shape).read(64, [0, 2], out)
    np.testing.assert_array_equal(out, values[64:194, [0, 2]])


def test_an_all_fill_chunk_is_written_and_read_back(tmp_path: Path) -> None:
    shape = layout(32, num_shards=1)
    values = np.full((256, 3, 32), 0x7FC0, np.uint16)
    path, encoded = write(tmp_path, shape, 0, values)
    out = np.empty_like(values)
    opened(path, encoded, shape).read(0, [0, 1, 2], out)
    np.testing.assert_array_equal(out, values)


def test_the_bytes_do_not_depend_on_threads_or_on_the_run() -> None:
    values = features(256, 3, 4096)  # chunks of 512 KiB each
    big = features(1024, 1, 4096)  # one chunk of sixteen codec blocks
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(4) as four:
        for array, chunk in ((values, (64, 1, 4096)), (big, (1024, 1, 4096))):
            reference = encode_shard(array, chunk, one).record.sha256
            assert {encode_shard(array, chunk, four).record.sha256 for _ in range(8)} == {reference}


def test_every_flipped_byte_is_found(tmp_path: Path) -> None:
    shape = layout(32, num_shards=1)
    values = features(256, 3, 32)
    path, encoded = write(tmp_path, shape, 0, values)
    content = bytearray(path.read_bytes())
    out = np.empty_like(values)
    for position in range(0, len(content), max(1, len(content) // 300)):
        content[position] ^= 0x10
        path.write_bytes(content)
        with pytest.raises(CacheError):
            opened(path, encoded, shape).read(0, [0, 1, 2], out)
        content[position] ^= 0x10


def test_a_damaged_chunk_is_named_with_its_place_and_its_layer(tmp_path: Path) -> None:
    shape = layout(32)
    path, encoded = write(tmp_path, shape, 0, features(256, 3, 32))
    index = np.frombuffer(path.read_bytes()[-4 - 16 * 12 : -4], "<u8").reshape(4, 3, 2)
    begin, size = index[1, 2].tolist()
    content = bytearray(path.read_bytes())
    content[begin + 30] ^= 1
    path.write_bytes(content)
    with pytest.raises(CacheError, match=f"bytes {begin} to {begin + size}, layer {LAYER_IDS[2]}, is damaged"):
        opened(path, encoded, shape).read(64, [0, 1, 2], np.empty((64, 3, 32), np.uint16))


def test_when_a_helper_fails_nobody_writes_any_more_once_the_read_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = layout(4096)
    path, encoded = write(tmp_path, shape, 0, features(256, 3, 4096))
    begun, ended, numbers = Event(), Event(), count()

    def read(_self: ShardFile, _parts: Any) -> None:
        if current_thread() is main_thread():
            assert begun.wait(10)
        elif next(numbers) == 0:
            raise CacheError("planted")
        else:
            begun.set()
            time.sleep(0.1)
            ended.set()

    monkeypatch.setattr(ShardFile, "_read", read)
    with ThreadPoolExecutor(1) as pool:  # one helper after the other: one fails, one is at it, one has not begun
        with pytest.raises(CacheError, match="planted"):
            opened(path, encoded, shape).read(0, [0, 1, 2], np.empty((256, 3, 4096), np.uint16), pool, 3)
        assert ended.is_set()
    assert next(numbers) == 2


@pytest.mark.parametrize("length", [0, 3, 100, -1])
def test_a_truncated_file_is_found(tmp_path: Path, length: int) -> None:
    shape = layout(32, num_shards=1)
    path, encoded = write(tmp_path, shape, 0, features(256, 3, 32))
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(CacheError, match="not the file its commit record describes"):
        opened(path, encoded, shape)


def test_a_shard_of_another_cache_is_refused_although_its_chunks_are_sound(tmp_path: Path) -> None:
    shape = layout(32, num_shards=1)
    _, encoded = write(tmp_path / "a", shape, 0, features(256, 3, 32, seed=0))
    other, _ = write(tmp_path / "b", shape, 0, features(256, 3, 32, seed=1))
    with pytest.raises(CacheError):
        opened(other, encoded, shape)
