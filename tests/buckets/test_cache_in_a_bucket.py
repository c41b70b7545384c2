"""A cache in a bucket is the local one, object by object, to every command; the bucket is a model of one, in memory."""

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

import numpy as np
import obstore
import pytest
import zarr
from cache_files import content
from interleavings import content_of, written
from obstore.store import MemoryStore
from running import Settings, arguments, dflash, refused
from safetensors.numpy import load_file
from zarr.storage import ObjectStore

from dflash_offline.schemas.manifest import shard_files
from dflash_offline.schemas.settings.train import TrainConfig
from dflash_offline.stages.buckets.bucket import Bucket
from dflash_offline.stages.buckets.mirror import open_mirror
from dflash_offline.stages.capture import forecast
from dflash_offline.stages.progress import Silent
from dflash_offline.stages.store.cache import Cache
from dflash_offline.stages.store.verify import verify_cache
from dflash_offline.stages.train import train

_number = count()


@pytest.fixture()
def url() -> str:
    """The address of an empty prefix of a bucket."""
    return f"s3://model-{next(_number)}/caches/one"


@pytest.fixture()
def store(url: str) -> Iterator[MemoryStore]:
    """What lies below the address."""
    store = MemoryStore()
    mirror = open_mirror(url, Bucket(url, store))
    yield store
    shutil.rmtree(mirror.folder.parent, ignore_errors=True)


def filled(store: MemoryStore, cache: Path) -> None:
    """Copy a local cache into a bucket."""
    for name, value in written(cache).items():
        obstore.put(store, name, value)


def test_extraction_into_a_bucket_leaves_the_local_cache_object_by_object(
    cache: Path, extract_config: Settings, store: MemoryStore, url: str
) -> None:
    planned = dflash(*arguments(extract_config, Path(url)), "--plan")
    assert planned.exit_code == 0 and "Free" not in planned.stdout
    assert content_of(store) == {}
    for is_new in (True, False):
        done = dflash(*arguments(extract_config, Path(url)))
        assert done.exit_code == 0, done.output
        assert f"{url} is complete" in done.stdout and f"dflash train {url} --out run" in done.stdout
        assert ("Written now: 0 shards" in done.stdout) != is_new
    there = content_of(store)
    assert there.keys() == {name for name in written(cache) if not name.startswith("tmp/")}
    for name, value in content(cache).items():
        assert there[name] == value, name
    hidden = zarr.open_group(ObjectStore(store, read_only=True), path="features.zarr", mode="r")["hidden_states"]
    local = zarr.open_group(cache / "features.zarr", mode="r")["hidden_states"]
    assert isinstance(hidden, zarr.Array) and isinstance(local, zarr.Array)
    np.testing.assert_array_equal(hidden[:256], local[:256])
    refused(dflash(*arguments(extract_config | {"block_size": 4}, Path(url))), url, "block_size")


def test_every_command_reads_a_bucket_as_a_folder(cache: Path, store: MemoryStore, url: str) -> None:
    filled(store, cache)
    for command in (["inspect"], ["inspect", "--sample", "0"], ["inspect", "--shard", "0"], ["verify"]):
        local, there = (dflash(command[0], place, *command[1:]) for place in (cache, url))
        assert local.exit_code == there.exit_code == 0, there.output
        said = local.stdout.replace(str(cache), url).replace(f"{cache.parent}/run", "run")  # where a run would be
        assert there.stdout == said
    reader, local_reader = Cache(Path(url)), Cache(cache)
    for sample in range(len(reader.samples)):
        np.testing.assert_array_equal(reader.codes(sample), local_reader.codes(sample))
        np.testing.assert_array_equal(reader.codes(sample, [1]), local_reader.codes(sample, [1]))


def test_training_from_a_bucket_and_a_folder_gives_the_bits_of_training_from_folders(
    cache: Path, extract_config: Settings, store: MemoryStore, url: str, tmp_path: Path
) -> None:
    filled(store, cache)
    weights = []
    for name, place in (("here", cache), ("there", Path(url))):
        config = TrainConfig(caches=(place,), out=tmp_path / name, steps=4, draft_layers=1, num_anchors=4, device="cpu")
        train(config, Silent())
        weights.append(load_file(tmp_path / name / "checkpoints" / "step-0000004" / "model.safetensors"))
    assert weights[0].keys() == weights[1].keys()
    for name in weights[0]:
        np.testing.assert_array_equal(weights[0][name], weights[1][name])
    shown = dflash("inspect", tmp_path / "there")
    assert shown.exit_code == 0 and url in shown.stdout
    assert f'"{url}"' in (tmp_path / "there" / "config.toml").read_text()
    refused(dflash("train", url, cache, "--out", tmp_path / "both"), "same cache")


def test_what_is_damaged_in_a_bucket_is_found_forgotten_and_done_again(
    cache: Path, extract_config: Settings, store: MemoryStore, url: str
) -> None:
    filled(store, cache)
    before = content_of(store)
    flipped = bytearray(before[shard_files(1)[0]])
    flipped[100] ^= 1
    obstore.put(store, shard_files(1)[0], bytes(flipped))
    obstore.delete(store, shard_files(0)[1])
    obstore.put(store, "tmp/building-of-the-dead/samples.parquet", b"half")
    found = dflash("verify", url)
    assert found.exit_code == 1
    assert f"{shard_files(1)[0]}: has another sha256" in found.stdout and "is missing" in found.stdout
    assert f"dflash verify {url} --repair" in found.stdout
    assert "Forgot shards 0, 1" in dflash("verify", url, "--repair").stdout
    assert dflash(*arguments(extract_config, Path(url))).exit_code == 0
    after = content_of(store)
    assert after.keys() == before.keys()
    assert all(after[name] == before[name] for name in content(cache))
    assert dflash("verify", url).exit_code == 0
    missing = bytearray(before["target/config.json"])
    missing[5] ^= 1
    obstore.put(store, "target/config.json", bytes(missing))
    refusal = dflash("verify", url)
    assert refusal.exit_code == 1 and "target/config.json: has another sha256" in refusal.stdout


def test_several_may_verify_one_address_on_one_machine_at_once(cache: Path, store: MemoryStore, url: str) -> None:
    filled(store, cache)
    obstore.delete(store, shard_files(1)[2])
    mirror = open_mirror(url)
    mirror.pull()
    before = written(mirror.folder)
    with ThreadPoolExecutor(3) as pool:
        found = [job.result() for job in [pool.submit(verify_cache, mirror.folder, Silent()) for _ in range(3)]]
    assert [fault.place for fault in found[0]] == [shard_files(1)[2]] and found == [found[0]] * 3
    assert written(mirror.folder.parent) == {f"cache/{name}": value for name, value in before.items()} | {
        name: value for name, value in written(mirror.folder.parent).items() if "/" not in name
    }


def test_a_shard_too_large_for_one_object_is_refused_before_any_is_made(
    extract_config: Settings, store: MemoryStore, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forecast, "MOST_OBJECT_BYTES", 10_000)
    for more in ([], ["--plan"]):
        refused(dflash(*arguments(extract_config, Path(url)), *more), "in one object", "Lower --shard-mib")
    assert not [name for name in content_of(store) if not name.startswith("tmp/")]


def test_where_there_is_no_cache_the_address_is_named(store: MemoryStore, url: str, tmp_path: Path) -> None:
    for command in (["inspect", url], ["verify", url], ["train", url, "--out", tmp_path / "run"]):
        refused(dflash(*command), url, "not a feature cache")
    refused(dflash("inspect", "s3://name:secret@bucket/cache"), "environment")
