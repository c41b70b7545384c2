"""The command line: each command converts its arguments, calls one function and prints what it made."""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from dflash_offline.pipeline.arguments import (
    Attention,
    Device,
    Html,
    InputFormat,
    Json,
    KeepSpecialTokens,
    LogFormatOption,
    Mask,
    NoReasoning,
    Quiet,
    Revision,
    Target,
    TemplateKwargs,
    TrustRemoteCode,
    one_of,
)
from dflash_offline.pipeline.arguments import check_file as _check_file
from dflash_offline.pipeline.arguments import ids as _ids
from dflash_offline.pipeline.arguments import json_object as _object
from dflash_offline.pipeline.arguments import settings as _settings
from dflash_offline.pipeline.arguments import settings_over_file as _settings_over_file
from dflash_offline.pipeline.arguments import shares as _shares
from dflash_offline.pipeline.command import is_first_rank as _is_first_rank
from dflash_offline.pipeline.command import reported as _reported
from dflash_offline.pipeline.help import OVERVIEW, taught
from dflash_offline.pipeline.progress import LogFormat
from dflash_offline.schemas.config import (
    ATTENTION_BACKENDS,
    AUTOCAST_DTYPES,
    DTYPES,
    LOSSES,
    ON_BAD_FEATURES,
    OPTIMIZERS,
    REPORTERS,
    ExtractConfig,
    RerunConfig,
    TrainConfig,
    choice_problem,
)
from dflash_offline.schemas.draft import CAUSAL_LAYERS
from dflash_offline.schemas.draft_formats import FORMATS
from dflash_offline.schemas.errors import DflashError
from dflash_offline.schemas.evaluation import EvalConfig
from dflash_offline.schemas.manifest import FEATURE_KINDS
from dflash_offline.schemas.regeneration import RegenerateConfig
from dflash_offline.stages.cores import limit_threads
from dflash_offline.stages.progress import readable_bytes

CHECKPOINTS = ("best", "last")

app = typer.Typer(
    name="dflash",
    help="Train DFlash drafters offline: cache a target's hidden states once, then train from the cache.",
    epilog=OVERVIEW,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"dflash-offline {version('dflash-offline')}")
        raise typer.Exit


