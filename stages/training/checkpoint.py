"""Checkpoints of a run: one folder each, written whole and renamed; nothing in it executes when read."""

import json
import os
import re
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from dflash_offline.schemas.checked import Count, checked, unlike
from dflash_offline.schemas.draft.config import DraftConfig
from dflash_offline.schemas.errors import CacheError, DflashError
from dflash_offline.schemas.files import remove_known, sha256_file, sync_folder, write_synced
from dflash_offline.schemas.locks import building_folder
from dflash_offline.schemas.run import CHECKPOINT, CHECKPOINTS, STATE, RunRecord, read_saved_state
from dflash_offline.schemas.sealed import sealed_bytes
from dflash_offline.stages.draft.model import DraftModel
from dflash_offline.stages.draft.weights import check_draft_weights, save_weights
from dflash_offline.stages.training.optimizer import WeightAverage
from dflash_offline.stages.training.ranks import Ranks, held_like, part, whole
from dflash_offline.stages.training.sums import Window, no_sums

WEIGHTS, MASTERS, OPTIMIZER = "model.safetensors", "masters.safetensors", "optimizer.safetensors"
"""`WEIGHTS` is validated and exported. With `--ema` it holds the averaged weights, and `MASTERS` the trained ones."""
FILES = (WEIGHTS, MASTERS, OPTIMIZER, "config.json", STATE)
"""All that a checkpoint may hold; what shows whose it is stands last, and is removed last."""
_GO_BACK = "Remove its folder to go on from the checkpoint before it."
_UNFINISHED = re.compile(r"\.step-\d{7,}\.(\d+|building-.+-\d+-[0-9a-f]{8})")
"""The first form is that of older versions."""


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """Where a run stands after a step. Data order and anchors follow from the step, so no generator is kept."""

    step: Count
    """Finished optimizer steps."""
    best_step: Count = 0
    """Step of the best validation so far; 0 for none."""
    best_walk: float = 0.0
    """Its acceptance length in simulated serving."""
    tokens: Count = 0
    """Training tokens seen."""
    window: Window = field(default_factory=Window)
    """Steps that the next row of the log covers; empty also where an older version saved a checkpoint between rows."""


def checkpoint_folder(run: Path, step: int) -> Path:
    """Return the folder of a step's checkpoint."""
    return run / CHECKPOINTS / f"step-{step:07d}"


