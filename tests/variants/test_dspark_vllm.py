"""A real vLLM serves a DSpark draft of ours: the target's own answers, and the same rounds as here, one by one."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from live_vllm import decode_live, embedded_run
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


def without_bias(draft: Path, folder: Path) -> Path:
    """Return a copy of a draft whose Markov head changes nothing."""
    shutil.copytree(draft, folder, ignore=shutil.ignore_patterns("checksums.json"))
    weights = load_file(folder / "model.safetensors")
    weights["markov_head.markov_w2.weight"].zero_()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_every_round_is_that_of_this_project(tmp_path: Path) -> None:
    run = embedded_run(tmp_path / "made", final=True, draft_layers=2, variant="dspark", block_size=7, markov_rank=32)
    draft, files = export(run, tmp_path / "draft").draft, open_target(str(TARGET))
    config = json.loads((draft / "config.json").read_text())
    assert config["architectures"] == ["Qwen3DSparkModel"]
    target = load_model(files, dtype=torch.float32, device=torch.device("cpu"))
    prompts = [encode_prompt(prompt, files.tokenizer, {}) for prompt in read_prompts(PROMPTS, NUM_PROMPTS)]
    stops = sorted(stop_ids(target, files.tokenizer))
    plain = [plain_decode(target, prompt, NEW_TOKENS, stops).tokens for prompt in prompts]
    drafts = draft, without_bias(draft, tmp_path / "without")
    ours, others = (
        [speculative_decode(target, load_draft(folder), prompt, NEW_TOKENS, stops) for prompt in prompts]
        for folder in drafts
    )
    assert [one.kept for one in ours] != [one.kept for one in others], "the bias is to be felt"
    settings = {"method": "dspark"}
    found = decode_live(tmp_path, draft, prompts, new_runner=True, num_speculative_tokens=7, settings=settings)
    assert found.tokens == plain
    assert found.equal_prompts(ours) == NUM_PROMPTS