@app.callback()
def _main(
    _version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command(**taught("regenerate"))
def regenerate(
    data: Annotated[list[Path], typer.Argument(help="Conversations, named as for `dflash extract`.")],
    out: Annotated[Path, typer.Option(help="JSONL file of the conversations with the target's own answers.")],
    target: Annotated[
        str | None, typer.Option(help="Hugging Face model: a folder, or a hub id. With --server only a name.")
    ] = RegenerateConfig.target,
    server: Annotated[
        list[str] | None,
        typer.Option(metavar="URL", help="OpenAI-compatible server that answers; may be given several times."),
    ] = None,
    model: Annotated[str | None, typer.Option(help="The model's name on the servers. [default: the target]")] = None,
    temperature: Annotated[
        float, typer.Option(help="0 for the likeliest token each time; above, tokens are drawn.")
    ] = RegenerateConfig.temperature,
    top_p: Annotated[
        float, typer.Option(help="When drawn: the likeliest tokens with this much together.")
    ] = RegenerateConfig.top_p,
    seed: Annotated[int, typer.Option(help="Of the draws, a row's own by its number.")] = RegenerateConfig.seed,
    max_new_tokens: Annotated[
        int, typer.Option(help="Tokens of an answer; a longer one leaves its row out.")
    ] = RegenerateConfig.max_new_tokens,
    chat_template_kwargs: TemplateKwargs = "{}",
    input_format: InputFormat = RegenerateConfig.input_format,
    limit: Annotated[int | None, typer.Option(help="Rows read, at most. [default: all]")] = RegenerateConfig.limit,
    skip_bad_rows: Annotated[
        bool, typer.Option("--skip-bad-rows", help="Leave unusable rows out, counted, instead of stopping.")
    ] = RegenerateConfig.skip_bad_rows,
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16 or float16; auto is float32 on the CPU, else the checkpoint's.")
    ] = RegenerateConfig.dtype,
    attn_implementation: Attention = RegenerateConfig.attn_implementation,
    device: Device = RegenerateConfig.device,
    device_map: Annotated[
        str | None, typer.Option(help="auto spreads a target that is larger than one GPU over all of them.")
    ] = RegenerateConfig.device_map,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    batch_rows: Annotated[
        int, typer.Option(help="Conversations answered at once here; another number may decide a near tie otherwise.")
    ] = RegenerateConfig.batch_rows,
    concurrency: Annotated[
        int, typer.Option(help="Requests on their way to all servers together.")
    ] = RegenerateConfig.concurrency,
    timeout_s: Annotated[
        float, typer.Option(help="Seconds until a server's answer must be there.")
    ] = RegenerateConfig.timeout_s,
    row_tries: Annotated[
        int, typer.Option(help="Tries until a row is left out that fails while others are answered.")
    ] = RegenerateConfig.row_tries,
    backoff_s: Annotated[
        float, typer.Option(help="Seconds before a second try; doubled each time, or as the server asks.")
    ] = RegenerateConfig.backoff_s,
    server_tries: Annotated[
        int, typer.Option(help="Tries in a row without an answer until a server rests.")
    ] = RegenerateConfig.server_tries,
    rest_s: Annotated[
        float, typer.Option(help="Seconds of its first rest; the next ones are longer.")
    ] = RegenerateConfig.rest_s,
    rests: Annotated[
        int, typer.Option(help="Rests in a row until a server is gone; without one left the command stops.")
    ] = RegenerateConfig.rests,
    json_: Json = False,
    log_format: LogFormatOption = LogFormat.text,
    quiet: Quiet = False,
) -> None:
    """Replace the assistant's turns of conversations by the target's own answers."""
    given = locals()
    with _reported(
        "The answers so far are kept; repeat the command to go on.", quiet=quiet, log_format=log_format
    ) as progress:
        config = _settings(
            RegenerateConfig,
            given,
            data=tuple(data),
            servers=tuple(server or ()),
            chat_template_kwargs=_object(chat_template_kwargs, "--chat-template-kwargs"),
        )
        from dflash_offline.pipeline.regenerate import print_done
        from dflash_offline.stages.regenerate import regenerate as run

        print_done(run(config, progress), target, as_json=json_)


@app.command(**taught("extract"))
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
    limit: Annotated[int | None, typer.Option(help="Rows read, at most. [default: all]")] = ExtractConfig.limit,
    seed: Annotated[int, typer.Option(help="Draws and mixes rows where data has weights.")] = ExtractConfig.seed,
    drop_duplicates: Annotated[
        bool, typer.Option("--drop-duplicates", help="Leave out rows that say exactly what an earlier one says.")
    ] = ExtractConfig.drop_duplicates,
    mask: Mask = ExtractConfig.mask,
    no_reasoning: NoReasoning = ExtractConfig.no_reasoning,
    keep_special_tokens: KeepSpecialTokens = ExtractConfig.keep_special_tokens,
    skip_bad_rows: Annotated[
        bool, typer.Option("--skip-bad-rows", help="Leave unusable rows out, counted, instead of stopping.")
    ] = False,
    dtype: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="float32, bfloat16 or float16; auto is float32 on the CPU, else the checkpoint's.",
            autocompletion=one_of(*DTYPES),
        ),
    ] = ExtractConfig.dtype,
    attn_implementation: Attention = ExtractConfig.attn_implementation,
    device: Device = ExtractConfig.device,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    batch_tokens: Annotated[
        int, typer.Option(help="Padded tokens of one forward; fewer take less memory.")
    ] = ExtractConfig.batch_tokens,
    shard_mib: Annotated[
        int, typer.Option(help="Raw features in one shard: what a kill can cost, and memory holds three.")
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
        float, typer.Option(help="Of the samples, that may be skipped so before the target is to blame.")
    ] = ExtractConfig.max_skipped,
    device_map: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="auto spreads a target that is larger than one GPU over all of them."),
    ] = ExtractConfig.device_map,
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
    with _reported(go_on, quiet=quiet, log_format=log_format) as progress:
        config = _settings(
            ExtractConfig,
            given,
            data=tuple(data),
            layers=_ids(layers, "--layers"),
            chat_template_kwargs=_object(chat_template_kwargs, "--chat-template-kwargs"),
        )
        from dflash_offline.pipeline.extract import print_done, print_plan
        from dflash_offline.stages.extract import extract as run
        from dflash_offline.stages.extract import plan_only
        from dflash_offline.stages.target import quiet_libraries

        quiet_libraries()
        if plan:
            print_plan(config, *plan_only(config, progress), as_json=json_)
        else:
            print_done(run(config, progress), out, as_json=json_)


