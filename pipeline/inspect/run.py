"""What a training run says of itself, from run.json, metrics.jsonl and the checkpoints' states; torch is not loaded."""

import itertools
import json
import math
import time
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from dflash_offline.pipeline.inspect.run_view import Comparison, Rows, RunCache, RunView
from dflash_offline.pipeline.inspect.run_warnings import run_warnings
from dflash_offline.schemas.checked import Count
from dflash_offline.schemas.draft.config import DraftConfig
from dflash_offline.schemas.errors import CacheError
from dflash_offline.schemas.evaluation import read_result
from dflash_offline.schemas.identity import flatten
from dflash_offline.schemas.manifest import Manifest
from dflash_offline.schemas.paths import store_url
from dflash_offline.schemas.run import (
    CHECKPOINT,
    CHECKPOINTS,
    CONFIG,
    METRICS,
    RUN,
    RunRecord,
    SavedState,
    read_saved_state,
)

EVALUATION = "eval.json"
"""Where `dflash export` looks for a result of `dflash eval --save`, and so does this."""


def is_run(folder: Path) -> bool:
    """Say whether a folder holds a run."""
    return (folder / RUN).is_file()


def read_run(run: Path) -> RunView:
    """Return what a run's folder says; `DflashError` if the folder is no run."""
    record = RunRecord.read(run)
    rows, unreadable = _read_rows(run / METRICS)
    training = [row for row in rows if "loss" in row]
    validation = [row for row in rows if "val_loss" in row]
    saved = _checkpoints(run)
    newest: SavedState | dict[str, Any] = saved[max(saved)] if saved else {}
    settings, draft = record.identity["settings"], record.identity["draft"]
    view = RunView(
        run=str(run),
        target=record.origin["target"],
        step=max([*saved, *(row["step"] for row in rows)], default=0),
        total_steps=record.origin.get("total_steps") or settings.get("steps"),
        epochs=settings.get("epochs"),
        patience=_patience(run),
        tokens_at_checkpoint=newest.get("tokens"),
        checkpoints=sorted(saved),
        best_step=newest.get("best_step") or None,
        best_serving_walk=newest.get("best_walk", 0.0) if newest.get("best_step") else None,
        last_training=training[-1] if training else None,
        last_validation=validation[-1] if validation else None,
        written_s_ago=_age_s(run / METRICS),
        parameters=sum(math.prod(shape) for shape in DraftConfig.from_record(draft, run / RUN).shapes.values()),
        draft=draft,
        settings=settings,
        init_from=record.identity.get("init_from"),
        caches=_caches(record),
        evaluation=_evaluation(run / EVALUATION),
        software=record.origin["software"],
        unreadable_rows=unreadable,
        training=training,
        validation=validation,
        state="",
    )
    return replace(view, state=_state(view), warnings=run_warnings(view))


def _read_rows(path: Path) -> tuple[Rows, int]:
    """Return the rows, and how many lines are not one; the last line of a killed run may be cut off."""
    rows: Rows = []
    unreadable = 0
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    for line in lines:
        try:
            row = json.loads(line)
            figures = msgspec.convert(row, dict[str, float | list[float | None] | None])
            if any(isinstance(value, list) != name.endswith("_by_slot") for name, value in figures.items()):
                raise ValueError("a list in place of a number, or a number of a list")
            finite = {name: _finite(value) for name, value in figures.items()}
            rows.append(finite | {"step": msgspec.convert(row.get("step"), Count)})
        except (ValueError, RecursionError):
            unreadable += 1
    return rows, unreadable


def _finite(value: Any) -> Any:
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _checkpoints(run: Path) -> dict[int, SavedState]:
    """Return the checkpoints' states by step; their weights are not read."""
    paths = (run / CHECKPOINTS).glob("step-*/state.json")
    states = [read_saved_state(path.parent)[0] for path in paths if CHECKPOINT.fullmatch(path.parent.name)]
    return {state["step"]: state for state in states}


def _patience(run: Path) -> int | None:
    """Return the patience of the last call, which a resume may change; None where it cannot be read."""
    try:
        patience = tomllib.loads((run / CONFIG).read_text()).get("patience")
    except (OSError, ValueError, RecursionError):
        return None
    return patience if type(patience) is int else None


def _age_s(path: Path) -> float | None:
    return max(0.0, time.time() - path.stat().st_mtime) if path.is_file() else None


def _caches(record: RunRecord) -> list[RunCache]:
    """Return where the run's caches lay, and whether what lies there now is still them."""
    pairs = zip(record.origin["caches"], record.identity["caches"], strict=True)
    return [RunCache(path, checksum, _cache_fault(Path(path), checksum)) for path, checksum in pairs]


def _cache_fault(cache: Path, checksum: str) -> str | None:
    if store_url(cache):
        return None  # a run is shown without asking a store
    try:
        return "another cache lies there now" if Manifest.read(cache).checksum != checksum else None
    except CacheError as error:
        return str(error) if cache.exists() else "is not there any more"


def _evaluation(path: Path) -> dict[str, Any] | None:
    """Return the result of `dflash eval --save` if there is one; `DflashError` if the file is something else."""
    if not path.is_file():
        return None
    return read_result(path, "Write it again, or move it away.")


def _state(view: RunView) -> str:
    if view.total_steps and view.step >= view.total_steps:
        return "finished"
    patience, best = view.patience, view.best_step
    if patience and best and view.step - best >= patience * view.settings["val_every"]:
        return "stopped early"
    return "not finished" if view.step else "no step done"


def settings_table(documents: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Return each setting of nested documents with every document's value, None where it has none."""
    flat = [flatten(document) for document in documents]
    names = {name: None for document in flat for name in document}
    return {name: [document.get(name) for document in flat] for name in names}


def compare(views: list[RunView]) -> Comparison:
    """Return the runs with the settings, draft numbers and caches in which they differ."""
    documents = [
        {**view.settings, "draft": view.draft, "init_from": view.init_from}
        | {"target": view.target, "caches": [cache.manifest[:12] for cache in view.caches]}
        for view in views
    ]
    table = settings_table(documents)
    return Comparison(views, {name: row for name, row in table.items() if any(value != row[0] for value in row)})


def bucket_means(rows: Rows, name: str, most: int) -> tuple[list[float], list[float]]:
    """Return steps and values of one metric: every row's, or the means of `most` runs of rows where there are more.

    Rows without the metric are left out.
    """
    pairs = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    buckets = min(most, len(pairs))
    edges = [round(i * len(pairs) / buckets) for i in range(buckets + 1)] if buckets else []
    parts = [pairs[begin:end] for begin, end in itertools.pairwise(edges)]
    return (
        [math.fsum(step for step, _ in part) / len(part) for part in parts],
        [math.fsum(value for _, value in part) / len(part) for part in parts],
    )
