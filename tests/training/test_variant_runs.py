"""Runs of DFlash 2: they go on exactly, in all shapes of a batch alike, and from a base draft's weights."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dflash_offline.schemas.draft.config import DraftConfig
from dflash_offline.schemas.errors import DflashError, MismatchError
from dflash_offline.schemas.settings.evaluate import EvalConfig
from dflash_offline.schemas.settings.train import TrainConfig
from dflash_offline.schemas.variants.dflash2 import DFlash2
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
SHAPE: dict[str, object] = {"conv_kernel_size": 2, "conv_group_size": 8, "selector_rank": 6, "selector_top_k": 5}
SETTINGS: dict[str, object] = {
    **{"variant": "dflash2", "steps": 8, "optimizer": "muon", "learning_rate": 2e-3, "draft_layers": 2},
    **{"num_anchors": 8, "batch_tokens": 512, "val_every": 4, "save_every": 4, "ema": 0.9, "device": "cpu"},
    **SHAPE,
}
TABLES = ("base_kernel", "predecessor_codebook", "successor_codebook")


def config(cache: Path, out: Path, **changes: object) -> TrainConfig:
    return TrainConfig(**{**SETTINGS, **changes, "caches": (cache,), "out": out})


def training(cache: Path, out: Path, **changes: object) -> Training:
    """Return a run whose selector and convolutions already matter."""
    made = Training(config(cache, out, **changes), Corpus.open((cache,)), Ranks(rank=0, count=1, device=CPU))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in made.draft.named_parameters():
            if "_conv." in name or name.startswith("candidate_selector."):
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return made


def placed(one: Training, *rows: list[int]) -> Batch:
    loader, by_length = one.loader(0), np.argsort(one.corpus.num_tokens, kind="stable")
    return loader.widen(loader.load([by_length[np.array(row)] for row in rows], 4))


@pytest.fixture(scope="module")
def run(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "run"
    train(config(cache, out), Silent())
    return out


def test_a_run_goes_on_to_the_same_weights_and_metrics(cache: Path, run: Path, tmp_path: Path) -> None:
    again = Path(shutil.copytree(run, tmp_path / "again"))
    shutil.rmtree(again / "checkpoints/step-0000008")
    train(config(cache, again), Silent())
    for name in ("model", "masters", "optimizer"):
        one, other = (each / f"checkpoints/step-0000008/{name}.safetensors" for each in (run, again))
        assert one.read_bytes() == other.read_bytes(), name
    last = [json.loads((each / "metrics.jsonl").read_text().splitlines()[-1]) for each in (run, again)]
    assert last[0] == last[1]


SAID: dict[str, tuple[object, object]] = {
    **{"variant": ("dflash2", "dflash"), "conv_kernel_size": (2, 3), "conv_group_size": (8, 4)},
    **{"selector_rank": (6, 8), "selector_top_k": (5, 4), "selector_loss_alpha": (1.0, 0.5)},
    "selector_warmup_ratio": (0.0, 0.5),
}


@pytest.mark.parametrize("name", SAID)
def test_a_resume_may_say_what_a_variants_setting_resolves_to_and_nothing_else(
    cache: Path, run: Path, name: str
) -> None:
    same, other = SAID[name]
    assert train(config(cache, run, **{name: same}), Silent()).state.step == 8
    changes = {name: other} | (dict.fromkeys(SHAPE) if other == "dflash" else {})
    with pytest.raises(MismatchError, match=r"was started with other settings(?s:.*)run: .* now: "):
        train(config(cache, run, **changes), Silent())


def test_settings_of_another_variant_are_refused_by_name(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(DflashError, match=r"variant dflash, (?s:.*)selector_rank is a setting of the variant dflash2"):
        train(config(cache, tmp_path / "run", variant=None), Silent())


def test_a_kernel_that_no_block_has_room_for_is_refused_before_the_run(cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(DflashError, match=r"conv_kernel_size is 9; expected at most the block_size 8"):
        train(config(cache, out, conv_kernel_size=9), Silent())
    assert not out.exists()
    assert dry_run(config(cache, out, conv_kernel_size=8)).parameters
    with pytest.raises(DflashError, match=r"conv_kernel_size is 5; expected at most the block_size 4"):
        dry_run(config(cache, out, conv_kernel_size=5, block_size=4))


def stepped(one: Training, *batches: Batch) -> tuple[tuple[float, ...], dict[str, torch.Tensor]]:
    """Return a step's sums and the gradients of their mean loss."""
    one._update = lambda: None  # type: ignore[method-assign]
    window = one.step(batches).window
    return window.sums, {name: p.grad.clone() for name, p in one.draft.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("loss", ["dflash", "dpace"])
@pytest.mark.parametrize("other", ["packed", "accumulated", "checkpointed"])
def test_every_shape_of_a_batch_gives_the_same_sums_and_gradients(
    cache: Path, tmp_path: Path, other: str, loss: str
) -> None:
    padded = training(cache, tmp_path / "a", packing=False, loss=loss)
    first = stepped(padded, placed(padded, [0], [3], [5], [7]))
    changes: dict[str, object] = {"packing": False, "accumulation": 2 if other == "accumulated" else 1}
    changes |= {"packing": True, "batch_tokens": 2048} if other == "packed" else {}
    one = training(cache, tmp_path / "b", loss=loss, gradient_checkpointing=other == "checkpointed", **changes)
    rows = {"packed": [[[3, 0], [7, 5]]], "accumulated": [[[0], [5]], [[3], [7]]]}.get(other, [[[0], [3], [5], [7]]])
    second = stepped(one, *(placed(one, *each) for each in rows))
    torch.testing.assert_close(first[0], second[0], rtol=1e-6, atol=1e-6)
    assert first[1].keys() == second[1].keys() == dict(one.draft.named_parameters()).keys()
    for name, grad in first[1].items():
        torch.testing.assert_close(second[1][name], grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_neither_decay_nor_muon_touches_tables_and_kernels(cache: Path, tmp_path: Path, optimizer: str) -> None:
    draft = training(cache, tmp_path / "run").draft
    before = {name: parameter.detach().clone() for name, parameter in draft.named_parameters()}
    optimizers = make_optimizers(draft, optimizer, 0.1, 0.5)
    for parameter in draft.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for each in optimizers:
        each.step()
    for name, parameter in draft.named_parameters():
        is_linear = parameter.dim() == 2 and name.split(".")[-1] not in TABLES
        assert torch.equal(parameter, before[name]) != is_linear, name
    orthogonalized = [n for o in optimizers if isinstance(o, torch.optim.Muon) for n in o.param_groups[0]["names"]]
    assert not {name for name in orthogonalized if name.split(".")[-1] in TABLES}


@pytest.mark.parametrize("variant", [None, "dflash2"])
def test_memory_is_counted_with_the_moments_that_the_optimizers_hold(
    cache: Path, tmp_path: Path, variant: str | None
) -> None:
    own: dict[str, object] = {} if variant else dict.fromkeys(SHAPE)
    held, counted = [], []
    for name in ("adamw", "muon"):
        one = training(cache, tmp_path / "run", variant=variant, optimizer=name, **own)
        for parameter in one.draft.parameters():
            parameter.grad = torch.zeros_like(parameter)
        for each in one.optimizers:
            each.step()
        states = [state for each in one.optimizers for state in each.state.values()]
        held.append(sum(value.nbytes for state in states for value in state.values() if value.dim()))
        counted.append(one.memory.other)
    assert counted[0] - counted[1] == held[0] - held[1] > 0


def test_without_its_loss_the_selector_changes_nothing(cache: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(config(cache, run, selector_loss_alpha=0.0, ema=None), Silent())
    weights = load_file(run / "checkpoints/step-0000008/model.safetensors")
    assert not weights["candidate_selector.successor_codebook"].any()
    row = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][-1]
    assert row["val_serving_walk"] == row["val_serving_walk_without_selector"] <= row["val_serving_walk_oracle"]


def test_the_metrics_are_logged_of_both_paths_and_of_the_best_candidates(run: Path) -> None:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    row = [row for row in rows if "val_loss" in row][-1]
    slots = row["val_top_k_recall_by_slot"]
    assert len(slots) == 7 and all(top >= own for top, own in zip(slots, row["val_accuracy_by_slot"], strict=True))
    found = row["val_selector_accuracy_where_covered"] * row["val_top_k_recall"]
    assert found == pytest.approx(row["val_accuracy"], rel=1e-9) and 0 < row["val_top_k_recall"] <= 1
    assert row["val_accept_len_over_anchors_oracle"] >= row["val_accept_len_over_anchors"]
    assert row["val_loss"] == pytest.approx(row["val_draft_loss"] + row["val_selector_loss"], rel=1e-6)
    trained = [row for row in rows if "loss" in row][-1]
    assert {"draft_loss", "selector_loss", "top_k_recall", "accept_len_over_anchors_without_selector"} <= trained.keys()
    assert not any(name.endswith("_by_slot") for name in trained)


def test_a_run_starts_from_a_base_draft_and_at_first_drafts_what_that_does(cache: Path, tmp_path: Path) -> None:
    base = config(cache, tmp_path / "base", variant=None, ema=None, **dict.fromkeys(SHAPE))
    train(base, Silent())
    export(base.out, tmp_path / "draft")
    begun = {"init_from": tmp_path / "draft", "draft_layers": None}
    start = Training(
        config(cache, tmp_path / "run", **begun), Corpus.open((cache,)), Ranks(rank=0, count=1, device=CPU)
    )
    for name, weight in load_file(tmp_path / "draft/model.safetensors").items():
        assert torch.equal(start.draft.state_dict()[name], weight.float()), name
    same = {**begun, "variant": None, "anchors": "partial", **dict.fromkeys(SHAPE)}
    plain = Training(config(cache, tmp_path / "run", **same), Corpus.open((cache,)), start.ranks)
    rows = [each.validate() for each in (start, plain)]
    for name in ("val_serving_walk", "val_accuracy_by_slot", "val_accept_len_over_anchors"):
        assert rows[0][name] == rows[1][name]
    assert rows[0]["val_draft_loss"] == rows[1]["val_loss"]
    assert train(config(cache, tmp_path / "run", **begun, ema=None), Silent()).state.step == 8


def test_a_start_without_other_tensors_or_back_to_the_base_is_refused(cache: Path, run: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "draft")
    begun = {"init_from": tmp_path / "draft", "draft_layers": None}
    with pytest.raises(MismatchError, match=r"architecture +draft: DFlash2DraftModel +run: \(absent\)"):
        train(config(cache, tmp_path / "a", **begun, variant="dflash", **dict.fromkeys(SHAPE)), Silent())
    with pytest.raises(MismatchError, match=r"selector_rank +draft: 6 +run: 7"):
        train(config(cache, tmp_path / "a", **begun, selector_rank=7), Silent())
    goes_on = config(cache, tmp_path / "b", **begun, variant=None, **dict.fromkeys(SHAPE))
    assert train(goes_on, Silent()).state.step == 8
    assert DraftConfig.read(tmp_path / "b/checkpoints/step-0000008").variant == DFlash2(**SHAPE)
    path = tmp_path / "draft/model.safetensors"
    (tmp_path / "draft/checksums.json").unlink()
    weights = load_file(path)
    for missing in ("candidate_selector.successor_codebook", "layers.1.self_attn.q_proj.weight"):
        save_file({name: w for name, w in weights.items() if name != missing}, path, {"format": "pt"})
        with pytest.raises(MismatchError, match=rf"{missing} is missing"):
            train(config(cache, tmp_path / "c", **begun), Silent())


def test_an_export_walks_as_its_checkpoint_and_writes_again_as_the_same_bytes(
    cache: Path, run: Path, tmp_path: Path
) -> None:
    export(run, tmp_path / "draft")
    walked = [
        evaluate_folder(EvalConfig(draft=folder, cache=cache, device="cpu")).acceptance.pooled
        for folder in (run, tmp_path / "draft")
    ]
    assert walked[0] == pytest.approx(walked[1], rel=0.05)  # halved weights
    target = json.loads((run / "run.json").read_text())["origin"]["target"]
    export_draft(tmp_path / "draft", tmp_path / "again", "zlab", target)
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "draft" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    with pytest.raises(DflashError, match=r"transformers format has no draft of the variant dflash2.*--format zlab"):
        export(run, tmp_path / "other", kind="transformers")
    card = (tmp_path / "draft/README.md").read_text()
    assert "DFlash 2" in card and "selector_loss_alpha 1.0" in card and "selector_rank 6" in card


def test_a_dry_run_counts_the_variants_parameters(cache: Path, run: Path, tmp_path: Path) -> None:
    found = dry_run(config(cache, tmp_path / "dry"))
    weights = load_file(run / "checkpoints/step-0000008/model.safetensors")
    assert found.parameters == sum(weight.numel() for weight in weights.values())
