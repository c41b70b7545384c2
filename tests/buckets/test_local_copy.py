"""A local copy of what is read from a bucket changes no value, holds its bound, and may go at any time."""

import os
import random
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from feature_writer import create, fill_cache
from obstore.store import LocalStore
from processes import FORKING
from running import dflash, refused
from safetensors.numpy import load_file

from dflash_offline.schemas.draft.anchor_rule import AnchorRule
from dflash_offline.schemas.settings.train import TrainConfig
from dflash_offline.stages.buckets.bucket import Bucket
from dflash_offline.stages.buckets.local_copy import LocalCopy
from dflash_offline.stages.buckets.mirror import open_mirror
from dflash_offline.stages.progress import Silent
from dflash_offline.stages.store.cache import Cache
from dflash_offline.stages.train import train
from dflash_offline.stages.training import run as training_run
from dflash_offline.stages.training.corpus import Corpus
from dflash_offline.stages.training.loader import BatchLoader
from dflash_offline.stages.training.ranks import Ranks
from dflash_offline.stages.training.run import Training
from dflash_offline.stages.training.schedule import Rows

GIB = 1 << 30


class Counting(Bucket):
    """A bucket of files that counts the ranges of chunks that are asked for."""

    def __init__(self, url: str, folder: Path) -> None:
        super().__init__(url, LocalStore(folder))
        self.ranges = 0
        self.places: set[tuple[str, int]] = set()

    def read_range(self, name: str, begin: int, end: int) -> object:
        if end - begin > 4:  # no first chunk's checksum
            self.ranges += 1
            self.places.add((name, begin))
        return super().read_range(name, begin, end)


@pytest.fixture()
def local(tmp_path: Path) -> Path:
    create(tmp_path / "local", num_shards=6, width=64)
    fill_cache(tmp_path / "local")
    return tmp_path / "local"


@pytest.fixture()
def bucket(local: Path, request: pytest.FixtureRequest) -> Iterator[Counting]:
    url = f"s3://copied/{request.node.name}"
    bucket = Counting(url, local)
    mirror = open_mirror(url, bucket)
    yield bucket
    shutil.rmtree(mirror.folder.parent, ignore_errors=True)


def copied(bucket: Bucket, folder: Path, most_bytes: int = GIB, said: list[str] | None = None) -> Corpus:
    """Return the cache of a bucket as a new process opens it, with a local copy."""
    corpus = Corpus([Cache(Path(bucket.url))])
    corpus.copy_locally(folder, most_bytes, (said if said is not None else []).append)
    return corpus


def check_all(corpus: Corpus, local: Path, columns: list[int] | None = None) -> None:
    here, there = Cache(local), corpus.caches[0]
    for sample in range(len(here.samples)):
        np.testing.assert_array_equal(there.codes(sample, columns), here.codes(sample, columns))


def kept(folder: Path) -> list[Path]:
    return [path for path in folder.glob("*/*/*") if not path.name.startswith(".")]


