"""Writers killed at random instants leave a cache that one more run completes, byte for byte."""

import random
import subprocess
import sys
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import numpy as np
from cache_files import content
from feature_writer import create, features, fill_cache
from processes import FORKING

from dflash_offline.schemas.manifest import SAMPLES, Manifest
from dflash_offline.schemas.samples import SampleTable
from dflash_offline.stages.progress import Silent
from dflash_offline.stages.store.cache import Cache
from dflash_offline.stages.store.codec import NAN
from dflash_offline.stages.store.verify import verify_cache

KILLS = 30
SHARDS = 120


WRITER = Path(__file__).parents[1] / "feature_writer.py"


def start(cache: Path, worker: int) -> ForkServerProcess:
    process = FORKING.Process(target=fill_cache, args=(cache, worker))
    process.start()
    return process


def finished(cache: Path) -> int:
    return len(list((cache / "commits").iterdir()))


def test_thirty_kills_of_two_writers_at_once_leave_the_same_bytes(tmp_path: Path) -> None:
    cache, whole = tmp_path / "killed", tmp_path / "whole"
    for folder in (cache, whole):
        create(folder, num_shards=SHARDS)
    fill_cache(whole)
    chance = random.Random(1)
    kills = while_writing = 0
    workers = [start(cache, n) for n in range(2)]
    while kills < KILLS:
        before, deadline = finished(cache), time.monotonic() + 60
        # Wait for two commits more, then a random instant: kills land in the writing, not in the imports.
        while finished(cache) < before + 2 and any(worker.is_alive() for worker in workers):
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(chance.random() * 0.02)
        victim = chance.randrange(2)
        alive = workers[victim].is_alive()
        workers[victim].kill()
        workers[victim].join()
        kills += alive
        while_writing += alive and finished(cache) < SHARDS
        if finished(cache) > SHARDS - 6:  # so that there is something to kill in
            _forget_some(cache, chance)
        workers[victim] = start(cache, kills + 2)
    for worker in workers:
        worker.kill()
        worker.join()
    assert while_writing >= KILLS - 2
    subprocess.run([sys.executable, str(WRITER), str(cache), "0"], check=True)  # and without torch, as it says itself
    assert content(cache) == content(whole)
    assert verify_cache(cache, Silent()) == []


def _forget_some(cache: Path, chance: random.Random) -> None:
    records = sorted((cache / "commits").iterdir())
    for record in chance.sample(records, len(records) * 3 // 4):
        record.unlink(missing_ok=True)


def test_a_late_worker_throws_its_own_shard_away(tmp_path: Path) -> None:
    create(tmp_path / "cache", num_shards=2)
    fill_cache(tmp_path / "cache")
    before = content(tmp_path / "cache")
    manifest = Manifest.read(tmp_path / "cache")
    samples = SampleTable.read(tmp_path / "cache" / SAMPLES)
    from dflash_offline.stages.store.writer import ShardWriter

    writer = ShardWriter(Cache(tmp_path / "cache"))
    other = features(manifest, samples, 1, NAN)
    other[0, 0, 0] ^= 1
    assert writer.commit(1, other) == 0  # as where locks do not reach: no claim was asked for
    assert content(tmp_path / "cache") == before


def test_a_reader_sent_to_a_spawned_process_reads_the_same(tmp_path: Path) -> None:
    import multiprocessing

    create(tmp_path / "cache", num_shards=3)
    fill_cache(tmp_path / "cache")
    reader = Cache.open(tmp_path / "cache")
    here = [reader.codes(sample) for sample in range(len(reader.samples))]
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        there = pool.map(reader.codes, range(len(reader.samples)))
    for one, other in zip(here, there, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_reader_shared_by_threads_reads_the_same(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    create(tmp_path / "cache", num_shards=6)
    fill_cache(tmp_path / "cache")
    reader = Cache.open(tmp_path / "cache")
    samples = list(range(len(reader.samples))) * 5
    here = {sample: reader.codes(sample) for sample in set(samples)}
    with ThreadPoolExecutor(8) as pool:
        for sample, codes in zip(samples, pool.map(reader.codes, samples), strict=True):
            np.testing.assert_array_equal(codes, here[sample])
