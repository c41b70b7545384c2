"""Final states in a bucket: added beside hidden states, object by object the local ones, and mended alone."""

import json
import shutil
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import numpy as np
import obstore
import pytest
from feature_writer import create
from interleavings import Content, Process, alone, content_of, states, written
from obstore.store import MemoryStore
from running import Settings, arguments, dflash

from dflash_offline.schemas.commits import SkippedSample
from dflash_offline.schemas.files import sha256_bytes
from dflash_offline.schemas.manifest import FINAL, shard_files
from dflash_offline.schemas.settings.extract import ExtractConfig
from dflash_offline.stages.buckets.bucket import Bucket
from dflash_offline.stages.buckets.mirror import Mirror, open_mirror
from dflash_offline.stages.capture.final import add_final
from dflash_offline.stages.extract import extract
from dflash_offline.stages.progress import Silent
from dflash_offline.stages.store.cache import Cache
from dflash_offline.stages.store.writer import ShardWriter

_number = count()


@pytest.fixture()
def url() -> str:
    """The address of an empty prefix of a bucket."""
    return f"s3://final-{next(_number)}/one"


@pytest.fixture()
def store(url: str) -> Iterator[MemoryStore]:
    """What lies below the address."""
    store = MemoryStore()
    mirror = open_mirror(url, Bucket(url, store))
    yield store
    shutil.rmtree(mirror.folder.parent, ignore_errors=True)


def test_final_states_are_added_in_a_bucket_read_verified_and_mended_alone(
    cache: Path, extract_config: Settings, store: MemoryStore, url: str, tmp_path: Path
) -> None:
    local = shutil.copytree(cache, tmp_path / "cache")
    extract(ExtractConfig(**extract_config, out=local, final=True), Silent())
    for name, value in written(cache).items():
        obstore.put(store, name, value)
    before = content_of(store)
    adding = [*arguments(extract_config, Path(url)), "--final"]
    done = dflash(*adding)
    assert done.exit_code == 0 and f"{url} is complete" in done.stdout, done.output
    there = content_of(store)
    assert {name: there[name] for name in before} == before
    for name, value in written(local).items():
        if "final" in name and not name.startswith("commits/"):
            assert there[name] == value, name
    assert there.keys() == {name for name in written(local) if not name.startswith("tmp/")}
    final, own = Cache(Path(url)).require_final(), Cache(local).require_final()
    for sample in range(len(own.samples)):
        np.testing.assert_array_equal(final.codes(sample), own.codes(sample))
    assert dflash("verify", url).exit_code == 0
    said = [dflash("inspect", place).stdout for place in (local, url)]
    kept = [[line for line in text.splitlines() if "kept for" in line] for text in said]
    assert kept[0] == kept[1] and len(kept[0]) == 1

    name = shard_files(1, FINAL)[0]
    flipped = bytearray(there[name])
    flipped[100] ^= 1
    obstore.put(store, name, bytes(flipped))
    found = dflash("verify", url, "--repair")
    assert found.exit_code == 1 and f"{name}: has another sha256" in found.stdout and "Forgot shards 1" in found.stdout
    assert there.keys() - content_of(store).keys() == {name, "commits/000001.final.json"}
    assert "Written now: 1 shards" in dflash(*adding).stdout
    again = content_of(store)
    assert again.keys() == there.keys() and again[name] == there[name]
    assert dflash("verify", url).exit_code == 0


def worker(folder: Path, *, differs: bool = False, skips: bool = False) -> Process:
    """Return a worker that commits the final states of the one shard; `skips` without its first sample."""
    final = Cache(folder, whole=True).final
    assert final is not None
    layout = final.layout
    codes = np.full((layout.shard_tokens, 1, layout.hidden_size), final.codec.fill, np.uint16)
    chance = np.random.default_rng(0)
    for sample in range(len(final.samples)):
        values = chance.integers(0x3E00, 0x4100, codes[final.slots(sample)].shape).astype(np.uint16)
        kept = final.stored(sample) & (not (skips and sample == 0))
        codes[final.slots(sample)][kept] = values[kept] ^ differs
    skipped = [SkippedSample(sample=0, reason="planted", layer_id=1, position=2)] if skips else []

    def commit(bucket: Bucket) -> int:
        own = Cache(folder, final.manifest, whole=True)
        own.mirror = Mirror(folder, bucket)
        return ShardWriter(own).commit(0, codes, skipped)

    return commit


@pytest.mark.parametrize("other", ["is alike", "differs", "skips"])
def test_two_workers_at_final_states_in_any_order_leave_a_record_of_what_is_there(tmp_path: Path, other: str) -> None:
    create(tmp_path / "empty", num_shards=1, shard_tokens=192, width=8)
    add_final(Cache(tmp_path / "empty"))
    name, record = shard_files(0, FINAL)[0], "commits/000000.final.json"
    one = worker(tmp_path / "empty")
    two = worker(tmp_path / "empty", differs=other != "is alike", skips=other == "skips")
    reached: dict[object, Content] = {}
    for state in states({}, [one, two]):
        for process in state.processes:
            assert process.error is None, (state.steps, process.error)
            assert not process.ended or record in state.content, state.steps
        reached[tuple(sorted(state.content.items()))] = state.content
    ends = set()
    for content in reached.values():  # whoever died in whatever state, a worker that comes ends it
        for third in (one, two):
            done, ended = alone(content, third)
            assert ended.error is None and done.keys() == {name, record}
            said = json.loads(done[record])
            assert said["files"][name]["sha256"] == sha256_bytes(done[name])
            ends.add((done[name], len(said["skipped"])))
    assert len(ends) == (1 if other == "is alike" else 2)
