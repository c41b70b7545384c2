"""Stage one: run the frozen target over conversations once and keep the hidden states of chosen layers.

Axes: L captured layers, H hidden size.
"""

import gc
import os
import platform
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import save_file

from dflash_offline.schemas.commits import Commit, read_commits
from dflash_offline.schemas.identity import differences, refuse_differences, refuse_other_identity
from dflash_offline.schemas.locks import building_folder, remove_unfinished
from dflash_offline.schemas.manifest import (
    CAPTURE_RULE,
    EMBEDDINGS,
    FEATURES,
    MANIFEST,
    SAMPLES,
    TARGET,
    TMP,
    Layout,
    Manifest,
)
from dflash_offline.schemas.paths import output_folder, refuse_other_than_utf8, utf8_name
from dflash_offline.schemas.samples import SampleTable
from dflash_offline.schemas.settings.extract import ExtractConfig
from dflash_offline.stages.capture.bad_features import BadFeatures, refuse_too_many
from dflash_offline.stages.capture.calibrate import calibrated_scales
from dflash_offline.stages.capture.encode import FeatureEncoder
from dflash_offline.stages.capture.forecast import Forecast, free_bytes, measure, refuse_too_large, rest_bytes
from dflash_offline.stages.capture.shard import Capturer
from dflash_offline.stages.capture.workers import Work, run_shards, run_workers
from dflash_offline.stages.conversations.loss_mask import ConversationEncoder
from dflash_offline.stages.conversations.plan import Plan, make_plan, refuse_ids_beyond_table
from dflash_offline.stages.conversations.sources import Data
from dflash_offline.stages.progress import Progress, Silent, readable_bytes
from dflash_offline.stages.store.cache import Cache
from dflash_offline.stages.store.create import create_arrays, publish_cache
from dflash_offline.stages.store.leftovers import remove_abandoned
from dflash_offline.stages.store.plan_wait import wait_for_plan
from dflash_offline.stages.store.shard_file import CODEC
from dflash_offline.stages.store.writer import ShardWriter
from dflash_offline.stages.target.files import TargetFiles, open_target
from dflash_offline.stages.target.layer_ids import check_layer_ids, default_layer_ids
from dflash_offline.stages.target.mask_token import choose_mask_token
from dflash_offline.stages.target.model import (
    choose_device,
    embedding_tensors,
    load_as_configured,
    refuse_non_finite,
    resolve_dtype,
)

_SOFTWARE = "dflash-offline torch transformers tokenizers numpy pyarrow zarr numcodecs zstandard".split()


@dataclass(frozen=True, kw_only=True)
class Extracted:
    """What `extract` left."""

    cache: Path
    num_samples: int
    num_tokens: int
    num_shards: int
    shards_left: int
    """To other ranks of an array job."""
    num_skipped: int
    """Samples without features because the target's own were bad."""
    shards_written: int
    """By this call; the rest was there before, or another worker's."""
    bytes_written: int
    seconds: float
    """Spent on the shards."""


