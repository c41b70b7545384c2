"""Tiny targets and caches, made once a test session."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: tests run side by side
os.environ["HF_HUB_OFFLINE"] = "1"

import gc
import hashlib
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from processes import leave_syncing_out
from tiny_target import save_conversations, save_target
from transformers.utils import logging

from dflash_offline.schemas import files
from dflash_offline.schemas.settings.extract import ExtractConfig
from dflash_offline.schemas.settings.train import TrainConfig
from dflash_offline.stages.extract import extract
from dflash_offline.stages.progress import Silent
from dflash_offline.stages.train import train

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background, and then by what tests start
logging.disable_progress_bar()
leave_syncing_out()


@pytest.fixture(scope="module", autouse=True)
def frozen() -> None:
    """Leave what is imported out of what the collector walks: it takes 0.2 s, each time that a target is dropped."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3 target of six layers, its template with generation tags."""
    return save_target(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL file of 80 conversations."""
    return save_conversations(tmp_path_factory.mktemp("data") / "chats.jsonl", 80)


@pytest.fixture(scope="session")
def extract_config(target: Path, data: Path) -> dict[str, object]:
    """Settings that make a cache of several shards; add `out`."""
    return {
        "data": (data,),
        "target": str(target),
        "layers": (1, 2, 4),
        "block_size": 8,
        "shard_mib": 1,
        "chunk_tokens": 32,
        "device": "cpu",
    }


@pytest.fixture(scope="session")
def cache(extract_config: dict[str, object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete cache; copy it before changing anything."""
    out = tmp_path_factory.mktemp("cache") / "cache"
    extract(ExtractConfig(**extract_config, out=out), Silent())
    return out


@pytest.fixture(scope="session")
def cache_with_final(extract_config: dict[str, object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete cache that also holds the target's final states; copy it before changing anything."""
    out = tmp_path_factory.mktemp("final") / "cache"
    extract(ExtractConfig(**extract_config, out=out, final=True), Silent())
    return out


@pytest.fixture(scope="session")
def run(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of four steps; copy it before changing anything."""
    out = tmp_path_factory.mktemp("run") / "run"
    train(TrainConfig(caches=(cache,), out=out, steps=4, draft_layers=1, num_anchors=4, device="cpu"), Silent())
    return out


@pytest.fixture
def slow_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every update of a file's sha256 take long enough for what is hashed to be overwritten meanwhile."""

    class SlowDigest:
        def __init__(self, content: bytes = b"") -> None:
            self._digest = hashlib.sha256(content)

        def update(self, content: memoryview) -> None:
            time.sleep(0.01)
            self._digest.update(content)

        def hexdigest(self) -> str:
            return self._digest.hexdigest()

    monkeypatch.setattr(files, "hashlib", SimpleNamespace(sha256=SlowDigest, file_digest=hashlib.file_digest))


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Have the metadata of a vLLM found, whose version a test may write anew; returns its folder."""
    folder = tmp_path / "packages" / "vllm-0.32.0.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0\n")
    monkeypatch.syspath_prepend(folder.parent)
    return folder
