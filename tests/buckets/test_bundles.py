"""Bundles of records spare requests and never change what a reader sees: the records are the truth."""

import json
from pathlib import Path

import obstore
import pytest
from feature_writer import create, fill_cache
from interleavings import Content, Process, content_of, states, written
from obstore.store import MemoryStore
from running import dflash

from dflash_offline.schemas.commits import Commit, read_commits
from dflash_offline.schemas.manifest import MANIFEST, Manifest
from dflash_offline.schemas.sealed import sealed_bytes
from dflash_offline.stages.buckets import bundles as bundles_module
from dflash_offline.stages.buckets.bucket import Bucket
from dflash_offline.stages.buckets.bundles import write_bundles
from dflash_offline.stages.buckets.mirror import Mirror, open_mirror

SHARDS = 10


class Counting(Bucket):
    """A bucket that notes which objects are read."""

    def __init__(self, url: str, store: MemoryStore) -> None:
        super().__init__(url, store)
        self.reads: list[str] = []

    def read(self, name: str) -> bytes | None:
        self.reads.append(name)
        return super().read(name)


@pytest.fixture(autouse=True)
def _small_bundles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundles_module, "BUNDLE_SHARDS", 4)


@pytest.fixture()
def whole(tmp_path: Path) -> Path:
    create(tmp_path / "whole", num_shards=SHARDS, width=8)
    fill_cache(tmp_path / "whole")
    return tmp_path / "whole"


def store_of(content: Content) -> MemoryStore:
    store = MemoryStore()
    for name, value in content.items():
        obstore.put(store, name, value)
    return store


def read(bucket: Bucket, folder: Path, manifest: Manifest) -> dict[int, Commit]:
    """Return the records that a new reader of a bucket sees."""
    (folder / "commits").mkdir(parents=True, exist_ok=True)
    known = Mirror(folder, bucket).pull_records(manifest)
    commits, faults = read_commits(folder, manifest, with_files=False, known=known)
    assert not faults
    return commits


def changed(record: bytes, worker: str) -> bytes:
    """Return a sound record of the same size, of another worker's, whose name is cut to the length of the one's."""
    document = json.loads(record)
    del document["checksum"]
    return sealed_bytes(document | {"worker": worker.ljust(len(document["worker"]), "x")[: len(document["worker"])]})


def test_a_reader_asks_for_bundles_and_only_for_the_records_that_are_in_none(whole: Path, tmp_path: Path) -> None:
    manifest = Manifest.read(whole)
    bucket = Counting("s3://bundled/one", store_of(written(whole)))
    local, _ = read_commits(whole, manifest)
    assert write_bundles(bucket, manifest) == ["bundles/000000", "bundles/000001"]
    assert write_bundles(bucket, manifest) == []
    assert read(bucket, tmp_path / "mirror", manifest) == local
    assert sorted(bucket.reads) == ["bundles/000000", "bundles/000001", "commits/000008.json", "commits/000009.json"]
    bucket.reads.clear()
    assert read(bucket, tmp_path / "mirror", manifest) == local
    assert bucket.reads == []


def test_a_record_that_is_gone_or_made_anew_is_so_whatever_a_bundle_holds(whole: Path, tmp_path: Path) -> None:
    manifest, content = Manifest.read(whole), written(whole)
    bucket = Bucket("s3://bundled/two", store_of(content))
    write_bundles(bucket, manifest)
    bucket.remove("commits/000001.json", "commits/000002.json")
    bucket.create("commits/000002.json", changed(content["commits/000002.json"], "x"))
    seen = read(bucket, tmp_path / "mirror", manifest)
    assert 1 not in seen and set(seen[2].worker) == {"x"} and len(seen) == SHARDS - 1


@pytest.mark.parametrize("damage", ["flipped", "cut", "of another cache"])
def test_a_damaged_bundle_is_told_and_done_without_until_a_repair(
    whole: Path, tmp_path: Path, damage: str, request: pytest.FixtureRequest
) -> None:
    url = f"s3://bundled/{request.node.name}".replace(" ", "-")
    bucket = Bucket(url, store_of(written(whole)))
    open_mirror(url, bucket)
    manifest = Manifest.read(whole)
    write_bundles(bucket, manifest)
    sound = bucket.read("bundles/000000")
    assert sound
    if damage == "of another cache":
        create(tmp_path / "other", num_shards=4, width=8, seed=1)
        fill_cache(tmp_path / "other")
        other = Bucket("s3://bundled/other", store_of(written(tmp_path / "other")))
        write_bundles(other, Manifest.read(tmp_path / "other"))
        spoilt = other.read("bundles/000000")
        assert spoilt
    else:
        spoilt = sound[:-3] if damage == "cut" else sound[:100] + bytes([sound[100] ^ 1]) + sound[101:]
    bucket.put("bundles/000000", spoilt)
    assert read(bucket, tmp_path / "mirror", manifest) == read_commits(whole, manifest)[0]
    found = dflash("verify", url)
    told = "bundles/000000: is damaged" in found.stdout
    assert told == (damage != "of another cache") and found.exit_code == told, found.output
    dflash("verify", url, "--repair")
    assert bucket.read("bundles/000000") == sound
    assert dflash("verify", url).exit_code == 0


def test_no_order_of_a_bundler_and_of_who_makes_a_record_anew_shows_a_reader_another_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundles_module, "BUNDLE_SHARDS", 2)
    monkeypatch.setattr(bundles_module, "SMALL_AT_ONCE", 1)
    create(tmp_path / "whole", num_shards=2, width=8)
    fill_cache(tmp_path / "whole")
    content, manifest = written(tmp_path / "whole"), Manifest.read(tmp_path / "whole")
    name = "commits/000000.json"

    def bundle(bucket: Bucket) -> None:
        write_bundles(bucket, manifest)

    def repair_bundles(bucket: Bucket) -> None:
        write_bundles(bucket, manifest, anew=True)

    def redo(bucket: Bucket) -> None:
        bucket.remove(name)
        bucket.create(name, changed(content[name], "another"))

    processes: list[Process] = [bundle, redo, repair_bundles]
    count = bundled = 0
    for state in states(content, processes):
        store = state.processes[0]._store
        now = content_of(store)
        (tmp_path / f"{count}").mkdir()
        (tmp_path / f"{count}" / MANIFEST).write_bytes(content[MANIFEST])
        seen = read(Bucket("s3://model/cache", store), tmp_path / f"{count}", manifest)
        assert seen.keys() == {shard for shard in range(2) if f"commits/{shard:06d}.json" in now}, state.steps
        assert name not in now or seen[0].worker == json.loads(now[name])["worker"], state.steps
        assert all(process.error is None for process in state.processes), state.steps
        count += 1
        bundled += "bundles/000000" in now
    assert count > 50 and bundled > 10, (count, bundled)
