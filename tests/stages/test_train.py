"""Stage two: what it trains on, that it goes on exactly, and what it refuses."""

import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from importlib.machinery import ModuleSpec
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from cache_files import made_otherwise, set_field
from numpy.typing import NDArray
from processes import Command, held_by_another_process
from running import flags
from safetensors.torch import load_file, save_file

from dflash_offline.schemas.errors import CacheError, DflashError, MismatchError
from dflash_offline.schemas.locks import LOCK
from dflash_offline.schemas.run import RUN, RunRecord
from dflash_offline.schemas.sealed import sealed_bytes
from dflash_offline.schemas.settings.option import options
from dflash_offline.schemas.settings.toml import read_settings
from dflash_offline.schemas.settings.train import TrainConfig, recommended_gamma
from dflash_offline.schemas.variants.table import VARIANTS, own_fields
from dflash_offline.stages.export import export
from dflash_offline.stages.progress import Silent
from dflash_offline.stages.store.cache import Cache
from dflash_offline.stages.train import dry_run, train
from dflash_offline.stages.training.checkpoint import list_checkpoints
from dflash_offline.stages.training.corpus import Corpus
from dflash_offline.stages.training.loader import Batch
from dflash_offline.stages.training.optimizer import WeightAverage, learning_rate_at
from dflash_offline.stages.training.ranks import Ranks
from dflash_offline.stages.training.run import Training
from dflash_offline.stages.training.schedule import Rows

CPU = torch.device("cpu")
SETTINGS: dict[str, object] = {
    "steps": 24,
    "optimizer": "muon",
    "learning_rate": 2e-3,
    "draft_layers": 1,
    "num_anchors": 8,
    "batch_tokens": 512,
    "val_every": 8,
    "save_every": 8,
    "device": "cpu",
}

LONGEST = 384
"""Tokens of a packed row of the cache: its longest sample, rounded up."""


def config(cache: Path, out: Path, **changes: object) -> TrainConfig:
    return TrainConfig(**{**SETTINGS, **changes, "caches": (cache,), "out": out})


def arguments(cache: Path, out: Path, **changes: object) -> list[str]:
    return ["train", str(cache), "--out", str(out), *flags({**SETTINGS, **changes})]


def command(cache: Path, out: Path, **changes: object) -> list[str]:
    return [sys.executable, "-m", "dflash_offline.pipeline.app", *arguments(cache, out, **changes)]


