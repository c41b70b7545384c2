"""A new cache: its samples planned, its cost forecast, its static files written and published; no shard exists yet.

Axes: L captured layers, H hidden size.
"""

import os
import platform
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dflash_offline.schemas.draft.anchor_rule import WHOLE
from dflash_offline.schemas.locks import building_folder
from dflash_offline.schemas.manifest import EMBEDDINGS, FEATURES, TARGET
from dflash_offline.schemas.paths import utf8_name
from dflash_offline.schemas.settings.extract import ExtractConfig
from dflash_offline.stages.capture.calibrate import calibrated_scales
from dflash_offline.stages.capture.extractor import Extractor, load_extractor
from dflash_offline.stages.capture.forecast import forecast_cost, refuse_large_objects, refuse_too_large
from dflash_offline.stages.capture.inputs import Inputs
from dflash_offline.stages.conversations.plan import Plan, make_plan, refuse_ids_beyond_table
from dflash_offline.stages.draft.weights import save_weights
from dflash_offline.stages.progress import Progress
from dflash_offline.stages.store.create import create_arrays, publish_cache
from dflash_offline.stages.target.files import TargetFiles
from dflash_offline.stages.target.mask_token import choose_mask_token
from dflash_offline.stages.target.model import refuse_non_finite

_SOFTWARE = "dflash-offline torch transformers tokenizers numpy pyarrow numcodecs zstandard".split()


def create_cache(inputs: Inputs, progress: Progress) -> Extractor:
    """Publish a cache without shards, unless another process has been first; returns the loaded target."""
    config, target = inputs.config, inputs.target
    if target.device.type == "cpu":
        torch.set_num_threads(max(1, torch.get_num_threads() // config.workers))
    with building_folder(config.out) as folder, ExitStack() as loaded:
        # A target that cannot be drafted for is refused before any other work.
        runner = load_extractor(config, target, inputs.identity, progress)
        loaded.callback(runner.close)
        plan, mask_token_id = plan_samples(inputs, folder, progress)
        for name, text in [*plan.facts(), ("Shards", f"{plan.num_shards:,}")]:
            progress.say(f"{name}: {text}." if name else f"  {text}.")
        layout = inputs.layout(plan.num_shards, plan.shard_tokens)
        runner.start(plan.samples, progress)
        forecast = forecast_cost(inputs, runner, plan, layout, progress)
        progress.say(f"Forecast: {forecast}.")
        refuse_large_objects(config.out, layout, forecast)
        if not config.ignore_free_space:
            refuse_too_large(config.out, forecast.num_bytes, forecast.free_bytes, is_begun=False)
        step, skip_bad = layout.features.step, config.on_bad_features == "skip"
        scales = None
        if step is not None:
            scales = calibrated_scales(runner, plan.samples, step, skip_bad=skip_bad, progress=progress)
        create_arrays(folder / FEATURES, layout, list(target.layer_ids), scales)
        _write_target(folder / TARGET, target.files, runner.embeddings())
        publish_cache(
            folder,
            config.out,
            identity=inputs.identity,
            origin=_origin(config),
            decoder=target.files.decoder(),
            layout=layout,
            plan={
                **plan.counts(),
                "mask_token_id": mask_token_id,
                "block_size": config.block_size,
                **({} if config.anchors == WHOLE else {"anchor_kind": config.anchors}),
                "cpu_threads": torch.get_num_threads(),
                "feature_bytes": forecast.bytes_by_kind[forecast.features.kind],
            },
        )
        loaded.pop_all()
    return runner


def plan_samples(inputs: Inputs, folder: Path, progress: Progress) -> tuple[Plan, int]:
    """Tokenize the data into files of `folder`; returns the plan of its samples, and the mask token."""
    config, files = inputs.config, inputs.target.files
    progress.start("Tokenizing", None, "rows")
    slot_bytes, by_length = inputs.layout().slot_bytes, inputs.by_length
    plan = make_plan(config, inputs.data, inputs.encoder, slot_bytes, folder, progress.advance, by_length=by_length)
    progress.finish()
    inputs.data.refuse_changed()
    refuse_ids_beyond_table(files, plan)
    return plan, choose_mask_token(files, plan.samples, plan.first_uses, config.mask_token_id)


def _write_target(folder: Path, files: TargetFiles, embeddings: dict[str, Tensor]) -> None:
    """Write the target's configs and tokenizer, and its embeddings, which drafts borrow and which must be finite."""
    folder.mkdir()
    for name in ("config.json", "generation_config.json"):
        if (files.folder / name).is_file():
            shutil.copyfile(files.folder / name, folder / name)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in embeddings.items()}
    refuse_non_finite(tensors, files.name)
    with _system_errors_of_tokenizers(folder):
        files.tokenizer.save_pretrained(folder)
    save_weights(folder / EMBEDDINGS, tensors)


@contextmanager
def _system_errors_of_tokenizers(folder: Path) -> Iterator[None]:
    """Raise a full disk as an `OSError`: tokenizers raises a bare `Exception` there."""
    try:
        yield
    except Exception as error:
        named = re.search(r"os error (\d+)|code: (\d+)", str(error))
        if type(error) is not Exception or named is None:
            raise
        number = int(named[1] or named[2])
        raise OSError(number, os.strerror(number), str(folder)) from error


def _origin(config: ExtractConfig) -> dict[str, Any]:
    """Return where a cache comes from: names and versions that decide nothing in it."""
    return {
        "target": config.target,
        "revision": config.revision,
        "data": [utf8_name(path) for path in config.data],
        "software": {"python": platform.python_version(), **{name: version(name) for name in _SOFTWARE}},
    }
