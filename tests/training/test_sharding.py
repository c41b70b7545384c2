"""A draft that ranks hold together, in parts or each a whole one, trains as one process does, and is saved alike.

The ranks are processes forked from one that has imported torch; slow tests of `test_ranks.py` have torchrun start them.
"""

import json
import math
import os
import shutil
import signal
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from processes import Command, agents_store, as_ranks, rank_environments
from running import dflash, flags
from safetensors.torch import load_file
from tiny import TinyBatch, tiny_batch, tiny_draft, tiny_draft_config, tiny_trainer

from dflash_offline.schemas.settings.train import TrainConfig
from dflash_offline.schemas.variants.dflash2 import DFlash2
from dflash_offline.stages.draft.model import DraftModel
from dflash_offline.stages.progress import Silent
from dflash_offline.stages.train import dry_run, train
from dflash_offline.stages.training.checkpoint import CheckpointWriter, list_checkpoints
from dflash_offline.stages.training.corpus import Corpus
from dflash_offline.stages.training.ranks import distribute, joined_ranks, reduce_gradients, whole
from dflash_offline.stages.training.run import Training

SETTINGS: dict[str, Any] = {
    "steps": 4,
    "learning_rate": 2e-3,
    "draft_layers": 2,
    "num_anchors": 8,
    "batch_tokens": 512,
    "val_samples": 6,
    "val_every": 2,
    "save_every": 2,
    "keep": 9,
    "device": "cpu",
}
DFLASH2 = {"variant": "dflash2", "selector_rank": 8, "conv_group_size": 8}
CASES: dict[str, dict[str, Any]] = {
    "base": {"accumulation": 2, "ema": 0.9, "gradient_checkpointing": True, "draft_intermediate_size": 33},
    "selector": {**DFLASH2, "gradient_checkpointing": True},
}
SLOW_CASES: dict[str, dict[str, Any]] = {
    "bfloat16": {**DFLASH2, "dtype": "bfloat16", "ema": 0.9},
    "muon": {"optimizer": "muon", "draft_intermediate_size": 33},
    "compiled": {"compile": True, "activation_budget": 0.5},
}
TIMES = {"time", "tokens_per_s", "samples_per_s", "data_wait_share", "peak_memory_gib"}


def config(cache: Path, out: Path, **changes: Any) -> TrainConfig:
    return TrainConfig(caches=(cache,), out=out, **{**SETTINGS, **changes})


def train_all(*configs: TrainConfig) -> None:
    for each in configs:
        train(each, Silent())


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(run: Path, other: Path, tolerance: float = 1e-6) -> None:
    assert [row["step"] for row in rows(run)] == [row["step"] for row in rows(other)]
    for mine, its in zip(rows(run), rows(other), strict=True):
        assert mine.keys() == its.keys()
        for name in its.keys() - TIMES:
            near = 10 * tolerance if name == "grad_norm" else tolerance  # Adam magnifies small gradients
            assert mine[name] == pytest.approx(its[name], rel=near, abs=near), (mine["step"], name)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def cut(run: Path, to: Path, step: int) -> Path:
    """Copy a run as it was when a step's checkpoint had been written."""
    shutil.copytree(run, to)
    for folder in list_checkpoints(to):
        if folder.name > f"step-{step:07d}":
            shutil.rmtree(folder)
    return to


def by_one(cache: Path, folder: Path, cases: dict[str, dict[str, Any]]) -> None:
    """Train in a process of its own, as ranks do: torch's compiler hides its own warnings from users alone."""
    configs = [
        config(cache, folder / name / "one", **{**changes, "accumulation": 2 * changes.get("accumulation", 1)})
        for name, changes in cases.items()
    ]
    as_ranks(1, train_all, *configs)


def by_two(cache: Path, folder: Path, cases: dict[str, dict[str, Any]]) -> None:
    configs = [
        config(cache, folder / name / kind, **changes, shard_draft=kind == "parts")
        for name, changes in cases.items()
        for kind in ("parts", "copies")
    ]
    as_ranks(2, train_all, *configs)


