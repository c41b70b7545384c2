"""Stage two: what it trains on, that it goes on exactly, and what it refuses."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dflash_offline.schemas.config import TrainConfig, recommended_gamma
from dflash_offline.schemas.errors import CacheError, DflashError, MismatchError
from dflash_offline.stages.cache import CacheReader
from dflash_offline.stages.checkpoint import list_checkpoints
from dflash_offline.stages.loader import BatchLoader, epoch_batches, split_samples
from dflash_offline.stages.optimizer import learning_rate_at
from dflash_offline.stages.progress import Silent
from dflash_offline.stages.train import Training, train

SETTINGS: dict[str, object] = {
    "steps": 24,
    "optimizer": "muon",
    "learning_rate": 2e-3,
    "draft_layers": 1,
    "num_anchors": 8,
    "batch_size": 4,
    "val_every": 8,
    "save_every": 8,
    "device": "cpu",
}


def config(cache: Path, out: Path, **changes: object) -> TrainConfig:
    return TrainConfig(**{**SETTINGS, **changes, "cache": cache, "out": out})


def command(cache: Path, out: Path) -> list[str]:
    flags = [part for name, value in SETTINGS.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    return [sys.executable, "-m", "dflash_offline.pipeline.app", "train", str(cache), "--out", str(out), *flags]


def final_weights(run: Path) -> bytes:
    return (run / "checkpoints/step-0000024/model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def run(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("run") / "run"
    train(config(cache, out), Silent())
    return out


def test_killed_at_random_instants_it_resumes_to_the_same_weights(cache: Path, run: Path, tmp_path: Path) -> None:
    out, chance = tmp_path / "run", random.Random(1)
    kills = 0
    for saved in (0, 1, 2):
        process = subprocess.Popen(command(cache, out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline and len(_steps(out)) < saved + 1:
            time.sleep(0.002)
        time.sleep(chance.random() * 0.05)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
    assert kills >= 2
    subprocess.run(command(cache, out), check=True, capture_output=True)
    assert final_weights(out) == final_weights(run)
    assert _without_times(out) == _without_times(run)


def _steps(out: Path) -> set[str]:
    """Checkpoints that were finished, by the rows logged when they were."""
    return {path.name for path in (out / "checkpoints").glob("step-*")} if out.exists() else set()


def _without_times(run: Path) -> list[dict[str, object]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if "_per_s" not in k and "wait" not in k} for row in rows]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_a_checkpoint_and_says_how_to_go_on(
    cache: Path, run: Path, tmp_path: Path, number: signal.Signals
) -> None:
    out = tmp_path / "run"
    process = subprocess.Popen(command(cache, out), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (out / "metrics.jsonl").exists():
        time.sleep(0.002)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in said, said
    assert "is saved" in said and "Repeat the command" in said and list_checkpoints(out)
    train(config(cache, out), Silent())
    assert final_weights(out) == final_weights(run)


def test_a_finished_run_does_nothing_more(cache: Path, run: Path) -> None:
    before = (run / "metrics.jsonl").read_text()
    assert train(config(cache, run), Silent()).state.step == 24
    assert (run / "metrics.jsonl").read_text() == before


def test_the_run_keeps_its_metrics_events_and_newest_checkpoints(run: Path) -> None:
    rows = _without_times(run)
    steps = [row["step"] for row in rows]
    assert steps == [8, 8, 10, 16, 16, 20, 24, 24]
    validations = [row for row in rows if "val_loss" in row]
    assert {"val_serving_walk", "val_accept_len_over_anchors", "val_accuracy_by_slot"} <= set(validations[0])
    assert list((run / "tensorboard").glob("events.*"))
    record = json.loads((run / "checkpoints/step-0000024/state.json").read_text())
    kept = {int(path.name.removeprefix("step-")) for path in list_checkpoints(run)}
    assert kept == {16, 24, record["best_step"]}


def test_training_learns(run: Path) -> None:
    losses = [row["loss"] for row in _without_times(run) if "loss" in row]
    assert isinstance(losses[-1], float) and isinstance(losses[0], float) and losses[-1] < losses[0]


def test_a_resume_with_other_settings_or_another_cache_is_refused_field_by_field(
    cache: Path, run: Path, tmp_path: Path
) -> None:
    for name, value in {
        "learning_rate": 1e-3,
        "optimizer": "adamw",
        "block_size": 6,
        "num_anchors": 4,
        "loss": "dpace",
        "seed": 1,
    }.items():
        with pytest.raises(MismatchError, match=rf"settings\.{name} +run: .* now: {value}"):
            train(config(cache, run, **{name: value}), Silent())
    copy = shutil.copytree(cache, tmp_path / "copy")
    assert train(config(copy, run), Silent()).state.step == 24  # the same cache elsewhere is the same cache


def test_a_block_longer_than_planned_or_a_layer_not_cached_is_refused(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match="planned for blocks of 8"):
        train(config(cache, tmp_path / "run", block_size=9), Silent())
    with pytest.raises(MismatchError, match=r"holds layers \[1, 2, 4\], but this draft reads \[1, 3\]"):
        train(config(cache, tmp_path / "run", layers=(1, 3)), Silent())
    assert not (tmp_path / "run").exists()


def test_an_incomplete_or_damaged_cache_is_refused(cache: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(cache, tmp_path / "copy")
    (copy / "commits/000001.json").unlink()
    with pytest.raises(CacheError, match=r"1 of .* shards are not extracted"):
        train(config(copy, tmp_path / "run"), Silent())
    shutil.copy(cache / "commits/000001.json", copy / "commits")
    shard = copy / "features.zarr/hidden_states/c/1/0/0"
    content = bytearray(shard.read_bytes())
    content[len(content) // 3] ^= 1
    shard.write_bytes(content)
    with pytest.raises(CacheError, match="its checksum does not hold"):
        train(config(copy, tmp_path / "run"), Silent())


def test_a_folder_with_something_else_is_refused(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DflashError, match="is not a training run"):
        train(config(cache, tmp_path), Silent())


def test_a_checkpoint_with_a_flipped_byte_is_refused(cache: Path, run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    path = copy / "checkpoints/step-0000024/optimizer.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(DflashError, match=r"optimizer.safetensors is missing or damaged"):
        train(config(cache, copy), Silent())


def test_adamw_too_goes_on_to_the_same_weights(cache: Path, tmp_path: Path) -> None:
    whole, halves = (config(cache, tmp_path / name, optimizer="adamw", steps=8, save_every=4) for name in "ab")
    train(whole, Silent())
    train(halves, Silent())
    shutil.rmtree(tmp_path / "b/checkpoints/step-0000008")
    assert train(halves, Silent()).state.step == 8
    first, second = (tmp_path / name / "checkpoints/step-0000008/model.safetensors" for name in "ab")
    assert first.read_bytes() == second.read_bytes()


def test_accumulation_equals_one_large_batch(cache: Path, tmp_path: Path) -> None:
    reader = CacheReader(cache)
    small = Training(config(cache, tmp_path / "a", accumulation=2), reader, Silent())
    large = Training(config(cache, tmp_path / "b", batch_size=8), reader, Silent())
    members = np.arange(8)
    loader = small.loader(0)
    sums_small, norm_small, _ = small.step([loader.load(members[:4], 0), loader.load(members[4:], 0)])
    sums_large, norm_large, _ = large.step([loader.load(members, 0)])
    torch.testing.assert_close(sums_small["loss_sum"], sums_large["loss_sum"], rtol=1e-6, atol=0)
    assert norm_small == pytest.approx(norm_large, rel=1e-5)


def test_a_non_finite_loss_stops_with_step_and_samples(cache: Path, tmp_path: Path) -> None:
    training = Training(config(cache, tmp_path / "run"), CacheReader(cache), Silent())
    batch = training.loader(0).load(np.array([3, 5]), 0)
    broken = replace(batch, hidden_states=batch.hidden_states * float("nan"))
    with pytest.raises(DflashError, match=r"not finite at step 1, samples \[3, 5\]"):
        training.step([broken])


def loader(cache: Path) -> BatchLoader:
    return BatchLoader(CacheReader(cache), columns=[0, 2], block_size=8, num_anchors=5, seed=3, pinned=False)


def test_a_batch_holds_the_caches_features_tokens_and_mask(cache: Path) -> None:
    reader, members = CacheReader(cache), np.array([7, 2, 30])
    batch = loader(cache).load(members, 0)
    for row, sample in enumerate(members.tolist()):
        count = int(reader.samples.num_tokens[sample])
        expected = torch.from_numpy(reader.read_values(sample, [0, 2])).flatten(1)
        torch.testing.assert_close(batch.hidden_states[row, :count].float(), expected, rtol=0, atol=0)
        assert batch.input_ids[row, :count].tolist() == reader.samples.input_ids(sample).tolist()
        assert batch.loss_mask[row, :count].tolist() == reader.samples.loss_mask(sample).tolist()
        assert (batch.document_ids[row] == 0).sum() == count and not batch.hidden_states[row, count:].any()
        assert not batch.loss_mask[row, count:].any()


def test_anchors_do_not_depend_on_the_batch_but_on_the_epoch(cache: Path) -> None:
    def drawn(members: list[int], epoch: int) -> list[int]:
        batch = loader(cache).load(np.array(members), epoch)
        row = members.index(4)
        return batch.anchors[row][batch.keep_mask[row]].tolist()

    assert drawn([4], 0) == drawn([9, 4, 1], 0) != drawn([4], 1)


def test_every_epoch_holds_every_sample_once_in_another_order(cache: Path) -> None:
    samples = CacheReader(cache).samples
    members = np.arange(len(samples))
    first, second = (np.concatenate(epoch_batches(samples, members, 4, 0, epoch)) for epoch in (0, 1))
    assert sorted(first.tolist()) == sorted(second.tolist()) == members.tolist()
    assert first.tolist() != second.tolist()


def test_the_split_follows_content(cache: Path) -> None:
    samples = CacheReader(cache).samples
    training, held_out = split_samples(samples, 5)
    assert len(held_out) == 5 and sorted([*training, *held_out]) == list(range(len(samples)))
    assert len(split_samples(samples, 10**6)[1]) == len(samples) // 10


def test_the_schedule_warms_up_and_ends_near_zero() -> None:
    rates = [learning_rate_at(step, 100, 1.0, 0.04) for step in range(100)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0] and rates[-1] < 0.001
    assert all(a >= b for a, b in pairwise(rates[3:]))


def test_the_recommended_decay_is_the_published_one() -> None:
    assert [recommended_gamma(size) for size in (8, 10, 16)] == [4, 5, 7]


def test_masters_and_moments_are_float32(run: Path) -> None:
    for name in ("model", "optimizer"):
        tensors = load_file(run / f"checkpoints/step-0000024/{name}.safetensors")
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
