"""Checkpoints are written behind the steps: what is in them, what an error of it does, and what is given up."""

import errno
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dflash_offline.schemas.errors import DflashError
from dflash_offline.schemas.settings.train import TrainConfig
from dflash_offline.stages.draft.weights import load_draft
from dflash_offline.stages.progress import Figure, Silent
from dflash_offline.stages.train import train
from dflash_offline.stages.training import checkpoint
from dflash_offline.stages.training.checkpoint import CheckpointWriter, list_checkpoints, read_state
from dflash_offline.stages.training.ranks import Ranks

FILES = {"model.safetensors", "masters.safetensors", "optimizer.safetensors", "config.json", "state.json"}


def config(cache: Path, out: Path, **changes: object) -> TrainConfig:
    settings = {"steps": 9, "save_every": 3, "val_samples": 0, "ema": 0.9, "keep": 9, "device": "cpu"}
    small = {"draft_layers": 1, "num_anchors": 4, "batch_tokens": 512}
    return TrainConfig(caches=(cache,), out=out, **{**settings, **small, **changes})


@pytest.fixture(scope="module")
def whole(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that saved after 3, 6 and 9 steps."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train(config(cache, out), Silent())
    return out


def left(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("checkpoint")]


class Slow:
    """Lets the writing of a step's checkpoint go on only when it is let."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str, fail: Exception | None = None) -> None:
        self.begun, self.let = threading.Event(), threading.Event()
        save = checkpoint.save_weights

        def slow(path: Path, tensors: Mapping[str, Tensor]) -> str:
            if name in str(path):
                self.begun.set()
                assert self.let.wait(60)
                if fail:
                    path.write_bytes(b"half")
                    raise fail
            return save(path, tensors)

        monkeypatch.setattr(checkpoint, "save_weights", slow)


class At(Silent):
    """Does something after so many steps."""

    def __init__(self, **actions: Any) -> None:
        self.actions, self.step = {int(name.removeprefix("step")): action for name, action in actions.items()}, 0

    def advance(self, amount: int, **_: Figure) -> None:
        self.step += amount
        if amount and self.step in self.actions:
            self.actions[self.step]()


def test_steps_go_on_while_a_checkpoint_is_written_and_do_not_change_it(
    cache: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, seen = Slow(monkeypatch, "step-0000003"), []

    def after_two_more() -> None:
        assert slow.begun.wait(60)
        seen.extend(list_checkpoints(tmp_path / "run"))
        slow.let.set()

    train(config(cache, tmp_path / "run"), At(step5=after_two_more))
    assert not seen and left(tmp_path / "run") == left(whole) == [f"step-000000{step}" for step in (3, 6, 9)]
    for folder in list_checkpoints(whole):
        again = tmp_path / "run" / "checkpoints" / folder.name
        assert {path.name for path in again.iterdir()} == FILES
        for name in FILES - {"state.json"}:
            assert (again / name).read_bytes() == (folder / name).read_bytes(), (folder.name, name)
        assert read_state(again).step == read_state(folder).step
    assert not threads()


def test_each_checkpoint_waits_for_the_one_before(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow, seen = Slow(monkeypatch, "step-0000003"), []
    save = checkpoint.CheckpointWriter.save

    def noted(writer: checkpoint.CheckpointWriter, state: checkpoint.TrainState, *rest: Any) -> None:
        if state.step == 6:
            threading.Timer(0.3, slow.let.set).start()
        save(writer, state, *rest)
        seen.append((state.step, list_checkpoints(tmp_path / "run")[:1]))

    monkeypatch.setattr(checkpoint.CheckpointWriter, "save", noted)
    train(config(cache, tmp_path / "run", steps=7, save_every=3), Silent())
    assert seen[1] == (6, [tmp_path / "run/checkpoints/step-0000003"]) and slow.begun.is_set()


@pytest.mark.parametrize(("step", "written"), [(3, []), (6, ["step-0000003"]), (9, ["step-0000003", "step-0000006"])])
def test_an_error_of_the_writing_stops_the_run_and_leaves_no_half_checkpoint(
    cache: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, written: list[str]
) -> None:
    with monkeypatch.context() as here:
        slow = Slow(here, f"step-000000{step}", OSError(errno.ENOSPC, "No space left on device"))
        slow.let.set()
        progress = At()
        with pytest.raises(OSError, match="No space left"):
            train(config(cache, tmp_path / "run"), progress)
    assert left(tmp_path / "run") == written and step <= progress.step <= step + 3 and not threads()
    train(config(cache, tmp_path / "run"), Silent())
    for name in FILES - {"state.json"}:
        last = f"checkpoints/step-0000009/{name}"
        assert (tmp_path / "run" / last).read_bytes() == (whole / last).read_bytes()


def test_an_interrupt_gives_up_what_is_being_written_and_an_error_lets_it_be_finished(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for error, kept in ((KeyboardInterrupt(), []), (ZeroDivisionError(), ["step-0000003"])):
        with monkeypatch.context() as here:
            slow = Slow(here, "model.safetensors")

            def stop(slow: Slow = slow, error: BaseException = error) -> None:
                assert slow.begun.wait(60)
                threading.Timer(0.2, slow.let.set).start()
                raise error

            with pytest.raises(type(error)):
                train(config(cache, tmp_path / "run"), At(step4=stop))
        assert left(tmp_path / "run") == kept and not threads()
        shutil.rmtree(tmp_path / "run")


def test_an_error_of_a_step_is_told_with_that_of_the_writing(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Slow(monkeypatch, "model.safetensors", OSError(errno.ENOSPC, "No space left on device"))

    def stop() -> None:
        slow.let.set()
        raise checkpoint.DflashError("the step's own")

    with pytest.raises(checkpoint.DflashError, match=r"(?s)the step's own\nNor could .* No space left"):
        train(config(cache, tmp_path / "run"), At(step4=stop))


def test_a_rank_that_comes_after_the_first_has_written_is_not_stopped_by_what_it_wrote(whole: Path) -> None:
    there = list_checkpoints(whole)[0]
    state, draft = read_state(there), load_draft(there)
    for rank in (0, 1):
        with CheckpointWriter(whole, 9, Ranks(rank=rank, count=2, device=torch.device("cpu"))) as writer:
            if rank:
                writer.save(state, draft, [])
            else:
                with pytest.raises(DflashError, match="is in the way of the checkpoint of step 3"):
                    writer.save(state, draft, [])
    assert len(left(whole)) == 3
