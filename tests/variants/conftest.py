"""A DFlash 2 run on the embedded target, made once for the clients that serve it."""

from pathlib import Path

import pytest
from live_vllm import embedded_run


@pytest.fixture(scope="session")
def dflash2_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run that has learned something, convolutions and selector included."""
    folder = tmp_path_factory.mktemp("dflash2")
    return embedded_run(folder, draft_layers=2, variant="dflash2", selector_rank=32)
