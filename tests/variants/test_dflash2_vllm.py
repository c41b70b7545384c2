"""A real vLLM serves a DFlash 2 draft of ours: the target's own answers, and the same rounds as here, one by one."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from live_vllm import decode_live
from safetensors.torch import load_file, save_file

from dflash_offline.pipeline.demo import PROMPTS, TARGET
from dflash_offline.stages.conversations.prompts import encode_prompt, read_prompts
from dflash_offline.stages.draft.decode import plain_decode, speculative_decode
from dflash_offline.stages.draft.weights import load_draft
from dflash_offline.stages.evaluate import stop_ids
from dflash_offline.stages.export import export
from dflash_offline.stages.target.files import open_target
from dflash_offline.stages.target.model import load_model

pytestmark = pytest.mark.vllm
NUM_PROMPTS = min(int(os.environ.get("DFLASH_VLLM_PROMPTS", "200")), 20)
NEW_TOKENS = 256


def without_selector(draft: Path, folder: Path) -> Path:
    """Return a copy of a draft whose selector changes nothing."""
    shutil.copytree(draft, folder, ignore=shutil.ignore_patterns("checksums.json"))
    weights = load_file(folder / "model.safetensors")
    weights["candidate_selector.successor_codebook"].zero_()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_every_round_is_that_of_this_project(dflash2_run: Path, tmp_path: Path) -> None:
    draft, files = export(dflash2_run, tmp_path / "draft").draft, open_target(str(TARGET))
    config = json.loads((draft / "config.json").read_text())
    assert config["architectures"] == ["DFlash2DraftModel"]
    target = load_model(files, dtype=torch.float32, device=torch.device("cpu"))
    prompts = [encode_prompt(prompt, files.tokenizer, {}) for prompt in read_prompts(PROMPTS, NUM_PROMPTS)]
    stops = sorted(stop_ids(target, files.tokenizer))
    plain = [plain_decode(target, prompt, NEW_TOKENS, stops).tokens for prompt in prompts]
    drafts = draft, without_selector(draft, tmp_path / "without")
    ours, others = (
        [speculative_decode(target, load_draft(folder), prompt, NEW_TOKENS, stops) for prompt in prompts]
        for folder in drafts
    )
    assert [one.kept for one in ours] != [one.kept for one in others], "the selector is to be felt"
    found = decode_live(tmp_path, draft, prompts, new_runner=True)
    assert found.tokens == plain
    assert found.equal_prompts(ours) == NUM_PROMPTS
