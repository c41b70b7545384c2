"""A run learns what it is to learn, by the slow reference's loss; with a planted mistake it does not."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import ReferenceStep, train_step
from safetensors.torch import load_file
from torch import Tensor

from dflash_offline.schemas.draft.config import DraftConfig
from dflash_offline.schemas.settings.extract import ExtractConfig
from dflash_offline.schemas.settings.train import TrainConfig
from dflash_offline.stages import trainer
from dflash_offline.stages.draft.objective import Head, HeadTerms
from dflash_offline.stages.extract import extract
from dflash_offline.stages.progress import Silent
from dflash_offline.stages.store.cache import Cache
from dflash_offline.stages.train import train
from dflash_offline.stages.training import run as training
from dflash_offline.stages.training.checkpoint import list_checkpoints
from dflash_offline.stages.training.draft_setup import borrowed_parts


@pytest.fixture(scope="module")
def counting(extract_config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of answers that count on and on, so that each token says all that follow."""
    folder = tmp_path_factory.mktemp("counting")
    answers = ["".join(str((start + i) % 10) for i in range(30)) for start in range(30)]
    lines = [
        json.dumps({"messages": [{"role": "user", "content": f"cat {n}"}, {"role": "assistant", "content": answer}]})
        for n, answer in enumerate(answers)
    ]
    (folder / "chats.jsonl").write_text("\n".join(lines))
    settings = {**extract_config, "data": (folder / "chats.jsonl",), "block_size": 4, "out": folder / "cache"}
    extract(ExtractConfig(**settings), Silent())
    return folder / "cache"


def after_training(cache: Path, out: Path) -> ReferenceStep:
    """Train, and return what the reference finds for blocks of a few samples."""
    config = TrainConfig(
        caches=(cache,),
        out=out,
        steps=60,
        optimizer="muon",
        learning_rate=3e-2,
        draft_layers=1,
        num_anchors=16,
        batch_tokens=1024,
        val_samples=0,
        device="cpu",
    )
    train(config, Silent())
    checkpoint, opened = list_checkpoints(out)[-1], Cache.open(cache)
    head, embed = borrowed_parts(opened, torch.device("cpu"))
    documents = [
        {
            "input_ids": torch.from_numpy(opened.samples.input_ids(sample).astype("int64")),
            "hidden_states": torch.from_numpy(opened.values(sample)).flatten(1),
            "loss_mask": torch.from_numpy(opened.samples.loss_mask(sample)),
            "anchors": torch.from_numpy(opened.samples.loss_mask(sample)).nonzero()[:-3:7, 0],
        }
        for sample in (0, 3)
    ]
    weights = load_file(checkpoint / "model.safetensors")
    with torch.no_grad():
        return train_step(weights, DraftConfig.read(checkpoint), head, embed, documents)


def check_learned(found: ReferenceStep) -> None:
    assert found.loss.item() < 1.5 and found.correct_tokens >= 0.9 * found.valid_tokens > 0


def test_training_learns(counting: Path, tmp_path: Path) -> None:
    check_learned(after_training(counting, tmp_path / "run"))


def wrong_sign(monkeypatch: pytest.MonkeyPatch) -> None:
    loss = Head.loss

    def negated(*arguments: Any) -> HeadTerms:
        terms = loss(*arguments)
        return terms._replace(loss=-terms.loss)

    monkeypatch.setattr(Head, "loss", negated)


def shifted_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    slots = trainer.supervised_slots

    def shifted(anchors: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
        position, supervised = slots(anchors, *others)
        return (position + 1).clamp(max=others[1].shape[1] - 1), supervised

    monkeypatch.setattr(trainer, "supervised_slots", shifted)


def no_learning_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "learning_rate_at", lambda *_: 0.0)


@pytest.mark.parametrize("plant", [wrong_sign, shifted_labels, no_learning_rate])
def test_with_a_planted_mistake_it_does_not(
    plant: Callable[[pytest.MonkeyPatch], None], counting: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    found = after_training(counting, tmp_path / "run")
    with pytest.raises(AssertionError):
        check_learned(found)
