"""A DFlash 2 run on the embedded target, made once for the clients that serve it, and tiles of tiny batches."""

from pathlib import Path

import pytest
from live_vllm import embedded_run

from dflash_offline.stages.draft import attention


@pytest.fixture(scope="session")
def dflash2_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run that has learned something, convolutions and selector included."""
    folder = tmp_path_factory.mktemp("dflash2")
    return embedded_run(folder, draft_layers=2, variant="dflash2", selector_rank=32)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give tiny batches several tiles of sdpa."""
    monkeypatch.setattr(attention, "TILE_QUERIES", 11)
