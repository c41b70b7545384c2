"""Any number of workers and ranks gives the same bytes; what goes wrong in one of them is told."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from cache_files import content
from processes import Command, forked, run
from running import Settings, arguments, command
from tiny_target import save_conversations
from typer.testing import CliRunner

from dflash_offline.pipeline.app import app
from dflash_offline.pipeline.demo import CONVERSATIONS, TARGET
from dflash_offline.schemas.errors import DflashError, MismatchError
from dflash_offline.schemas.manifest import Manifest
from dflash_offline.schemas.samples import SampleTable
from dflash_offline.schemas.sealed import read_sealed, sealed_bytes
from dflash_offline.schemas.settings.extract import ExtractConfig
from dflash_offline.schemas.settings.verify import RerunConfig
from dflash_offline.stages import extract as stage
from dflash_offline.stages.capture.compare import compare_with_target
from dflash_offline.stages.capture.forecast import Forecast
from dflash_offline.stages.capture.runner import TargetRunner
from dflash_offline.stages.capture.workers import Work
from dflash_offline.stages.cores import usable_cores
from dflash_offline.stages.extract import extract, open_worker, plan_only
from dflash_offline.stages.progress import Silent
from dflash_offline.stages.store import writer as writing
from dflash_offline.stages.store.cache import Cache
from dflash_offline.stages.store.verify import verify_cache


def test_two_workers_write_the_same_bytes_as_one(cache: Path, extract_config: Settings, tmp_path: Path) -> None:
    done = extract(ExtractConfig(**extract_config, out=tmp_path / "cache", workers=2), Silent())
    assert done.shards_written == done.num_shards and done.shards_left == 0
    assert content(done.cache) == content(cache)
    assert list((done.cache / "tmp").iterdir()) == []


def test_ranks_do_their_shares_in_any_order_and_another_mix_finishes(
    cache: Path, extract_config: Settings, tmp_path: Path
) -> None:
    config = ExtractConfig(**extract_config, out=tmp_path / "cache")
    total = Cache.open(cache).manifest.layout.num_shards
    first = extract(replace(config, rank=0, world_size=3), Silent())
    assert (first.shards_written, first.shards_left) == (len(range(0, total, 3)), total - len(range(0, total, 3)))
    last = extract(replace(config, rank=1, world_size=2), Silent())
    assert last.shards_written == len(set(range(1, total, 2)) - set(range(0, total, 3)))
    rest = extract(config, Silent())
    assert rest.shards_left == 0
    assert first.shards_written + last.shards_written + rest.shards_written == total
    assert content(config.out) == content(cache)


def test_a_rank_that_is_done_says_how_many_shards_others_have(extract_config: Settings, tmp_path: Path) -> None:
    out = tmp_path / "cache"
    shown = CliRunner().invoke(app, [*command(extract_config, out)[3:], "--world-size", "3", "--quiet"]).stdout
    total, done = Manifest.read(out).layout.num_shards, len(list((out / "commits").iterdir()))
    assert f" in {total} shards; {total - done} of the shards are left to other ranks." in shown


@pytest.mark.slow
def test_workers_and_ranks_mix_and_change_from_one_call_to_the_next(
    extract_config: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("multiprocessing.get_context", forked)
    many = extract_config | {"data": (save_conversations(tmp_path / "many.jsonl", 240),)}
    alone = extract(ExtractConfig(**many, out=tmp_path / "alone"), Silent())
    config, total = ExtractConfig(**many, out=tmp_path / "cache"), alone.num_shards
    calls = [{"workers": 2, "world_size": 3}, {"workers": 2, "rank": 1, "world_size": 2}, {"workers": 2}]
    shares = [set(range(0, total, 3)), set(range(1, total, 2)), set(range(total))]
    done = set[int]()
    for call, share in zip(calls, shares, strict=True):
        assert extract(replace(config, **call), Silent()).shards_written == len(share - done) > 1
        done |= share
    assert content(config.out) == content(alone.cache)
    assert sum(commit.num_samples for commit in Cache.open(config.out).commits.values()) == alone.num_samples


def test_a_later_rank_waits_for_the_plan_of_rank_0(cache: Path, extract_config: Settings, tmp_path: Path) -> None:
    out = tmp_path / "cache"
    ranked = [[*arguments(extract_config, out), "--rank", str(rank), "--world-size", "2"] for rank in (1, 0)]
    later = Command(ranked[0])
    time.sleep(0.5)
    code, said = run(ranked[1])
    assert code == 0, said
    code, said = later.wait()
    assert code == 0 and "Waiting for rank 0" in said and "Tokenizing" not in said, said
    assert content(out) == content(cache)


def test_the_plan_alone_says_what_it_would_cost_and_writes_nothing(extract_config: Settings, tmp_path: Path) -> None:
    config = ExtractConfig(**extract_config, out=tmp_path / "cache")
    plan, layout, forecast = plan_only(config, Silent())
    assert list(tmp_path.iterdir()) == []
    done = extract(config, Silent())
    assert (done.num_samples, done.num_shards) == (len(plan.samples), plan.num_shards)
    assert layout == Cache.open(done.cache).manifest.layout
    assert forecast.bytes_by_kind["lossless"] == pytest.approx(done.bytes_written, rel=0.1)
    assert forecast.ratios["scaled"] < forecast.ratios["rounded"] < forecast.ratios["lossless"] < 1
    assert forecast.seconds > 0
    assert forecast.num_bytes == pytest.approx(sum(p.stat().st_size for p in config.out.rglob("*")), rel=0.1)


def test_the_plan_command_prints_every_layout_and_json(extract_config: Settings, tmp_path: Path) -> None:
    arguments = [*command(extract_config, tmp_path / "cache")[3:], "--plan", "--quiet"]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0, shown.output
    assert all(kind in shown.stdout for kind in ("lossless", "rounded", "scaled", "Free", "Time"))
    assert "longest sample" not in shown.stdout
    wide = ["--chunk-tokens", str((2 << 20) // (3 * 32 * 2))]  # of 2 MiB: a sample takes whole ones
    assert "of 2.0 MiB raw: the longest sample must fit" in CliRunner().invoke(app, [*arguments, *wide]).stdout
    found = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert found["fits"] and set(found["bytes"]) == {"lossless", "rounded", "scaled"}


def test_the_plan_says_what_each_rank_would_take(cache: Path, extract_config: Settings, tmp_path: Path) -> None:
    arguments = [*command(extract_config, tmp_path / "cache")[3:], "--plan", "--quiet", "--world-size", "3"]
    samples, total = Cache.open(cache).samples, Cache.open(cache).layout.num_shards
    expected = []
    for rank in range(3):
        own = [shard for shard in range(total) if shard % 3 == rank]
        tokens = [int(samples.num_tokens[sample]) for sample in range(len(samples)) if samples.shard[sample] in own]
        expected.append({"shards": len(own), "tokens": sum(tokens)})
    assert json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)["ranks"] == expected
    shown = CliRunner().invoke(app, arguments).stdout
    even = max(rank["tokens"] for rank in expected) / (sum(rank["tokens"] for rank in expected) / 3)
    assert f"the most is {even:.3f} of the mean" in shown
    assert all(f"{rank['shards']:,} shards, {rank['tokens']:,} tokens\n" in shown for rank in expected)


def test_a_disk_that_cannot_hold_it_is_refused_before_the_work_unless_told(
    extract_config: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ExtractConfig(**extract_config, out=tmp_path / "cache")
    free = tmp_path / "free"
    monkeypatch.setattr(shutil, "disk_usage", lambda _folder: SimpleNamespace(free=int(free.read_text())))
    free.write_text("0")
    _, _, expected = plan_only(config, Silent())
    # Room for the features alone does not do: the target's embeddings, its tokenizer and the plan need some too.
    free.write_text(str(expected.bytes_by_kind["lossless"]))
    with pytest.raises(DflashError, match=r"needs .* its disk has .* free.*fewer samples.*--ignore-free-space"):
        extract(config, Silent())
    shown = CliRunner().invoke(app, [*command(extract_config, config.out)[3:], "--plan", "--quiet"]).stdout
    assert "NOT ENOUGH" in shown and "fewer samples" in shown.splitlines()[-1]
    assert not config.out.exists()
    assert extract(replace(config, ignore_free_space=True), Silent()).shards_left == 0


def begun(cache: Path, out: Path, num_done: int) -> Path:
    """Return a copy of a cache of which only the first shards are finished."""
    shutil.copytree(cache, out)
    for record in sorted((out / "commits").iterdir())[num_done:]:
        record.unlink()
        shutil.rmtree(out / "features.zarr/hidden_states/c" / str(int(record.stem)))
    return out


def rest_of(cache: Path, num_done: int) -> int:
    """Return the bytes that the other shards' files take."""
    shards = Cache.open(cache).manifest.layout.num_shards
    folders = [cache / "features.zarr" / name for name in ("hidden_states", "input_ids", "loss_mask")]
    files = [file for shard in range(num_done, shards) for folder in folders for file in _files(folder / f"c/{shard}")]
    return sum(file.stat().st_size for file in files)


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]


