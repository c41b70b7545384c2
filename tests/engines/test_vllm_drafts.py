"""Drafts of two caches of the same conversations, vLLM's and transformers', are as good as each other."""

import os
import statistics
import subprocess
from pathlib import Path

import pytest
from live_vllm import environment
from test_vllm_extract import by_vllm

from dflash_offline.pipeline.demo import CONVERSATIONS, TARGET
from dflash_offline.schemas.settings.extract import ExtractConfig
from dflash_offline.schemas.settings.train import TrainConfig
from dflash_offline.stages.extract import extract
from dflash_offline.stages.progress import Silent
from dflash_offline.stages.train import train

pytestmark = pytest.mark.vllm
QUICK = int(os.environ.get("DFLASH_VLLM_PROMPTS", "200")) < 100
SEEDS = range(2 if QUICK else 5)
LEARNING = {"steps": 20 if QUICK else 60, "optimizer": "muon", "learning_rate": 6e-3, "num_anchors": 16}
LEARNING |= {"packing": False, "batch_size": 8, "val_samples": 24, "draft_layers": 2}


def walk(cache: Path, out: Path, seed: int) -> float:
    """Return the serving walk of a short run's best checkpoint on held-out conversations."""
    return train(TrainConfig(caches=(cache,), out=out, seed=seed, **LEARNING), Silent()).state.best_walk


def test_a_draft_of_vllms_cache_walks_as_one_of_transformers(tmp_path: Path) -> None:
    data = tmp_path / "chats.jsonl"
    data.write_text("".join(CONVERSATIONS.read_text().splitlines(keepends=True)[:200]))
    config = {"data": (data,), "target": str(TARGET), "block_size": 8}
    extract(ExtractConfig(**config, out=tmp_path / "own"), Silent())
    done = subprocess.run(by_vllm(config, tmp_path / "other"), env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    own, other = (
        [walk(tmp_path / name, tmp_path / f"run-{name}-{seed}", seed) for seed in SEEDS] for name in ("own", "other")
    )
    print(f"transformers {own}, vLLM {other}")
    spread = max(own) - min(own)
    assert abs(statistics.mean(own) - statistics.mean(other)) <= spread > 0
    # By the same seed they differ by less than seeds do: the caches differ in the last bits alone.
    assert max(abs(a - b) for a, b in zip(own, other, strict=True)) <= spread
    assert statistics.mean(own) > 1.05, "something was learned"