@app.command(**taught("inspect"))
def inspect(
    folders: Annotated[
        list[Path],
        typer.Argument(
            metavar="CACHE|RUN...",
            help="Cache folder; or run folders, compared where there are several; or with --target, data that "
            "`dflash extract` would take.",
        ),
    ],
    sample: Annotated[
        int | None, typer.Option(help="Show this sample: its text with mask and anchors, its norms along the tokens.")
    ] = None,
    shard: Annotated[int | None, typer.Option(help="Show this shard: its record, bytes, statistics, samples.")] = None,
    layers: Annotated[bool, typer.Option("--layers", help="Show each layer's statistics and bytes.")] = False,
    features: Annotated[
        int | None,
        typer.Option(help="With --layers, read the features of so many samples: norms, outlier channels, similarity."),
    ] = None,
    top: Annotated[
        str | None,
        typer.Option(
            help="Show the longest or shortest samples, or the rare ones: those of the tokens that are rarest here.",
            metavar="longest|shortest|rare",
        ),
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="Show what extracting for this target would make of row --sample of the data.")
    ] = None,
    input_format: InputFormat = ExtractConfig.input_format,
    mask: Mask = ExtractConfig.mask,
    no_reasoning: NoReasoning = ExtractConfig.no_reasoning,
    keep_special_tokens: KeepSpecialTokens = ExtractConfig.keep_special_tokens,
    chat_template_kwargs: TemplateKwargs = "{}",
    block_size: Annotated[int, typer.Option(help="Of the data's row, as for `dflash extract`.")] = (
        ExtractConfig.block_size
    ),
    max_length: Annotated[int, typer.Option(help="Of the data's row, as for `dflash extract`.")] = (
        ExtractConfig.max_length
    ),
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    html: Html = None,
    json_: Json = False,
) -> None:
    """Show what a cache or a run holds and what looks wrong in it; or a row of data, before anything is extracted.

    No feature is read but with --sample, --features and --html.
    """
    given = {name: value for name, value in locals().items() if name not in ("layers", "features")}
    with _reported():
        from dflash_offline.pipeline import run_view

        if html is not None:
            _check_file(html, "--html")
        views = {"--sample": sample, "--shard": shard, "--layers": layers or None, "--features": features, "--top": top}
        named = [name for name, value in views.items() if value is not None]
        if html is not None and (target is not None or named):
            raise DflashError(f"--html is a page of a whole cache or run; leave {', '.join(named) or '--target'} out.")
        if target is None and run_view.is_run(folders[0]):
            if named:
                raise DflashError(f"{folders[0]} is a run, and {', '.join(named)} shows a part of a cache. Name one.")
            _inspect_runs(folders, html, json_)
            return
        if len(folders) > 1:
            raise DflashError("Several folders are compared only where all are runs. Name one cache.")
        cache = folders[0]
        if target is not None:
            if shard is not None or layers or features is not None or top is not None:
                raise DflashError("With --target a row of data is shown; --shard, --layers and --top are a cache's.")
            from dflash_offline.pipeline.inspect_row import print_row, row_view
            from dflash_offline.pipeline.terminal import print_json
            from dflash_offline.stages.target import quiet_libraries

            quiet_libraries()
            kwargs = _object(chat_template_kwargs, "--chat-template-kwargs")
            config = _settings(ExtractConfig, given, data=(cache,), out=cache, chat_template_kwargs=kwargs)
            row = row_view(config, sample or 0)
            print_json(row) if json_ else print_row(row)
            return
        if html is not None:
            from dflash_offline.pipeline.cache_page import write_cache_page

            done = write_cache_page(cache, html)
            if not json_:
                print(f"{html} lists {done['listed']:,} samples and shows {done['shown']} of them token by token.")
                print("Next: open it in a browser.")
                return
        from dflash_offline.pipeline.inspect_cache import show_cache

        show_cache(cache, sample=sample, shard=shard, layers=layers, features=features, top=top, as_json=json_)


