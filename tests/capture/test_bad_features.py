"""Samples whose features the target spoils: refused, or left out, recorded, counted and bounded."""

import re
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from feature_writer import create, features
from processes import forked
from running import Settings
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from dflash_offline.pipeline.app import app
from dflash_offline.schemas.commits import SkippedSample, read_commits
from dflash_offline.schemas.errors import CacheError, DflashError
from dflash_offline.schemas.manifest import SAMPLES, Manifest
from dflash_offline.schemas.samples import SampleTable
from dflash_offline.schemas.settings.extract import ExtractConfig
from dflash_offline.stages.capture import bad_features
from dflash_offline.stages.capture.bad_features import ALWAYS_ALLOWED, BadFeatures
from dflash_offline.stages.capture.calibrate import calibrated_scales
from dflash_offline.stages.capture.encode import FeatureEncoder
from dflash_offline.stages.capture.shard import TOKEN_STATISTICS, token_statistics
from dflash_offline.stages.extract import extract
from dflash_offline.stages.progress import Silent
from dflash_offline.stages.store.cache import Cache
from dflash_offline.stages.store.codec import NAN
from dflash_offline.stages.store.verify import verify_cache
from dflash_offline.stages.store.writer import ShardWriter


@pytest.fixture(scope="module")
def rare(cache: Path) -> int:
    """The token of the data that the fewest samples hold, but more than one."""
    samples = Cache.open(cache).samples
    holders: dict[int, set[int]] = {}
    for sample in range(len(samples)):
        for token in np.unique(samples.input_ids(sample)).tolist():
            holders.setdefault(token, set()).add(sample)
    return min((token for token, held in holders.items() if len(held) > 1), key=lambda token: len(holders[token]))


def broken(target: Path, folder: Path, harm: Callable[[torch.nn.Module], None]) -> Path:
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    harm(model)
    shutil.copytree(target, folder)
    model.save_pretrained(folder)
    return folder


def too_large(token: int, model: torch.nn.Module) -> None:
    """Give a token a feature that bfloat16 cannot hold; a norm makes zeros of it: no other position sees it."""
    model.model.embed_tokens.weight.data[token, 5] = 3.4e38  # type: ignore[union-attr,operator,index]


