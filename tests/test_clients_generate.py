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

from dflash_offline.stages.decode import plain_decode, speculative_decode
from dflash_offline.stages.drafter import draft_state_dict

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