def _inspect_runs(runs: list[Path], html: Path | None, json_: bool) -> None:
    from dflash_offline.pipeline import run_report, run_view

    views = [run_view.run_view(run) for run in runs]
    if html is not None:
        from dflash_offline.pipeline.run_page import write_run_page

        write_run_page(views, html)
    if json_:
        print(json.dumps(views[0] if len(views) == 1 else run_view.compared(views), indent=1))
    elif html is not None:
        print(f"{html} shows {len(views)} run{'s' if len(views) > 1 else ''}. Next: open it in a browser.")
    elif len(views) == 1:
        run_report.print_run(views[0])
    else:
        run_report.print_runs(views)


@app.command(**taught("verify"))
def verify(
    folder: Annotated[Path, typer.Argument(help="Cache folder, or draft folder.")],
    target: Annotated[
        str | None,
        typer.Option(help="Also run this target again on some samples and compare each layer; a draft: compare sizes."),
    ] = None,
    samples: Annotated[int, typer.Option(help="To run the target on.")] = RerunConfig.samples,
    seed: Annotated[int, typer.Option(help="Draws those samples.")] = RerunConfig.seed,
    repair: Annotated[
        bool, typer.Option("--repair", help="Forget a cache's faulty shards; `dflash extract` redoes just those.")
    ] = False,
    revision: Annotated[
        str | None, typer.Option(metavar="NAME", help="Of the target's hub id. [default: the extraction's]")
    ] = RerunConfig.revision,
    trust_remote_code: TrustRemoteCode = RerunConfig.trust_remote_code,
    attn_implementation: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Of the target, where this machine lacks the extraction's. [default: its]"),
    ] = RerunConfig.attn_implementation,
    device: Device = RerunConfig.device,
    device_map: Annotated[
        str | None, typer.Option(metavar="NAME", help="Of the target, as for `dflash extract`. [default: its]")
    ] = RerunConfig.device_map,
    json_: Json = False,
    log_format: LogFormatOption = LogFormat.text,
    quiet: Quiet = False,
) -> None:
    """Check every file, chunk, token and statistic of a cache, or a draft by every client's rules; exit 1 if wrong."""
    given = locals()
    with _reported(quiet=quiet, log_format=log_format) as progress:
        rerun = _settings(RerunConfig, given) if target else None
        from dflash_offline.pipeline import verify as report
        from dflash_offline.schemas.draft_lint import is_draft
        from dflash_offline.schemas.manifest import MANIFEST

        if not (folder / MANIFEST).exists() and is_draft(folder):
            if not report.verify_draft(folder, target, as_json=json_):
                raise typer.Exit(1)
            return
        from dflash_offline.stages.target import quiet_libraries
        from dflash_offline.stages.verify import compare_with_target, verify_cache
        from dflash_offline.stages.verify import repair as forget

        faults = verify_cache(folder, progress)
        quiet_libraries()
        forgotten = forget(folder, faults) if repair else []
        # Of a damaged cache the faults are the news; what is left is compared when they are mended.
        fits = compare_with_target(folder, rerun, progress) if rerun and not faults else []
        print(report.to_json(folder, faults, fits, forgotten)) if json_ else report.print_report(
            folder, faults, fits, forgotten
        )
        if faults or any(fit.fault for fit in fits):
            raise typer.Exit(1)