def final_weights(run: Path) -> bytes:
    return (run / "checkpoints/step-0000024/model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def run(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("run") / "run"
    train(config(cache, out), Silent())
    return out


@pytest.mark.slow
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


@pytest.mark.torture
def test_killed_twenty_times_it_resumes_to_the_same_weights(cache: Path, tmp_path: Path) -> None:
    """Half of the kills fall anywhere from the start of the process, half around the writing of a checkpoint."""
    settings: dict[str, object] = {"steps": 480, "val_every": 24, "ema": 0.99}
    train(config(cache, tmp_path / "whole", **settings), Silent())
    out, chance = tmp_path / "run", random.Random(int(os.environ.get("DFLASH_TORTURE_SEED", "0")))
    kills = 0
    while kills < 20:
        process = subprocess.Popen(
            command(cache, out, **settings), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        before = _steps(out)
        if kills % 2:
            deadline = time.monotonic() + 60
            while process.poll() is None and time.monotonic() < deadline and _steps(out) <= before:
                time.sleep(0.001)
            time.sleep(chance.random() * 0.3)
        else:
            time.sleep(chance.random() * 8)
        process.send_signal(signal.SIGKILL)
        if process.wait() == -signal.SIGKILL:
            kills += 1
        else:  # it came through: begin anew
            assert process.returncode == 0
            _require_equal_runs(out, tmp_path / "whole")
            shutil.rmtree(out)
    subprocess.run(command(cache, out, **settings), check=True, capture_output=True)
    _require_equal_runs(out, tmp_path / "whole")


def _require_equal_runs(one: Path, other: Path) -> None:
    for name in ("model", "masters", "optimizer"):
        last = f"checkpoints/step-0000480/{name}.safetensors"
        assert (one / last).read_bytes() == (other / last).read_bytes(), name
    assert _without_times(one) == _without_times(other)


def _steps(out: Path) -> set[str]:
    """Checkpoints that were finished, by the rows logged when they were."""
    return {path.name for path in (out / "checkpoints").glob("step-*")} if out.exists() else set()


def _without_times(run: Path) -> list[dict[str, object]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    vary = {"tokens_per_s", "samples_per_s", "data_wait_share", "peak_memory_gib"}
    return [{name: value for name, value in row.items() if name not in vary} for row in rows]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_a_checkpoint_and_says_how_to_go_on(
    cache: Path, run: Path, tmp_path: Path, number: signal.Signals
) -> None:
    out = tmp_path / "run"
    process = Command(arguments(cache, out))
    while process.poll() is None and not (out / "metrics.jsonl").exists():
        time.sleep(0.002)
    process.send_signal(number)
    code, said = process.wait(60)
    assert code == 128 + number and "Traceback" not in said, said
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


def test_a_resume_with_other_settings_is_refused_field_by_field(cache: Path, run: Path, tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match=r"(?s)draft\.block_size +run: 8 +now: 6\n.*settings\.seed +run: 0 +now: 1"):
        train(config(cache, run, seed=1, block_size=6), Silent())
    with pytest.raises(MismatchError, match=r"settings\.epochs +run: None +now: 9.0"):
        train(config(cache, run, steps=None, epochs=9.0), Silent())
    copy = shutil.copytree(cache, tmp_path / "copy")
    assert train(config(copy, run), Silent()).state.step == 24  # the same cache elsewhere is the same cache


SAID: dict[str, tuple[object, object]] = {
    "weights": ((1,), (0.5,)),
    "epochs": (None, 9.0),
    "steps": (24, 25),
    "packing": (True, False),
    "batch_tokens": (512, 1024),
    "batch_block_tokens": (65_536, 4096),
    "row_tokens": (LONGEST, 512),
    "accumulation": (1, 2),
    "optimizer": ("muon", "adamw"),
    "learning_rate": (2e-3, 1e-3),
    "ema": (None, 0.9),
    "warmup_ratio": (0.04, 0.1),
    "weight_decay": (0.01, 0.0),
    "clip": (1.0, 2.0),
    "num_anchors": (8, 4),
    "anchors": ("whole", "partial"),
    "block_size": (8, 6),
    "loss": ("dflash", "dpace"),
    "gamma": (4.0, 5.0),
    "variant": ("dflash", "dflash2"),
    "draft_layers": (1, 2),
    "draft_heads": (4, 2),
    "draft_kv_heads": (2, 1),
    "draft_head_dim": (8, 16),
    "draft_intermediate_size": (64, 32),
    "draft_rope_theta": (1e4, 1e6),
    "draft_rms_norm_eps": (1e-6, 1e-5),
    "draft_max_position_embeddings": (512, 256),
    "sliding_window": (None, 64),
    "sliding_layers": ((), (0,)),
    "causal_layers": ("none", "all"),
    "layers": ((1, 2, 4), (1, 4)),
    "seed": (0, 1),
    "val_samples": (128, 4),
    "val_every": (8, 12),
    "dtype": ("float32", "bfloat16"),
}
"""Of each setting that decides what the run computes: what it resolves to in `run`, and something else."""
FREE: dict[str, object] = {
    "batch_size": 3,  # of padded micro-batches only
    "patience": 3,
    "save_every": 5,
    "keep": 4,
    "attention_backend": "eager",
    "device": "auto" if not torch.cuda.is_available() else "cpu",
    "gradient_checkpointing": True,
    "activation_budget": 0.5,
    "flex_tiles": "narrow",
    "compile": False,
    "report_to": None,
    "loader_threads": 1,
    "shard_draft": True,
}
"""Settings that a resume may change, with another value."""


def test_the_role_of_every_setting_is_tried_by_what_a_resume_may_say() -> None:
    free = {name for name, option in options(TrainConfig).items() if option.role == "free"}
    assert free == FREE.keys() - {"batch_size"} | {"out", "local_cache", "local_cache_gib"}  # test_local_copy.py
    by_content = {"caches", "init_from"}
    of_a_variant = {name for kind in VARIANTS.values() for name in (*own_fields(kind), *kind.loss_settings)}
    elsewhere = {"batch_size", "anchors", "teacher_temperature"}  # tried by tests of their own
    assert options(TrainConfig).keys() - free == SAID.keys() | by_content | of_a_variant | elsewhere


@pytest.mark.parametrize("name", SAID)
def test_a_resume_may_say_what_a_setting_resolves_to_and_nothing_else(cache: Path, run: Path, name: str) -> None:
    same, other = SAID[name]
    if same is not None:
        assert train(config(cache, run, **{name: same}), Silent()).state.step == 24
    extra = {"sliding_window": 64} if name == "sliding_layers" else {}
    extra |= {"steps": None} if name == "epochs" else {}
    with pytest.raises(MismatchError, match=r"was started with other settings(?s:.*)run: .* now: "):
        train(config(cache, run, **{name: other}, **extra), Silent())


@pytest.mark.parametrize("name", FREE)
def test_a_resume_may_change_where_and_how_fast_a_run_goes(cache: Path, run: Path, name: str) -> None:
    assert train(config(cache, run, **{name: FREE[name]}), Silent()).state.step == 24


def test_a_run_that_was_told_its_defaults_goes_on_without_them_and_in_other_units(cache: Path, tmp_path: Path) -> None:
    told = {"steps": None, "epochs": 0.5, "block_size": 8, "layers": (1, 2, 4), "draft_heads": 4, "row_tokens": LONGEST}
    done = train(config(cache, tmp_path / "run", **told), Silent())
    again = train(config(cache, tmp_path / "run", steps=done.total_steps), Silent())
    assert again.state.step == done.state.step == done.total_steps
    padded = config(cache, tmp_path / "padded", packing=False, steps=1)
    train(padded, Silent())
    assert train(replace(padded, batch_tokens=4096, row_tokens=4096), Silent()).state.step == 1
    with pytest.raises(MismatchError, match=r"settings\.batch_size +run: 8 +now: 4"):
        train(replace(padded, batch_size=4), Silent())


def test_a_weighted_run_of_the_earlier_order_is_refused(cache: Path, tmp_path: Path) -> None:
    settings = config(cache, tmp_path / "run", steps=1, weights=(0.5,))
    train(settings, Silent())
    assert train(settings, Silent()).state.step == 1
    record = RunRecord.read(tmp_path / "run")
    del record.identity["settings"]["weighted_draw"]
    (tmp_path / "run/run.json").write_bytes(sealed_bytes(record.to_json()))
    with pytest.raises(MismatchError, match=r"(?s)settings\.weighted_draw +run: .*recorded by an older version"):
        train(settings, Silent())


def test_without_weights_the_identity_says_nothing_of_how_shares_are_drawn(run: Path) -> None:
    assert "weighted_draw" not in RunRecord.read(run).identity["settings"]


def test_gamma_means_nothing_to_the_dpace_loss(cache: Path, tmp_path: Path) -> None:
    other = config(cache, tmp_path / "run", steps=1, loss="dpace")
    train(other, Silent())
    assert train(replace(other, gamma=3.0), Silent()).state.step == 1


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


def test_a_run_that_another_process_trains_is_left_alone(cache: Path, tmp_path: Path) -> None:
    (tmp_path / RUN).touch()
    (tmp_path / LOCK).touch()
    with held_by_another_process(tmp_path / LOCK), pytest.raises(DflashError, match="trained by another process"):
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


def training(cache: Path, out: Path, **changes: object) -> Training:
    return Training(config(cache, out, **changes), Corpus.open((cache,)), Ranks(rank=0, count=1, device=CPU))


def placed(one: Training, rows: Rows, epoch: int = 0) -> Batch:
    """Return a micro-batch of the samples whose places these are among all by length, the shortest first."""
    loader, by_length = one.loader(0), np.argsort(one.corpus.num_tokens, kind="stable")
    return loader.widen(loader.load([by_length[row] for row in rows], epoch))


def rows_of(*rows: list[int]) -> Rows:
    return [np.array(row) for row in rows]


def test_packed_rows_give_the_loss_gradient_and_validation_of_padded_ones(cache: Path, tmp_path: Path) -> None:
    packed = training(cache, tmp_path / "a", batch_tokens=2048)
    padded = training(cache, tmp_path / "b", packing=False)
    assert packed.batching.shape
    results = []
    for one, rows in ((packed, rows_of([3, 0], [7, 5])), (padded, rows_of([0], [3], [5], [7]))):
        results.append((one.step([placed(one, rows, 4)]), one.validate()))
    (first, row), (second, other) = results
    assert first.window.tokens == second.window.tokens and first.window.samples == second.window.samples == 4
    torch.testing.assert_close(first.window.sums, second.window.sums, rtol=1e-6, atol=1e-6)
    assert first.grad_norm == pytest.approx(second.grad_norm, rel=1e-5)
    for (name, weight), other_weight in zip(packed.draft.named_parameters(), padded.draft.parameters(), strict=True):
        # A gradient of next to nothing is divided by itself, so that its rounding shows.
        torch.testing.assert_close(weight, other_weight, rtol=1e-4, atol=1e-5, msg=name)
    assert row["val_serving_walk"] == pytest.approx(other["val_serving_walk"], rel=1e-6)
    assert row["val_loss"] == pytest.approx(other["val_loss"], rel=1e-4)


def test_accumulation_equals_one_large_batch(cache: Path, tmp_path: Path) -> None:
    small = training(cache, tmp_path / "a", packing=False, accumulation=2)
    large = training(cache, tmp_path / "b", packing=False)
    rows = rows_of(*([sample] for sample in range(8)))
    first = small.step([placed(small, rows[:4]), placed(small, rows[4:])])
    second = large.step([placed(large, rows)])
    torch.testing.assert_close(first.window.sums, second.window.sums, rtol=1e-6, atol=1e-6)
    assert first.grad_norm == pytest.approx(second.grad_norm, rel=1e-5)


def test_a_micro_batch_without_an_anchor_adds_nothing_and_stops_nobody(cache: Path, tmp_path: Path) -> None:
    alone, both = training(cache, tmp_path / "a"), training(cache, tmp_path / "b")
    batch = placed(alone, rows_of([3, 5]))
    without = replace(batch, keep_mask=torch.zeros_like(batch.keep_mask))
    first, second = alone.step([batch]), both.step([without, batch])
    torch.testing.assert_close(first.window.sums, second.window.sums, rtol=0, atol=0)
    assert second.grad_norm == pytest.approx(first.grad_norm, rel=1e-6)


def test_a_non_finite_loss_stops_with_step_samples_and_checkpoint(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(cache, tmp_path / "run", save_every=1, batch_tokens=320, val_samples=0)
    schedule = Training(settings, Corpus.open((cache,)), Ranks(rank=0, count=1, device=CPU)).schedule
    (first, _), (second, _) = schedule.between(0, 2)
    poisoned = int(second[0][0])
    assert not any(poisoned in row for row in first)
    read = Cache.codes

    def broken(reader: Cache, sample: int, columns: list[int], out: NDArray[np.uint16]) -> NDArray[np.uint16]:
        read(reader, sample, columns, out)
        if sample == poisoned:
            out[:] = 0x7FC0
        return out

    monkeypatch.setattr(Cache, "codes", broken)
    listed = sorted(int(sample) for row in second for sample in row)
    with pytest.raises(DflashError) as refused:
        train(settings, Silent())
    assert "not finite at step 2" in str(refused.value) and str(listed) in str(refused.value)
    assert "step-0000001" in str(refused.value) and f"--sample {listed[0]}" in str(refused.value)


def test_the_average_is_what_is_validated_and_saved_and_goes_on_exactly(cache: Path, tmp_path: Path) -> None:
    for name in "ab":
        train(config(cache, tmp_path / name, ema=0.9, steps=8, save_every=4, val_every=4), Silent())
    served, masters = (
        load_file(tmp_path / f"a/checkpoints/step-0000008/{name}.safetensors") for name in ("model", "masters")
    )
    assert not torch.equal(served["fc.weight"], masters["fc.weight"])
    rows = [row for row in _without_times(tmp_path / "a") if "val_loss" in row]
    shutil.rmtree(tmp_path / "b/checkpoints/step-0000008")
    train(config(cache, tmp_path / "b", ema=0.9, steps=8, save_every=4, val_every=4), Silent())
    again = load_file(tmp_path / "b/checkpoints/step-0000008/model.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in served.items())
    one = training(cache, tmp_path / "c")
    one.draft.load_state_dict(served)
    assert one.validate()["val_loss"] == pytest.approx(rows[-1]["val_loss"], rel=1e-6)


def test_the_average_starts_as_the_mean_of_few_and_never_outweighs_its_decay() -> None:
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(model.weight, 0.0)
    average, expected = WeightAverage(model, 0.5), 0.0
    for step in range(12):
        torch.nn.init.constant_(model.weight, float(step))
        average.update(model, step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    assert average.weights["weight"].item() == pytest.approx(expected)


def test_a_run_without_a_better_walk_stops_early_and_stays_stopped(cache: Path, tmp_path: Path) -> None:
    settings = config(cache, tmp_path / "run", learning_rate=1e-9, steps=40, val_every=4, patience=2)
    done = train(settings, Silent())
    assert done.state.step == done.state.best_step + 8 < 40
    assert list_checkpoints(tmp_path / "run")[-1].name == f"step-{done.state.step:07d}"
    assert train(settings, Silent()).state.step == done.state.step
    assert train(replace(settings, patience=None), Silent()).state.step == 40


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, math.inf) for name in ("clip", "gamma", "learning_rate", "weight_decay", "draft_rope_theta")),
        *((name, math.nan) for name in ("clip", "gamma", "learning_rate", "weight_decay", "epochs", "warmup_ratio")),
        *(("epochs", value) for value in (math.inf, 1e12)),
        ("seed", 2**63),
    ],
)
def test_numbers_that_no_run_can_compute_with_are_refused(name: str, value: float) -> None:
    with pytest.raises(DflashError, match=rf"{name} is {re.escape(str(value))}; expected"):
        config(Path("cache"), Path("run"), **{name: value})


def test_patience_without_held_out_samples_is_refused(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(DflashError, match="no sample is held out"):
        train(config(cache, tmp_path / "run", patience=2, val_samples=0), Silent())
    assert not (tmp_path / "run").exists()


def test_a_run_starts_from_a_draft_and_refuses_one_of_another_shape(cache: Path, run: Path, tmp_path: Path) -> None:
    draft = tmp_path / "draft"
    export(run, draft)
    start = training(cache, tmp_path / "run", draft_layers=None, init_from=draft)  # its one layer is the default
    weights = load_file(draft / "model.safetensors")
    assert all(torch.equal(start.draft.state_dict()[name], tensor.float()) for name, tensor in weights.items())
    with pytest.raises(MismatchError, match=r"num_hidden_layers +draft: 1 +run: 2"):
        training(cache, tmp_path / "run", draft_layers=2, init_from=draft)
    with pytest.raises(MismatchError, match=r"target_layer_ids +draft: \(1, 2, 4\) +run: \(1, 4\)"):
        training(cache, tmp_path / "run", layers=(1, 4), init_from=draft)
    settings = config(cache, tmp_path / "run", steps=2, init_from=draft)
    train(settings, Silent())
    shutil.copytree(draft, tmp_path / "moved")
    assert train(replace(settings, init_from=tmp_path / "moved"), Silent()).state.step == 2
    with pytest.raises(MismatchError, match=r"init_from +run: \w{64} +now: None"):
        train(replace(settings, init_from=None), Silent())


class Told(Silent):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


@pytest.mark.parametrize("field", ["target/weights_sha256/model.safetensors", "target/chat_template_sha256", "capture"])
def test_a_run_starts_from_a_draft_of_the_same_target_alone(cache: Path, run: Path, tmp_path: Path, field: str) -> None:
    other = made_otherwise(cache, tmp_path / "other", set_field(f"identity/{field}", "0" * 64))
    export(run, tmp_path / "draft")
    for start in (tmp_path / "draft", list_checkpoints(run)[-1]):
        settings = config(cache, tmp_path / "next" / start.name, steps=2, init_from=start)
        with pytest.raises(
            MismatchError, match=rf"(?s)another target than.*\n  {field.replace('/', '.')} +draft: "
        ) as told:
            train(replace(settings, caches=(other,)), Silent())
        assert str(told.value).count("cache: ") == 1 and not settings.out.exists()
        train(settings, told := Told())
        assert not [line for line in told.lines if "does not say" in line]


def test_a_run_starts_from_a_draft_of_the_same_target_that_was_spread_otherwise(
    cache: Path, run: Path, tmp_path: Path
) -> None:
    other = made_otherwise(cache, tmp_path / "other", set_field("identity/target/device_map", "auto"))
    settings = config(other, tmp_path / "next", steps=2, init_from=list_checkpoints(run)[-1])
    assert train(settings, Silent()).state.step == 2


def test_a_draft_that_does_not_say_its_target_starts_a_run_and_is_told(cache: Path, run: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "draft")
    path = tmp_path / "draft" / "model.safetensors"
    save_file(load_file(path), path, metadata={"format": "pt"})  # as others publish them
    (tmp_path / "draft" / "checksums.json").unlink()
    train(config(cache, tmp_path / "next", steps=2, init_from=tmp_path / "draft"), told := Told())
    assert len([line for line in told.lines if "does not say which target" in line]) == 1


def test_a_run_with_causal_windows_goes_on_and_gives_its_causality_to_what_starts_from_it(
    cache: Path, tmp_path: Path
) -> None:
    settings = config(cache, tmp_path / "run", steps=2, sliding_window=64, causal_layers="sliding")
    train(settings, Silent())
    assert train(settings, Silent()).state.step == 2
    export(tmp_path / "run", tmp_path / "draft")
    start = training(cache, tmp_path / "next", draft_layers=None, init_from=tmp_path / "draft")
    assert (start.draft_config.sliding_window, start.draft_config.causal_layers) == (64, "all")
    with pytest.raises(MismatchError, match=r"causal_layers +draft: all +run: none"):
        training(cache, tmp_path / "next", draft_layers=None, init_from=tmp_path / "draft", causal_layers="none")


def test_gradient_checkpointing_changes_no_gradient(cache: Path, tmp_path: Path) -> None:
    plain, saving = training(cache, tmp_path / "a"), training(cache, tmp_path / "b", gradient_checkpointing=True)
    batch = placed(plain, rows_of([3, 5]))
    assert plain.step([batch]).grad_norm == pytest.approx(saving.step([batch]).grad_norm, rel=1e-6)
    assert plain.draft.state_dict().keys() == saving.draft.state_dict().keys()


def test_a_dry_run_writes_nothing_and_gives_the_steps_of_the_run(cache: Path, tmp_path: Path) -> None:
    settings = config(cache, tmp_path / "run", steps=None, epochs=1.5)
    found = dry_run(settings)
    assert not list(tmp_path.iterdir())
    done = train(settings, Silent())
    assert done.state.step == found.total_steps and done.parameters == found.parameters
    assert 0 < found.filled <= 1 and found.seconds > 0 and found.peak_bytes > found.weight_bytes
    masters_gradients_momentum = 12
    assert found.weight_bytes == pytest.approx(masters_gradients_momentum * found.parameters, rel=0.01)


def test_epochs_count_every_sample_so_often(cache: Path, tmp_path: Path) -> None:
    done = train(config(cache, tmp_path / "run", steps=None, epochs=2.0, val_samples=0), Silent())
    assert done.state.tokens == 2 * int(Cache.open(cache).samples.num_tokens.sum())


def test_the_saved_settings_are_those_of_the_call(cache: Path, tmp_path: Path) -> None:
    settings = config(cache, tmp_path / "run", steps=1, weights=(1.0,), ema=0.9)
    train(settings, Silent())
    assert TrainConfig(**read_settings(tmp_path / "run/config.toml", TrainConfig)) == settings


class FakeTracker(ModuleType):
    def __init__(self) -> None:
        super().__init__("trackio")
        self.__spec__ = ModuleSpec("trackio", None)
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.started: dict[str, object] = {}
        self.finished = False

    def init(self, **settings: object) -> None:
        self.started = settings

    def log(self, row: dict[str, float], step: int) -> None:
        self.rows.append((step, row))

    def finish(self) -> None:
        self.finished = True


def test_a_tracker_gets_the_rows_of_the_log_and_a_missing_one_is_named(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(cache, tmp_path / "run", steps=2, report_to="trackio")
    with pytest.raises(DflashError, match="trackio, which is not installed"):
        train(settings, Silent())
    assert not (tmp_path / "run").exists()
    tracker = FakeTracker()
    monkeypatch.setitem(sys.modules, "trackio", tracker)
    train(settings, Silent())
    assert [step for step, _ in tracker.rows] == [2, 2] and tracker.finished
    assert tracker.started["name"] == "run" and tracker.rows[1][1].keys() >= {"val_loss", "val_accuracy_by_slot/1"}


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
