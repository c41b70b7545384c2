"""The real clients read an exported draft, and decode with it exactly as this project does, prompt by prompt."""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_decoding import fitted_draft, random_prompts, tiny_target
from torch import nn
from transformers import PreTrainedModel

from dflash_offline.pipeline.demo import CONVERSATIONS, PROMPTS, TARGET
from dflash_offline.schemas.draft.config import DraftConfig
from dflash_offline.schemas.settings.extract import ExtractConfig
from dflash_offline.schemas.settings.train import TrainConfig
from dflash_offline.stages.conversations.prompts import encode_prompt, read_prompts
from dflash_offline.stages.draft.decode import SpeculativeDecoding, plain_decode, speculative_decode
from dflash_offline.stages.draft.weights import draft_state_dict, load_draft
from dflash_offline.stages.evaluate import stop_ids
from dflash_offline.stages.export import export
from dflash_offline.stages.extract import extract
from dflash_offline.stages.progress import Silent
from dflash_offline.stages.target.files import open_target
from dflash_offline.stages.target.model import load_model
from dflash_offline.stages.train import train
from dflash_offline.stages.training.checkpoint import choose_checkpoint

pytestmark = pytest.mark.clients
SCRIPTS = Path(__file__).parent


def run_script(name: str, packages: str, given: Path, written: Path) -> dict[str, Any]:
    """Return what a script of `tests/clients` wrote, run in a process of its own.

    `packages` names the environment variable that holds the client's folder of packages; it is searched first.
    """
    folder = os.environ.get(packages)
    if not folder:
        pytest.fail(f"{packages} names no folder of the client's packages: run `make check-clients`, which makes it.")
    run = subprocess.run(
        [sys.executable, str(SCRIPTS / name), str(given), str(written)],
        env={**os.environ, "PYTHONPATH": folder},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr
    result: dict[str, Any] = json.loads(written.read_text())
    return result


def run_client(folder: Path, job: dict[str, Any], name: str = "zlab", packages: str = "DFLASH_ZLAB") -> dict[str, Any]:
    """Return what a client made of a job."""
    (folder / "job.json").write_text(json.dumps(job))
    return run_script(f"{name}_generate.py", packages, folder / "job.json", folder / f"{name}.json")


def save_draft(draft: nn.Module, folder: Path) -> None:
    """Write config.json and float32 weights, without the rounding that an export in bfloat16 brings."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(draft.config.to_json()))
    save_file(draft_state_dict(draft, draft.config, torch.float32), folder / "model.safetensors")


@pytest.fixture(scope="module", params=("qwen3", "llama"))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    target = tiny_target(request.param)
    draft = fitted_draft(target, random_prompts())
    target.save_pretrained(folder / "target")
    save_draft(draft, folder / "draft")
    return target, draft, folder


@pytest.mark.parametrize("with_stop", [False, True])
def test_the_reference_client_decodes_the_same_rounds(
    pair: tuple[PreTrainedModel, Any, Path], tmp_path: Path, with_stop: bool
) -> None:
    target, draft, folder = pair
    prompts = random_prompts(8)
    stops = [plain_decode(target, prompts[0], 40, ()).tokens[17]] if with_stop else []
    result = run_client(
        tmp_path,
        {
            "draft": str(folder / "draft"),
            "target": str(folder / "target"),
            "prompts": prompts,
            "max_new_tokens": 40,
            "stop_ids": stops,
        },
    )
    assert (result["missing_keys"], result["unexpected_keys"]) == ([], [])
    ours = [speculative_decode(target, draft, prompt, 40, stops) for prompt in prompts]
    for prompt, tokens, lengths, own in zip(prompts, result["tokens"], result["acceptance_lengths"], ours, strict=True):
        assert own.tokens == tokens == plain_decode(target, prompt, 40, stops).tokens
        assert own.produced == lengths
    assert max(length for own in ours for length in own.produced) > 2, "the draft is to be right sometimes"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run on the embedded target that has learned something."""
    folder = tmp_path_factory.mktemp("embedded")
    data = folder / "chats.jsonl"
    data.write_text("".join(CONVERSATIONS.read_text().splitlines(keepends=True)[:600]))
    extract(ExtractConfig(data=(data,), target=str(TARGET), out=folder / "cache", block_size=8, shard_mib=64), Silent())
    settings = {"steps": 150, "optimizer": "muon", "learning_rate": 3e-3, "draft_layers": 2, "num_anchors": 16}
    train(TrainConfig(caches=(folder / "cache",), out=folder / "run", **settings), Silent())
    return folder / "run"


@dataclass(frozen=True)
class Ours:
    """What this project decodes of 50 held-out prompts of the embedded target, in float32."""

    job: dict[str, Any]
    plain: list[list[int]]
    decoded: list[SpeculativeDecoding]


@pytest.fixture(scope="module")
def ours(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Ours:
    draft = export(run, tmp_path_factory.mktemp("draft") / "zlab").draft
    files = open_target(str(TARGET))
    target = load_model(files, dtype=torch.float32, device=torch.device("cpu"))
    prompts = [encode_prompt(prompt, files.tokenizer, {}) for prompt in read_prompts(PROMPTS, 50)]
    stops = sorted(stop_ids(target, files.tokenizer))
    job = {"draft": str(draft), "target": str(TARGET), "prompts": prompts, "max_new_tokens": 256, "stop_ids": stops}
    drafter = load_draft(draft)
    decoded = [speculative_decode(target, drafter, prompt, 256, stops) for prompt in prompts]
    produced = [length for one in decoded for length in one.produced]
    assert sum(produced) / len(produced) > 1.5, "the draft is to have learned something"
    return Ours(job, [plain_decode(target, prompt, 256, stops).tokens for prompt in prompts], decoded)


def test_an_export_of_the_embedded_target_decodes_alike_in_the_reference_client(ours: Ours, tmp_path: Path) -> None:
    result = run_client(tmp_path, ours.job)
    assert (result["missing_keys"], result["unexpected_keys"]) == ([], [])
    assert len(result["tokens"]) == 50
    for tokens, lengths, plain, own in zip(
        result["tokens"], result["acceptance_lengths"], ours.plain, ours.decoded, strict=True
    ):
        assert own.tokens == tokens == plain
        assert own.produced == lengths


def test_an_export_decodes_alike_in_transformers_own_generator(ours: Ours, run: Path, tmp_path: Path) -> None:
    draft = export(run, tmp_path / "draft", kind="transformers").draft
    result = run_client(tmp_path, ours.job | {"draft": str(draft)}, "transformers", "DFLASH_TRANSFORMERS")
    assert result["missing_keys"] == result["unexpected_keys"] == result["mismatched_keys"] == []
    assert result["version"] == "5.23.0"
    for tokens, theirs, calls, plain, own in zip(
        result["tokens"], result["plain"], result["target_calls"], ours.plain, ours.decoded, strict=True
    ):
        assert own.tokens == tokens == plain == theirs
        # It tells no lengths, but how often it asked the target: once for the prompt and once a round.
        assert calls == 1 + len(own.produced)


def test_the_lines_of_the_card_run_in_transformers_as_they_stand(run: Path, tmp_path: Path) -> None:
    draft = export(run, tmp_path / "draft", kind="transformers").draft
    lines = re.findall(r"^    (.*)$", (draft / "README.md").read_text(), re.MULTILINE)
    program = "\n".join(lines).replace("THIS_FOLDER", str(draft)) + "[0].tolist()"
    assert program.startswith("import torch") and "assistant_model=draft" in program
    env = {**os.environ, "PYTHONPATH": os.environ.get("DFLASH_TRANSFORMERS", "")}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


def test_an_export_loads_in_speculators(run: Path, tmp_path: Path) -> None:
    draft = export(run, tmp_path / "draft", kind="speculators").draft
    result = run_script("speculators_load.py", "DFLASH_SPECULATORS", draft, tmp_path / "result.json")
    config = DraftConfig.read(choose_checkpoint(run, "best"))
    assert (result["unknown"], result["different"], result["not_finite"]) == ([], [], [])
    assert result["class"] == "DFlashDraftModel" and result["versions"]["speculators"] == "0.9.0"
    assert result["layer_ids"] == [i + 1 for i in config.target_layer_ids]
    assert (result["block_size"], result["speculative_tokens"]) == (8, 7)
    assert (result["mask_token_id"], result["verifier"]) == (config.mask_token_id, str(TARGET))
    assert result["rope_theta"] == config.rope_theta
    borrowed = ["embed_tokens.weight", "lm_head.weight", "verifier_lm_head.weight", "verifier_norm.weight"]
    assert result["from_the_target"] == borrowed
