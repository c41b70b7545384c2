"""The writer's memory: kept from shard to shard, and used again only when nothing needs what is in it."""

import hashlib
import time
from pathlib import Path

import numpy as np
import pytest
from feature_writer import create, features, fill_cache

from dflash_offline.schemas import files
from dflash_offline.schemas.errors import CacheError
from dflash_offline.schemas.manifest import Manifest
from dflash_offline.stages.store import writer
from dflash_offline.stages.store.cache import Cache

SHARD_TOKENS = 960


@pytest.fixture
def little_memory(slow_digest: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for few pieces of one row of chunks each, every one of which waits for a slow digest."""
    monkeypatch.setattr(writer, "_JOB_BYTES", 1)
    monkeypatch.setattr(writer, "_AHEAD", 1)
    monkeypatch.setattr(files, "_HASH_BYTES", 1)


def assert_holds_what_was_given(cache: Path) -> None:
    reader = Cache.open(cache, hashed=False)
    for shard, commit in reader.commits.items():
        for name, record in commit.files.items():
            with (cache / name).open("rb") as file:
                assert record.sha256 == hashlib.file_digest(file, "sha256").hexdigest()
        codes = features(reader.manifest, reader.samples, shard, reader.codec.fill)
        for sample in reader.samples.samples_of_shard(shard).tolist():
            begin = int(reader.samples.start[sample]) % SHARD_TOKENS
            found = reader.codes(sample)
            np.testing.assert_array_equal(found, codes[begin : begin + len(found)])


@pytest.mark.usefixtures("little_memory")
def test_what_is_written_and_hashed_was_not_overwritten_by_the_next_pieces(tmp_path: Path) -> None:
    create(tmp_path / "cache", num_shards=2, shard_tokens=SHARD_TOKENS)
    fill_cache(tmp_path / "cache")
    assert_holds_what_was_given(tmp_path / "cache")


@pytest.mark.usefixtures("little_memory")
def test_a_refused_shard_is_left_only_once_nothing_of_it_is_being_encoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest: Manifest = create(tmp_path / "cache", num_shards=1, shard_tokens=SHARD_TOKENS)
    cache = Cache(tmp_path / "cache", manifest)
    codes = features(manifest, cache.samples, 0, cache.codec.fill)
    good = codes.copy()
    codes[int(cache.samples.start[1]), 0, 0] = cache.codec.fill
    encode, begun, ended = writer.encode_chunks, [], []

    def slow(values: np.ndarray, out: np.ndarray) -> object:
        begun.append(0)
        time.sleep(0.05)
        chunks = encode(values, out)
        ended.append(0)
        return chunks

    monkeypatch.setattr(writer, "encode_chunks", slow)
    shards = writer.ShardWriter(cache)
    with pytest.raises(CacheError, match="missing or not finite"):
        shards.commit(0, codes)
    assert begun and len(begun) == len(ended)
    shards.commit(0, good)
    assert_holds_what_was_given(tmp_path / "cache")
