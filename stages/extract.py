"""Stage one: run the frozen target over conversations once and keep the hidden states of chosen layers."""

import time
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dflash_offline.schemas.errors import CacheError
from dflash_offline.schemas.identity import refuse_other_identity
from dflash_offline.schemas.locks import building_folder, remove_unfinished
from dflash_offline.schemas.manifest import MANIFEST, Layout
from dflash_offline.schemas.settings.extract import ExtractConfig
from dflash_offline.stages.buckets.bundles import write_bundles
from dflash_offline.stages.buckets.mirror import mirror_of
from dflash_offline.stages.buckets.publish import prepare_bucket
from dflash_offline.stages.capture.bad_features import refuse_too_many
from dflash_offline.stages.capture.create import create_cache, plan_samples
from dflash_offline.stages.capture.engines.installed import engine_identity
from dflash_offline.stages.capture.extractor import Extractor, load_extractor
from dflash_offline.stages.capture.final import add_final
from dflash_offline.stages.capture.forecast import (
    Forecast,
    forecast_cost,
    free_bytes,
    refuse_large_objects,
    refuse_too_large,
    rest_bytes,
)
from dflash_offline.stages.capture.inputs import ChosenTarget, Inputs, choose_target, open_inputs, target_identity
from dflash_offline.stages.capture.workers import Output, Work, run_shards, run_workers
from dflash_offline.stages.cluster.connection import connected
from dflash_offline.stages.cluster.shards import gpus_of_worker, run_on_cluster
from dflash_offline.stages.conversations.plan import Plan
from dflash_offline.stages.progress import Progress, Silent, readable_bytes
from dflash_offline.stages.store.cache import Cache
from dflash_offline.stages.store.leftovers import remove_abandoned, remove_locks
from dflash_offline.stages.store.plan_wait import wait_for_plan


@dataclass(frozen=True, kw_only=True)
class Extracted:
    """What `extract` left."""

    cache: Path
    num_samples: int
    num_tokens: int
    split: dict[str, int]
    """As in the plan: conversations that became several samples, and what that cost; empty if none did."""
    num_shards: int
    shards_left: int
    """Shards that other ranks of an array job are to run."""
    num_skipped: int
    """Samples without features because the target's own were bad."""
    shards_written: int
    """Shards that this call wrote; the others were there before, or are another worker's."""
    bytes_written: int
    seconds: float
    """Spent on the shards."""


def extract(config: ExtractConfig, progress: Progress) -> Extracted:
    """Make the cache complete, or this rank's share of it, going on with what is there; returns what it holds.

    Raises `MismatchError` if the folder holds a cache of something else, and `DflashError` for unusable input.
    """
    inputs = open_inputs(config, progress)
    if (mirror := mirror_of(inputs.config.out)) is not None:
        prepare_bucket(mirror.bucket)
        mirror.pull()
    with ExitStack() as held:
        runner: Extractor | None = None
        ray = None
        if config.ray is not None:
            gpus_of_worker(config, inputs.target.device)
            ray = held.enter_context(connected(config.ray))
        if not (inputs.config.out / MANIFEST).exists():
            if config.rank:
                wait_for_plan(inputs.config.out, config.plan_timeout_s, progress)
            else:
                runner = create_cache(inputs, progress)
                held.callback(runner.close)
        return _extract(inputs, runner, ray, progress)


def _extract(inputs: Inputs, runner: Extractor | None, ray: Any, progress: Progress) -> Extracted:
    """Run what is left of a cache that is there; `runner` is what made it, if this process did."""
    config, out = inputs.config, inputs.config.out
    cache = Cache(out)
    refuse_other_identity(out, cache.manifest.identity, inputs.identity)
    cache.manifest.check_static_files(out)
    num_shards, began = cache.layout.num_shards, time.perf_counter()
    final = add_final(cache) if config.final else None
    _remove_abandoned(cache, progress)
    share = range(num_shards)[config.rank :: config.world_size]
    left = [shard for shard in share if shard not in cache.recorded or (final and shard not in final.recorded)]
    if len(left) < len(share):
        progress.say(f"{len(share) - len(left)} of {len(share)} shards are already done.")
    if final and (only := sum(shard in cache.recorded for shard in left)):
        progress.say(f"Of {only} shards the final states alone are extracted.")
    written = list[int]()
    if left:
        if not config.ignore_free_space:
            _refuse_no_room(cache, final)
        if runner and (ray or config.workers > 1):
            runner.close()  # worker processes load the target anew and need its memory
        if ray:
            written = run_on_cluster(ray, open_worker, config, cache, left, inputs.target.device, progress)
        elif config.workers > 1:
            written = run_workers(open_worker, config, cache, left, progress)
        elif runner:
            written = run_shards(_work(config, cache, runner), left, progress)
        else:
            with closing(_started(config, inputs.target, cache, progress)) as runner:
                written = run_shards(_work(config, cache, runner), left, progress)
        cache = Cache(out, cache.manifest)  # with the records that are there now
    if cache.mirror is not None:
        write_bundles(cache.mirror.bucket, cache.manifest)
    shards_left = num_shards - len(cache.commits)
    if final is not None:
        final = Cache(out, final.manifest, samples=cache.samples)
        if final.mirror is not None:
            write_bundles(final.mirror.bucket, final.manifest)
        shards_left = num_shards - len(cache.commits.keys() & final.commits.keys())
    if not shards_left:
        _finish(config, cache, progress)
    for folder in remove_unfinished(out):
        progress.say(f"{folder} stays: somebody may be planning in it. If nobody is, repeat this command in an hour.")
    return Extracted(
        cache=out,
        num_samples=len(cache.samples),
        num_tokens=int(cache.samples.num_tokens.sum()),
        split=cache.manifest.plan.get("split", {}),
        num_shards=num_shards,
        shards_left=shards_left,
        num_skipped=len((final or cache).skipped),
        shards_written=len(written),
        bytes_written=sum(written),
        seconds=time.perf_counter() - began,
    )


