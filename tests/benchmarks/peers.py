"""Other ways to keep the same samples on disk, each called in the fastest way its documentation gives.

Every side writes from, and reads into, torch bfloat16 tensors [T, L, H] in ordinary memory, nothing left lazy.
"""

import gzip
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import zarr
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

Read = Callable[[int], Tensor]


@dataclass(frozen=True)
class Peer:
    """How one format keeps a feature set in a folder."""

    settings: str
    write: Callable[[Path, Sequence[Tensor]], None]
    """Writes all samples, not yet synced."""
    open: Callable[[Path], Read]
    """Returns what reads one sample."""


def peers(num_tokens: Sequence[int], item: tuple[int, int]) -> dict[str, Peer]:
    """Return every peer for samples of these lengths, [L, H] a token."""
    shapes = [(count, *item) for count in num_tokens]
    return {
        "raw memory map": Peer(
            "one file, np.memmap kept open, a sample copied out of it", _write_raw, lambda path: _open_raw(path, shapes)
        ),
        "torch.load": Peer("a file a sample; torch.save, torch.load(path)", _write_torch, _torch_reader()),
        "torch.load unchecked": Peer(
            "the same files; torch.load(path, weights_only=False)", _write_torch, _torch_reader(weights_only=False)
        ),
        "torch.load mmap": Peer(
            "the same files; torch.load(path, mmap=True).clone()", _write_torch, _torch_reader(mmap=True)
        ),
        "torch.load gzip": Peer("a file a sample; torch.save into gzip, level 1", _write_gzip, _open_gzip),
        "safetensors": Peer(
            "a file a sample; save_file, load_file(path)[name].clone()", _write_safetensors, _open_safetensors
        ),
        "parquet": Peer(
            "one file, a row group a sample; float16 bits, byte-stream split, zstd 1, no dictionary",
            _write_parquet,
            lambda path: _open_parquet(path, shapes),
        ),
    }


def bits(sample: Tensor) -> NDArray[np.uint16]:
    """Return a bfloat16 tensor's bits, no copy."""
    return sample.view(torch.int16).numpy().view(np.uint16)


def from_bits(array: NDArray[Any]) -> Tensor:
    """Return the bfloat16 tensor of 16-bit patterns, no copy."""
    return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)


def sync_files(folder: Path) -> None:
    """Make every file and folder below durable."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def open_zarr(path: Path, begins: Sequence[int], num_tokens: Sequence[int]) -> Read:
    """Return zarr-python's reader of a sharded array with its default pipeline; samples begin at these slots."""
    array = zarr.open_array(str(path), mode="r")
    return lambda i: from_bits(np.asarray(array[begins[i] : begins[i] + num_tokens[i]]))


def _write_raw(folder: Path, samples: Sequence[Tensor]) -> None:
    with (folder / "raw").open("wb") as file:
        for sample in samples:
            file.write(bits(sample).data)


def _open_raw(folder: Path, shapes: Sequence[tuple[int, ...]]) -> Read:
    values = np.memmap(folder / "raw", np.uint16, "r")
    ends = np.cumsum([np.prod(shape) for shape in shapes]).tolist()
    return lambda i: from_bits(np.array(values[ends[i] - int(np.prod(shapes[i])) : ends[i]])).view(shapes[i])


def _write_torch(folder: Path, samples: Sequence[Tensor]) -> None:
    for number, sample in enumerate(samples):
        torch.save(sample, folder / f"{number}.pt")


def _torch_reader(**settings: bool) -> Callable[[Path], Read]:
    def open_folder(folder: Path) -> Read:
        if "mmap" in settings:
            return lambda i: torch.load(folder / f"{i}.pt", **settings).clone()
        return lambda i: torch.load(folder / f"{i}.pt", **settings)

    return open_folder


def _write_gzip(folder: Path, samples: Sequence[Tensor]) -> None:
    for number, sample in enumerate(samples):
        with gzip.open(folder / f"{number}.gz", "wb", compresslevel=1) as file:
            torch.save(sample, file)


def _open_gzip(folder: Path) -> Read:
    def read(number: int) -> Tensor:
        with gzip.open(folder / f"{number}.gz") as file:
            return torch.load(file)

    return read


def _write_safetensors(folder: Path, samples: Sequence[Tensor]) -> None:
    for number, sample in enumerate(samples):
        save_file({"features": sample}, folder / f"{number}.safetensors")


def _open_safetensors(folder: Path) -> Read:
    return lambda i: load_file(folder / f"{i}.safetensors")["features"].clone()  # else a lazy map of the file


def _write_parquet(folder: Path, samples: Sequence[Tensor]) -> None:
    schema = pa.schema([("features", pa.float16())])
    settings = {"compression": "zstd", "compression_level": 1, "use_dictionary": False, "write_statistics": False}
    with pq.ParquetWriter(folder / "parquet", schema, use_byte_stream_split=True, **settings) as writer:
        for sample in samples:
            values = pa.array(bits(sample).reshape(-1).view(np.float16))
            writer.write_table(pa.table([values], schema=schema), row_group_size=sample.numel())


def _open_parquet(folder: Path, shapes: Sequence[tuple[int, ...]]) -> Read:
    file = pq.ParquetFile(folder / "parquet", memory_map=True)

    def read(number: int) -> Tensor:
        column = file.read_row_group(number, use_threads=True)["features"]
        values = column.combine_chunks() if column.num_chunks > 1 else column.chunk(0)
        return from_bits(values.to_numpy(zero_copy_only=True).copy()).view(shapes[number])

    return read
