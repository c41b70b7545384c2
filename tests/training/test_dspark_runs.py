"""Runs of DSpark: exact in all ways to make them, from a cache with the target's final states alone, and exported."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from running import Settings
from safetensors.torch import load_file

from dflash_offline.schemas.errors import DflashError, MismatchError
from dflash_offline.schemas.run import RunRecord
from dflash_offline.schemas.settings.evaluate import EvalConfig
from dflash_offline.schemas.settings.train import TrainConfig
from dflash_offline.stages.evaluate import evaluate_folder
from dflash_offline.stages.export import export, export_draft
from dflash_offline.stages.progress import Silent
from dflash_offline.stages.train import dry_run, train
from dflash_offline.stages.training.corpus import Corpus
from dflash_offline.stages.training.loader import Batch
from dflash_offline.stages.training.optimizer import make_optimizers
from dflash_offline.stages.training.ranks import Ranks
from dflash_offline.stages.training.run import Training

CPU = torch.device("cpu")
SETTINGS: Settings = {
    **{"variant": "dspark", "markov_rank": 6, "block_size": 7, "steps": 8, "optimizer": "muon", "draft_layers": 2},
    **{"learning_rate": 2e-3, "num_anchors": 8, "batch_tokens": 512, "val_every": 4, "save_every": 4, "ema": 0.9},
    "device": "cpu",
}
TABLES = ("markov_head.markov_w1.weight", "markov_head.markov_w2.weight")


@pytest.fixture(scope="module")
def run(cache_with_final: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "run"
    train(config(cache_with_final, out), Silent())
    return out


def config(cache: Path, out: Path, **changes: object) -> TrainConfig:
    return TrainConfig(**{**SETTINGS, **changes, "caches": (cache,), "out": out})


def training(cache: Path, out: Path, **changes: object) -> Training:
    """Return a run whose heads already matter."""
    made = Training(config(cache, out, **changes), Corpus.open((cache,)), Ranks(rank=0, count=1, device=CPU))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in made.draft.named_parameters():
            if name.startswith(("markov_head.", "confidence_head.")):
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return made


def placed(one: Training, *rows: list[int]) -> Batch:
    loader, by_length = one.loader(0), np.argsort(one.corpus.num_tokens, kind="stable")
    return loader.widen(loader.load([by_length[np.array(row)] for row in rows], 4))


def last_row(run: Path, name: str) -> dict[str, float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if name in row][-1]


def test_a_run_goes_on_to_the_same_weights_and_metrics(cache_with_final: Path, run: Path, tmp_path: Path) -> None:
    again = Path(shutil.copytree(run, tmp_path / "again"))
    shutil.rmtree(again / "checkpoints/step-0000008")
    train(config(cache_with_final, again, anchors="partial"), Silent())
    for name in ("model", "masters", "optimizer"):
        one, other = (each / f"checkpoints/step-0000008/{name}.safetensors" for each in (run, again))
        assert one.read_bytes() == other.read_bytes(), name
    assert last_row(run, "val_loss") == last_row(again, "val_loss")
    settings = RunRecord.read(run).identity["settings"]
    assert (settings["anchors"], settings["gamma"]) == ("partial", 4.0), "as published for seven drafted tokens"
    with pytest.raises(MismatchError, match=r"l1_loss_alpha +run: 0.9 +now: 0.5"):
        train(config(cache_with_final, again, l1_loss_alpha=0.5), Silent())
    with pytest.raises(DflashError, match="--anchors whole is not for a draft of the variant dspark"):
        train(config(cache_with_final, again, anchors="whole"), Silent())


def test_a_cache_without_the_targets_final_states_is_refused(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(DflashError, match="--final"):
        train(config(cache, tmp_path / "run"), Silent())


@pytest.mark.parametrize("other", ["packed", "accumulated", "checkpointed"])
def test_every_shape_of_a_batch_gives_the_same_sums_and_gradients(
    cache_with_final: Path, tmp_path: Path, other: str
) -> None:
    def stepped(one: Training, *batches: Batch) -> tuple[tuple[float, ...], dict[str, torch.Tensor]]:
        one._update = lambda: None  # type: ignore[method-assign]
        window = one.step(batches).window
        return window.sums, {name: p.grad.clone() for name, p in one.draft.named_parameters() if p.grad is not None}

    padded = training(cache_with_final, tmp_path / "a", packing=False)
    first = stepped(padded, placed(padded, [0], [3], [5], [7]))
    changes: dict[str, object] = {"packing": False, "accumulation": 2 if other == "accumulated" else 1}
    changes |= {"packing": True, "batch_tokens": 2048} if other == "packed" else {}
    one = training(cache_with_final, tmp_path / "b", gradient_checkpointing=other == "checkpointed", **changes)
    rows = {"packed": [[[3, 0], [7, 5]]], "accumulated": [[[0], [5]], [[3], [7]]]}.get(other, [[[0], [3], [5], [7]]])
    second = stepped(one, *(placed(one, *each) for each in rows))
    torch.testing.assert_close(first[0], second[0], rtol=1e-6, atol=1e-6)
    assert first[1].keys() == second[1].keys() == dict(one.draft.named_parameters()).keys()
    for name, grad in first[1].items():
        torch.testing.assert_close(second[1][name], grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_neither_decay_nor_muon_touches_the_tables(cache_with_final: Path, tmp_path: Path, optimizer: str) -> None:
    draft = training(cache_with_final, tmp_path / "run").draft
    before = {name: parameter.detach().clone() for name, parameter in draft.named_parameters()}
    optimizers = make_optimizers(draft, optimizer, 0.1, 0.5)
    for parameter in draft.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for each in optimizers:
        each.step()
    for name, parameter in draft.named_parameters():
        assert torch.equal(parameter, before[name]) != (parameter.dim() == 2 and name not in TABLES), name
    orthogonalized = {n for o in optimizers if isinstance(o, torch.optim.Muon) for n in o.param_groups[0]["names"]}
    assert not orthogonalized & {*TABLES}


def test_validation_says_what_the_heads_are_worth(run: Path) -> None:
    row = last_row(run, "val_loss")
    parts = 0.1 * row["val_ce_loss"] + 0.9 * row["val_l1_loss"] + row["val_confidence_loss"]
    assert row["val_loss"] == pytest.approx(parts, rel=1e-6)
    assert row["val_mean_acceptance"] == pytest.approx(1 - row["val_l1_loss"] / 2)
    assert 0 < row["val_mean_confidence"] < 1 and row["val_serving_walk_without_markov"] >= 1
    assert len(row["val_accuracy_by_slot"]) == 7, "every slot predicts"


def test_a_start_is_another_dspark_draft_and_no_base_draft(cache_with_final: Path, run: Path, tmp_path: Path) -> None:
    base = config(cache_with_final, tmp_path / "base", variant=None, markov_rank=None, steps=2)
    train(base, Silent())
    export(base.out, tmp_path / "draft")
    with pytest.raises(MismatchError, match=r"architecture +draft: \(absent\) +run: Qwen3DSparkModel"):
        train(config(cache_with_final, tmp_path / "a", init_from=tmp_path / "draft"), Silent())
    export(run, tmp_path / "spark")
    begun = config(
        cache_with_final, tmp_path / "b", init_from=tmp_path / "spark", variant=None, markov_rank=None, steps=2
    )
    assert train(begun, Silent()).state.step == 2


def test_an_export_walks_and_decodes_and_writes_again_as_the_same_bytes(
    cache_with_final: Path, run: Path, tmp_path: Path
) -> None:
    export(run, tmp_path / "draft")
    document = json.loads((tmp_path / "draft/config.json").read_text())
    assert document["architectures"] == ["Qwen3DSparkModel"] and "dflash_config" not in document
    walked = evaluate_folder(EvalConfig(draft=tmp_path / "draft", cache=cache_with_final, device="cpu"))
    assert walked.block_size == 8 and len(walked.drafted_by_slot) == 7
    target = RunRecord.read(run).origin["target"]
    live: Settings = {"target": target, "cache": cache_with_final, "limit": 2, "max_new_tokens": 12, "device": "cpu"}
    plain, ended = (
        evaluate_folder(EvalConfig(draft=tmp_path / "draft", confidence_threshold=threshold, **live))
        for threshold in (None, 1.0)
    )
    assert plain.lossless and ended.lossless and plain.drafted_tokens > ended.drafted_tokens == 0
    drawn = evaluate_folder(EvalConfig(draft=tmp_path / "draft", temperature=0.8, draft_lengths=True, **live))
    assert [one.name for one in drawn.proposals] == ["greedy", "drawn"]
    assert drawn.draft_lengths is not None and len(drawn.draft_lengths.lengths) == 7
    with pytest.raises(DflashError, match="confidence_threshold needs --target"):
        EvalConfig(draft=tmp_path / "draft", cache=cache_with_final, confidence_threshold=0.5)
    for kind in ("zlab", "speculators"):
        export_draft(tmp_path / "draft", tmp_path / kind, kind, target)
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "draft" / name).read_bytes() == (tmp_path / "zlab" / name).read_bytes()
    card = (tmp_path / "draft/README.md").read_text()
    assert '"method": "dspark"' in card and "DSPARK" in card and "l1_loss_alpha 0.9" in card
    assert '"num_speculative_tokens": 7}' in card and "--speculative-num-draft-tokens 8" in card


def test_a_dry_run_counts_the_heads(cache_with_final: Path, run: Path, tmp_path: Path) -> None:
    found = dry_run(config(cache_with_final, tmp_path / "dry"))
    weights = load_file(run / "checkpoints/step-0000008/model.safetensors")
    assert found.parameters == sum(weight.numel() for weight in weights.values())
    assert found.anchors == "partial"
