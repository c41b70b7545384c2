"""A real run's folder with metrics of our choice: sound ones, and ones in which a single thing is wrong."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dflash_offline.schemas.sealed import read_sealed, sealed_bytes

STEPS, EVERY, VAL_EVERY, SLOTS = 1000, 10, 100, 7


def sound_rows() -> list[dict[str, Any]]:
    """Return the rows of a run that learns and then levels off."""
    rows: list[dict[str, Any]] = []
    for step in range(EVERY, STEPS + 1, EVERY):
        loss = 1.5 + 4 * math.exp(-step / 200)
        rows.append(
            {
                "step": step,
                "loss": loss + 0.02 * (step // EVERY % 3),
                "accuracy": 1 / loss,
                "accept_len_over_anchors": 1 + 3 / loss,
                "tokens_per_s": 30_000.0 + step % 70,
                "samples_per_s": 100.0,
                "data_wait_share": 0.01,
                "learning_rate": 6e-4 * (1 - step / STEPS),
                "grad_norm": 0.5 + 0.1 * (step // EVERY % 4),
                "peak_memory_gib": 3.25,
            }
        )
        if step % VAL_EVERY == 0:
            rows.append(
                {
                    "step": step,
                    "val_loss": loss + 0.1,
                    "val_accuracy": 0.9 / loss,
                    "val_accuracy_by_slot": [round(0.9 / (loss + slot / 4), 4) for slot in range(SLOTS)],
                    "val_accept_len_over_anchors": 1 + 2.9 / loss,
                    "val_serving_walk": 1 + 4 / loss,
                    "val_serving_walk_mean_of_samples": 1 + 4.2 / loss,
                }
            )
    return rows


def plant(
    run: Path, folder: Path, change: Callable[[list[dict[str, Any]]], None] = lambda rows: None, **settings: Any
) -> Path:
    """Copy a run, give it the sound rows, changed, and other recorded settings; returns the copy."""
    shutil.copytree(run, folder)
    rows = sound_rows()
    change(rows)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    best = max((row for row in rows if "val_loss" in row), key=lambda row: row["val_serving_walk"], default=None)
    state = next((folder / "checkpoints").glob("step-*/state.json"))
    document = read_sealed(state) | {"step": STEPS, "tokens": 5_000_000}
    if best:
        document |= {"best_step": best["step"], "best_walk": best["val_serving_walk"]}
    document.pop("checksum")
    state.write_bytes(sealed_bytes(document))
    record = read_sealed(folder / "run.json")
    record["identity"]["settings"] |= {"steps": STEPS, "val_every": VAL_EVERY, **settings}
    record["origin"]["total_steps"] = STEPS
    record.pop("checksum")
    (folder / "run.json").write_bytes(sealed_bytes(record))
    return folder
