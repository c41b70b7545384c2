"""Every flipped byte, truncation and exchange in a cache is found by verify, and by the reader where it gets there."""

import itertools
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from feature_writer import create, fill_cache
from numpy.typing import NDArray

from dflash_offline.schemas.errors import CacheError
from dflash_offline.schemas.files import read_sealed
from dflash_offline.stages.cache import CacheReader
from dflash_offline.stages.progress import Silent
from dflash_offline.stages.verify import verify_cache

FLIPS = 2000
ALWAYS_ALL = 400
"""Files up to this size have every byte flipped."""


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = tmp_path_factory.mktemp("damage") / "cache"
    create(cache, num_shards=2, shard_tokens=128, width=64)
    fill_cache(cache)
    assert verify_cache(cache, Silent()) == []
    return cache


@pytest.fixture()
def copy(sound: Path, tmp_path: Path) -> Path:
    return shutil.copytree(sound, tmp_path / "copy")


def files(cache: Path) -> list[Path]:
    return sorted(path for path in cache.rglob("*") if path.is_file() and path.parent.name != "tmp")


def read_all(cache: Path) -> list[NDArray[np.uint16]]:
    """What training does: open, require completeness, read every sample."""
    reader = CacheReader(cache)
    reader.require_complete()
    return [reader.read_codes(sample) for sample in range(len(reader.samples))]


def places(cache: Path, chance: random.Random) -> Iterator[tuple[Path, int]]:
    """Yield at least `FLIPS` places over all files: each byte of the small ones, the rest by their share."""
    sizes = {path: path.stat().st_size for path in files(cache)}
    large = {path: size for path, size in sizes.items() if size > ALWAYS_ALL}
    left = FLIPS
    for path in sizes.keys() - large.keys():
        left -= sizes[path]
        yield from ((path, position) for position in range(sizes[path]))
    each = max(40, -(-left // len(large)))
    for path, size in large.items():
        yield from ((path, position) for position in chance.sample(range(size), min(each, size)))


def test_every_flipped_byte_is_found_by_verify_and_never_decoded(copy: Path) -> None:
    before = read_all(copy)
    tried = 0
    for path, position in list(places(copy, random.Random(0))):
        content = bytearray(path.read_bytes())
        content[position] ^= 1 << random.Random(position).randrange(8)
        original = path.read_bytes()
        path.write_bytes(content)
        name = f"{path.relative_to(copy)} byte {position}"
        assert verify_cache(copy, Silent()), f"verify missed {name}"
        try:
            for one, other in zip(read_all(copy), before, strict=True):
                np.testing.assert_array_equal(one, other, err_msg=name)
        except CacheError:
            pass
        path.write_bytes(original)
        tried += 1
    assert tried >= FLIPS
    assert verify_cache(copy, Silent()) == []


def test_every_truncation_is_found(copy: Path) -> None:
    chance = random.Random(0)
    for path in files(copy):
        original = path.read_bytes()
        lengths = {0, 1, len(original) // 2, len(original) - 1, *(chance.randrange(len(original)) for _ in range(20))}
        for length in sorted(lengths):
            path.write_bytes(original[:length])
            assert verify_cache(copy, Silent()), f"verify missed {path.name} cut to {length}"
            if path.parts[-5:-1].count("loss_mask") or "input_ids" in path.parts:
                continue  # training takes tokens and masks from the plan
            with pytest.raises(CacheError):
                read_all(copy)
        path.write_bytes(original)


def test_every_missing_file_is_found(copy: Path) -> None:
    for path in files(copy):
        original = path.read_bytes()
        path.unlink()
        assert verify_cache(copy, Silent()), f"verify missed that {path.name} is gone"
        path.write_bytes(original)


def test_shards_swapped_with_each_other_or_another_cache_are_found(copy: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    create(other, num_shards=2, shard_tokens=128, width=64, seed=1)
    fill_cache(other)
    numbered = [
        "features.zarr/hidden_states/c/{}/0/0",
        "features.zarr/input_ids/c/{}",
        "features.zarr/loss_mask/c/{}",
        "commits/00000{}.json",
    ]
    swaps = [(copy / name.format(0), folder / name.format(1)) for name in numbered for folder in (copy, other)]
    swaps += [(copy / name, other / name) for name in ("samples.parquet", "manifest.json", "features.zarr/zarr.json")]
    for one, another in swaps:
        contents = one.read_bytes(), another.read_bytes()
        if contents[0] == contents[1]:
            continue
        one.write_bytes(contents[1])
        another.write_bytes(contents[0])
        assert verify_cache(copy, Silent()), f"verify missed {one.relative_to(copy)} exchanged with {another.name}"
        if "hidden_states" in one.parts:
            with pytest.raises(CacheError):
                read_all(copy)
        one.write_bytes(contents[0])
        another.write_bytes(contents[1])
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
