"""DFlash 2 in the real clients, in processes of their own: what they compute is what the slow reference computes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from reference_dflash2 import candidates_of, config_json, draft_block, random_weights, scores_of, walk
from safetensors.torch import load_file, save_file
from serving import Row, check_training_equals_serving, short_rows
from tiny import tiny_target_ends
from torch import Tensor

from dflash_offline.pipeline.demo import PROMPTS, TARGET
from dflash_offline.stages.conversations.prompts import encode_prompt, read_prompts
from dflash_offline.stages.draft.decode import plain_decode, speculative_decode
from dflash_offline.stages.draft.weights import load_draft
from dflash_offline.stages.evaluate import stop_ids
from dflash_offline.stages.export import export
from dflash_offline.stages.target.files import open_target
from dflash_offline.stages.target.model import load_model
from dflash_offline.stages.trainer import DFlashTrainerModule

pytestmark = pytest.mark.clients
HERE = Path(__file__).parent
CLIENTS = HERE.parent / "clients"
SHAPES: dict[str, dict[str, Any]] = {
    "full": {},
    "three taps": {"conv_kernel_size": 3, "conv_group_size": 4},
    "sliding": {"layer_types": ["sliding_attention"] * 2, "sliding_window": 5, "use_sliding_window": True},
    "wide window": {"layer_types": ["sliding_attention"] * 2, "sliding_window": 2048, "use_sliding_window": True},
}


def run_script(script: Path, packages: str, *arguments: Path) -> Path:
    """Run a client's script in a process of its own, and return the last of its arguments, which it wrote."""
    folder = os.environ.get(packages)
    if not folder:
        pytest.fail(f"{packages} names no folder of the client's packages: run `make check-clients`, which makes it.")
    run = subprocess.run(
        [sys.executable, str(script), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": f"{folder}:{CLIENTS}"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr
    return arguments[-1]


def run_zlab(folder: Path, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return what z-lab's client computes with the draft in a folder."""
    save_file(inputs, folder / "inputs")
    arguments = folder, folder / "inputs", folder / "outputs"
    return load_file(run_script(HERE / "zlab_selector.py", "DFLASH_ZLAB", *arguments))


def write_draft(folder: Path, config: dict[str, Any]) -> dict[str, Tensor]:
    """Write a random draft as the contract has it, in float32, and return its tensors."""
    weights = random_weights(config)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return weights


def draw(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def reference_states(
    weights: dict[str, Tensor], config: dict[str, Any], table: Tensor, features: Tensor, token: int, anchor: int
) -> Tensor:
    """Return the reference's states [K, H] of the block at an anchor."""
    own = config["dflash_config"]
    ids = torch.tensor([token] + [own["mask_token_id"]] * (own["block_size"] - 1))
    return draft_block(weights, config, features[:anchor], table[ids])


@pytest.mark.parametrize("shape", SHAPES)
def test_zlabs_client_computes_what_the_contract_says(shape: str, tmp_path: Path) -> None:
    config = config_json(**SHAPES[shape])
    own, weights = config["dflash_config"], write_draft(tmp_path, config)
    head, table = 0.2 * draw((40, 32), 1), draw((40, 32), 2)
    inputs, rows = {"head": head, "mask_embedding": table[own["mask_token_id"]]}, []
    for i, length in enumerate((13, 6)):
        tokens = torch.randint(39, (length,), generator=torch.Generator().manual_seed(i))
        rows.append((tokens, draw((length, 64), 10 + i), torch.arange(1, length)))
        inputs |= {f"tokens.{i}": tokens, f"target_hidden.{i}": rows[-1][1], f"anchors.{i}": rows[-1][2]}
        inputs[f"token_embedding.{i}"] = table[tokens]
    found = run_zlab(tmp_path, inputs)
    changed = 0
    for i, (tokens, features, anchors) in enumerate(rows):
        for n, a in enumerate(anchors.tolist()):
            hidden = reference_states(weights, config, table, features, int(tokens[a]), a)
            for kind in ("step", "cached"):
                torch.testing.assert_close(found[f"{kind}.{i}"][n].double(), hidden, atol=1e-5, rtol=1e-5)
            unary = hidden @ head.double().T
            drafted = walk(weights, hidden[1:], unary[1:], int(tokens[a]), own["selector_top_k"])
            assert found[f"walk.{i}"][n].tolist() == drafted
            changed += drafted != unary[1:].argmax(dim=-1).tolist()
            for k in range(1, min(own["block_size"], len(tokens) - a)):
                candidates = found[f"candidates.{i}"][n, k - 1].tolist()
                assert set(candidates) == set(candidates_of(unary[k], own["selector_top_k"]))
                scores = scores_of(weights, hidden[k], unary[k], int(tokens[a + k - 1]), candidates)
                torch.testing.assert_close(found[f"scores.{i}"][n, k - 1].double(), scores, atol=1e-5, rtol=1e-5)
    assert changed, "the selector is to change what is drafted"


# Its window is counted from the anchor, not from each slot, so a narrow one differs.
@pytest.mark.parametrize("shape", ["full", "three taps", "wide window"])
def test_speculators_computes_what_the_contract_says(shape: str, tmp_path: Path) -> None:
    config = config_json(**SHAPES[shape])
    weights = write_draft(tmp_path, config)
    head, table, features = 0.2 * draw((40, 32), 1), draw((40, 32), 2), draw((17, 64), 3)
    tokens = torch.randint(39, (17,), generator=torch.Generator().manual_seed(4))
    inputs = {"head": head, "table": table, "tokens": tokens, "target_hidden": features}
    inputs["last_hidden"] = draw((17, 32), 5)
    save_file(inputs, tmp_path / "inputs")
    arguments = tmp_path, tmp_path / "inputs", tmp_path / "outputs"
    found = load_file(run_script(HERE / "speculators_selector.py", "DFLASH_SPECULATORS", *arguments))
    assert found["anchors"].tolist() == list(range(13))
    for n, a in enumerate(found["anchors"].tolist()):
        hidden = reference_states(weights, config, table, features, int(tokens[a]), a)
        torch.testing.assert_close(found["hidden"][n].double(), hidden, atol=1e-5, rtol=1e-5)
        assert found["predecessors"][n, 1:].tolist() == tokens[a : a + 3].tolist()
        for k in range(1, 4):
            candidates = found["candidates"][n, k].tolist()
            unary = head.double() @ hidden[k]
            scores = scores_of(weights, hidden[k], unary, int(tokens[a + k - 1]), candidates)
            torch.testing.assert_close(found["scores"][n, k].double(), scores, atol=1e-5, rtol=1e-5)


# --- this project beside them ------------------------------------------------------------------------------------


def zlab_rows(trainer: DFlashTrainerModule, rows: list[Row], folder: Path) -> list[dict[str, Tensor]]:
    """Return what z-lab's client computes at the anchors of rows, row by row."""
    table, config = trainer.target_embed_tokens, trainer.draft_model.config
    inputs = {"head": trainer.target_lm_head.weight, "mask_embedding": table.weight[config.mask_token_id]}
    for i, row in enumerate(rows):
        inputs |= {f"tokens.{i}": row.tokens, f"anchors.{i}": row.anchors, f"token_embedding.{i}": table(row.tokens)}
        inputs[f"target_hidden.{i}"] = row.features(config.target_layer_ids)
    found = run_zlab(folder, {name: tensor.detach().clone() for name, tensor in inputs.items()})
    names = {name.rpartition(".")[0] for name in found}
    return [{name: found[f"{name}.{i}"] for name in names} for i in range(len(rows))]


@torch.no_grad()
@pytest.mark.parametrize("shape", ["full", "sliding"])
def test_training_and_its_selector_equal_zlabs_client_at_every_anchor(shape: str, tmp_path: Path) -> None:
    config = config_json(**SHAPES[shape])
    write_draft(tmp_path, config)
    draft = load_draft(tmp_path)
    settings: dict[str, Any] = {"block_size": 4, "attention_backend": "sdpa"}
    trainer = DFlashTrainerModule(draft, *tiny_target_ends(draft.config), 39, **settings)
    trainer.loss_settings = {**trainer.loss_settings, "selector_loss_alpha": 0.0}  # the check is of the CE alone
    rows = short_rows(draft.config, first_anchor=1)
    found = zlab_rows(trainer, rows, tmp_path)
    check_training_equals_serving(trainer, rows, [{kind: one[kind] for kind in ("step", "cached")} for one in found])
    covered = 0
    for row, one in zip(rows, found, strict=True):
        tokens, features = row.tokens[None], row.features((1, 3))[None]
        for n, a in enumerate(row.anchors.tolist()):
            wanted = torch.zeros(())
            for k, truth in enumerate(row.tokens[a + 1 : a + 4].tolist()):
                candidates = one["candidates"][n, k].tolist()
                if truth in candidates:
                    wanted = wanted - one["scores"][n, k].log_softmax(-1)[candidates.index(truth)]
                    covered += 1
            step = trainer(tokens, features, torch.ones_like(tokens), anchors=torch.tensor([[a]]))
            torch.testing.assert_close(step.part_sums["selector_loss"], wanted, atol=1e-5, rtol=1e-5)
    assert covered >= 5, "some truths are to be candidates"


def test_an_export_of_the_embedded_target_decodes_alike_in_zlabs_client(dflash2_run: Path, tmp_path: Path) -> None:
    draft, files = export(dflash2_run, tmp_path / "draft").draft, open_target(str(TARGET))
    target = load_model(files, dtype=torch.float32, device=torch.device("cpu"))
    prompts = [encode_prompt(prompt, files.tokenizer, {}) for prompt in read_prompts(PROMPTS, 50)]
    stops = sorted(stop_ids(target, files.tokenizer))
    job = {"draft": str(draft), "target": str(TARGET), "prompts": prompts, "max_new_tokens": 256, "stop_ids": stops}
    (tmp_path / "job.json").write_text(json.dumps(job))
    arguments = tmp_path / "job.json", tmp_path / "result.json"
    result = json.loads(run_script(CLIENTS / "zlab_generate.py", "DFLASH_ZLAB", *arguments).read_text())
    assert (result["class"], result["missing_keys"], result["unexpected_keys"]) == ("DFlash2DraftModel", [], [])
    drafter = load_draft(draft)
    ours = [speculative_decode(target, drafter, prompt, 256, stops) for prompt in prompts]
    theirs = zip(result["tokens"], result["acceptance_lengths"], strict=True)
    for prompt, own, (tokens, lengths) in zip(prompts, ours, theirs, strict=True):
        assert own.tokens == tokens == plain_decode(target, prompt, 256, stops).tokens
        assert own.produced == lengths
    produced = [length for own in ours for length in own.produced]
    assert sum(produced) / len(produced) > 1.5, "the draft is to have learned something"