def test_bad_samples_are_left_out_when_told_and_readers_subtract_them(
    extract_config: Settings, target: Path, tmp_path: Path, rare: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("multiprocessing.get_context", forked)

    name = str(broken(target, tmp_path / "broken", partial(too_large, rare)))
    config = ExtractConfig(**extract_config | {"target": name}, out=tmp_path / "cache")
    told = r"Sample \d+ \(chats.jsonl:\d+\): a feature is too large at layer 1.*--on-bad-features skip"
    with pytest.raises(DflashError, match=re.compile(told, re.DOTALL)):
        extract(replace(config, workers=2), Silent())  # a worker's fault is the command's
    done = extract(replace(config, on_bad_features="skip"), Silent())
    reader = Cache.open(done.cache)
    holders = {i for i in range(len(reader.samples)) if rare in reader.samples.input_ids(i)}
    assert reader.skipped == holders and done.num_skipped == len(holders)
    assert set(reader.usable().tolist()) == set(range(len(reader.samples))) - holders
    for sample in holders:
        with pytest.raises(CacheError, match="left out"):
            reader.codes(sample)
    assert verify_cache(done.cache, Silent()) == []
    shown = CliRunner().invoke(app, ["inspect", str(done.cache)])
    assert f"{len(holders)} samples whose features were bad" in shown.stdout
    assert f"e.g. sample {min(holders)}: a feature is too large at layer 1" in shown.stdout


def test_a_feature_too_large_to_store_is_refused_with_sample_layer_and_position(
    cache: Path, extract_config: Settings, target: Path, tmp_path: Path, rare: int
) -> None:
    name = str(broken(target, tmp_path / "broken", partial(too_large, rare)))
    samples = Cache.open(cache).samples
    ids = {sample: samples.input_ids(sample).tolist() for sample in range(len(samples))}
    first = next(sample for sample, held in ids.items() if rare in held)
    place = rf"Sample {first} \(chats.jsonl:{samples.row[first]}\)"
    told = rf"{place}: a feature is too large at layer 1, position {ids[first].index(rare)}\n"
    with pytest.raises(CacheError, match=told):
        extract(ExtractConfig(**extract_config | {"target": name}, out=tmp_path / "cache"), Silent())


def test_a_target_that_spoils_everything_is_refused_although_told_to_skip(
    extract_config: Settings, target: Path, tmp_path: Path
) -> None:
    def harm(model: torch.nn.Module) -> None:
        model.model.layers[2].mlp.down_proj.weight.data[3] = float("inf")  # type: ignore[union-attr,index]

    name = str(broken(target, tmp_path / "broken", harm))
    config = ExtractConfig(
        **extract_config | {"target": name}, out=tmp_path / "cache", on_bad_features="skip", max_skipped=0.05
    )
    told = r"(\d+) of the \1 samples of shard 0.*\1 samples: a feature is not finite, first at layer 2.*and \d+ more"
    with pytest.raises(CacheError, match=re.compile(told, re.DOTALL)):
        extract(config, Silent())
    assert not list((config.out / "commits").iterdir())
    everything = extract(replace(config, max_skipped=1), Silent())
    assert everything.num_skipped == everything.num_samples  # told so, and counted


def test_scaled_features_are_calibrated_without_the_bad_samples_or_refused_naming_them(
    cache: Path, extract_config: Settings, target: Path, tmp_path: Path, rare: int
) -> None:
    name = str(broken(target, tmp_path / "broken", partial(too_large, rare)))
    config = ExtractConfig(**extract_config | {"target": name}, out=tmp_path / "cache", features="scaled")
    sound = Cache.open(cache)
    holders = {i for i in range(len(sound.samples)) if rare in sound.samples.input_ids(i)}
    first = min(holders)
    told = rf"{len(holders)} of the 80 samples.*calibrate.*Sample {first} \(chats.jsonl:\d+\): a feature is too large "
    position = sound.samples.input_ids(first).tolist().index(rare)
    with pytest.raises(CacheError, match=re.compile(f"{told}at layer 1, position {position}", re.DOTALL)):
        extract(config, Silent())
    assert not config.out.exists()
    done = extract(replace(config, on_bad_features="skip"), Silent())
    assert Cache.open(done.cache).skipped == holders
    # What a target without the fault gives for the other samples: all of a plan as small as this one calibrates.
    states = np.concatenate([sound.values(i) for i in range(len(sound.samples)) if i not in holders])
    codec = Cache.open(done.cache).codec
    assert codec.center is not None and codec.step is not None
    for layer in range(states.shape[1]):
        low, middle, high = np.percentile(states[:, layer], [15.87, 50, 84.13], axis=0)
        np.testing.assert_allclose(codec.center[layer], middle, atol=0.02 * np.abs(states).max())
        np.testing.assert_allclose(codec.step[layer], config.step * (high - low) / 2, rtol=0.05)


def test_too_few_sound_tokens_calibrate_nothing(extract_config: Settings, target: Path, tmp_path: Path) -> None:
    def harm(model: torch.nn.Module) -> None:
        model.model.layers[2].mlp.down_proj.weight.data[3] = float("inf")  # type: ignore[union-attr,index]

    name = str(broken(target, tmp_path / "broken", harm))
    settings = extract_config | {"target": name, "features": "scaled", "on_bad_features": "skip", "max_skipped": 1}
    with pytest.raises(CacheError, match=r"(?s)80 of the 80 samples.* 0 of their [\d,]+ tokens are left"):
        extract(ExtractConfig(**settings, out=tmp_path / "cache"), Silent())
    assert not (tmp_path / "cache").exists()


class HugeChannel:
    """Gives features of which one channel spreads over more than a float32 can tell."""

    layer_ids = (4,)

    def batches(self, samples: SampleTable, members: np.ndarray) -> list[np.ndarray]:
        return [members]

    def run_batch(
        self, samples: SampleTable, batch: np.ndarray, encoders: dict[str, FeatureEncoder]
    ) -> dict[str, tuple[torch.Tensor, ...]]:
        ((array, encoder),) = encoders.items()
        states = torch.randn(int(samples.num_tokens[batch].sum()), 1, 8, generator=torch.Generator().manual_seed(0))
        states[:, 0, 5] = 3e38 * states[:, 0, 5].sign()
        codes, statistics = encoder.encode(states, 0), torch.empty(len(states), 1, len(TOKEN_STATISTICS))
        token_statistics(states[:, 0], codes[:, 0], encoder, 0, statistics[:, 0])
        return {array: (codes, statistics)}


def test_a_scale_that_is_no_number_above_zero_is_refused(tmp_path: Path) -> None:
    samples = Plan(tmp_path / "cache").samples
    with pytest.raises(CacheError, match=r"Channel 5 of layer 4 has center .* step inf .*--features rounded"):
        calibrated_scales(cast(Any, HugeChannel()), samples, 0.125, skip_bad=True, progress=Silent())


class Plan:
    """A cache of 120 shards of a few samples each, and what decides about bad ones in it."""

    def __init__(self, folder: Path) -> None:
        self.manifest: Manifest = create(folder, num_shards=120)
        self.samples = SampleTable.read(folder / SAMPLES)
        self.writer = ShardWriter(Cache(folder))

    def bad(self, shard: int) -> list[SkippedSample]:
        """The first sample of a shard, spoiled."""
        sample = int(self.samples.samples_of_shard(shard)[0])
        return [SkippedSample(sample=sample, reason="a feature is not finite", layer_id=2, position=1)]

    def write(self, shard: int) -> int:
        codes = features(self.manifest, self.samples, shard, NAN)
        begin = int(self.samples.start[self.bad(shard)[0].sample]) % len(codes)
        codes[begin : begin + int(self.samples.num_tokens[self.bad(shard)[0].sample])] = NAN
        return self.writer.commit(shard, codes, self.bad(shard))


def test_samples_left_out_are_counted_over_all_shards_and_all_workers(tmp_path: Path) -> None:
    plan = Plan(tmp_path / "cache")
    share = 20 / len(plan.samples)
    first, second = (BadFeatures(plan.writer.cache, "skip", share) for _ in range(2))
    for shard in range(20):  # two workers, turn by turn
        (first, second)[shard % 2].check(shard, plan.bad(shard))
        plan.write(shard)
    for decides in (first, second, BadFeatures(plan.writer.cache, "skip", share)):
        with pytest.raises(CacheError, match=rf"(?s)21 of {len(plan.samples)} samples so far.*--max-skipped") as error:
            decides.check(20, plan.bad(20))
        assert "21 samples: a feature is not finite, first at layer 2" in str(error.value)
    BadFeatures(plan.writer.cache, "skip", 21 / len(plan.samples)).check(20, plan.bad(20))
    first.check(21, [])


@pytest.mark.parametrize("locks_reach", [True, False])
def test_two_workers_at_once_leave_out_no_more_than_one_may(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, locks_reach: bool
) -> None:
    plan = Plan(tmp_path / "cache")
    for shard in range(19):
        plan.write(shard)
    if not locks_reach:
        monkeypatch.setattr(bad_features, "locked", lambda _path, *, wait: nullcontext(wait))
    together = threading.Barrier(2)

    def commit(shard: int) -> int:
        def write() -> int:
            with suppress(threading.BrokenBarrierError):  # only one is here at a time where locks reach
                together.wait(0.3)
            return plan.write(shard)

        return BadFeatures(plan.writer.cache, "skip", 20.5 / len(plan.samples)).commit(shard, plan.bad(shard), write)

    with ThreadPoolExecutor(2) as pool:
        faults = [job.exception() for job in [pool.submit(commit, shard) for shard in (19, 20)]]
    assert together.broken == locks_reach
    told = [str(fault) for fault in faults if fault is not None]
    assert told and all("21 of" in text for text in told), faults
    commits, _ = read_commits(tmp_path / "cache", plan.manifest)
    assert sum(len(one.skipped) for one in commits.values()) == 21 - len(told)


def test_a_few_samples_of_a_small_plan_may_be_left_out_unless_none_may(tmp_path: Path) -> None:
    plan = Plan(tmp_path / "cache")
    with pytest.raises(CacheError, match=r"at most 0 \(0.0%\)"):
        BadFeatures(plan.writer.cache, "skip", 0.0).check(0, plan.bad(0))
    decides = BadFeatures(plan.writer.cache, "skip", 1e-6)
    for shard in range(ALWAYS_ALLOWED):
        decides.check(shard, plan.bad(shard))
        plan.write(shard)
    with pytest.raises(CacheError, match=f"{ALWAYS_ALLOWED + 1} of"):
        decides.check(ALWAYS_ALLOWED, plan.bad(ALWAYS_ALLOWED))


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_impossible_shares_are_refused(extract_config: Settings, tmp_path: Path, share: float) -> None:
    with pytest.raises(DflashError, match="max_skipped is"):
        ExtractConfig(**extract_config, out=tmp_path, max_skipped=share)
