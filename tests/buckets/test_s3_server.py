"""A cache on a real server of the S3 protocol: workers killed, a server in trouble, readers without this package."""

import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest
from bucket_worker import fill_bucket
from cache_files import content
from feature_writer import create, fill_cache
from interleavings import written
from processes import FORKING
from running import Settings, command, dflash, refused
from servers import KEY, SECRET, environment, make_bucket, moto_server, now_and_then, troubled_server

from dflash_offline.schemas.manifest import shard_files
from dflash_offline.stages.buckets.bucket import Bucket, in_parallel
from dflash_offline.stages.progress import Silent
from dflash_offline.stages.store.verify import verify_cache

pytestmark = pytest.mark.buckets
KILLS, SHARDS = 60, 60


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with moto_server(tmp_path_factory.mktemp("moto") / "log") as port:
        make_bucket(port, "bucket")
        yield port


@pytest.fixture(autouse=True)
def _environment(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment(port).items():
        monkeypatch.setenv(name, value)


def put_static(cache: Path, bucket: Bucket) -> None:
    """Publish a local cache's static files."""
    in_parallel(lambda item: bucket.put(*item), [*written(cache).items()])


def fetched(bucket: Bucket, folder: Path) -> Path:
    """Copy a whole bucket into a folder."""
    in_parallel(lambda name: bucket.fetch(name, folder / name), bucket.names())
    (folder / "tmp").mkdir(exist_ok=True)
    return folder


@pytest.mark.parametrize("differs", [False, True])
def test_sixty_kills_of_two_workers_leave_a_complete_cache_that_verifies(
    tmp_path: Path, port: int, differs: bool
) -> None:
    """Where the workers round alike, also byte for byte that of one worker that nobody disturbs."""
    whole, url = tmp_path / "whole", f"s3://bucket/killed-{differs}"
    create(whole, num_shards=SHARDS)
    bucket, chance = Bucket(url), random.Random(1)
    put_static(whole, bucket)
    fill_cache(whole)

    def start(number: int, place: int) -> ForkServerProcess:
        folder = tmp_path / f"machine-{place}"
        process = FORKING.Process(
            target=fill_bucket, args=(url, folder, number, environment(port)), kwargs={"differs": differs}
        )
        process.start()
        return process

    def records() -> int:
        return len(bucket.names("commits"))

    workers = [start(number, number) for number in range(2)]
    kills = while_writing = 0
    while kills < KILLS:
        before, deadline = records(), time.monotonic() + 60
        while records() < min(before + 1, SHARDS) and any(worker.is_alive() for worker in workers):
            assert time.monotonic() < deadline
        time.sleep(chance.random() * 0.1)
        victim = chance.randrange(2)
        alive = workers[victim].is_alive()
        workers[victim].kill()
        workers[victim].join()
        kills += 1
        while_writing += alive
        if records() > SHARDS - 6:  # so that there is something to kill in
            for shard in chance.sample(range(SHARDS), SHARDS * 3 // 4):
                bucket.remove(f"commits/{shard:06d}.json", *shard_files(shard)[:0:-1])
                bucket.remove(shard_files(shard)[0])
        workers[victim] = start(2 * kills + victim, victim)
    for worker in workers:
        worker.kill()
        worker.join()
    assert while_writing >= KILLS * 3 // 4, while_writing
    assert dflash("verify", url, "--repair").exit_code == 1  # not all is extracted
    fill_bucket(url, tmp_path / "machine-2", 0, {})
    assert dflash("verify", url, "--repair").exit_code == 0
    there = fetched(bucket, tmp_path / "there")
    assert verify_cache(there, Silent()) == []
    assert written(there).keys() == {name for name in written(whole) if not name.startswith("tmp/")}
    if not differs:
        assert content(there) == content(whole)


def test_a_server_in_trouble_is_asked_again_and_the_cache_is_the_same(
    cache: Path, extract_config: Settings, port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sixth of all requests fails: refused for now, slowed down, cut before or after it was carried out."""
    trouble = now_and_then(1 / 6, [(500, "InternalError"), (503, "SlowDown"), (0, ""), (0, "after")])
    url = "s3://bucket/troubled"
    with troubled_server(port, trouble) as between:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{between}")
        env = os.environ | {"TMPDIR": str(tmp_path), "AWS_LOG": "trace", "RUST_LOG": "trace"}
        for arguments in (command(extract_config, Path(url))[3:], ["verify", url], ["inspect", url, "--json"]):
            ran = subprocess.run(
                [sys.executable, "-m", "dflash_offline.pipeline.app", *arguments],
                env=env, capture_output=True, text=True,
            )  # fmt: skip
            assert ran.returncode == 0, ran.stderr
            assert not any(secret in ran.stdout + ran.stderr for secret in (KEY, SECRET))
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    there = fetched(Bucket(url), tmp_path / "there")
    assert content(there) == content(cache)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(secret.encode() in path.read_bytes() for secret in (KEY, SECRET) for path in files)


def test_a_server_that_stays_away_is_one_message(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with troubled_server(None, lambda _method, _path: (503, "SlowDown")) as port:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        refused(dflash("inspect", "s3://bucket/away"), "SlowDown", "tried", "repeat the command")


def test_plain_zarr_opens_the_bucket_in_a_process_without_this_package(cache: Path) -> None:
    put_static(cache, Bucket("s3://bucket/plain"))
    program = """
import sys
sys.modules["dflash_offline"] = None
import numpy as np, zarr
from obstore.store import from_url
from zarr.storage import ObjectStore
store = ObjectStore(from_url("s3://bucket/plain/features.zarr"), read_only=True)
there, here = zarr.open_group(store, mode="r"), zarr.open_group(sys.argv[1] + "/features.zarr", mode="r")
for name in ("hidden_states", "input_ids", "loss_mask"):
    np.testing.assert_array_equal(there[name][:], here[name][:])
"""
    subprocess.run([sys.executable, "-c", program, str(cache)], check=True)


def test_two_commands_at_once_on_machines_of_their_own_share_the_work(
    cache: Path, extract_config: Settings, tmp_path: Path
) -> None:
    url, starts = "s3://bucket/at-once", []
    for number in range(2):
        (tmp_path / str(number)).mkdir()
        env = os.environ | {"TMPDIR": str(tmp_path / str(number))}
        starts.append(subprocess.Popen(command(extract_config, Path(url)), env=env, stderr=subprocess.PIPE, text=True))
    for process in starts:
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said
    there = fetched(Bucket(url), tmp_path / "there")
    assert content(there) == content(cache)
    assert not any(name.startswith("tmp/") for name in Bucket(url).names())
