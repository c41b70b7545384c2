"""The reference client decodes an exported draft exactly as this project does, prompt by prompt."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_decoding import fitted_draft, random_prompts, tiny_target
from torch import nn
from transformers import PreTrainedModel

from dflash_offline.pipeline.embedded import CONVERSATIONS, PROMPTS, TARGET
from dflash_offline.pipeline.evaluate import stop_ids
from dflash_offline.pipeline.export import export
from dflash_offline.schemas.config import ExtractConfig, TrainConfig
from dflash_offline.stages.decode import plain_decode, speculative_decode
from dflash_offline.stages.drafter import draft_state_dict, load_draft
from dflash_offline.stages.extract import extract
from dflash_offline.stages.progress import Silent
from dflash_offline.stages.prompts import encode_prompt, read_prompts
from dflash_offline.stages.target import load_model, open_target
from dflash_offline.stages.train import train

pytestmark = pytest.mark.clients
SCRIPT = Path(__file__).parent / "clients" / "zlab_generate.py"


def run_client(folder: Path, job: dict[str, Any]) -> dict[str, Any]:
    """Return what the reference client made of a job, in a process of its own."""
    given, written = folder / "job.json", folder / "result.json"
    given.write_text(json.dumps(job))
    run = subprocess.run(
        [sys.executable, str(SCRIPT), str(given), str(written)], capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stderr
    result: dict[str, Any] = json.loads(written.read_text())
    return result


def save_draft(draft: nn.Module, folder: Path) -> None:
    """Write config.json and float32 weights, without the rounding that an export in bfloat16 brings."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(draft.config.to_json()))
    save_file(draft_state_dict(draft, draft.config, torch.float32), folder / "model.safetensors")


@pytest.fixture(scope="module", autouse=True)
def client() -> None:
    if "DFLASH_ZLAB" not in os.environ:
        pytest.fail("DFLASH_ZLAB names no unpacked reference client: run `make check-clients`, which fetches it.")


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


def test_an_export_of_the_embedded_target_decodes_alike_in_the_reference_client(tmp_path: Path) -> None:
    data = tmp_path / "chats.jsonl"
    data.write_text("".join(CONVERSATIONS.read_text().splitlines(keepends=True)[:600]))
    extract(
        ExtractConfig(data=(data,), target=str(TARGET), out=tmp_path / "cache", block_size=8, shard_mib=64), Silent()
    )
    settings = {"steps": 150, "optimizer": "muon", "learning_rate": 3e-3, "draft_layers": 2, "num_anchors": 16}
    train(TrainConfig(cache=tmp_path / "cache", out=tmp_path / "run", **settings), Silent())
    export(tmp_path / "run", tmp_path / "draft")

    files = open_target(str(TARGET))
    target = load_model(files, dtype=torch.float32, device=torch.device("cpu"))
    draft = load_draft(tmp_path / "draft")
    prompts = [encode_prompt(prompt, files.tokenizer, {}) for prompt in read_prompts(PROMPTS, 50)]
    stops = sorted(stop_ids(target, files.tokenizer))
    job = {"draft": str(tmp_path / "draft"), "target": str(TARGET), "prompts": prompts, "max_new_tokens": 256}
    result = run_client(tmp_path, {**job, "stop_ids": stops})
    assert (result["missing_keys"], result["unexpected_keys"]) == ([], [])
    ours = [speculative_decode(target, draft, prompt, 256, stops) for prompt in prompts]
    for prompt, tokens, lengths, own in zip(prompts, result["tokens"], result["acceptance_lengths"], ours, strict=True):
        assert own.tokens == tokens == plain_decode(target, prompt, 256, stops).tokens
        assert own.produced == lengths
    produced = [length for own in ours for length in own.produced]
    assert sum(produced) / len(produced) > 1.5, "the draft is to have learned something"
