"""Runs that learn from the target's own distribution: exact in all ways to make them, and refused without it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from running import Settings
from torch import Tensor

from dflash_offline.schemas.errors import CacheError, DflashError, MismatchError
from dflash_offline.schemas.run import RunRecord
from dflash_offline.schemas.settings.train import TrainConfig
from dflash_offline.stages.progress import Silent
from dflash_offline.stages.train import dry_run, train
from dflash_offline.stages.training.corpus import Corpus
from dflash_offline.stages.training.loader import Batch
from dflash_offline.stages.training.ranks import Ranks
from dflash_offline.stages.training.run import Training
from dflash_offline.stages.training.simulated_serving import draft_everywhere, expected_rounds, simulate_serving

CPU = torch.device("cpu")
SETTINGS: Settings = {
    **{"loss": "kl:0.9,dflash:0.1", "teacher_temperature": 0.8, "steps": 8, "learning_rate": 2e-3, "draft_layers": 2},
    **{"num_anchors": 8, "batch_tokens": 512, "val_every": 4, "save_every": 4, "ema": 0.9, "device": "cpu"},
}


@pytest.fixture(scope="module")
def run(cache_with_final: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "run"
    train(config(cache_with_final, out), Silent())
    return out


def config(cache: Path, out: Path, **changes: object) -> TrainConfig:
    return TrainConfig(**{**SETTINGS, **changes, "caches": (cache,), "out": out})


def training(cache: Path, out: Path, **changes: object) -> Training:
    return Training(config(cache, out, **changes), Corpus.open((cache,)), Ranks(rank=0, count=1, device=CPU))


def rows(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_goes_on_to_the_same_weights_and_metrics(cache_with_final: Path, run: Path, tmp_path: Path) -> None:
    again = Path(shutil.copytree(run, tmp_path / "again"))
    shutil.rmtree(again / "checkpoints/step-0000008")
    train(config(cache_with_final, again, loss="dflash:0.10,kl:.9"), Silent())
    for name in ("model", "masters", "optimizer"):
        one, other = (each / f"checkpoints/step-0000008/{name}.safetensors" for each in (run, again))
        assert one.read_bytes() == other.read_bytes(), name
    assert rows(run)[-1] == rows(again)[-1]


def test_the_record_says_loss_and_temperature_and_another_is_another_run(cache_with_final: Path, run: Path) -> None:
    settings = RunRecord.read(run).identity["settings"]
    assert (settings["loss"], settings["teacher_temperature"]) == (SETTINGS["loss"], 0.8)
    for name, other in {"loss": "kl:0.8,dflash:0.2", "teacher_temperature": 1.0}.items():
        with pytest.raises(MismatchError, match=rf"was started with other settings(?s:.*){name}.*(?s:.*)run: .* now: "):
            train(config(cache_with_final, run, **{name: other}), Silent())


def test_a_run_with_hard_labels_is_the_same_whether_the_cache_holds_final_states(
    cache: Path, cache_with_final: Path, tmp_path: Path
) -> None:
    hard: Settings = {"loss": "dflash", "teacher_temperature": None, "steps": 4}
    for name, made in {"without": cache, "with": cache_with_final}.items():
        train(config(made, tmp_path / name, **hard), Silent())
    one, other = (tmp_path / name for name in ("without", "with"))
    assert "teacher_temperature" not in RunRecord.read(other).identity["settings"]
    weights = [each / "checkpoints/step-0000004/model.safetensors" for each in (one, other)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    more = {"val_expected_acceptance_length_t0.6", "val_expected_acceptance_length_t1"}
    assert rows(other)[-1].keys() - rows(one)[-1].keys() == more
    assert all(1 <= rows(other)[-1][name] <= 8 for name in more)


def test_a_cache_without_final_states_is_refused_with_the_command_that_adds_them(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(CacheError, match=r"cache has no final states.*repeat the `dflash extract`.*--final"):
        train(config(cache, tmp_path / "run"), Silent())
    assert not (tmp_path / "run").exists()


def test_a_temperature_that_nothing_reads_is_refused(cache_with_final: Path, tmp_path: Path) -> None:
    with pytest.raises(DflashError, match=r"teacher_temperature is 0.8, and --loss dpace does not learn"):
        train(config(cache_with_final, tmp_path / "run", loss="dpace"), Silent())


def test_accumulation_adds_up_to_one_larger_micro_batch(cache_with_final: Path, tmp_path: Path) -> None:
    """What ranks add up to is tried by test_ranks; their sums are those of micro-batches."""
    one = training(cache_with_final, tmp_path / "run", packing=False)
    shortest = np.argsort(one.corpus.num_tokens, kind="stable")[:4]
    whole, *parts = (placed(one, *each) for each in (shortest, shortest[:2], shortest[2:]))
    found = {}
    for name, batches in {"whole": [whole], "parts": parts}.items():
        one.draft.zero_grad()
        sums = sum((one._backward(batch) for batch in batches), torch.zeros(()))
        found[name] = (
            sums,
            [parameter.grad.clone() for parameter in one.draft.parameters() if parameter.grad is not None],
        )
    torch.testing.assert_close(found["whole"][0], found["parts"][0], rtol=1e-6, atol=1e-6)
    for grad, other in zip(found["whole"][1], found["parts"][1], strict=True):
        assert (grad - other).norm() <= 1e-5 * grad.norm()


def placed(one: Training, *samples: int) -> Batch:
    loader = one.loader(0)
    return loader.widen(loader.load([np.array([sample]) for sample in samples], 4))


def test_a_dry_run_counts_the_states_and_the_targets_logits(cache_with_final: Path, tmp_path: Path) -> None:
    soft = dry_run(config(cache_with_final, tmp_path / "run"))
    hard = dry_run(config(cache_with_final, tmp_path / "run", loss="dflash", teacher_temperature=None))
    assert soft.activation_bytes > hard.activation_bytes and soft.most_block_tokens < hard.most_block_tokens
    assert hard.flops_per_step < soft.flops_per_step < 1.5 * hard.flops_per_step


# --- expected acceptance -----------------------------------------------------------------------------------------


def slow_rounds(position: int, last: int, kept: np.ndarray, slots: int) -> float:
    """Return the rounds expected from a position on, by trying every way in which rounds may end."""
    if position >= last:
        return 0.0
    total, stays = 1.0, 1.0
    for slot in range(slots):
        total += stays * (1 - kept[position, slot]) * slow_rounds(position + slot + 1, last, kept, slots)
        stays *= kept[position, slot]
    return total + stays * slow_rounds(position + slots + 1, last, kept, slots)


def test_expected_rounds_are_those_of_every_way_in_which_rounds_may_end() -> None:
    kept = np.random.default_rng(0).random((2, 9, 3)).astype(np.float32)
    for first, last in ((0, 8), (2, 7), (5, 5)):
        expected = [slow_rounds(first, last, each, 3) for each in kept]
        np.testing.assert_allclose(expected_rounds(first, last, kept), expected, rtol=1e-6)
    certain = np.stack([np.ones((9, 3)), np.zeros((9, 3))]).astype(np.float32)
    assert expected_rounds(0, 8, certain).tolist() == [2, 8]


def test_what_stays_is_what_the_formula_says_of_each_slot(cache_with_final: Path, tmp_path: Path) -> None:
    one = training(cache_with_final, tmp_path / "run", packing=False)
    batch = placed(one, *np.argsort(one.corpus.num_tokens, kind="stable")[-1:])
    assert batch.final is not None
    found, head = draft_everywhere(one.module, batch).kept, one.module.target_lm_head
    assert found is not None
    checked = 0
    for row, _, stop in batch.spans:
        for anchor in batch.loss_mask[row].nonzero()[:, 0].tolist():
            states = drafted_alone(one, batch, row, anchor)
            for slot in range(1, 8):
                label = anchor + slot
                if label >= stop or not batch.loss_mask[row, label]:
                    assert (found[:, row, anchor, slot - 1] == 0).all()
                    continue
                token, checked = batch.input_ids[row, label], checked + 1
                for number, temperature in enumerate((0.6, 1.0)):
                    q = (head(states[slot]).double() / temperature).softmax(-1)[token]
                    p = (head(batch.final[row, label - 1].float()).double() / temperature).softmax(-1)[token]
                    expected = min(1.0, (q / p).item())
                    assert found[number, row, anchor, slot - 1] == pytest.approx(expected, rel=1e-3)
    assert checked > 40
    walked = simulate_serving(one.module, batch)
    tokens = sum(sum(rounds) for document in walked.walks[0] for rounds in document)
    assert walked.expected[:, 0].tolist() == [tokens, tokens]
    one.module.loss_type = "dflash"
    assert simulate_serving(one.module, replace(batch, final=None)).expected.tolist() == [[0, 0], [0, 0]]


@torch.no_grad()
def drafted_alone(one: Training, batch: Batch, row: int, anchor: int) -> Tensor:
    """Return the states [K, H] of one block as serving computes them."""
    size = one.draft_config.block_size
    block = torch.full((1, size), one.draft_config.mask_token_id)
    block[0, 0] = batch.input_ids[row, anchor]
    hidden = one.draft(
        position_ids=torch.arange(anchor + size)[None],
        noise_embedding=one.module.target_embed_tokens(block),
        target_hidden=batch.hidden_states[row : row + 1, :anchor].float(),
    )
    return hidden[0]
