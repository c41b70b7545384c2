"""The drafts we train, run by the real serving clients in processes of their own."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from serving import MISTAKES, Row, Served, check_training_equals_serving, short_rows
from tiny import ATTENTION, tiny_batch, tiny_draft, tiny_trainer
from torch import Tensor

from dflash_offline.stages.draft.weights import draft_state_dict
from dflash_offline.stages.trainer import DFlashTrainerModule

pytestmark = pytest.mark.clients
SCRIPT = Path(__file__).with_name("zlab_forward.py")


def run_client(trainer: DFlashTrainerModule, folder: Path, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Run z-lab's client with the trainer's draft, exported to `folder`."""
    client = Path(os.environ.get("DFLASH_ZLAB", ""))
    if not (client / "dflash" / "model.py").is_file():
        pytest.fail(
            f"DFLASH_ZLAB is {str(client)!r}; expected a folder that holds z-lab's unpacked package `dflash`. "
            f"Run `make check-clients`, which unpacks it and sets the variable."
        )
    draft = trainer.draft_model
    (folder / "config.json").write_text(json.dumps(draft.config.to_json()))
    save_file(draft_state_dict(draft, draft.config), folder / "model.safetensors", metadata={"format": "pt"})
    save_file({name: x.detach().clone() for name, x in inputs.items()}, folder / "inputs.safetensors")
    command = [sys.executable, str(SCRIPT), str(folder), str(folder / "inputs.safetensors"), str(folder / "out")]
    run = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(client)}, capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stderr
    return load_file(folder / "out")


def served_by_client(trainer: DFlashTrainerModule, rows: list[Row], folder: Path) -> Served:
    table, config = trainer.target_embed_tokens, trainer.draft_model.config
    inputs = {"mask_embedding": table.weight[config.mask_token_id]}
    for i, row in enumerate(rows):
        inputs[f"target_hidden.{i}"] = row.features(config.target_layer_ids)
        inputs[f"token_embedding.{i}"] = table(row.tokens)
        inputs[f"anchors.{i}"] = row.anchors
    outputs = run_client(trainer, folder, inputs)
    return [{kind: outputs[f"{kind}.{i}"] for kind in ("step", "cached")} for i in range(len(rows))]


def client_rows(trainer: DFlashTrainerModule) -> list[Row]:
    """Without context the client's cache is fed nothing in its first round; a real prompt has at least one token."""
    return short_rows(trainer.draft_model.config, first_anchor=1)


@pytest.mark.parametrize("attention", ATTENTION)
def test_training_equals_zlabs_client_at_every_anchor_step_by_step_and_cached(attention: str, tmp_path: Path) -> None:
    trainer = tiny_trainer(tiny_draft(**ATTENTION[attention]))
    rows = client_rows(trainer)
    check_training_equals_serving(trainer, rows, served_by_client(trainer, rows, tmp_path))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    trainer = tiny_trainer()
    return served_by_client(trainer, client_rows(trainer), tmp_path_factory.mktemp("served"))


@pytest.mark.parametrize("plant", MISTAKES)
def test_a_planted_mistake_differs_from_zlabs_client(
    plant: Callable[[DFlashTrainerModule, pytest.MonkeyPatch], dict[str, Any]],
    served: Served,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trainer = tiny_trainer()
    with pytest.raises(AssertionError, match="not close"):
        check_training_equals_serving(trainer, client_rows(trainer), served, **plant(trainer, monkeypatch))


@torch.no_grad()
def test_zlabs_client_gives_the_same_for_the_very_arguments_of_a_training_step(tmp_path: Path) -> None:
    trainer = tiny_trainer(attention_backend="eager")  # its mask is the dense one that the client takes too
    batch = tiny_batch(trainer.draft_model.config, [15, 9])
    calls: list[tuple[dict[str, Tensor], Tensor]] = []
    hook = trainer.draft_model.register_forward_hook(
        lambda _, args, call, output: calls.append((call, output)), with_kwargs=True
    )
    trainer(batch.input_ids, batch.hidden_states, batch.loss_mask, document_ids=batch.document_ids)
    hook.remove()
    call, trained = calls[0]
    rows = call.pop("rows")  # those that the loss reads; the client computes them all
    outputs = run_client(trainer, tmp_path, {f"call.{name}": x for name, x in call.items()})
    torch.testing.assert_close(outputs["call"].flatten(0, 1)[rows], trained, atol=1e-5, rtol=1e-5)
