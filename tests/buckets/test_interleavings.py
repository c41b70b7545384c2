"""In a bucket, no order of two workers' requests and no death leaves a record beside objects that are not its own."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from feature_writer import create, features
from interleavings import Content, Process, alone, states, written
from running import some_slow

from dflash_offline.schemas.commits import SkippedSample
from dflash_offline.schemas.errors import CacheError
from dflash_offline.schemas.files import sha256_bytes
from dflash_offline.schemas.manifest import MANIFEST, shard_files
from dflash_offline.stages.buckets import bucket as bucket_module
from dflash_offline.stages.buckets.bucket import Bucket
from dflash_offline.stages.buckets.mirror import Mirror
from dflash_offline.stages.buckets.publish import complete_static, publish_static, remove_attempts
from dflash_offline.stages.progress import Silent
from dflash_offline.stages.store.cache import Cache
from dflash_offline.stages.store.object_commit import remove_aliens
from dflash_offline.stages.store.verify import verify_cache
from dflash_offline.stages.store.writer import ShardWriter

RECORD = "commits/000000.json"


@pytest.fixture()
def empty(tmp_path: Path) -> Path:
    """A cache of one shard, without it."""
    create(tmp_path / "empty", num_shards=1, shard_tokens=192, width=8)
    return tmp_path / "empty"


def worker(folder: Path, *, differs: bool = False, skips: bool = False) -> Process:
    """Return a worker that commits the one shard; `differs` as another GPU rounds, `skips` without its first sample."""
    cache = Cache(folder, whole=True)
    codes = features(cache.manifest, cache.samples, 0, cache.codec.fill)
    skipped = [SkippedSample(sample=0, reason="planted", layer_id=1, position=2)] if skips else []
    if differs:
        codes[cache.slots(1), 0, 0] ^= 1
    if skips:
        codes[cache.slots(0)] = cache.codec.fill

    def commit(bucket: Bucket) -> int:
        own = Cache(folder, cache.manifest, whole=True)
        own.mirror = Mirror(folder, bucket)
        return ShardWriter(own).commit(0, codes, skipped)

    return commit


def unlike_its_record(content: Content) -> str:
    """Return how the record differs from the objects beside it, or from what they hold; nothing without a record."""
    if RECORD not in content:
        return ""
    record = json.loads(content[RECORD])
    for name in shard_files(0):
        if name not in content:
            return f"{name} is missing"
        if sha256_bytes(content[name]) != record["files"][name]["sha256"]:
            return f"{name} is another"
    return ""


def is_sound(content: Content, static: Path, folder: Path) -> bool:
    """Say whether a bucket's content is a cache that verifies."""
    for name, value in (written(static) | content).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(value)
    return verify_cache(folder, Silent()) == []


@pytest.mark.parametrize("other", some_slow(("is alike", "differs", "skips"), "skips"))
def test_two_workers_in_any_order_and_dying_anywhere_leave_a_record_of_what_is_there(
    empty: Path, tmp_path: Path, other: str
) -> None:
    one, two = worker(empty), worker(empty, differs=other != "is alike", skips=other == "skips")
    reached, ends, count = {}, set(), 0
    for state in states({}, [one, two]):
        assert not unlike_its_record(state.content), state.steps
        for process in state.processes:
            assert process.error is None, (state.steps, process.error)
            assert not process.ended or RECORD in state.content, state.steps
        reached[tuple(sorted(state.content.items()))] = state
        ends |= {tuple(int(process.result) > 0 for process in state.processes if process.ended)}
        count += 1
    assert {(True, False), (False, True)} <= ends  # either may win
    assert count > 80, count
    sound = {}
    for number, state in enumerate(reached.values()):  # whoever died in whatever state, a worker that comes ends it
        for third in (one, two):
            content, ended = alone(state.content, third)
            assert ended.error is None and RECORD in content and not unlike_its_record(content), state.steps
            bytes_of = tuple(content[name] for name in shard_files(0))
            if bytes_of not in sound:
                sound[bytes_of] = is_sound(content, empty, tmp_path / f"end-{number}")
    assert all(sound.values()) and len(sound) == (1 if other == "is alike" else 2)


