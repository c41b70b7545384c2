"""A DFlash 2 run on the embedded target, made once for the clients that serve it."""

from pathlib import Path

import pytest

from dflash_offline.pipeline.demo import CONVERSATIONS, TARGET
from dflash_offline.schemas.settings.extract import ExtractConfig
from dflash_offline.schemas.settings.train import TrainConfig
from dflash_offline.stages.extract import extract
from dflash_offline.stages.progress import Silent
from dflash_offline.stages.train import train


@pytest.fixture(scope="session")
def dflash2_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run that has learned something, convolutions and selector included."""
    folder = tmp_path_factory.mktemp("dflash2")
    data = folder / "chats.jsonl"
    data.write_text("".join(CONVERSATIONS.read_text().splitlines(keepends=True)[:600]))
    extract(ExtractConfig(data=(data,), target=str(TARGET), out=folder / "cache", block_size=8, shard_mib=64), Silent())
    settings = {"steps": 150, "optimizer": "muon", "learning_rate": 6e-3, "draft_layers": 2, "num_anchors": 16}
    settings |= {"packing": False, "batch_size": 8, "val_samples": 16, "variant": "dflash2", "selector_rank": 32}
    train(TrainConfig(caches=(folder / "cache",), out=folder / "run", **settings), Silent())
    return folder / "run"