@app.command(**taught("train"))
def train(
    ctx: typer.Context,
    caches: Annotated[
        list[Path] | None, typer.Argument(help="Cache folders made by `dflash extract` from one target.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; continued if it already holds the same run.")] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="TOML", help="File of settings, named as here; flags go before it.")
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(metavar="SHARES", help="Share of each cache that an epoch takes, as in 1,0.3. [default: all]"),
    ] = None,
    epochs: Annotated[float, typer.Option(help="Over the training samples; as published.")] = TrainConfig.epochs,
    steps: Annotated[int | None, typer.Option(help="Of the optimizer, instead of --epochs.")] = None,
    packing: Annotated[
        bool, typer.Option(help="Pack whole documents into rows of one length, or pad a sample a row.")
    ] = TrainConfig.packing,
    batch_tokens: Annotated[
        int, typer.Option(help="Of a packed micro-batch; fewer take less memory.")
    ] = TrainConfig.batch_tokens,
    row_tokens: Annotated[
        int | None,
        typer.Option(help="Of a packed row. [default: all of them with flex attention, else the longest document's]"),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(help="Of a padded micro-batch, with --no-packing.")
    ] = TrainConfig.batch_size,
    accumulation: Annotated[
        int, typer.Option(help="Micro-batches of each rank in one step; the loss is their exact mean.")
    ] = TrainConfig.accumulation,
    optimizer: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="adamw, as published; or muon, which needs fewer steps.",
            autocompletion=one_of(*OPTIMIZERS),
        ),
    ] = TrainConfig.optimizer,
    learning_rate: Annotated[
        float,
        typer.Option(
            "--learning-rate", "--lr", help="Peak of the schedule, after which it falls to zero; as published."
        ),
    ] = TrainConfig.learning_rate,
    init_from: Annotated[
        Path | None, typer.Option(metavar="DRAFT", help="Draft folder to start from, ours or z-lab's.")
    ] = None,
    ema: Annotated[
        float | None,
        typer.Option(help="Of averaged weights, which are then validated and exported, as in 0.999. [default: none]"),
    ] = None,
    warmup_ratio: Annotated[
        float, typer.Option(help="Of the steps, that warm up; as published.")
    ] = TrainConfig.warmup_ratio,
    weight_decay: Annotated[float, typer.Option(help="On matrices; norms do not decay.")] = TrainConfig.weight_decay,
    clip: Annotated[float, typer.Option(help="Largest norm of a gradient; as published.")] = TrainConfig.clip,
    num_anchors: Annotated[
        int, typer.Option(help="Drawn from each sample and step, at most; as published.")
    ] = TrainConfig.num_anchors,
    block_size: Annotated[
        int | None, typer.Option(help="An anchor and the drafted tokens. [default: the cache's]")
    ] = None,
    loss: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="dflash, whose weights fall with the slot; or dpace, whose weights follow the draft's confidence.",
            autocompletion=one_of(*LOSSES),
        ),
    ] = TrainConfig.loss,
    gamma: Annotated[
        float | None,
        typer.Option(help="In which the weights of dflash fall to 1/e. [default: 7, 5, 4 for blocks of 16, 10, 8]"),
    ] = None,
    layers: Annotated[str | None, typer.Option(metavar="IDS", help="Target layers to read. [default: all]")] = None,
    draft_layers: Annotated[
        int | None, typer.Option(help="Draft layers. [default: as many as target layers are read]")
    ] = None,
    draft_heads: Annotated[int | None, typer.Option(help="Query heads. [default: the target's]")] = None,
    draft_kv_heads: Annotated[int | None, typer.Option(help="Key-value heads. [default: the target's]")] = None,
    draft_head_dim: Annotated[int | None, typer.Option(help="Width of a head. [default: the target's]")] = None,
    draft_intermediate_size: Annotated[
        int | None, typer.Option(help="Feed-forward width. [default: the target's]")
    ] = None,
    draft_rope_theta: Annotated[float | None, typer.Option(help="Rotary base. [default: the target's]")] = None,
    draft_rms_norm_eps: Annotated[float | None, typer.Option(help="Norms' epsilon. [default: the target's]")] = None,
    draft_max_position_embeddings: Annotated[
        int | None, typer.Option(help="Longest text it is declared for. [default: the target's]")
    ] = None,
    sliding_window: Annotated[
        int | None, typer.Option(help="Context positions that draft layers see. [default: all]")
    ] = None,
    sliding_layers: Annotated[
        str | None, typer.Option(metavar="IDS", help="Draft layers with that window, from 0. [default: every one]")
    ] = None,
    causal_layers: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Draft layers causal within a block: none, sliding or all. [default: none]",
            autocompletion=one_of(*CAUSAL_LAYERS),
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of weights, order and anchors.")] = TrainConfig.seed,
    val_samples: Annotated[
        int, typer.Option(help="Held out, at most; never over a tenth of them.")
    ] = TrainConfig.val_samples,
    val_every: Annotated[int, typer.Option(help="Steps between validations.")] = TrainConfig.val_every,
    patience: Annotated[
        int | None, typer.Option(help="Without a better serving walk, before it stops. [default: never]")
    ] = None,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = TrainConfig.save_every,
    keep: Annotated[int, typer.Option(help="The newest that are kept, beside the best.")] = TrainConfig.keep,
    attention_backend: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="flex_attention, sdpa or eager; auto is the first on a GPU, the second on a CPU.",
            autocompletion=one_of(*ATTENTION_BACKENDS),
        ),
    ] = TrainConfig.attention_backend,
    dtype: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Autocast: bfloat16 or float32; auto is bfloat16 on a GPU.",
            autocompletion=one_of(*AUTOCAST_DTYPES),
        ),
    ] = TrainConfig.dtype,
    device: Device = TrainConfig.device,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Compute layers twice: less memory, more time.")
    ] = TrainConfig.gradient_checkpointing,
    compile: Annotated[bool | None, typer.Option(help="torch.compile. [default: on a GPU]")] = None,
    report_to: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="wandb or trackio, if installed. [default: none]", autocompletion=one_of(*REPORTERS)
        ),
    ] = None,
    loader_threads: Annotated[
        int, typer.Option(help="That read ahead; more where the log shows waiting.")
    ] = TrainConfig.loader_threads,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Do two steps, say what the run would take, and write nothing.")
    ] = False,
    json_: Json = False,
    log_format: LogFormatOption = LogFormat.text,
    quiet: Quiet = False,
) -> None:
    """Train a draft from caches; the target is not loaded. Under torchrun, every rank runs this command."""
    given = locals()
    go_on = "" if dry_run else "Repeat the command to go on from the last checkpoint."
    with _reported(go_on, quiet=quiet, log_format=log_format) as progress:
        given |= {
            "caches": tuple(caches or ()),
            "layers": _ids(layers, "--layers"),
            "sliding_layers": _ids(sliding_layers, "--sliding-layers"),
            "weights": _shares(weights, "--weights"),
        }
        settings = _settings_over_file(TrainConfig, ctx, config, given)
        from dflash_offline.pipeline import training
        from dflash_offline.stages import train as stage

        if dry_run:
            found = stage.rehearse(settings)
            if _is_first_rank():
                print(training.rehearsal_json(found)) if json_ else training.print_rehearsal(found)
            return
        done = stage.train(settings, progress)
        if _is_first_rank():
            print(training.trained_json(done)) if json_ else training.print_trained(done, settings.out)