def room(folder: Path) -> int:
    """Return the bytes that all files of chunks take, in blocks."""
    found = 0
    for path in folder.glob("*/*/*"):
        try:
            found += -(-path.stat().st_size // 4096) * 4096
        except FileNotFoundError:
            continue
    return found


def test_what_was_read_once_is_read_from_the_disk(local: Path, bucket: Counting, tmp_path: Path) -> None:
    check_all(copied(bucket, tmp_path / "copy"), local)
    samples = len(Cache(local).samples)
    assert bucket.ranges == samples == len(kept(tmp_path / "copy"))
    check_all(copied(bucket, tmp_path / "copy"), local)
    assert bucket.ranges == samples
    check_all(copied(bucket, tmp_path / "copy"), local, [1])
    assert bucket.ranges == 2 * samples  # other layers are other ranges


def test_a_damaged_or_cut_file_is_read_anew(local: Path, bucket: Counting, tmp_path: Path) -> None:
    check_all(copied(bucket, tmp_path / "copy"), local)
    read, files = bucket.ranges, kept(tmp_path / "copy")
    content = files[0].read_bytes()
    files[0].write_bytes(content[:50] + bytes([content[50] ^ 1]) + content[51:])
    files[1].write_bytes(files[1].read_bytes()[:-1])
    check_all(copied(bucket, tmp_path / "copy"), local)
    assert bucket.ranges == read + 2
    assert files[0].read_bytes() == content


def test_the_bound_holds_and_other_caches_make_room(local: Path, bucket: Counting, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    bound = 40 * 4096
    said: list[str] = []
    check_all(copied(bucket, copy, bound, said), local)
    assert 0 < room(copy) <= bound and not said
    some = bucket.ranges
    check_all(copied(bucket, copy, bound), local)
    assert some < bucket.ranges < 2 * some
    check_all(copied(bucket, copy, bound // 2), local)
    assert 0 < room(copy) <= bound // 2
    other = copy / "another" / "object"
    other.mkdir(parents=True)
    (other / "0-5").write_bytes(b"bytes")
    (other / ".half-1").write_bytes(b"by")
    copied(bucket, copy, GIB)
    assert (other / "0-5").exists() and not (other / ".half-1").exists()
    copied(bucket, copy, bound)
    assert not other.exists()


def test_the_folder_may_go_while_it_is_used(local: Path, bucket: Counting, tmp_path: Path) -> None:
    said: list[str] = []
    corpus = copied(bucket, tmp_path / "copy", said=said)
    check_all(corpus, local)
    shutil.rmtree(tmp_path / "copy")
    check_all(corpus, local)
    check_all(corpus, local)
    assert kept(tmp_path / "copy") and not said


def test_a_disk_that_takes_nothing_more_is_told_once(local: Path, bucket: Counting, tmp_path: Path) -> None:
    said: list[str] = []
    corpus = copied(bucket, tmp_path / "copy", said=said)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        check_all(corpus, local)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(said) == 1 and "takes nothing more (File too large)" in said[0] and "read from the store" in said[0]
    assert room(tmp_path / "copy") == 0
    assert int.from_bytes((tmp_path / "copy" / "bytes").read_bytes(), "little") == 0


def test_a_folder_that_others_may_write_into_is_refused(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(ValueError, match="this user alone"):
        LocalCopy(tmp_path / "open", 1, {}, print)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="--local-cache"):
        LocalCopy(tmp_path / "file", 1, {}, print)
    refused(dflash("train", tmp_path, "--out", tmp_path / "run", "--local-cache", tmp_path / "x"), "object store")
    refused(dflash("train", "s3://a/b", "--out", tmp_path / "run", "--local-cache-gib", 3), "no --local-cache")


def read_for_ever(url: str, cache: Path, folder: Path, copy: Path, most_bytes: int) -> None:
    """Read samples in an order of its own, each compared with the local cache's, until killed."""
    folder.mkdir(exist_ok=True)
    tempfile.tempdir = str(folder)
    bucket = Counting(url, cache)
    open_mirror(url, bucket)
    corpus, here, chance = copied(bucket, copy, most_bytes), Cache(cache), random.Random(os.getpid())
    while True:
        sample = chance.randrange(len(here.samples))
        if not np.array_equal(corpus.caches[0].codes(sample), here.codes(sample)):
            (folder / "differs").touch()


def test_processes_that_are_killed_leave_the_bound_and_what_they_kept(
    local: Path, bucket: Counting, tmp_path: Path
) -> None:
    copy, bound = tmp_path / "copy", 40 * 4096
    copy.mkdir(mode=0o700)

    def start(place: int) -> "FORKING.Process":  # type: ignore[name-defined]
        folder = tmp_path / f"machine-{place}"
        process = FORKING.Process(target=read_for_ever, args=(bucket.url, local, folder, copy, bound))
        process.start()
        return process

    readers, chance = [start(place) for place in range(3)], random.Random(0)
    for kill in range(6):
        victim, until = kill % 3, time.monotonic() + 0.3 + chance.random() * 0.1
        while time.monotonic() < until:
            assert room(copy) <= bound
        readers[victim].kill()
        readers[victim].join()
        if kill % 3 == 2:
            shutil.rmtree(next(iter(copy.glob("*/*")), copy / "none"), ignore_errors=True)
        readers[victim] = start(victim)
    for reader in readers:
        reader.kill()
        reader.join()
    assert not [*tmp_path.glob("machine-*/differs")]
    check_all(copied(bucket, copy, bound), local)
    assert 0 < room(copy) <= bound
    assert not [*copy.glob("*/*/.half-*")]


def test_training_with_a_local_copy_gives_the_bits_of_training_from_a_folder(
    cache: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    url = f"s3://copied/{request.node.name}"
    bucket = Counting(url, cache)
    mirror = open_mirror(url, bucket)
    weights, ranges = [], []
    for name, place, copy in (("here", cache, None), ("cold", Path(url), "copy"), ("warm", Path(url), "copy")):
        folder = tmp_path / copy if copy else None
        config = TrainConfig(
            caches=(place,), out=tmp_path / name, steps=4, draft_layers=1, num_anchors=4, device="cpu",
            local_cache=folder,
        )  # fmt: skip
        train(config, Silent())
        weights.append(load_file(tmp_path / name / "checkpoints" / "step-0000004" / "model.safetensors"))
        ranges.append(bucket.ranges)
        assert "data_wait_share" in (tmp_path / name / "metrics.jsonl").read_text()
    shutil.rmtree(mirror.folder.parent, ignore_errors=True)
    assert ranges[0] == 0 < ranges[1] == ranges[2]
    for other in weights[1:]:
        for name, values in weights[0].items():
            np.testing.assert_array_equal(values, other[name])


def test_each_rank_asks_for_what_it_trains_on_alone(
    cache: Path, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_run, "distribute", lambda *_, **__: None)  # nothing is trained, so no rank is met
    url = f"s3://copied/{request.node.name}"
    bucket = Counting(url, cache)
    mirror = open_mirror(url, bucket)
    asked, trained = [], []
    for rank in range(2):
        bucket.places = set()
        config = TrainConfig(
            caches=(Path(url),), out=tmp_path / "run", epochs=1, batch_tokens=512, draft_layers=1, device="cpu"
        )
        ranks = Ranks(rank=rank, count=2, device=torch.device("cpu"))
        training = Training(config, Corpus.open(config.caches), ranks)
        trained.append({sample for batch in training.stream() for sample in batch.samples})
        asked.append(bucket.places)
    shutil.rmtree(mirror.folder.parent, ignore_errors=True)
    assert not asked[0] & asked[1] and not trained[0] & trained[1]
    assert [len(places) for places in asked] == [len(samples) for samples in trained] and min(map(len, trained)) > 10


def test_the_last_batches_of_a_stream_are_fetched_once(bucket: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    read = bucket.read_range

    def read_slowly(name: str, begin: int, end: int) -> object:
        time.sleep(0.02)
        return read(name, begin, end)

    monkeypatch.setattr(bucket, "read_range", read_slowly)
    corpus = Corpus([Cache(Path(bucket.url))])
    loader = BatchLoader(
        corpus,
        layer_ids=corpus.caches[0].layer_ids,
        anchor_rule=AnchorRule(4),
        num_anchors=4,
        seed=0,
        shape=None,
        device=torch.device("cpu"),
    )
    batches: list[tuple[Rows, int]] = [([group], 0) for group in np.array_split(np.arange(len(corpus)), 3)]
    found = [sample for batch in loader.stream(batches, 1) for sample in batch.samples]
    assert found == list(range(len(corpus)))
    assert bucket.ranges == len(found)