def plan_of(folder: Path, seed: int) -> Path:
    """Return a folder with a static file and the manifest that names it."""
    folder.mkdir()
    (folder / "samples.parquet").write_bytes(f"samples.parquet of {seed}".encode())
    (folder / MANIFEST).write_bytes(json.dumps({"samples.parquet": seed}).encode())
    return folder


@pytest.mark.slow
def test_two_planners_in_any_order_and_dying_anywhere_publish_the_plan_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bucket_module, "_AT_ONCE", 1)
    plans = [plan_of(tmp_path / str(seed), seed) for seed in range(2)]

    def mixed(content: Content) -> str:
        if MANIFEST not in content:
            return ""
        seeds = json.loads(content[MANIFEST])
        return next((name for name, seed in seeds.items() if content.get(name) != f"{name} of {seed}".encode()), "")

    def publish(folder: Path, name: str) -> Process:
        def run(bucket: Bucket) -> None:
            monkeypatch.setattr("secrets.token_hex", lambda _count: name)  # its attempt, the same in every order
            publish_static(bucket, folder)

        return run

    published, reached = set(), {}
    for state in states({}, [publish(plan, f"{number}") for number, plan in enumerate(plans)]):
        assert not mixed(state.content), state.steps
        for process in state.processes:
            assert process.error is None, (state.steps, process.error)
            assert not process.ended or MANIFEST in state.content, state.steps
        reached[tuple(sorted(state.content.items()))] = state
        if all(process.ended for process in state.processes):
            published.add(state.content[MANIFEST])
    assert len(published) == 2 and len(reached) > 40

    def another(bucket: Bucket) -> None:
        monkeypatch.setattr("secrets.token_hex", lambda _count: "another")
        if not complete_static(bucket):
            publish_static(bucket, plans[0])
        remove_attempts(bucket)

    for state in reached.values():
        content, ended = alone(state.content, another)
        assert ended.error is None and not mixed(content), state.steps
        assert content.keys() == {MANIFEST, "samples.parquet"}, state.steps


def flipped(content: Content, name: str) -> Content:
    """Return a bucket's content with one bit of an object flipped."""
    value = bytearray(content[name])
    value[len(value) // 2] ^= 1
    return content | {name: bytes(value)}


def without(content: Content, *names: str) -> Content:
    """Return a bucket's content without some objects."""
    return {name: value for name, value in content.items() if name not in names}


HIDDEN, IDS, MASK = shard_files(0)
DAMAGE: dict[str, Callable[[Content], Content]] = {
    "hidden states flipped": lambda content: flipped(content, HIDDEN),
    "hidden states missing": lambda content: without(content, HIDDEN),
    "ids flipped": lambda content: flipped(content, IDS),
    "mask missing": lambda content: without(content, MASK),
    "record flipped": lambda content: flipped(content, RECORD),
    "of another cache, without a record": lambda content: without(content, RECORD, MASK) | {HIDDEN: b"alien"},
}


@pytest.mark.parametrize("damage", some_slow(DAMAGE, "ids flipped", "mask missing"))
def test_a_repair_beside_a_worker_leaves_no_record_of_what_is_not_there(empty: Path, damage: str) -> None:
    """The worker begins when the damage is there; the record that was damaged is the only one that may be wrong."""
    whole, _ = alone({}, worker(empty, differs=True))
    damaged = DAMAGE[damage](whole)

    def repair(bucket: Bucket) -> None:
        cache = Cache(empty, whole=True)
        cache.mirror = Mirror(empty, bucket)
        cache.forget(0)
        remove_aliens(cache, 0)

    for state in states(damaged, [worker(empty), repair]):
        if state.content.get(RECORD) != damaged.get(RECORD):
            assert not unlike_its_record(state.content), state.steps
        assert isinstance(state.processes[0].error, CacheError | None), (state.steps, state.processes[0].error)
        assert state.processes[1].error is None, (state.steps, state.processes[1].error)
        if all(process.ended for process in state.processes):
            content, ended = alone(state.content, worker(empty))
            assert ended.error is None and RECORD in content and not unlike_its_record(content), state.steps