class CheckpointWriter:
    """Writes a run's checkpoints behind its steps, one at a time.

    `save` copies what is to be saved and returns; a thread writes the copies, removes checkpoints that need not be
    kept, and keeps an error for the next call. As a context manager it returns once nothing is being written: a
    checkpoint is finished, or after a KeyboardInterrupt left out as if it had not been begun. The first rank writes,
    whole tensors; the others give it their parts.
    """

    def __init__(self, run: Path, keep: int, ranks: Ranks) -> None:
        self._run, self._keep, self._ranks = run, keep, ranks
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self._pinned: dict[str, dict[str, Tensor]] = {}
        """Of a GPU's tensors the copies, used again: page-locked memory is slow to come by."""
        self._is_abandoned = threading.Event()

    def save(
        self,
        state: TrainState,
        draft: DraftModel,
        optimizers: list[torch.optim.Optimizer],
        average: WeightAverage | None = None,
    ) -> None:
        """Begin to write masters, optimizers and state as they are now, once the checkpoint before is written.

        Every rank calls this.
        """
        self.wait()
        folder = checkpoint_folder(self._run, state.step)
        if self._ranks.is_first and os.path.lexists(folder):  # another rank may see what the first has just written
            raise DflashError(
                f"{folder} is in the way of the checkpoint of step {state.step}. Move it away, and repeat."
            )
        masters = {name: parameter.detach() for name, parameter in draft.named_parameters()}
        files = {WEIGHTS: average.weights if average else masters, OPTIMIZER: _optimizer_tensors(optimizers)}
        if average:
            files[MASTERS] = masters
        check_draft_weights(masters, draft.config, "The draft in memory")
        copies = {file: self._copied(file, tensors) for file, tensors in files.items()}
        if (device := masters["fc.weight"].device).type == "cuda":
            torch.cuda.current_stream(device).synchronize()
        if self._ranks.is_first:
            self._writing = self._pool.submit(self._write, folder, state, draft.config, copies)

    def check(self) -> None:
        """Raise what ended the writing of a checkpoint, if anything did."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Return once the checkpoint is there; raises what ended its writing."""
        if self._writing is not None:
            writing = self._writing
            writing.result()
            self._writing = None

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, _type: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, KeyboardInterrupt):
            self._is_abandoned.set()
        self._pool.shutdown()
        failed = None if self._writing is None else self._writing.exception()
        if failed is None or isinstance(failed, _Abandoned) or failed is error:
            return
        if error is None:
            raise failed
        if isinstance(error, Exception):
            raise DflashError(f"{error}\nNor could the last checkpoint be written: {failed}") from error

    def _copied(self, file: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return copies on the CPU of whole tensors; those of a GPU's are complete when its stream is.

        Those ranks that do not write return none.
        """
        held = self._pinned.get(file, {})
        copies = {}
        for name, tensor in ((name, whole(tensor)) for name, tensor in tensors.items()):
            if not self._ranks.is_first:
                continue
            if name not in held:
                held[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=not tensor.is_cpu)
            copies[name] = held[name].copy_(tensor, non_blocking=True)
            if not tensor.is_cpu:
                self._pinned[file] = held
        return copies

    def _write(
        self, folder: Path, state: TrainState, config: DraftConfig, files: Mapping[str, Mapping[str, Tensor]]
    ) -> None:
        """Write a checkpoint whole and rename its folder into place."""
        with building_folder(folder) as temporary:
            hashes = {}
            for file, tensors in files.items():
                if self._is_abandoned.is_set():
                    raise _Abandoned
                hashes[file] = save_weights(temporary / file, tensors)
            text = json.dumps(config.to_json(), indent=1).encode()
            hashes["config.json"] = write_synced(temporary / "config.json", [text])
            write_synced(temporary / STATE, [sealed_bytes({**asdict(state), "files": hashes})])
            sync_folder(temporary)
            temporary.rename(folder)
        sync_folder(folder.parent)
        prune_checkpoints(self._run, self._keep, state.best_step)


class _Abandoned(Exception):
    """The writing of a checkpoint was given up."""


def read_state(folder: Path) -> TrainState:
    """Return a checkpoint's state after checking every file's sha256."""
    if not (folder / STATE).is_file():
        raise DflashError(f"{folder} has the name of a checkpoint and no {STATE}. Move it away if it is not the run's.")
    saved, document = read_saved_state(folder)
    for name, digest in saved["files"].items():
        if not (folder / name).is_file() or sha256_file(folder / name) != digest:
            raise DflashError(
                f"{folder / name} is missing or damaged. Remove {folder} to go on from the checkpoint before it."
            )
    return checked(document, TrainState, folder / STATE)


def list_checkpoints(run: Path) -> list[Path]:
    """Return the run's checkpoints, oldest first; of any other name is what somebody else keeps beside them."""
    folders = [path for path in (run / CHECKPOINTS).glob("step-*") if CHECKPOINT.fullmatch(path.name)]
    return sorted(folders, key=lambda path: int(path.name.removeprefix("step-")))


def prune_checkpoints(run: Path, keep: int, best_step: int) -> None:
    """Remove all but the newest `keep` checkpoints and the best one.

    What cannot be shown to be a checkpoint of ours, by its files and by its state's seal and step, stays.
    """
    best = checkpoint_folder(run, best_step)
    for folder in list_checkpoints(run)[:-keep]:
        if folder == best:
            continue
        with suppress(CacheError):
            if checkpoint_folder(run, read_saved_state(folder)[0]["step"]) == folder:
                remove_known(folder, FILES)


def remove_unfinished_checkpoints(run: Path) -> None:
    """Remove what killed processes left of checkpoints; the caller holds the run's lock."""
    for folder in (run / CHECKPOINTS).glob(".step-*"):
        if _UNFINISHED.fullmatch(folder.name):
            remove_known(folder, FILES)


def restore(
    folder: Path, draft: DraftModel, optimizers: list[torch.optim.Optimizer], average: WeightAverage | None = None
) -> TrainState:
    """Load a checkpoint into draft, optimizers and average, of all tensors this rank's part; returns its state."""
    state = read_state(folder)
    if DraftConfig.read(folder) != draft.config:
        raise unlike(folder / "config.json", "it is another draft's than the run's", _GO_BACK)
    none = no_sums(draft.config.variant, draft.config.block_size, torch.device("cpu"))
    if len(state.window.sums) not in (0, len(none)):
        raise unlike(folder / STATE, f"window.sums holds {len(state.window.sums)} numbers", _GO_BACK)
    masters = {name: parameter.detach() for name, parameter in draft.named_parameters()}
    _fill(masters, _load_weights(folder / (MASTERS if average else WEIGHTS), draft))
    if average:
        _fill(average.weights, _load_weights(folder / WEIGHTS, draft))
    moments: dict[str, dict[str, Tensor]] = {}
    for key, tensor in _load(folder / OPTIMIZER).items():
        kind, _, name = key.partition(".")
        moments.setdefault(name, {})[kind] = tensor
    for optimizer, name, parameter in _named(optimizers):
        if name not in moments:
            raise unlike(folder / OPTIMIZER, f"it holds nothing of {name}", _GO_BACK)
        optimizer.state[parameter] = {kind: held_like(tensor, parameter) for kind, tensor in moments[name].items()}
    return state


def _fill(tensors: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        part(tensor).copy_(part(held_like(saved[name], tensor)))


def _load(path: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError) as error:
        raise unlike(path, f"it is no safetensors file ({error})", _GO_BACK) from error
    return tensors


def _load_weights(path: Path, draft: DraftModel) -> dict[str, Tensor]:
    weights = _load(path)
    check_draft_weights(weights, draft.config, str(path))
    return weights


def _optimizer_tensors(optimizers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    return {
        f"{kind}.{name}": value.detach()
        for optimizer, name, parameter in _named(optimizers)
        for kind, value in optimizer.state[parameter].items()
    }


def _named(optimizers: list[torch.optim.Optimizer]) -> Iterator[tuple[torch.optim.Optimizer, str, nn.Parameter]]:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for name, parameter in zip(group["names"], group["params"], strict=True):
                yield optimizer, name, parameter


def choose_checkpoint(run: Path, which: str) -> Path:
    """Return the run's best or last checkpoint; best is by the serving walk, and the last where none was measured."""
    saved = list_checkpoints(run)
    if not saved:
        raise DflashError(f"{run} has no checkpoint yet. Let `dflash train` reach its first one.")
    best = checkpoint_folder(run, read_state(saved[-1]).best_step)
    return best if which == "best" and best.is_dir() else saved[-1]


def training_record(record: RunRecord, step: int) -> dict[str, Any]:
    """Return what a weight file says of its own training, from the run's sealed record and not from any config."""
    draft, settings = record.identity["draft"], record.identity["settings"]
    return {
        **{name: draft[name] for name in ("target_layer_ids", "block_size", "mask_token_id")},
        "caches": record.identity["caches"],
        "target": record.origin["target_identity"],
        "val_samples": settings["val_samples"],
        "run": record.checksum,
        "step": step,
    }