class Extraction:
    """One call of `dflash extract`: the target's files, what is captured, and, once needed, the loaded model."""

    def __init__(self, config: ExtractConfig, progress: Progress) -> None:
        self.progress = progress
        self.files: TargetFiles = open_target(
            config.target, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
        self.config = self._within_positions(config)
        self.layer_ids = (
            check_layer_ids(config.layers, self.files.num_layers)
            if config.layers is not None
            else default_layer_ids(self.files.num_layers, config.num_layers)
        )
        self.device = choose_device(config.device)
        self.dtype = resolve_dtype(config.dtype, self.device, self.files.config)
        self.encoder = ConversationEncoder(self.files, config)
        self._model: Any = None

    @cached_property
    def data(self) -> Data:
        """What the data arguments name; looked up only where a plan or the identity needs it."""
        return Data(self.config)

    def _within_positions(self, config: ExtractConfig) -> ExtractConfig:
        most = self.files.decoder()["max_position_embeddings"]
        if config.max_length <= most:
            return config
        self.progress.say(f"The target has {most} positions; longer conversations are cut there.")
        return replace(config, max_length=most)

    @cached_property
    def target_identity(self) -> dict[str, Any]:
        """What decides the target's hidden states, by its files before any weight is loaded."""
        return self._target_identity_now()

    def _target_identity_now(self) -> dict[str, Any]:
        return {
            **self.files.identity(),
            "dtype": str(self.dtype).removeprefix("torch."),
            "attn_implementation": self.config.attn_implementation,
            "device_map": self.config.device_map,
        }

    def identity(self) -> dict[str, Any]:
        """Return every field that decides the cache's content."""
        config = self.config
        return {
            "target": self.target_identity,
            "device": self.device.type,
            "layer_ids": list(self.layer_ids),
            "capture": CAPTURE_RULE,
            "data": self.data.identity(),
            **_selection(self.data),
            "mask_rule": self.encoder.mask_rule,
            "mask_token_id": "found" if config.mask_token_id is None else config.mask_token_id,
            "chat_template_kwargs": config.chat_template_kwargs,
            "max_length": config.max_length,
            "block_size": config.block_size,
            "skip_bad_rows": config.skip_bad_rows,
            "layout": {
                "features": asdict(config.feature_layout),
                "codec": CODEC,
                "shard_mib": config.shard_mib,
                "chunk_tokens": config.chunk_tokens,
                "batch_tokens": config.batch_tokens,
            },
        }

    @property
    def model(self) -> Any:
        """The loaded target, checked to be one that a draft can be served with."""
        if self._model is None:
            identity = self.target_identity
            self._model = load_as_configured(self.files, self.config, self.dtype, self.device, self.progress)
            self._refuse_changed_target(identity)
        return self._model

    def _refuse_changed_target(self, before: dict[str, Any]) -> None:
        """Raise `MismatchError` if the target's files are no longer those that were hashed before they were loaded."""
        refuse_differences(
            f"{self.files.folder} changed while the target was loaded from it",
            differences(before, self._target_identity_now()),
            ("before", "now"),
            "Repeat the command when nobody writes there any more.",
        )

    def unload(self) -> None:
        """Drop the model, so that worker processes have its memory."""
        self._model = None
        gc.collect()  # hooks of a quantized one hold their modules, which hold them
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def plan(self, folder: Path) -> Plan:
        """Tokenize the data into files of `folder`."""
        _ = self.model  # a target that cannot be drafted for is refused before any other work
        self.progress.start("Tokenizing", None, "rows")
        plan = make_plan(self.config, self.data, self.encoder, self.layout().slot_bytes, folder, self.progress.advance)
        self.progress.finish()
        self.data.refuse_changed()
        refuse_ids_beyond_table(self.files, plan)
        return plan

    def layout(self, num_shards: int = 0, shard_tokens: int = 0) -> Layout:
        """Return where the features of a plan lie."""
        return Layout(
            num_shards=num_shards,
            shard_tokens=shard_tokens,
            chunk_tokens=self.config.chunk_tokens,
            num_layers=len(self.layer_ids),
            hidden_size=int(self.files.text_config.hidden_size),
            features=self.config.feature_layout,
        )

    def capturer(self) -> Capturer:
        """Return what runs the loaded target."""
        return Capturer(self.model, self.device, list(self.layer_ids), self.config.batch_tokens)

    def forecast(self, plan: Plan) -> Forecast:
        """Return what extracting the plan will cost on this machine, measured on a few of its micro-batches."""
        self.progress.start("Measuring", None, "batches")
        layout = self.layout(plan.num_shards, plan.shard_tokens)
        target_bytes = sum(tensor.nbytes for tensor in embedding_tensors(self.model).values())
        target_bytes += len(self.files.tokenizer.backend_tokenizer.to_str(pretty=True))
        found = measure(self.config, self.capturer(), plan, layout, target_bytes, self.progress.advance)
        self.progress.finish()
        return found

    def create(self, identity: dict[str, Any]) -> None:
        """Plan the samples and publish the cache's static files; another process may have been first."""
        if self.device.type == "cpu":
            torch.set_num_threads(max(1, torch.get_num_threads() // self.config.workers))
        with building_folder(self.config.out) as folder:
            plan = self.plan(folder)
            mask_token_id = choose_mask_token(self.files, plan.samples, plan.first_uses, self.config.mask_token_id)
            _say_plan(self.progress, plan)
            forecast = self.forecast(plan)
            self.progress.say(f"Forecast: {forecast}.")
            if not self.config.ignore_free_space:
                refuse_too_large(self.config.out, forecast.num_bytes, forecast.free_bytes, is_begun=False)
            layout = self.layout(plan.num_shards, plan.shard_tokens)
            create_arrays(folder / FEATURES, layout, list(self.layer_ids), self._scales(plan.samples))
            self._write_target(folder / TARGET)
            publish_cache(
                folder,
                self.config.out,
                identity=identity,
                origin=self._origin(),
                decoder=self.files.decoder(),
                layout=layout,
                plan={
                    **plan.counts(),
                    "mask_token_id": mask_token_id,
                    "block_size": self.config.block_size,
                    "cpu_threads": torch.get_num_threads(),
                    "feature_bytes": forecast.bytes_by_kind[forecast.features.kind],
                },
            )

    def _scales(self, samples: SampleTable) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:
        """Return center and step of each layer and channel, float32 [L, H], if the layout needs them."""
        step, skip_bad = self.config.feature_layout.step, self.config.on_bad_features == "skip"
        if step is None:
            return None
        return calibrated_scales(self.capturer(), samples, step, skip_bad=skip_bad, progress=self.progress)

    def _write_target(self, folder: Path) -> None:
        folder.mkdir()
        for name in ("config.json", "generation_config.json"):
            if (self.files.folder / name).is_file():
                shutil.copyfile(self.files.folder / name, folder / name)
        tensors = {name: tensor.cpu().contiguous() for name, tensor in embedding_tensors(self.model).items()}
        refuse_non_finite(tensors, self.files.name)
        with _system_errors_of_rust(folder):
            self.files.tokenizer.save_pretrained(folder)
            save_file(tensors, folder / EMBEDDINGS)

    def _origin(self) -> dict[str, Any]:
        return {
            "target": self.files.name,
            "revision": self.config.revision,
            "data": [utf8_name(path) for path in self.config.data],
            "software": {
                "python": platform.python_version(),
                **{name: version(name) for name in _SOFTWARE},
            },
        }

    def open_work(self, cache: Cache) -> Work:
        """Return what runs the cache's shards in this process; `MismatchError` if its target is not the cache's."""
        refuse_other_identity(
            cache.path, {"target": cache.manifest.identity["target"]}, {"target": self.target_identity}
        )
        if self.device.type == "cpu":
            num_threads = cache.manifest.plan["cpu_threads"]
            torch.set_num_threads(num_threads)  # the last bits of a product depend on their number
        writer = ShardWriter(cache)
        return Work(
            writer=writer,
            capturer=self.capturer,
            encoder=FeatureEncoder(cache.codec),
            bad_features=BadFeatures(writer, self.config.on_bad_features, self.config.max_skipped),
        )


def extract(config: ExtractConfig, progress: Progress) -> Extracted:
    """Make the cache complete, or this rank's share of it, going on with what is there; returns what it holds.

    Raises `MismatchError` if the folder holds a cache of something else, and `DflashError` for unusable input.
    """
    out = _cache_folder(config.out)
    extraction = Extraction(replace(config, out=out), progress)
    config = extraction.config
    identity = extraction.identity()
    if not (out / MANIFEST).exists():
        if config.rank:
            wait_for_plan(out, config.plan_timeout_s, progress)
        else:
            extraction.create(identity)
    cache = Cache(out)
    manifest = cache.manifest
    refuse_other_identity(out, manifest.identity, identity)
    manifest.check_static_files(out)
    samples = cache.samples
    began = time.perf_counter()
    work = extraction.open_work(cache)
    _remove_abandoned(cache, progress)
    share = range(manifest.layout.num_shards)[config.rank :: config.world_size]
    before = _finished(out, manifest)
    left = [shard for shard in share if shard not in before]
    if len(left) < len(share):
        progress.say(f"{len(share) - len(left)} of {len(share)} shards are already done.")
    if left and not config.ignore_free_space:  # all that is left, not this rank's share: they fill one disk together
        refuse_too_large(out, rest_bytes(manifest, samples, before) or 0, free_bytes(out), is_begun=True)
    if left:
        done = int(samples.num_tokens.sum() - samples.num_tokens[np.isin(samples.shard, left)].sum())
        if config.workers > 1:
            extraction.unload()
            written = run_workers(open_worker, config, left, samples, progress, done, cache.is_done)
        else:
            written = run_shards(work, left, samples, progress, done)
    else:
        written = []
    finished = _finished(out, manifest) if left else before
    shards_left = manifest.layout.num_shards - len(finished)
    if not shards_left:
        _remove_abandoned(cache, progress)
        for lock in (out / TMP).glob("*.lock"):
            lock.unlink(missing_ok=True)
        refuse_too_many([one for commit in finished.values() for one in commit.skipped], samples, config.max_skipped)
    for folder in remove_unfinished(out):
        progress.say(f"{folder} stays: somebody may be planning in it. If nobody is, repeat this command in an hour.")
    return Extracted(
        cache=out,
        num_samples=len(samples),
        num_tokens=int(samples.num_tokens.sum()),
        num_shards=manifest.layout.num_shards,
        shards_left=shards_left,
        num_skipped=sum(len(commit.skipped) for commit in finished.values()),
        shards_written=len(written),
        bytes_written=sum(written),
        seconds=time.perf_counter() - began,
    )


def _cache_folder(path: Path) -> Path:
    out = output_folder(path, marker=MANIFEST, kind="feature cache", renamed=True)
    refuse_other_than_utf8(out, "a feature cache")
    return out


def open_worker(config: ExtractConfig) -> Work:
    """Return the work of an existing cache, in a worker process."""
    return Extraction(config, Silent()).open_work(Cache(config.out))


def plan_only(config: ExtractConfig, progress: Progress) -> tuple[Plan, Layout, Forecast]:
    """Return what `extract` would do and what it would cost; what is written on the way does not outlast the call."""
    out = _cache_folder(config.out)
    extraction = Extraction(replace(config, out=out), progress)
    identity = extraction.identity()
    begun = Manifest.read(out) if (out / MANIFEST).exists() else None
    if begun:
        refuse_other_identity(out, begun.identity, identity)
    near = next(folder for folder in out.parents if folder.is_dir())
    with building_folder(near / out.name) as folder:
        plan = extraction.plan(folder)
        choose_mask_token(extraction.files, plan.samples, plan.first_uses, config.mask_token_id)
        forecast = extraction.forecast(plan)
    if begun:
        forecast = forecast.of_rest(begun, SampleTable.read(out / SAMPLES), _finished(out, begun))
    return plan, extraction.layout(plan.num_shards, plan.shard_tokens), forecast


@contextmanager
def _system_errors_of_rust(folder: Path) -> Iterator[None]:
    """Raise a full disk as the `OSError` it is: tokenizers gives it as a bare `Exception`, safetensors as its own."""
    try:
        yield
    except Exception as error:
        found = re.search(r"os error (\d+)|code: (\d+)", str(error))
        if type(error) not in (Exception, SafetensorError) or found is None:
            raise
        number = int(found[1] or found[2])
        raise OSError(number, os.strerror(number), str(folder)) from error


def _remove_abandoned(cache: Cache, progress: Progress) -> None:
    removed = remove_abandoned(cache.path, cache.is_done)
    if removed:
        size = readable_bytes(sum(one.num_bytes for one in removed))
        progress.say(f"Removed {len(removed)} half-written files ({size}) of workers that died.")


def _finished(out: Path, manifest: Manifest) -> dict[int, Commit]:
    return read_commits(out, manifest.layout.num_shards, manifest.checksum)[0]


def _selection(data: Data) -> dict[str, Any]:
    """Return the settings that choose among the data's rows, those alone that are not the default."""
    config = data.config
    chosen = {
        "input_format": config.input_format,
        "limit": config.limit,
        "weights": data.weights,
        "seed": None if data.weights is None else config.seed,
        "drop_duplicates": config.drop_duplicates or None,
        "keep_special_tokens": config.keep_special_tokens or None,
    }
    return {name: value for name, value in chosen.items() if value is not None}


def _say_plan(progress: Progress, plan: Plan) -> None:
    counts = plan.counts()
    for kind, rows in counts["formats"].items():
        progress.say(f"Data: {rows:,} rows of {kind}.")
    if counts["not_drawn"]:
        progress.say(f"  {counts['not_drawn']:,} rows were left out by weight.")
    progress.say(
        f"Plan: {counts['samples']:,} samples, {counts['tokens']:,} tokens ({counts['supervised']:,} supervised), "
        f"{counts['anchors']:,} anchors, {plan.num_shards} shards."
    )
    if counts["truncated"]:
        cut = f"{counts['truncated']:,} samples were cut at the maximum length"
        progress.say(f"  {cut}, by {counts['truncated_supervised']:,} supervised tokens.")
    for reason, count in counts["rejects"].items():
        progress.say(f"  left out: {count:,} rows: {reason}.")