@app.command(**taught("export"))
def export(
    run: Annotated[Path, typer.Argument(help="Run folder made by `dflash train`.")],
    out: Annotated[Path, typer.Option(help="Draft folder to write.")],
    checkpoint: Annotated[
        str,
        typer.Option(help="best (by the serving walk) or last.", metavar="NAME", autocompletion=one_of(*CHECKPOINTS)),
    ] = "best",
    format_: Annotated[
        str,
        typer.Option(
            "--format",
            help="zlab, for z-lab's client, vLLM and SGLang; or speculators; or transformers, for its own generator.",
            metavar="NAME",
            autocompletion=one_of(*FORMATS),
        ),
    ] = FORMATS[0],
    eval_: Annotated[
        Path | None,
        typer.Option("--eval", help="Result of `dflash eval --save` for the model card. [default: RUN/eval.json]"),
    ] = None,
    json_: Json = False,
    log_format: LogFormatOption = LogFormat.text,
    quiet: Quiet = False,
) -> None:
    """Write a checkpoint as a folder that the serving clients load, checked by their rules."""
    with _reported("Repeat the command.", quiet=quiet, log_format=log_format):
        if problem := choice_problem("--checkpoint", checkpoint, CHECKPOINTS):
            raise DflashError(problem)
        from dflash_offline.pipeline.export import export as write

        done = write(run, out, checkpoint, format_, eval_)
        if json_:
            written = {"draft": str(done.draft), "step": done.step}
            print(json.dumps({**written, "parameters": done.num_parameters, "bytes": done.num_bytes}, indent=1))
            return
        size = f"{done.num_parameters:,} parameters, {readable_bytes(done.num_bytes)}"
        print(f"{out} holds the draft of step {done.step}: {size}.")
        print(done.next_line(out))


