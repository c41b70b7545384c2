"""`dflash extract`: its options, and what they start."""

from pathlib import Path
from typing import Annotated

import typer

from dflash_offline.pipeline.arguments import (
    Attention,
    Device,
    DeviceMap,
    InputFormat,
    Json,
    KeepSpecialTokens,
    Limit,
    LogFormatOption,
    Mask,
    NoReasoning,
    Quiet,
    Revision,
    SkipBadRows,
    Target,
    TargetDtype,
    TemplateKwargs,
    TrustRemoteCode,
    ids,
    json_object,
    one_of,
    settings,
)
from dflash_offline.pipeline.command import reported
from dflash_offline.pipeline.progress import LogFormat
from dflash_offline.schemas.manifest import FEATURE_KINDS
from dflash_offline.schemas.settings.extract import ON_BAD_FEATURES, ExtractConfig


def extract(
    data: Annotated[
        list[Path],
        typer.Argument(
            help="Files, folders, globs or hub ids of conversations; a.jsonl:0.3 takes that share of a.jsonl."
        ),
    ],
    target: Target,
    out: Annotated[Path, typer.Option(help="Cache folder; continued if it already holds the same cache.")],
    layers: Annotated[
        str | None,
        typer.Option(metavar="IDS", help="Captured layers, as in 1,9,17; id i is layer i's output. [default: spread]"),
    ] = None,
    num_layers: Annotated[
        int | None,
        typer.Option(
            help="Captured layers, spread over the target. [default: 5 as published, fewer in a small target]"
        ),
    ] = None,
    block_size: Annotated[
        int,
        typer.Option(help="Longest block of drafts from this cache: an anchor and the drafted tokens; as published."),
    ] = ExtractConfig.block_size,
    mask_token_id: Annotated[
        int | None,
        typer.Option(help="Token that fills the slots to be drafted. [default: a reserved one that no data holds]"),
    ] = None,
    max_length: Annotated[
        int, typer.Option(help="Kept of each conversation, from its start; as published.")
    ] = ExtractConfig.max_length,
    chat_template_kwargs: TemplateKwargs = "{}",
    input_format: InputFormat = ExtractConfig.input_format,
    limit: Limit = ExtractConfig.limit,
    seed: Annotated[int, typer.Option(help="Draws and mixes rows where data has weights.")] = ExtractConfig.seed,
    drop_duplicates: Annotated[
        bool, typer.Option("--drop-duplicates", help="Leave out rows that say exactly what an earlier one says.")
    ] = ExtractConfig.drop_duplicates,
    mask: Mask = ExtractConfig.mask,
    no_reasoning: NoReasoning = ExtractConfig.no_reasoning,
    keep_special_tokens: KeepSpecialTokens = ExtractConfig.keep_special_tokens,
    skip_bad_rows: SkipBadRows = ExtractConfig.skip_bad_rows,
    dtype: TargetDtype = ExtractConfig.dtype,
    attn_implementation: Attention = ExtractConfig.attn_implementation,
    device: Device = ExtractConfig.device,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    batch_tokens: Annotated[
        int, typer.Option(help="Padded tokens of one forward; fewer take less memory.")
    ] = ExtractConfig.batch_tokens,
    shard_mib: Annotated[
        int, typer.Option(help="Raw features in one shard: what a kill can cost. A worker holds two, on a CPU one.")
    ] = ExtractConfig.shard_mib,
    chunk_tokens: Annotated[
        int, typer.Option(help="Of one compressed chunk: the least that is read and rounded up to.")
    ] = ExtractConfig.chunk_tokens,
    features: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="lossless, rounded or scaled: about 0.68, 0.49 and 0.33 of raw bfloat16 on disk.",
            autocompletion=one_of(*FEATURE_KINDS),
        ),
    ] = ExtractConfig.features,
    mantissa_bits: Annotated[
        int, typer.Option(help="Kept of 7 by rounded features; 4 err by 1.4 %.")
    ] = ExtractConfig.mantissa_bits,
    step: Annotated[
        float, typer.Option(help="Of scaled features, in standard deviations of the channel; 0.125 errs by 2.6 %.")
    ] = ExtractConfig.step,
    on_bad_features: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="refuse a sample whose features are not finite or dead, or skip it, recorded.",
            autocompletion=one_of(*ON_BAD_FEATURES),
        ),
    ] = ExtractConfig.on_bad_features,
    max_skipped: Annotated[
        float, typer.Option(help="Of the samples, that may be skipped so; 8 of a small plan may. 0 allows none.")
    ] = ExtractConfig.max_skipped,
    device_map: DeviceMap = ExtractConfig.device_map,
    workers: Annotated[
        int, typer.Option(help="On this machine, dealt to its GPUs in turn: one a GPU.")
    ] = ExtractConfig.workers,
    rank: Annotated[
        int, typer.Option(help="Which share is this command's, in an array job: 0 to --world-size - 1.")
    ] = ExtractConfig.rank,
    world_size: Annotated[int, typer.Option(help="Commands of the array job.")] = ExtractConfig.world_size,
    plan_timeout_s: Annotated[
        float, typer.Option(help="That a later rank waits for a sign of the plan, which rank 0 makes.")
    ] = ExtractConfig.plan_timeout_s,
    plan: Annotated[
        bool, typer.Option("--plan", help="Only say what it would make: samples, shards, disk, time. Writes nothing.")
    ] = False,
    ignore_free_space: Annotated[
        bool, typer.Option("--ignore-free-space", help="Start although the disk cannot hold the cache.")
    ] = ExtractConfig.ignore_free_space,
    json_: Json = False,
    log_format: LogFormatOption = LogFormat.text,
    quiet: Quiet = False,
) -> None:
    """Run a target over conversations once and cache its hidden states."""
    given = locals()
    go_on = "Finished shards are kept; repeat the command to go on."
    with reported(go_on, quiet=quiet, log_format=log_format) as progress:
        config = settings(
            ExtractConfig,
            given,
            data=tuple(data),
            layers=ids(layers, "--layers"),
            chat_template_kwargs=json_object(chat_template_kwargs, "--chat-template-kwargs"),
        )
        from dflash_offline.pipeline.extract import print_done, print_plan
        from dflash_offline.stages.extract import extract as run
        from dflash_offline.stages.extract import plan_only
        from dflash_offline.stages.target.model import quiet_libraries

        quiet_libraries()
        if plan:
            print_plan(config, *plan_only(config, progress), as_json=json_)
        else:
            print_done(run(config, progress), out, as_json=json_)