def open_worker(config: ExtractConfig) -> Work:
    """Return what runs an existing cache's shards in a worker process; `MismatchError` if its target is not theirs."""
    cache, target = Cache(config.out), choose_target(config)
    identity = target_identity(config, target)
    have = {name: cache.manifest.identity.get(name) for name in ("target", "engine")}
    refuse_other_identity(config.out, have, {"target": identity, "engine": None, **engine_identity(config)})
    return _work(config, cache, _started(config, target, cache, Silent()))


def _started(config: ExtractConfig, target: ChosenTarget, cache: Cache, progress: Progress) -> Extractor:
    """Return what runs the target, ready to run the cache's samples."""
    _set_threads(cache, target.device)
    runner = load_extractor(config, target, cache.manifest.identity, progress)
    with ExitStack() as opened:
        opened.callback(runner.close)
        runner.start(cache.samples, progress)
        opened.pop_all()
    return runner


def plan_only(config: ExtractConfig, progress: Progress) -> tuple[Plan, Layout, Forecast]:
    """Return what `extract` would make and what it would cost; what is written on the way does not outlast the call."""
    inputs = open_inputs(config, progress)
    config, out = inputs.config, inputs.config.out
    begun = Cache(out) if (out / MANIFEST).exists() else None
    if begun:
        refuse_other_identity(out, begun.manifest.identity, inputs.identity)
    near = next(folder for folder in out.parents if folder.is_dir())
    # A target that cannot be drafted for is refused before any other work.
    with (
        building_folder(near / out.name) as folder,
        closing(load_extractor(config, inputs.target, inputs.identity, progress)) as runner,
    ):
        plan, _mask_token_id = plan_samples(inputs, folder, progress)
        runner.start(plan.samples, progress)
        layout = inputs.layout(plan.num_shards, plan.shard_tokens)
        forecast = forecast_cost(inputs, runner, plan, layout, progress)
        refuse_large_objects(out, layout, forecast)
    return plan, layout, forecast.of_rest(begun) if begun else forecast


def _set_threads(cache: Cache, device: torch.device) -> None:
    """Run a CPU's target with the threads of the plan, on which the last bits of a product depend."""
    if device.type == "cpu":
        torch.set_num_threads(cache.manifest.plan["cpu_threads"])


def _work(config: ExtractConfig, cache: Cache, runner: Extractor) -> Work:
    """Return what runs a cache's shards in this process."""
    outputs = [Output.of(cache, config)]
    if config.final:
        assert cache.final is not None, "it was added before the shards"
        outputs.append(Output.of(cache.final, config, cache))
    return Work(runner=runner, outputs=outputs)


def _refuse_no_room(cache: Cache, final: Cache | None) -> None:
    """Raise `DflashError` if the shards that are left, those of all ranks, do not fit the disk they share."""
    needed = sum(rest_bytes(one) or 0 for one in (cache, final) if one is not None)
    refuse_too_large(cache.path, needed, free_bytes(cache.path), is_begun=True)


def _remove_abandoned(cache: Cache, progress: Progress) -> None:
    def is_done(shard: int) -> bool:
        return cache.is_done(shard) and (final is None or final.is_done(shard))

    final = _final_if_sound(cache)
    removed = remove_abandoned(cache.path, is_done)
    if removed:
        size = readable_bytes(sum(file.num_bytes for file in removed))
        progress.say(f"Removed {len(removed)} half-written files ({size}) of workers that died.")


def _final_if_sound(cache: Cache) -> Cache | None:
    """Return the final states of a cache of which none may be asked for: what is wrong with them is not told here."""
    with suppress(CacheError):
        return cache.final
    return None


def _finish(config: ExtractConfig, cache: Cache, progress: Progress) -> None:
    """Remove what only work in progress needs; `CacheError` if more samples are left out than may be."""
    _remove_abandoned(cache, progress)
    final = _final_if_sound(cache)
    if final is None or len(final.commits) == len(cache.commits):  # else somebody may be adding them
        remove_locks(cache.path)
    arrays = [cache] if final is None or not config.final else [cache, final]
    for array in arrays:
        skipped = [sample for commit in array.commits.values() for sample in commit.skipped]
        refuse_too_many(skipped, cache.samples, config.max_skipped)