@app.command(**taught("eval"))
def evaluate(
    draft: Annotated[
        Path, typer.Argument(help="Draft folder, ours or another's; or a run folder, for its best checkpoint.")
    ],
    target: Annotated[
        str | None,
        typer.Option(help="Hugging Face model: a folder, or a hub id. [default: none; a cache is walked without it]"),
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help='JSONL of {"messages": [...]} or {"prompt": "..."}, and "kind" if wanted.')
    ] = None,
    cache: Annotated[Path | None, typer.Option(help="Cache; its held-out samples are the prompts, or walked.")] = None,
    limit: Annotated[int | None, typer.Option(help="Or held-out samples, from the first. [default: all]")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Of one answer, at most.")] = EvalConfig.max_new_tokens,
    temperature: Annotated[
        float, typer.Option(help="0 is greedy; above, tokens are drawn, and drafted ones kept by rejection sampling.")
    ] = EvalConfig.temperature,
    top_p: Annotated[
        float, typer.Option(help="When drawn: the likeliest tokens that together have this much.")
    ] = EvalConfig.top_p,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = EvalConfig.seed,
    repeats: Annotated[
        int, typer.Option(help="Each prompt is decoded each way, in turn; speeds are of the medians.")
    ] = EvalConfig.repeats,
    prompt_lookup: Annotated[
        bool, typer.Option("--prompt-lookup", help="Also decode with prompt lookup, for comparison.")
    ] = EvalConfig.prompt_lookup,
    chat_template_kwargs: TemplateKwargs = "{}",
    dtype: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="float32, bfloat16 or float16; auto is float32 on the CPU, else the target's.",
            autocompletion=one_of(*DTYPES),
        ),
    ] = EvalConfig.dtype,
    attn_implementation: Attention = EvalConfig.attn_implementation,
    device: Device = EvalConfig.device,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    threads: Annotated[int | None, typer.Option(help="CPU threads. [default: one a core]")] = None,
    save: Annotated[Path | None, typer.Option(help="Also write the result as JSON to this file.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Also write a PNG of acceptance by slot and of the rounds; needs matplotlib.")
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Also write a page of where the draft fails: every round of every prompt, by token."
        ),
    ] = None,
    json_: Json = False,
    log_format: LogFormatOption = LogFormat.text,
    quiet: Quiet = False,
) -> None:
    """Decode prompts with and without the draft, or walk a cache; exit 1 if an answer changes."""
    given = locals()
    with _reported("Repeat the command.", quiet=quiet, log_format=log_format) as progress:
        for flag, path in (("--save", save), ("--plot", plot), ("--html", html)):
            if path is not None:
                _check_file(path, flag)
        kwargs = _object(chat_template_kwargs, "--chat-template-kwargs")
        config = _settings(
            EvalConfig, given, chat_template_kwargs=kwargs, keep_rounds=html is not None and target is not None
        )
        from dflash_offline.pipeline import eval_page, plots
        from dflash_offline.pipeline import eval_report as report
        from dflash_offline.pipeline.evaluate import evaluate_folder, token_decoder
        from dflash_offline.stages.target import quiet_libraries

        quiet_libraries()
        if plot is not None:
            report.require_matplotlib()
        if html is not None:
            plots.require_matplotlib()
        result = evaluate_folder(config, progress)
        text = json.dumps(result.to_json(), indent=1)
        print(text) if json_ else report.print_report(result)
        if save is not None:
            save.write_text(text + "\n")
        if plot is not None:
            report.save_plot(result, plot)
        if html is not None:
            eval_page.write_eval_page(result, html, token_decoder(config) if config.target else None)
            if not json_:
                print(f"{html} shows every round. Next: open it in a browser.")
        if not json_:
            report.print_made([path for path in (save, plot) if path is not None], result)
        if result.lossless is False:
            raise typer.Exit(1)


