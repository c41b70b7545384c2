"""Every flipped byte, truncation and exchange in a cache is found by verify, and by the reader where it gets there."""

import itertools
import random
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
from feature_writer import create, fill_cache
from numpy.typing import NDArray

from dflash_offline.schemas.errors import CacheError
from dflash_offline.schemas.manifest import FeatureLayout, Manifest
from dflash_offline.schemas.sealed import read_sealed
from dflash_offline.stages.progress import Silent
from dflash_offline.stages.store.cache import Cache
from dflash_offline.stages.store.verify import verify_cache

FLIPS = 2000
"""Of the thorough test, for each layout of features."""
SMALL = 400
"""Files up to this size are damaged at every byte by the thorough tests."""
LAYOUTS = {
    "lossless": FeatureLayout(),
    "rounded": FeatureLayout(kind="rounded", mantissa_bits=4),
    "scaled": FeatureLayout(kind="scaled", step=1 / 8),
}


@pytest.fixture(scope="module", params=LAYOUTS)
def sound(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of two shards, once for each layout of features."""
    cache = tmp_path_factory.mktemp("damage") / "cache"
    create(cache, num_shards=2, shard_tokens=128, width=64, features=LAYOUTS[request.param])
    fill_cache(cache)
    assert verify_cache(cache, Silent()) == []
    return cache


@pytest.fixture()
def copy(sound: Path, tmp_path: Path) -> Path:
    return shutil.copytree(sound, tmp_path / "copy")


def files(cache: Path) -> list[Path]:
    return sorted(path for path in cache.rglob("*") if path.is_file() and path.parent.name != "tmp")


def read_all(cache: Path) -> list[NDArray[np.float32]]:
    """What training does: open, require completeness, read every sample."""
    reader = Cache.open(cache)
    reader.require_complete()
    return [reader.values(sample) for sample in range(len(reader.samples))]


@contextmanager
def changed(path: Path, content: bytes) -> Iterator[None]:
    """Let a file hold something else for a while."""
    original = path.read_bytes()
    assert content != original
    path.write_bytes(content)
    yield
    path.write_bytes(original)


def flip_bytes(copy: Path, each: dict[Path, int]) -> int:
    """Flip a bit in so many bytes of each file, one at a time: verify finds it, and no reader decodes another value."""
    before, tried, chance = read_all(copy), 0, random.Random(0)
    for path, count in each.items():
        original = path.read_bytes()
        for position in chance.sample(range(len(original)), min(count, len(original))):
            content = bytearray(original)
            content[position] ^= 1 << chance.randrange(8)
            name = f"{path.relative_to(copy)} byte {position}"
            with changed(path, bytes(content)):
                assert verify_cache(copy, Silent()), f"verify missed {name}"
                with suppress(CacheError):
                    for one, other in zip(read_all(copy), before, strict=True):
                        np.testing.assert_array_equal(one, other, err_msg=name)
            tried += 1
    assert verify_cache(copy, Silent()) == []
    return tried


def test_a_flipped_byte_of_any_file_is_found_by_verify_and_never_decoded(copy: Path) -> None:
    shards = set((copy / "features.zarr/hidden_states/c").rglob("*"))
    assert flip_bytes(copy, {path: 25 if path in shards else 2 for path in files(copy)}) >= 70


@pytest.mark.slow
def test_thousands_of_flipped_bytes_are_found_by_verify_and_never_decoded(copy: Path) -> None:
    """Every byte of the small files, the rest spread over the others."""
    sizes = {path: path.stat().st_size for path in files(copy)}
    small = sum(size for size in sizes.values() if size <= SMALL)
    share = -(-(FLIPS - small) // sum(size > SMALL for size in sizes.values()))
    assert flip_bytes(copy, {path: max(share, 40) if size > SMALL else size for path, size in sizes.items()}) >= FLIPS


def cut(copy: Path, lengths: Callable[[int, random.Random], Iterable[int]]) -> None:
    chance = random.Random(0)
    for path in files(copy):
        original = path.read_bytes()
        for length in sorted(set(lengths(len(original), chance))):
            with changed(path, original[:length]):
                assert verify_cache(copy, Silent()), f"verify missed {path.name} cut to {length}"
                with pytest.raises(CacheError):
                    read_all(copy)
    assert verify_cache(copy, Silent()) == []


def test_a_truncated_file_is_found_by_verify_and_refused_by_the_reader(copy: Path) -> None:
    cut(copy, lambda size, chance: [0, chance.randrange(size), size - 1])


@pytest.mark.slow
def test_every_truncation_is_found_by_verify_and_refused_by_the_reader(copy: Path) -> None:
    """To every length, of large files to some hundred."""

    def lengths(size: int, chance: random.Random) -> Iterable[int]:
        every = range(size)
        return every if size <= SMALL else [0, 1, size - 1, *chance.sample(every, 300)]

    cut(copy, lengths)


def test_every_missing_file_is_found(copy: Path) -> None:
    for path in files(copy):
        path.rename(copy / "away")
        assert verify_cache(copy, Silent()), f"verify missed that {path.name} is gone"
        with pytest.raises(CacheError):
            read_all(copy)
        (copy / "away").rename(path)


SHARD = [
    "features.zarr/hidden_states/c/{}/0/0",
    "features.zarr/input_ids/c/{}",
    "features.zarr/loss_mask/c/{}",
    "commits/00000{}.json",
]


def exchange(pairs: list[tuple[Path, Path]]) -> None:
    for one, another in pairs:
        contents = one.read_bytes(), another.read_bytes()
        one.write_bytes(contents[1])
        another.write_bytes(contents[0])


def test_shards_exchanged_with_each_other_or_another_cache_are_found(copy: Path, tmp_path: Path) -> None:
    """File by file, all files of a shard without its record, and with it."""
    other = tmp_path / "other"
    create(other, num_shards=2, shard_tokens=128, width=64, seed=1, features=Manifest.read(copy).layout.features)
    fill_cache(other)
    for folder, shard in ((copy, 1), (other, 0), (other, 1)):
        whole = [(copy / name.format(0), folder / name.format(shard)) for name in SHARD]
        static = ["samples.parquet", "manifest.json", "features.zarr/zarr.json"]
        across = [[(copy / name, other / name)] for name in static] if folder is other else []
        for pairs in [*([pair] for pair in whole), whole[:3], whole, *across]:
            if all(one.read_bytes() == another.read_bytes() for one, another in pairs):
                continue
            exchange(pairs)
            names = ", ".join(one.name for one, _ in pairs)
            assert verify_cache(copy, Silent()), f"verify missed {names} exchanged with shard {shard} of {folder.name}"
            if any("hidden_states" in one.parts for one, _ in pairs):
                with pytest.raises(CacheError):
                    read_all(copy)
            exchange(pairs)
    assert verify_cache(copy, Silent()) == []


def test_chunks_exchanged_within_a_shard_are_found(copy: Path) -> None:
    """Each chunk passes its own checksum; the file's does not."""
    path = copy / "features.zarr/hidden_states/c/0/0/0"
    original = path.read_bytes()
    num_chunks = 128 // 32 * 3
    index = np.frombuffer(original[-4 - 16 * num_chunks : -4], "<u8").reshape(-1, 2).astype(int)
    parts = [original[offset : offset + size] for offset, size in index.tolist()]
    pairs = [(a, b) for a, b in itertools.combinations(range(num_chunks), 2) if parts[a] != parts[b]]
    for one, another in sorted(pairs, key=lambda pair: abs(len(parts[pair[0]]) - len(parts[pair[1]])))[:5]:
        changed = list(parts)
        changed[one], changed[another] = parts[another], parts[one]
        path.write_bytes(b"".join(changed) + original[-4 - 16 * num_chunks :])
        assert verify_cache(copy, Silent())


def test_a_record_of_another_manifest_is_refused(copy: Path, tmp_path: Path) -> None:
    create(tmp_path / "other", num_shards=2, shard_tokens=128, width=64, seed=2)
    fill_cache(tmp_path / "other")
    assert read_sealed(tmp_path / "other/commits/000001.json")["shard"] == 1
    shutil.copy(tmp_path / "other/commits/000001.json", copy / "commits/000001.json")
    with pytest.raises(CacheError, match="belongs to shard 1 of the cache with manifest"):
        read_all(copy)
