"""`dflash extract`: its options, what they start, and what it prints."""

import json
from collections.abc import Callable
from dataclasses import asdict, astuple
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from dflash_offline.pipeline.command import reported
from dflash_offline.pipeline.options import Json, LogFormatOption, Quiet, command
from dflash_offline.pipeline.progress import LogFormat
from dflash_offline.schemas.errors import dflash_line
from dflash_offline.schemas.manifest import FEATURE_KINDS, Layout
from dflash_offline.schemas.paths import free_name, shown
from dflash_offline.schemas.settings.extract import ExtractConfig
from dflash_offline.schemas.settings.option import Option
from dflash_offline.stages.progress import readable_bytes, readable_seconds

if TYPE_CHECKING:  # help is shown, and words are completed, without what takes long to import
    from dflash_offline.stages.capture.forecast import Forecast
    from dflash_offline.stages.conversations.plan import Plan
    from dflash_offline.stages.extract import Extracted

_MOST_RANKS = 32
"""Ranks whose shares a plan lists one by one."""


@command(
    "extract",
    "Run a target over conversations once, into a cache.",
    ("what it would make and take, before any work", "chats.jsonl --target Qwen/Qwen3-8B --out cache --plan"),
    ("the same without --plan; repeated, it goes on", "chats.jsonl --target Qwen/Qwen3-8B --out cache"),
    ("by the nodes of a Ray cluster", "chats.jsonl --target Qwen/Qwen3-8B --out s3://bucket/cache --ray"),
    ("three tenths of a file and all of another, mixed", "a.jsonl:0.3 b.jsonl --target Qwen/Qwen3-8B --out mixed"),
    (
        "by vLLM, which spreads the target over four GPUs",
        "chats.jsonl --target Qwen/Qwen3-235B-A22B --out large --engine vllm --tensor-parallel-size 4",
    ),
)
def extract(
    settings: Callable[..., ExtractConfig],
    plan: Annotated[
        bool, Option("Only say what it would make (samples, shards, disk, time) and write nothing.", "Cache", "free")
    ] = False,
    json_: Json = False,
    log_format: LogFormatOption = LogFormat.text,
    quiet: Quiet = False,
) -> None:
    """Run a target over conversations once and cache its hidden states."""
    go_on = "" if plan else "Finished shards are kept; repeat the command to go on."
    with reported(go_on, quiet=quiet, log_format=log_format) as progress:
        config = settings()
        from dflash_offline.stages import extract as stage
        from dflash_offline.stages.target.model import quiet_libraries

        quiet_libraries()
        if plan:
            print_plan(config, *stage.plan_only(config, progress), as_json=json_)
        else:
            print_done(stage.extract(config, progress), shown(config.out), as_json=json_)


def print_done(done: "Extracted", cache: str, *, as_json: bool) -> None:
    """Print what the cache, here named as the user does, holds now and what to do next."""
    if as_json:
        from dflash_offline.pipeline.inspect.overview import overview
        from dflash_offline.pipeline.terminal import print_json
        from dflash_offline.stages.store.cache import Cache

        print_json(overview(Cache.open(done.cache, hashed=False)))
        return
    written = f"{done.shards_written} shards, {readable_bytes(done.bytes_written)}, {done.seconds:.0f} s"
    samples = f"{done.num_samples:,} samples, {done.num_tokens:,} tokens in {done.num_shards} shards"
    if done.shards_left:
        print(f"{cache}: this share is done. Written now: {written}.")
        print(f"The cache has {samples}; {done.shards_left} of the shards are left to other ranks.")
    else:
        print(f"{cache} is complete: {samples}.")
        print(f"Written now: {written}.")
    if done.split:
        from dflash_offline.stages.conversations.advice import split_up

        print(f"In it are {split_up(done.split, done.num_tokens)}.")
    if done.num_skipped:
        print(f"{done.num_skipped} samples with bad features were left out.")
    if not done.shards_left:
        print(f"Next: {dflash_line('train', cache, '--out', free_name(Path(cache), 'run'))}")
    print(f"Look: {dflash_line('inspect', cache)}")


def print_plan(config: ExtractConfig, plan: "Plan", layout: Layout, forecast: "Forecast", *, as_json: bool) -> None:
    """Print what extracting would make and cost."""
    from dflash_offline.stages.capture.forecast import more_room

    if as_json:
        print(json.dumps(_document(config, plan, layout, forecast), indent=1))
        return
    for name, text in plan.facts():
        print(f"{name:<12}{text}")
    shard_bytes = layout.shard_tokens * layout.slot_bytes
    why = ": the longest sample must fit" if shard_bytes > config.shard_mib << 20 else ""
    print(f"Shards      {plan.num_shards:,} of {readable_bytes(shard_bytes)} raw{why}")
    for kind in FEATURE_KINDS:
        chosen = "   <- asked for" if kind == config.features else ""
        size = readable_bytes(forecast.bytes_by_kind[kind])
        print(f"Disk        {kind:<9} {size:>10}, {forecast.ratios[kind]:.2f} of raw bfloat16{chosen}")
    if forecast.final_bytes:
        print(f"            final states: {readable_bytes(forecast.final_bytes)}")
    static = f"the plan {readable_bytes(forecast.plan_bytes)}, of the target {readable_bytes(forecast.target_bytes)}"
    print(f"            besides: {static}")
    if forecast.rest_bytes is not None:
        left = readable_bytes(forecast.rest_bytes)
        print(
            f"Done        {forecast.shards_done:,} of {plan.num_shards:,} shards; about {left} are still to be written"
        )
    if forecast.free_bytes is not None:
        print(f"Free        {readable_bytes(forecast.free_bytes)}{'' if forecast.fits else ': NOT ENOUGH'}")
    if config.world_size > 1:
        _print_shares(plan, config.world_size)
    print(
        f"Time        {readable_seconds(forecast.seconds)} at {forecast.tokens_per_s:,.0f} tokens/s a process, measured"
    )
    print(
        f"Next: {'the same without --plan' if forecast.fits else more_room(is_begun=forecast.rest_bytes is not None)}."
    )


def _print_shares(plan: "Plan", world_size: int) -> None:
    """Print what each rank would take, of many the range, and how even that is."""
    from dflash_offline.stages.capture.forecast import shares

    ranks = shares(plan.samples, plan.num_shards, world_size)
    largest, mean = max(rank.tokens for rank in ranks), sum(rank.tokens for rank in ranks) / world_size
    spread = [f"{min(counts):,} to {max(counts):,}" for counts in zip(*map(astuple, ranks), strict=True)]
    even = f"the most is {largest / mean:.3f} of the mean"
    print(f"Ranks       {world_size:,}: {spread[0]} shards, {spread[1]} tokens; {even}")
    for number, rank in enumerate(ranks if world_size <= _MOST_RANKS else ()):
        print(f"            {number:>3}: {rank.shards:,} shards, {rank.tokens:,} tokens")


def _document(config: ExtractConfig, plan: "Plan", layout: Layout, forecast: "Forecast") -> dict[str, Any]:
    from dflash_offline.stages.capture.forecast import shares

    found = asdict(forecast)
    del found["rest_bytes"]
    return {
        **plan.counts(),
        "shards": plan.num_shards,
        "shard_bytes_raw": layout.shard_tokens * layout.slot_bytes,
        "bytes": found.pop("bytes_by_kind"),
        **found,
        "bytes_left": forecast.bytes_left,
        "fits": forecast.fits,
        "ranks": list(map(asdict, shares(plan.samples, plan.num_shards, config.world_size))),
    }
