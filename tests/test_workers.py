"""Any number of workers and ranks gives the same bytes; what goes wrong in one of them is told."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_extract import Settings, command, content
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from dflash_offline.pipeline.app import app
from dflash_offline.schemas.config import ExtractConfig
from dflash_offline.schemas.errors import CacheError, DflashError, MismatchError
from dflash_offline.stages.cache import CacheReader
from dflash_offline.stages.extract import extract, open_worker, plan_only
from dflash_offline.stages.progress import Silent
from dflash_offline.stages.verify import verify_cache
from dflash_offline.stages.workers import Work


def test_two_workers_write_the_same_bytes_as_one(cache: Path, extract_config: Settings, tmp_path: Path) -> None:
    done = extract(ExtractConfig(**extract_config, out=tmp_path / "cache", workers=2), Silent())
    assert done.shards_written == done.num_shards and done.shards_left == 0
    assert content(done.cache) == content(cache)
    assert list((done.cache / "tmp").iterdir()) == []


def test_ranks_do_their_shares_in_any_order_and_another_mix_finishes(
    cache: Path, extract_config: Settings, tmp_path: Path
) -> None:
    config = ExtractConfig(**extract_config, out=tmp_path / "cache")
    total = CacheReader(cache).manifest.layout.num_shards
    first = extract(replace(config, rank=0, world_size=3), Silent())
    assert (first.shards_written, first.shards_left) == (len(range(0, total, 3)), total - len(range(0, total, 3)))
    last = extract(replace(config, rank=1, world_size=2), Silent())
    assert last.shards_written == len(set(range(1, total, 2)) - set(range(0, total, 3)))
    rest = extract(config, Silent())
    assert rest.shards_left == 0
    assert first.shards_written + last.shards_written + rest.shards_written == total
    assert content(config.out) == content(cache)


def test_a_later_rank_waits_for_the_plan_of_rank_0(cache: Path, extract_config: Settings, tmp_path: Path) -> None:
    out = tmp_path / "cache"
    ranked = [[*command(extract_config, out), "--rank", str(rank), "--world-size", "2"] for rank in (1, 0)]
    processes = [subprocess.Popen(one, stderr=subprocess.PIPE, text=True) for one in ranked]
    said = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert "Waiting for rank 0" in said[0] and "Tokenizing" not in said[0]
    assert content(out) == content(cache)


def _target_that_breaks_on_a_word(target: Path, tmp_path: Path) -> Path:
    """Return a target whose features are not finite wherever the rarest token of the data stands."""
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    model.model.embed_tokens.weight.data[RARE] = float("inf")
    broken = shutil.copytree(target, tmp_path / "broken")
    model.save_pretrained(broken)
    return broken


RARE = 0
"""Set by the fixture to a token that few samples hold."""


@pytest.fixture(autouse=True)
def _find_rare_token(cache: Path) -> None:
    global RARE
    samples = CacheReader(cache).samples
    holders = {
        int(token): {i for i in range(len(samples)) if token in samples.input_ids(i)}
        for token in np.unique(np.concatenate([samples.input_ids(i) for i in range(len(samples))]))
    }
    RARE = min((token for token, held in holders.items() if len(held) > 1), key=lambda token: len(holders[token]))


def test_bad_samples_are_left_out_when_told_and_readers_subtract_them(
    extract_config: Settings, target: Path, tmp_path: Path
) -> None:
    broken = _target_that_breaks_on_a_word(target, tmp_path)
    config = ExtractConfig(**extract_config | {"target": str(broken)}, out=tmp_path / "cache")
    told = r"Sample \d+ \(chats.jsonl:\d+\): a feature is not finite at layer 1.*--on-bad-features skip"
    with pytest.raises(DflashError, match=re.compile(told, re.DOTALL)):
        extract(replace(config, workers=2), Silent())  # a worker's fault is the command's
    done = extract(replace(config, on_bad_features="skip"), Silent())
    reader = CacheReader(done.cache)
    holders = {i for i in range(len(reader.samples)) if RARE in reader.samples.input_ids(i)}
    assert reader.skipped == holders and done.num_skipped == len(holders)
    assert set(reader.usable().tolist()) == set(range(len(reader.samples))) - holders
    for sample in holders:
        with pytest.raises(CacheError, match="left out"):
            reader.read_codes(sample)
    assert verify_cache(done.cache, Silent()) == []
    shown = CliRunner().invoke(app, ["inspect", str(done.cache)])
    assert f"{len(holders)} samples whose features were bad" in shown.stdout
    assert f"e.g. sample {min(holders)}: a feature is not finite at layer 1" in shown.stdout


def test_the_plan_alone_says_what_it_would_cost_and_writes_nothing(extract_config: Settings, tmp_path: Path) -> None:
    config = ExtractConfig(**extract_config, out=tmp_path / "cache")
    plan, layout, forecast = plan_only(config, Silent())
    assert list(tmp_path.iterdir()) == []
    done = extract(config, Silent())
    assert (done.num_samples, done.num_shards) == (len(plan.samples), plan.num_shards)
    assert layout == CacheReader(done.cache).manifest.layout
    assert forecast.bytes_by_kind["lossless"] == pytest.approx(done.bytes_written, rel=0.1)
    assert forecast.ratios["scaled"] < forecast.ratios["rounded"] < forecast.ratios["lossless"] < 1
    assert forecast.seconds > 0


def test_the_plan_command_prints_every_layout_and_json(extract_config: Settings, tmp_path: Path) -> None:
    arguments = [*command(extract_config, tmp_path / "cache")[3:], "--plan", "--quiet"]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0, shown.output
    assert all(kind in shown.stdout for kind in ("lossless", "rounded", "scaled", "Free", "Time"))
    found = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert found["fits"] and set(found["bytes"]) == {"lossless", "rounded", "scaled"}


def test_a_disk_that_cannot_hold_it_is_refused_before_the_work_unless_told(
    extract_config: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dflash_offline.stages import forecast

    monkeypatch.setattr(forecast, "_free_bytes", lambda _out: 1000)
    config = ExtractConfig(**extract_config, out=tmp_path / "cache")
    with pytest.raises(DflashError, match=r"1000 B free.*--ignore-free-space"):
        extract(config, Silent())
    assert not config.out.exists()
    assert extract(replace(config, ignore_free_space=True), Silent()).shards_left == 0


@pytest.mark.parametrize("kind", ["rounded", "scaled"])
def test_a_compact_cache_is_sound_and_close_to_the_target(
    extract_config: Settings, target: Path, tmp_path: Path, kind: str
) -> None:
    from dflash_offline.stages.verify import compare_with_target

    config = ExtractConfig(**extract_config, out=tmp_path / "cache", features=kind)
    extract(config, Silent())
    assert verify_cache(config.out, Silent()) == []
    fits = compare_with_target(config.out, str(target), 4, 0, Silent())
    assert [fit.fault for fit in fits] == ["", "", ""]
    assert all(0.005 < fit.error < 0.05 for fit in fits)


PLAIN_DECODER = """
import sys
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
    values, reader = np.load(out), CacheReader(config.out)
    for sample in (0, 7, len(reader.samples) - 1):
        slots = slice(reader.samples.start[sample], reader.samples.start[sample] + reader.samples.num_tokens[sample])
        np.testing.assert_array_equal(values[slots], reader.read_values(sample))
    assert np.isnan(values[reader.samples.num_tokens[0]]).all()


def test_a_target_spread_over_devices_gives_the_same_features_and_is_recorded(
    cache: Path, extract_config: Settings, tmp_path: Path
) -> None:
    config = ExtractConfig(**extract_config, out=tmp_path / "cache", device_map="auto")
    extract(config, Silent())
    assert content(config.out) == content(cache)
    assert CacheReader(config.out).manifest.identity["target"]["device_map"] == "auto"
    with pytest.raises(MismatchError, match=r"target\.device_map +cache: auto  now: None"):
        extract(replace(config, device_map=None), Silent())


def test_without_accelerate_a_spread_target_is_refused_with_what_to_install(
    extract_config: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dflash_offline.stages import target as loading

    monkeypatch.setattr(loading, "find_spec", lambda _name: None)
    config = ExtractConfig(**extract_config, out=tmp_path / "cache", device_map="auto")
    with pytest.raises(DflashError, match=r"pip install 'dflash-offline\[large\]'"):
        extract(config, Silent())


def test_a_killed_worker_whose_shards_the_others_did_is_no_failure(
    cache: Path, extract_config: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dflash_offline.stages import extract as stage

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
