"""Ranks started together on this machine, gloo between them: what they train is what one process trains.

The slow tests have torchrun start them; the others fork them as it would.
"""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import Command, agents_store, rank_environments
from running import flags
from safetensors.torch import load_file

from dflash_offline.schemas.errors import DflashError, MismatchError
from dflash_offline.schemas.settings.train import TrainConfig
from dflash_offline.stages.progress import Silent
from dflash_offline.stages.train import train
from dflash_offline.stages.training.checkpoint import list_checkpoints
from dflash_offline.stages.training.ranks import joined_ranks

SETTINGS: dict[str, Any] = {
    "steps": 12,
    "learning_rate": 2e-3,
    "draft_layers": 1,
    "num_anchors": 8,
    "batch_tokens": 512,
    "val_samples": 4,
    "val_every": 6,
    "save_every": 6,
    "device": "cpu",
}


def arguments(cache: Path, out: Path, **changes: object) -> list[str]:
    return ["train", str(cache), "--out", str(out), *flags({**SETTINGS, **changes})]


def start(
    ranks: int, cache: Path, out: Path, *, launcher: tuple[str, ...] = (), **changes: object
) -> subprocess.Popen[str]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), *launcher]
    program = [*(torchrun if ranks > 1 else []), "-m", "dflash_offline.pipeline.app"]
    command = [sys.executable, *program, *arguments(cache, out, **changes), "--json"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def started_together(command: list[str]) -> list[tuple[int, str]]:
    """Return how two ranks ended that are forked as torchrun would start them, and what each said."""
    store = agents_store()
    ranks = [Command(command, environment=each) for each in rank_environments(2, store)]
    return [rank.wait() for rank in ranks]


def finish(process: subprocess.Popen[str]) -> dict[str, object]:
    out, said = process.communicate(timeout=180)
    assert process.returncode == 0, said
    return json.loads(out)  # one document: one rank alone prints


def rows(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def pid_of_rank(launcher: subprocess.Popen[str], rank: int) -> int:
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    (found,) = [pid for pid in children if f"\0RANK={rank}\0" in Path(f"/proc/{pid}/environ").read_text()]
    return int(found)


@pytest.fixture(scope="module")
def one(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process that accumulates two micro-batches."""
    out = tmp_path_factory.mktemp("one") / "run"
    finish(start(1, cache, out, accumulation=2))
    return out


def assert_same_run(run: Path, one: Path, *names: str) -> None:
    assert [row["step"] for row in rows(run)] == [row["step"] for row in rows(one)]
    for mine, other in zip(rows(run), rows(one), strict=True):
        for name in other.keys() & {*names, "val_loss", "val_serving_walk", "val_accuracy"}:
            assert mine[name] == pytest.approx(other[name], rel=1e-6), (mine["step"], name)
    first, second = (load_file(list_checkpoints(path)[-1] / "model.safetensors") for path in (run, one))
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.slow
def test_two_ranks_equal_one_with_twice_the_accumulation(cache: Path, one: Path, tmp_path: Path) -> None:
    done = finish(start(2, cache, tmp_path / "run"))
    assert done["step"] == 12
    assert_same_run(tmp_path / "run", one, "loss", "accuracy", "accept_len_over_anchors")
    states = [json.loads((list_checkpoints(run)[-1] / "state.json").read_text()) for run in (tmp_path / "run", one)]
    assert states[0]["tokens"] == states[1]["tokens"]


@pytest.mark.slow
def test_two_ranks_equal_one_with_twice_the_accumulation_of_a_draft_with_a_selector(
    cache: Path, tmp_path: Path
) -> None:
    changes = {"variant": "dflash2", "selector_rank": 8, "conv_group_size": 8, "steps": 6}
    finish(start(1, cache, tmp_path / "one", accumulation=2, **changes))
    finish(start(2, cache, tmp_path / "two", **changes))
    names = "loss", "draft_loss", "selector_loss", "accuracy", "top_k_recall", "val_serving_walk_without_selector"
    assert_same_run(tmp_path / "two", tmp_path / "one", *names)


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_and_another_number_of_ranks_goes_on(
    cache: Path, one: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = start(2, cache, run)
    while process.poll() is None and not (run / "metrics.jsonl").exists():
        time.sleep(0.01)
    os.kill(pid_of_rank(process, 1), signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    saved = list_checkpoints(run)
    assert process.returncode != 0 and saved, said
    assert said.count("is saved") == 1, said
    assert finish(start(1, cache, run))["step"] == 12  # with all of a step's micro-batches
    assert_same_run(run, one)


@pytest.mark.slow
def test_ranks_that_torchrun_starts_again_after_the_death_of_one_go_on_from_the_last_checkpoint(
    cache: Path, one: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = start(2, cache, run, launcher=("--max-restarts", "1"), save_every=1, keep=99)
    while process.poll() is None and not list_checkpoints(run):
        time.sleep(0.005)
    os.kill(pid_of_rank(process, 1), signal.SIGKILL)
    out, said = process.communicate(timeout=180)
    assert process.returncode == 0, said
    assert json.loads(out)["step"] == 12
    assert said.count("Another of the 2 ranks has ended") == 1 and said.count("Going on from") == 1, said
    assert_same_run(run, one)


def test_ranks_that_cannot_share_a_step_of_the_run_alike_are_refused(cache: Path, tmp_path: Path) -> None:
    run, short = tmp_path / "run", {"steps": 1, "val_samples": 0, "save_every": 1}
    train(TrainConfig(caches=(cache,), out=run, **{**SETTINGS, **short, "accumulation": 3}), Silent())
    ended = started_together(arguments(cache, run, **short))
    assert all(code != 0 for code, _ in ended)
    assert any("takes 3 micro-batches a step, which 2 ranks cannot share alike" in said for _, said in ended), ended


def test_a_resume_with_another_set_of_micro_batches_a_step_is_refused(cache: Path, tmp_path: Path) -> None:
    begun = TrainConfig(caches=(cache,), out=tmp_path / "run", **{**SETTINGS, "steps": 1, "accumulation": 2})
    train(begun, Silent())
    with pytest.raises(MismatchError, match=r"settings\.accumulation_times_ranks +run: 2 +now: 1"):
        train(replace(begun, accumulation=1), Silent())


def test_an_error_of_one_rank_ends_all(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    ended = started_together(arguments(cache, tmp_path))
    assert all(code != 0 for code, _ in ended)
    assert any("is not a training run" in said for _, said in ended), ended


def test_ranks_of_torchrun_refuse_the_number_of_one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _device: None)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **__: pytest.fail("ranks were joined"))
    for name, value in {"MASTER_ADDR": "localhost", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    refused = pytest.raises(
        DflashError, match=r"device is 'cuda:1', but torchrun started 2 ranks.*CUDA_VISIBLE_DEVICES"
    )
    with refused, joined_ranks("cuda:1"):
        pass
    monkeypatch.setenv("WORLD_SIZE", "1")
    with joined_ranks("cuda:1") as ranks:  # one rank alone may be sent anywhere
        assert ranks.device == torch.device("cuda", 1)


def test_ranks_of_a_launcher_that_numbers_them_otherwise_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500", "WORLD_SIZE": "2", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(DflashError, match=r"LOCAL_RANK is not set.*torchrun"), joined_ranks("cuda"):
        pass
