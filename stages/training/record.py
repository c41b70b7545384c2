"""What a run folder says of the run: run.json, which identifies it, and the settings of the newest call."""

import json
import platform
from contextlib import ExitStack
from importlib.metadata import version
from typing import Any

from dflash_offline.schemas.draft.anchor_rule import WHOLE
from dflash_offline.schemas.errors import DflashError
from dflash_offline.schemas.files import publish, refuse_links
from dflash_offline.schemas.locks import locked_folder, remove_unfinished
from dflash_offline.schemas.manifest import TARGET
from dflash_offline.schemas.paths import local_path, store_url
from dflash_offline.schemas.run import (
    CHECKPOINTS,
    CONFIG,
    EVENTS,
    METRICS,
    RUN,
    RunRecord,
    refuse_other_run,
    settings_identity,
)
from dflash_offline.schemas.sealed import sealed_bytes
from dflash_offline.schemas.settings.toml import to_toml
from dflash_offline.schemas.settings.train import TrainConfig
from dflash_offline.stages.training.checkpoint import remove_unfinished_checkpoints
from dflash_offline.stages.training.run import Training
from dflash_offline.stages.training.schedule import ROW_RULE

WEIGHTED_DRAW = "a stream for each cache"
"""How an epoch's share of a cache is drawn; recorded where `weights` ask for shares, so that a run which was begun
when cache 0 was drawn by the stream of the shuffle does not go on in another order."""


def claim_folder(training: Training, stack: ExitStack) -> None:
    """Lock the run folder until the stack closes, and make sure that it is a run of these settings.

    Raises `DflashError` if another process trains in it, and `MismatchError` if it is of something else.
    """
    run, identity = training.config.out, _identity(training)
    run.mkdir(parents=True, exist_ok=True)
    if not stack.enter_context(locked_folder(run)):
        raise DflashError(f"{run} is being trained by another process. Wait for it, or name another --out.")
    refuse_links(run, CHECKPOINTS, EVENTS)
    for name in (RUN, CONFIG, METRICS):
        remove_unfinished(run / name)
    remove_unfinished_checkpoints(run)
    if (run / RUN).exists():
        refuse_other_run(run, identity, training.total_steps)
    else:
        record = RunRecord(identity=identity, origin=_origin(training))
        publish([sealed_bytes(record.to_json())], path=run / RUN)
    publish([to_toml(training.config).encode()], path=run / CONFIG)


def _identity(training: Training) -> dict[str, Any]:
    """Return every field that decides what the run computes."""
    settings = settings_identity(training.config)
    settings["dtype"] = "bfloat16" if training.bfloat16 else "float32"
    settings["loss"] = str(training.config.mixture)
    settings["gamma"] = training.gamma
    if training.needs_final:
        settings["teacher_temperature"] = training.teacher_temperature
    settings["val_every"] = training.val_every
    settings["accumulation_times_ranks"] = training.per_step
    del settings["accumulation"]
    if any(weight < 1 for weight in settings["weights"]):
        settings["weighted_draw"] = WEIGHTED_DRAW
    packed = training.batching.shape
    settings["row_tokens"] = packed.tokens if packed else None
    if packed and not training.is_earlier:
        settings["row_rule"] = ROW_RULE
    elif not packed or settings["batch_block_tokens"] == TrainConfig.batch_block_tokens:
        del settings["batch_block_tokens"]  # earlier runs have no bound, and refuse to be given one
    for name in ("batch_size",) if packed else ("batch_tokens", "row_tokens"):
        del settings[name]
    settings |= training.loss_settings
    if training.anchor_rule.kind != WHOLE:
        settings["anchors"] = training.anchor_rule.kind
    record = training.draft_config.to_record()
    draft = {name: list(v) if isinstance(v, tuple) else v for name, v in record.items()}
    caches = [cache.manifest.checksum for cache in training.corpus.caches]
    return {"settings": settings, "caches": caches, "draft": draft, "init_from": training.start_sha256}


def _origin(training: Training) -> dict[str, Any]:
    """Return paths, names and versions, which are shown and never compared."""
    cache = training.corpus.caches[0]
    return {
        "caches": [store_url(path) or str(local_path(path).resolve()) for path in training.config.caches],
        "target": cache.manifest.origin["target"],
        "target_identity": cache.manifest.identity["target"],
        "total_steps": training.total_steps,
        "target_architectures": json.loads((cache.path / TARGET / "config.json").read_text()).get("architectures"),
        "software": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("dflash-offline", "torch", "transformers")},
        },
    }