@pytest.fixture(scope="module")
def runs(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cases' runs, of one process and of two ranks that hold parts or copies of the draft."""
    folder = tmp_path_factory.mktemp("runs")
    by_one(cache, folder, CASES)
    by_two(cache, folder, CASES)
    return folder


@pytest.mark.parametrize("kind", ["parts", "copies"])
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_train_as_one_with_twice_the_accumulation(runs: Path, case: str, kind: str) -> None:
    assert_same_run(runs / case / kind, runs / case / "one")


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW_CASES)
def test_two_ranks_train_as_one_with_twice_the_accumulation_also(cache: Path, tmp_path: Path, case: str) -> None:
    by_one(cache, tmp_path, {case: SLOW_CASES[case]})
    by_two(cache, tmp_path, {case: SLOW_CASES[case]})
    for kind in ("parts", "copies"):
        assert_same_run(tmp_path / case / kind, tmp_path / case / "one", 1e-5 if case == "compiled" else 1e-6)


@pytest.mark.slow
def test_two_ranks_train_heads_that_learn_from_the_targets_distribution_as_one_does(
    cache_with_final: Path, tmp_path: Path
) -> None:
    case = {"dspark": {"variant": "dspark", "markov_rank": 6, "block_size": 7, "ema": 0.9}}
    by_one(cache_with_final, tmp_path, case)
    by_two(cache_with_final, tmp_path, case)
    for kind in ("parts", "copies"):
        assert_same_run(tmp_path / "dspark" / kind, tmp_path / "dspark" / "one")


def gradients(draft: DraftModel, batches: list[TinyBatch], is_reduced: list[bool]) -> list[NDArray[np.float32]]:
    trainer = tiny_trainer(draft)
    for batch, now in zip(batches, is_reduced, strict=True):
        reduce_gradients(draft, now)
        anchors = torch.tensor([[1, 3]])
        ids = {"document_ids": batch.document_ids, "anchors": anchors}
        trainer(batch.input_ids, batch.hidden_states, batch.loss_mask, **ids).loss_sum.backward()
    return [whole(parameter.grad).numpy() for parameter in draft.parameters() if parameter.grad is not None]


def batches_of(rank: int) -> list[TinyBatch]:
    found = [tiny_batch(tiny_draft_config(), [12], seed=7 + 2 * rank + number) for number in range(2)]
    if rank == 1:
        found[1].loss_mask.zero_()
    return found


def distributed_gradients(sharded: bool, is_reduced: list[bool]) -> list[NDArray[np.float32]]:
    with joined_ranks("cpu") as ranks:
        draft = tiny_draft(**UNEVEN)
        distribute(draft, ranks, sharded=sharded, bfloat16=False)
        return gradients(draft, batches_of(ranks.rank), is_reduced)


UNEVEN: dict[str, Any] = {
    "variant": DFlash2(conv_kernel_size=2, conv_group_size=8, selector_rank=6, selector_top_k=5),
    "intermediate_size": 49,
}
"""Three ranks share nothing of it evenly, and one has nothing of the convolutions' kernels."""


@pytest.mark.parametrize(("sharded", "is_reduced"), [(True, [True, True]), (False, [False, True])])
def test_gradients_are_the_sums_of_three_ranks_one_of_which_supervises_nothing(
    sharded: bool, is_reduced: list[bool]
) -> None:
    expected = gradients(tiny_draft(**UNEVEN), [batch for rank in range(3) for batch in batches_of(rank)], 6 * [True])
    for found in as_ranks(3, distributed_gradients, sharded, is_reduced):
        for mine, sum_ in zip(found, expected, strict=True):
            np.testing.assert_allclose(mine, sum_, rtol=0, atol=3e-6 * np.abs(sum_).max())


def saved_again(begun: TrainConfig, to: Path) -> None:
    """Load a run's newest checkpoint, and save it in another folder."""
    with joined_ranks("cpu") as ranks:
        training = Training(begun, Corpus.open(begun.caches), ranks)
        training.resume()
        with CheckpointWriter(to, 1, ranks) as writer:
            writer.save(training.state, training.draft, training.optimizers, training.average)


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_that_other_ranks_load_and_save_keeps_every_byte(
    runs: Path, cache: Path, tmp_path: Path, case: str
) -> None:
    changes = CASES[case]
    accumulation = changes.get("accumulation", 1)
    one = config(cache, runs / case / "one", **{**changes, "accumulation": 2 * accumulation})
    (by_one := tmp_path / "by_one").mkdir()
    saved_again(replace_out(one, runs / case / "parts"), by_one)
    (by_parts := tmp_path / "by_parts").mkdir()
    as_ranks(2, saved_again, config(cache, runs / case / "one", **changes, shard_draft=True), by_parts)
    for begun, again in ((runs / case / "parts", by_one), (runs / case / "one", by_parts)):
        saved, *others = list_checkpoints(again)
        assert not others
        assert content(saved) == content(list_checkpoints(begun)[-1])


