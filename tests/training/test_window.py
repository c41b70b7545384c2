"""The rows of the log: each covers the steps since the one before it, whatever interrupted or saved the run."""

import json
import os
import signal
from pathlib import Path

import pytest

from dflash_offline.schemas.settings.train import TrainConfig
from dflash_offline.stages.progress import Figure, Silent
from dflash_offline.stages.train import Interrupted, train

TIMES = {"tokens_per_s", "samples_per_s", "data_wait_share", "peak_memory_gib"}


def config(cache: Path, out: Path, **changes: object) -> TrainConfig:
    settings = {"steps": 30, "draft_layers": 1, "num_anchors": 4, "batch_tokens": 512, "val_every": 15, "device": "cpu"}
    return TrainConfig(caches=(cache,), out=out, **{**settings, **changes})


def rows(run: Path) -> list[dict[str, object]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name not in TIMES} for line in lines]


class StoppedAfter(Silent):
    """Sends this process a signal after so many steps."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def advance(self, amount: int, **figures: Figure) -> None:
        self.left -= amount
        if amount and not self.left:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(scope="module")
def whole(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    """The rows of a run that saves at its validations and its end alone."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train(config(cache, out), Silent())
    return rows(out)


def test_a_run_stopped_between_two_rows_logs_the_rows_of_one_that_went_through(
    cache: Path, whole: list[dict[str, object]], tmp_path: Path
) -> None:
    assert [row["step"] for row in whole] == [10, 15, 15, 20, 30, 30]
    for steps, saved in ((3, 4), (12, 17)):
        with pytest.raises(Interrupted, match=f"Stopped at step {saved};"):
            train(config(cache, tmp_path / "run"), StoppedAfter(steps))
    train(config(cache, tmp_path / "run"), Silent())
    assert rows(tmp_path / "run") == whole


def test_a_row_does_not_depend_on_when_checkpoints_are_saved(
    cache: Path, whole: list[dict[str, object]], tmp_path: Path
) -> None:
    train(config(cache, tmp_path / "run", save_every=4), Silent())
    assert rows(tmp_path / "run") == whole