@app.command(**taught("demo"))
def demo(
    out: Annotated[Path, typer.Option(help="Folder for cache, run and draft.")] = Path("dflash-demo"),
    log_format: LogFormatOption = LogFormat.text,
    quiet: Quiet = False,
) -> None:
    """Run extract, inspect, train, export and eval on the target that ships with the package."""
    with _reported("Repeat the command to go on.", quiet=quiet, log_format=log_format):
        from dflash_offline.pipeline.demo import run_demo

        run_demo(out, [f"--log-format={log_format}", *(["--quiet"] if quiet else [])])


@app.command(**taught("doctor"))
def doctor(
    out: Annotated[Path, typer.Option(help="Folder whose disk is tried: where caches and runs will be.")] = Path(),
    target: Annotated[
        str | None, typer.Option(help="Look at this target as well: a folder, or a hub id that was fetched before.")
    ] = None,
    hub: Annotated[bool, typer.Option("--hub", help="Also see whether the model hub answers.")] = False,
    json_: Json = False,
    log_format: LogFormatOption = LogFormat.text,
    quiet: Quiet = False,
) -> None:
    """Look at packages, devices, disk and speed; exit 1 if something that is needed is wrong."""
    with _reported(quiet=quiet, log_format=log_format) as progress:
        from dflash_offline.pipeline.doctor import examine, require_folder
        from dflash_offline.pipeline.doctor_report import print_examination

        require_folder(out)
        found = examine(out, target, hub, progress)
        print(found.to_json()) if json_ else print_examination(found, out)
        if any(finding.needed for finding in found.findings):
            raise typer.Exit(1)


def main() -> None:
    """Run the command line."""
    limit_threads()
    app()


if __name__ == "__main__":
    main()