@pytest.mark.parametrize("num_done", [0, 2])
def test_a_begun_cache_starts_where_all_that_is_left_fits_whichever_rank_asks(
    cache: Path, extract_config: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_done: int
) -> None:
    out, rest = begun(cache, tmp_path / "cache", num_done), rest_of(cache, num_done)
    config = ExtractConfig(**extract_config, out=out)
    monkeypatch.setattr(shutil, "disk_usage", lambda _folder: SimpleNamespace(free=rest // 2))
    # Half of the rest would hold this rank's share, but the others' are written to the same disk.
    for shares in ({}, {"rank": 2, "world_size": 8}):
        # Other settings would be refused: only room helps.
        with pytest.raises(DflashError, match=r"more and its disk has .* free\. Make room .*--ignore-free-space"):
            extract(replace(config, **shares), Silent())
    assert len(list((out / "commits").iterdir())) == num_done
    monkeypatch.setattr(shutil, "disk_usage", lambda _folder: SimpleNamespace(free=round(1.3 * rest)))
    extract(config, Silent())
    assert content(out) == content(cache)


def test_a_begun_cache_of_an_older_version_goes_on_although_its_plan_expects_no_size(
    cache: Path, extract_config: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = begun(cache, tmp_path / "cache", 0)
    document = read_sealed(out / "manifest.json")
    del document["checksum"], document["plan"]["feature_bytes"]
    (out / "manifest.json").write_bytes(sealed_bytes(document))
    extract(ExtractConfig(**extract_config, out=out), Silent())
    assert content(out) == content(cache)


def test_samples_that_were_left_out_of_finished_shards_are_not_still_to_be_written(cache: Path) -> None:
    begun = Cache.open(cache)
    commit = begun.commits[0]
    begun.commits[0] = replace(commit, num_tokens=commit.num_tokens // 2)  # as if the other half were left out
    whole = Forecast(
        features=begun.layout.features,
        tokens_per_s=1.0,
        seconds=60.0,
        ratios={"lossless": 1.0},
        bytes_by_kind={"lossless": 1},
        final_bytes=0,
        plan_bytes=0,
        target_bytes=0,
        free_bytes=0,
    )
    rest = whole.of_rest(begun)
    assert (rest.seconds, rest.bytes_left) == (0.0, 0)


def test_the_plan_of_a_begun_cache_counts_what_is_left(
    cache: Path, extract_config: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, rest = begun(cache, tmp_path / "cache", 2), rest_of(cache, 2)
    config = ExtractConfig(**extract_config, out=out)
    whole, left = (plan_only(replace(config, out=one), Silent())[2] for one in (tmp_path / "new", out))
    assert (left.shards_done, left.bytes_left) == (2, pytest.approx(rest, rel=0.3))
    assert whole.bytes_left == whole.num_bytes == left.num_bytes > 1.5 * left.bytes_left
    arguments = [*command(extract_config, out)[3:], "--plan", "--quiet"]
    for free, fits in ((1.3 * rest, True), (rest / 2, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _folder, free=free: SimpleNamespace(free=round(free)))
        shown = CliRunner().invoke(app, arguments).stdout
        assert ("NOT ENOUGH" not in shown) == fits and "Done        2 of" in shown
        found = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
        assert found["fits"] == fits and found["shards_done"] == 2


@pytest.mark.parametrize("kind", ["rounded", "scaled"])
def test_a_compact_cache_is_sound_and_close_to_the_target(
    extract_config: Settings, target: Path, tmp_path: Path, kind: str
) -> None:
    config = ExtractConfig(**extract_config, out=tmp_path / "cache", features=kind)
    extract(config, Silent())
    assert verify_cache(config.out, Silent()) == []
    fits = compare_with_target(config.out, RerunConfig(target=str(target), samples=4), Silent())
    assert [fit.fault for fit in fits] == ["", "", ""]
    assert all(0.005 < fit.error < 0.05 for fit in fits)


PLAIN_DECODER = """
import sys
import time
sys.modules["dflash_offline"] = None
import numpy as np, zarr
group = zarr.open_group(sys.argv[1] + "/features.zarr", mode="r")
codes = group["hidden_states"][:]
m = (codes >> 1).astype(np.int32)
far = (((m - 16384) << 13) + 1182793728).view(np.float32)
magnitude = np.where(m < 16384, m.astype(np.float32), far)
value = group["feature_center"][:] + np.where(codes & 1, -magnitude, magnitude) * group["feature_step"][:]
np.save(sys.argv[2], np.where(codes == 65535, np.nan, value).astype(np.float32))
"""


def test_plain_zarr_and_numpy_decode_a_scaled_cache(extract_config: Settings, tmp_path: Path) -> None:
    config = ExtractConfig(**extract_config, out=tmp_path / "cache", features="scaled")
    extract(config, Silent())
    out = tmp_path / "values.npy"
    subprocess.run([sys.executable, "-c", PLAIN_DECODER, str(config.out), str(out)], check=True, cwd=tmp_path)
    values, reader = np.load(out), Cache.open(config.out)
    for sample in (0, 7, len(reader.samples) - 1):
        slots = slice(reader.samples.start[sample], reader.samples.start[sample] + reader.samples.num_tokens[sample])
        np.testing.assert_array_equal(values[slots], reader.values(sample))
    assert np.isnan(values[reader.samples.num_tokens[0]]).all()


def test_a_target_spread_over_devices_gives_the_same_features_and_is_recorded(
    cache: Path, extract_config: Settings, tmp_path: Path
) -> None:
    config = ExtractConfig(**extract_config, out=tmp_path / "cache", device_map="auto")
    extract(config, Silent())
    assert content(config.out) == content(cache)
    assert Cache.open(config.out).manifest.identity["target"]["device_map"] == "auto"
    with pytest.raises(MismatchError, match=r"target\.device_map +cache: auto  now: None"):
        extract(replace(config, device_map=None), Silent())


def test_without_accelerate_a_spread_target_is_refused_with_what_to_install(
    extract_config: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dflash_offline.stages.target import model as loading

    monkeypatch.setattr(loading, "find_spec", lambda _name: None)
    config = ExtractConfig(**extract_config, out=tmp_path / "cache", device_map="auto")
    with pytest.raises(DflashError, match=r"pip install 'dflash-offline\[large\]'"):
        extract(config, Silent())


def test_a_killed_worker_whose_shards_the_others_did_is_no_failure(
    cache: Path, extract_config: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("multiprocessing.get_context", forked)
    monkeypatch.setattr(stage, "open_worker", _die_as_worker_0)
    said: list[str] = []

    class Listening(Silent):
        def say(self, text: str) -> None:
            said.append(text)

    done = extract(ExtractConfig(**extract_config, out=tmp_path / "cache", workers=2), Listening())
    assert done.shards_left == 0 and any("exit code -9" in text for text in said)
    assert content(done.cache) == content(cache)


def _die_as_worker_0(config: ExtractConfig) -> Work:
    if multiprocessing.current_process().name == "Worker 0":
        os.kill(os.getpid(), signal.SIGKILL)
    return open_worker(config)


@pytest.mark.slow
def test_each_worker_takes_its_share_of_the_cores_and_of_the_threads(
    extract_config: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "open_worker", _note_cores)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    with pytest.raises(DflashError, match="noted"):
        extract(ExtractConfig(**extract_config, out=tmp_path / "cache", workers=2), Silent())
    share = f"{max(1, usable_cores() // 2)} 1"
    assert [(tmp_path / f"Worker {index}").read_text() for index in range(2)] == [share, share]


def _note_cores(config: ExtractConfig) -> Work:
    """Note what a worker may take, by its name."""
    note = config.out.parent / multiprocessing.current_process().name
    note.write_text(f"{usable_cores()} {torch.get_num_threads()}")
    raise DflashError("noted")


def test_the_next_forwards_do_not_wait_for_a_slow_disk_and_records_keep_their_order(
    cache: Path, extract_config: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    last = Cache.open(cache).layout.num_shards - 1
    begun = [threading.Event() for _ in range(last + 1)]
    waited, records = dict[int, bool](), list[str]()
    run_shard, sync, publish = TargetRunner.run_shard, os.fsync, writing.publish

    def note_begin(self: TargetRunner, samples: SampleTable, members: Any, *args: Any) -> Any:
        begun[int(samples.shard[members[0]])].set()
        return run_shard(self, samples, members, *args)

    def slow(descriptor: int) -> None:
        """Sync a shard's features only once the forwards of the second next shard have begun."""
        shard = re.search(r"/tmp/(\d{6})\.", str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        if shard and int(shard[1]) not in waited:
            waited[int(shard[1])] = begun[min(int(shard[1]) + 2, last)].wait(60)
        sync(descriptor)

    def note_record(*args: Any, path: Path, **kwargs: Any) -> str:
        records.extend([path.name] if path.parent.name == "commits" else [])
        return publish(*args, path=path, **kwargs)

    monkeypatch.setattr(TargetRunner, "run_shard", note_begin)
    monkeypatch.setattr(os, "fsync", slow)
    monkeypatch.setattr(writing, "publish", note_record)
    out = tmp_path / "cache"
    extract(ExtractConfig(**extract_config, out=out), Silent())
    assert waited == dict.fromkeys(range(last + 1), True)
    assert len(records) == last + 1 and records == sorted(records)
    assert content(out) == content(cache)


@pytest.mark.slow
def test_memory_grows_by_one_shard_where_the_target_is_on_the_cpu(tmp_path: Path) -> None:
    with CONVERSATIONS.open() as lines:
        (tmp_path / "data.jsonl").write_text("".join(islice(lines, 1200)))

    def peak(shard_mib: int) -> int:
        given = f"extract {tmp_path}/data.jsonl --target {TARGET} --block-size 8 --device cpu --quiet --shard-mib"
        code = "from dflash_offline.pipeline.app import main; main()"
        out = ["--out", str(tmp_path / str(shard_mib))]
        process = subprocess.Popen([sys.executable, "-c", code, *given.split(), str(shard_mib), *out])
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
        return used.ru_maxrss * 1024

    assert peak(96) - peak(4) < 2.5 * (92 << 20)  # what is freed and kept takes some, too