def replace_out(begun: TrainConfig, out: Path) -> TrainConfig:
    return TrainConfig(**{**vars(begun), "out": out})


def test_a_run_goes_on_with_more_ranks_or_fewer_whatever_they_hold(runs: Path, cache: Path, tmp_path: Path) -> None:
    two = CASES["base"]
    same = cut(runs / "base" / "parts", tmp_path / "same", 2)
    more = cut(runs / "base" / "one", tmp_path / "more", 2)
    as_ranks(2, train_all, *(config(cache, run, **two, shard_draft=True) for run in (same, more)))
    fewer = cut(runs / "base" / "parts", tmp_path / "fewer", 2)
    train(config(cache, fewer, **{**two, "accumulation": 4}), Silent())
    for run in (same, more, fewer):
        assert_same_run(run, runs / "base" / "one")
    last = [load_file(list_checkpoints(run)[-1] / "masters.safetensors") for run in (same, runs / "base" / "parts")]
    assert all(torch.equal(last[0][name], last[1][name]) for name in last[0])


def test_a_rank_holds_a_half_of_masters_gradients_and_moments_and_a_dry_run_says_so(
    cache: Path, tmp_path: Path
) -> None:
    changes = {"draft_intermediate_size": 33, "val_samples": 0}
    found = as_ranks(2, dry_run, config(cache, tmp_path / "run", **changes, shard_draft=True))
    copies = as_ranks(2, dry_run, config(cache, tmp_path / "run", **changes))
    train(config(cache, tmp_path / "one", **changes, steps=1), Silent())
    shapes = [
        tensor.shape for tensor in load_file(list_checkpoints(tmp_path / "one")[-1] / "model.safetensors").values()
    ]
    steps = 4 * len(shapes)  # AdamW's counts
    numbers = {rank: [math.prod(((rows + 1 - rank) // 2, *others)) for rows, *others in shapes] for rank in (0, 1)}
    assert [dry.weight_bytes - steps for dry in found] == [16 * sum(numbers[rank]) for rank in (0, 1)]
    assert {dry.weight_bytes - steps for dry in copies} == {16 * sum(map(math.prod, shapes))}
    said = as_ranks(2, dry_run_output, cache, tmp_path / "run")
    assert "weights, gradients and optimizer on each of 2 ranks, each a part of them; " in said[0] and not said[1]


def dry_run_output(cache: Path, out: Path) -> str:
    result = dflash("train", cache, "--out", out, *flags(SETTINGS), "--dry-run", "--shard-draft")
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize("killed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_the_death_of_a_rank_ends_the_other_with_one_message_and_the_command_goes_on(
    cache: Path, tmp_path: Path, killed: int
) -> None:
    run = tmp_path / "run"
    command = ["train", str(cache), "--out", str(run), *flags({**SETTINGS, "steps": 24}), "--shard-draft"]
    store = agents_store()  # torchrun keeps it when it starts ranks again
    environments = rank_environments(2, store)
    with ExitStack() as stack:
        first = [Command(command, environment=each) for each in environments]
        stack.callback(lambda: [each.send_signal(signal.SIGKILL) for each in first])
        while not list_checkpoints(run):
            assert all(each.poll() is None for each in first)
            time.sleep(0.01)
        first[killed].send_signal(signal.SIGKILL)
        code, said = first[1 - killed].wait(30)
    assert code == 1 and said.count("Another of the 2 ranks has ended") == 1 and "Traceback" not in said, said
    second = [Command(command, environment=each) for each in environments]
    assert [each.wait()[0] for each in second] == [0, 0]
    assert list_checkpoints(run)[-1].name == "step-0000024"


def meet(late: int) -> int:
    """Join the ranks, a second late as that rank, and return the number of those that are here."""
    time.sleep(float(os.environ["RANK"] == str(late)))
    with joined_ranks("cpu") as ranks:
        return int(ranks.add(torch.ones(1)).item())


@pytest.mark.parametrize("late", [0, 1])
def test_ranks_connect_with_those_that_are_here_and_not_with_those_that_left(late: int) -> None:
    store = agents_store()
    for _ in range(3):
        assert as_ranks(2, meet, late, store=store) == [2, 2]
