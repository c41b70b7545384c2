"""The command line: each command converts its arguments, calls one function and prints what it made."""

import errno
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import typer

from dflash_offline.pipeline.progress import TerminalProgress
from dflash_offline.schemas.config import ExtractConfig, TrainConfig
from dflash_offline.schemas.draft_formats import FORMATS
from dflash_offline.schemas.errors import DflashError
from dflash_offline.schemas.evaluation import EvalConfig
from dflash_offline.schemas.regeneration import RegenerateConfig
from dflash_offline.schemas.settings import read_settings, require_fields
from dflash_offline.stages.cores import limit_threads
from dflash_offline.stages.progress import readable_bytes

app = typer.Typer(
    name="dflash",
    help="Train DFlash drafters offline: cache a target's hidden states once, then train from the cache.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Config = TypeVar("Config", ExtractConfig, TrainConfig, EvalConfig, RegenerateConfig)
Number = TypeVar("Number", int, float)
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N; auto takes a GPU if there is one.")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")]
TemplateKwargs = Annotated[
    str, typer.Option(metavar="JSON", help="""Passed to the chat template, e.g. '{"enable_thinking": false}'.""")
]
InputFormat = Annotated[
    str | None,
    typer.Option(
        help="json, jsonl, parquet or arrow, and/or messages, sharegpt, prompt-response, text or tokens, as in "
        "parquet,messages. [default: found out]"
    ),
]
Mask = Annotated[str, typer.Option(help="Supervised: every assistant turn, the last-turn, or all tokens.")]
NoReasoning = Annotated[bool, typer.Option("--no-reasoning", help="Leave an answer's reasoning unsupervised.")]
KeepSpecialTokens = Annotated[
    bool, typer.Option("--keep-special-tokens", help="Keep rows whose text spells a special token, as it is served.")
]
Attention = Annotated[str, typer.Option(help="As transformers names it.")]
Target = Annotated[str, typer.Option(help="Hugging Face model: a folder, or a hub id.")]
Revision = Annotated[str | None, typer.Option(help="Revision of a hub id.")]


_OUTSIDE_FAULTS = {
    getattr(errno, name) for name in "ENOSPC EDQUOT EFBIG EACCES EPERM EROFS EIO ENAMETOOLONG ELOOP".split()
}
"""System errors that are nobody's bug: no room, no permission, a broken disk, an impossible name."""


@contextmanager
def _reported(go_on: str = "") -> Iterator[None]:
    """Turn a user's errors into one message and exit 1, and Ctrl-C into exit 130; a bug keeps its traceback."""
    try:
        yield
    except DflashError as error:
        _fail(str(error), 1)
    except KeyboardInterrupt as error:
        said = f"{error} " if str(error) else "Stopped. "
        _fail(f"{said}{go_on}".rstrip(), 130)
    except OSError as error:
        if error.errno not in _OUTSIDE_FAULTS:
            raise
        place = f"{error.filename}: " if error.filename else ""
        _fail(f"{place}{error.strerror}. {go_on}".rstrip(), 1)


def _fail(message: str, code: int) -> NoReturn:
    if _is_first_rank():
        print(f"dflash: {message}", file=sys.stderr)
    elif code != 130:  # all ranks stop at a signal; one of them says so
        print(f"dflash, rank {os.environ['RANK']}: {message}", file=sys.stderr)
    raise typer.Exit(code)


def _listed(kind: type[Number], text: str | None, flag: str, example: str) -> tuple[Number, ...] | None:
    if text is None:
        return None
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        raise DflashError(
            f"{flag} is {text!r}; expected numbers with commas between, as in {flag} {example}."
        ) from None


def _ids(text: str | None, flag: str) -> tuple[int, ...] | None:
    return _listed(int, text, flag, "1,9,17")


def _shares(text: str | None, flag: str) -> tuple[float, ...] | None:
    return _listed(float, text, flag, "1,0.3")


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _object(text: str, flag: str) -> dict[str, Any]:
    try:
        value = json.loads(text, parse_constant=_no_number)
    except ValueError as error:
        raise DflashError(
            f"{flag} is not JSON ({error}): {text!r}. Give an object, as in '{{\"a\": true}}'."
        ) from error
    if not isinstance(value, dict):
        raise DflashError(f"{flag} is a JSON {type(value).__name__}; expected an object, as in '{{\"a\": true}}'.")
    return value


def _settings(kind: type[Config], given: dict[str, Any], **converted: Any) -> Config:
    """Return a command's settings: its arguments by name, some of them converted first."""
    names = {field.name for field in fields(kind)}
    return kind(**{name: value for name, value in given.items() if name in names} | converted)


def _settings_over_file(kind: type[Config], ctx: typer.Context, path: Path | None, given: dict[str, Any]) -> Config:
    """Return a command's settings: a file's, where there is one, and over them what stands on the command line."""
    settings = read_settings(path, kind) if path else {}
    for field in fields(kind):
        if field.name not in settings or _given(ctx, field.name):
            settings[field.name] = given[field.name]
    if _given(ctx, "epochs") and not _given(ctx, "steps"):
        settings["steps"] = None  # the file's, which would go before the epochs asked for
    require_fields(kind, settings)
    return kind(**settings)


def _given(ctx: typer.Context, name: str) -> bool:
    """Say whether an argument stands on the command line."""
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _is_first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"


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


@app.command(
    epilog="Examples: dflash regenerate chats.jsonl --target Qwen/Qwen3-8B --out own.jsonl; where a server runs that "
    "model, with --server http://127.0.0.1:8000/v1. The same command again goes on where it stopped."
)
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
    quiet: Quiet = False,
) -> None:
    """Replace the assistant's turns of conversations by the target's own answers."""
    given = locals()
    with _reported("The answers so far are kept; repeat the command to go on."):
        config = _settings(
            RegenerateConfig,
            given,
            data=tuple(data),
            servers=tuple(server or ()),
            chat_template_kwargs=_object(chat_template_kwargs, "--chat-template-kwargs"),
        )
        from dflash_offline.pipeline.regenerate import print_done
        from dflash_offline.stages.regenerate import regenerate as run

        print_done(run(config, TerminalProgress(quiet=quiet)), target, as_json=json_)


@app.command(
    epilog="Example: dflash extract chats.jsonl --target Qwen/Qwen3-8B --out cache --plan, then without --plan. "
    "The same command again goes on where it stopped, with any number of --workers."
)
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
        str | None, typer.Option(metavar="IDS", help="Captured layers, as in 1,9,17; id i is layer i's output.")
    ] = None,
    num_layers: Annotated[
        int | None, typer.Option(help="Number of captured layers, spread over the target. [default: 5, if it has room]")
    ] = None,
    block_size: Annotated[
        int, typer.Option(help="Longest block that drafts of this cache may have: an anchor and the drafted tokens.")
    ] = ExtractConfig.block_size,
    mask_token_id: Annotated[
        int | None, typer.Option(help="Token that fills the slots to be drafted. [default: a reserved one]")
    ] = None,
    max_length: Annotated[int, typer.Option(help="Tokens kept of each conversation.")] = ExtractConfig.max_length,
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
        str, typer.Option(help="float32, bfloat16 or float16; auto is float32 on the CPU, else the checkpoint's.")
    ] = ExtractConfig.dtype,
    attn_implementation: Attention = ExtractConfig.attn_implementation,
    device: Device = ExtractConfig.device,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    batch_tokens: Annotated[int, typer.Option(help="Padded tokens of one forward.")] = ExtractConfig.batch_tokens,
    shard_mib: Annotated[
        int, typer.Option(help="MiB of raw features in one shard, the unit of resuming.")
    ] = ExtractConfig.shard_mib,
    chunk_tokens: Annotated[int, typer.Option(help="Tokens of one compressed chunk.")] = ExtractConfig.chunk_tokens,
    features: Annotated[
        str, typer.Option(help="lossless, rounded or scaled: about 0.68, 0.49 and 0.33 of raw bfloat16 on disk.")
    ] = ExtractConfig.features,
    mantissa_bits: Annotated[
        int, typer.Option(help="Mantissa bits that rounded features keep, of 7.")
    ] = ExtractConfig.mantissa_bits,
    step: Annotated[
        float, typer.Option(help="Step of scaled features, in standard deviations of the channel.")
    ] = ExtractConfig.step,
    on_bad_features: Annotated[
        str, typer.Option(help="refuse a sample whose features are not finite or dead, or skip it, recorded.")
    ] = ExtractConfig.on_bad_features,
    device_map: Annotated[
        str | None, typer.Option(help="auto spreads a target that is larger than one GPU over all of them.")
    ] = ExtractConfig.device_map,
    workers: Annotated[
        int, typer.Option(help="Processes on this machine, dealt to its GPUs in turn.")
    ] = ExtractConfig.workers,
    rank: Annotated[int, typer.Option(help="Which share is this command's, in an array job.")] = ExtractConfig.rank,
    world_size: Annotated[int, typer.Option(help="Commands of the array job.")] = ExtractConfig.world_size,
    plan: Annotated[
        bool, typer.Option("--plan", help="Only say what it would make: samples, shards, disk, time. Writes nothing.")
    ] = False,
    ignore_free_space: Annotated[
        bool, typer.Option("--ignore-free-space", help="Start although the disk cannot hold the cache.")
    ] = ExtractConfig.ignore_free_space,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run a target over conversations once and cache its hidden states."""
    given = locals()
    with _reported("Finished shards are kept; repeat the command to go on."):
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
        progress = TerminalProgress(quiet=quiet)
        if plan:
            print_plan(config, *plan_only(config, progress), as_json=json_)
        else:
            print_done(run(config, progress), as_json=json_)


@app.command(
    epilog="Examples: dflash inspect cache --sample 0; dflash inspect chats.jsonl --target Qwen/Qwen3-8B --sample 3"
)
def inspect(
    cache: Annotated[Path, typer.Argument(help="Cache folder; with --target, data that `dflash extract` would take.")],
    sample: Annotated[int | None, typer.Option(help="Print this sample's text, the supervised part marked.")] = None,
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
    json_: Json = False,
) -> None:
    """Show what a cache holds, without reading a feature; or a row of data, before anything is extracted."""
    given = locals()
    with _reported():
        from dflash_offline.pipeline import inspect as view

        if target is not None:
            from dflash_offline.pipeline.inspect_row import print_row, row_view
            from dflash_offline.stages.target import quiet_libraries

            quiet_libraries()
            kwargs = _object(chat_template_kwargs, "--chat-template-kwargs")
            config = _settings(ExtractConfig, given, data=(cache,), out=cache, chat_template_kwargs=kwargs)
            row = row_view(config, sample or 0)
            view.print_json(row) if json_ else print_row(row)
        elif sample is None:
            found = view.overview(cache)
            view.print_json(found) if json_ else view.print_overview(found)
        else:
            one = view.sample_view(cache, sample)
            view.print_json(one) if json_ else view.print_sample(one)


@app.command(epilog="Examples: dflash verify cache --target Qwen/Qwen3-8B --samples 8; dflash verify draft")
def verify(
    folder: Annotated[Path, typer.Argument(help="Cache folder, or draft folder.")],
    target: Annotated[
        str | None,
        typer.Option(help="Also run this target again on some samples and compare each layer; a draft: compare sizes."),
    ] = None,
    samples: Annotated[int, typer.Option(help="Samples to run the target on.")] = 8,
    seed: Annotated[int, typer.Option(help="Draws those samples.")] = 0,
    repair: Annotated[
        bool, typer.Option("--repair", help="Forget a cache's faulty shards; `dflash extract` redoes just those.")
    ] = False,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Check every file, chunk, token and statistic of a cache, or a draft by every client's rules; exit 1 if wrong."""
    with _reported():
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

        progress = TerminalProgress(quiet=quiet)
        faults = verify_cache(folder, progress)
        quiet_libraries()
        forgotten = forget(folder, faults) if repair else []
        # Of a damaged cache the faults are the news; what is left is compared when they are mended.
        fits = compare_with_target(folder, target, samples, seed, progress) if target and not faults else []
        print(report.to_json(faults, fits, forgotten)) if json_ else report.print_report(
            folder, faults, fits, forgotten
        )
        if faults or any(fit.fault for fit in fits):
            raise typer.Exit(1)


@app.command(
    epilog="Example: dflash train cache --out run --epochs 6. The same command again goes on from its last checkpoint."
)
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
    epochs: Annotated[float, typer.Option(help="Passes over the training samples.")] = TrainConfig.epochs,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps, instead of --epochs.")] = None,
    packing: Annotated[
        bool, typer.Option(help="Pack whole documents into rows of one length, or pad a sample a row.")
    ] = TrainConfig.packing,
    batch_tokens: Annotated[int, typer.Option(help="Tokens of a packed micro-batch.")] = TrainConfig.batch_tokens,
    row_tokens: Annotated[
        int | None,
        typer.Option(
            help="Length of a packed row. [default: all of them with flex attention, else the longest document's]"
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Samples of a padded micro-batch.")] = TrainConfig.batch_size,
    accumulation: Annotated[
        int, typer.Option(help="Micro-batches of each rank in one step.")
    ] = TrainConfig.accumulation,
    optimizer: Annotated[
        str, typer.Option(help="adamw, as published; or muon, which needs fewer steps.")
    ] = TrainConfig.optimizer,
    learning_rate: Annotated[
        float, typer.Option("--learning-rate", "--lr", help="Peak of the schedule.")
    ] = TrainConfig.learning_rate,
    init_from: Annotated[
        Path | None, typer.Option(metavar="DRAFT", help="Draft folder to start from, ours or z-lab's.")
    ] = None,
    ema: Annotated[
        float | None, typer.Option(help="Decay of averaged weights, which are then validated and exported.")
    ] = None,
    warmup_ratio: Annotated[float, typer.Option(help="Share of the steps that warm up.")] = TrainConfig.warmup_ratio,
    weight_decay: Annotated[float, typer.Option(help="On matrices; norms do not decay.")] = TrainConfig.weight_decay,
    clip: Annotated[float, typer.Option(help="Largest gradient norm.")] = TrainConfig.clip,
    num_anchors: Annotated[
        int, typer.Option(help="Blocks drawn from each sample and step, at most.")
    ] = TrainConfig.num_anchors,
    block_size: Annotated[int | None, typer.Option(help="Block size. [default: the cache's]")] = None,
    loss: Annotated[str, typer.Option(help="dflash or dpace.")] = TrainConfig.loss,
    gamma: Annotated[
        float | None, typer.Option(help="Decay of the dflash loss. [default: 7, 5, 4 for blocks of 16, 10, 8]")
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
        str | None, typer.Option(help="Draft layers causal within a block: none, sliding or all. [default: none]")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of weights, order and anchors.")] = TrainConfig.seed,
    val_samples: Annotated[
        int, typer.Option(help="Samples held out, at most; never over a tenth.")
    ] = TrainConfig.val_samples,
    val_every: Annotated[int, typer.Option(help="Steps between validations.")] = TrainConfig.val_every,
    patience: Annotated[
        int | None, typer.Option(help="Validations without a better serving walk before it stops.")
    ] = None,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = TrainConfig.save_every,
    keep: Annotated[int, typer.Option(help="Newest checkpoints kept, beside the best.")] = TrainConfig.keep,
    attention_backend: Annotated[
        str, typer.Option(help="flex_attention, sdpa or eager; auto is the first on a GPU, the second on a CPU.")
    ] = TrainConfig.attention_backend,
    dtype: Annotated[
        str, typer.Option(help="Autocast: bfloat16 or float32; auto is bfloat16 on a GPU.")
    ] = TrainConfig.dtype,
    device: Device = TrainConfig.device,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, more time.")
    ] = TrainConfig.gradient_checkpointing,
    compile: Annotated[bool | None, typer.Option(help="torch.compile. [default: on a GPU]")] = None,
    report_to: Annotated[str | None, typer.Option(help="wandb or trackio, if installed.")] = None,
    loader_threads: Annotated[int, typer.Option(help="Threads that read ahead.")] = TrainConfig.loader_threads,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Do two steps, say what the run would take, and write nothing.")
    ] = False,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train a draft from caches; the target is not loaded. Under torchrun, every rank runs this command."""
    given = locals()
    with _reported("" if dry_run else "Repeat the command to go on from the last checkpoint."):
        given |= {
            "caches": tuple(caches or ()),
            "layers": _ids(layers, "--layers"),
            "sliding_layers": _ids(sliding_layers, "--sliding-layers"),
            "weights": _shares(weights, "--weights"),
        }
        settings = _settings_over_file(TrainConfig, ctx, config, given)
        from dflash_offline.pipeline import training
        from dflash_offline.stages import train as stage

        progress = TerminalProgress(quiet=quiet)
        if dry_run:
            found = stage.rehearse(settings)
            if _is_first_rank():
                print(training.rehearsal_json(found)) if json_ else training.print_rehearsal(found)
            return
        done = stage.train(settings, progress)
        if _is_first_rank():
            print(training.trained_json(done)) if json_ else training.print_trained(done, settings.out)


@app.command(epilog="Example: dflash export run --out draft")
def export(
    run: Annotated[Path, typer.Argument(help="Run folder made by `dflash train`.")],
    out: Annotated[Path, typer.Option(help="Draft folder to write.")],
    checkpoint: Annotated[str, typer.Option(help="best (by the serving walk) or last.", metavar="best|last")] = "best",
    format_: Annotated[
        str,
        typer.Option(
            "--format",
            help="zlab, for z-lab's client, vLLM and SGLang; or speculators; or transformers, for its own generator.",
            metavar="|".join(FORMATS),
        ),
    ] = FORMATS[0],
    eval_: Annotated[
        Path | None,
        typer.Option("--eval", help="Result of `dflash eval --save` for the model card. [default: RUN/eval.json]"),
    ] = None,
    json_: Json = False,
) -> None:
    """Write a checkpoint as a folder that the serving clients load, checked by their rules."""
    with _reported("Repeat the command."):
        if checkpoint not in ("best", "last"):
            raise DflashError(f"--checkpoint is {checkpoint!r}; expected best or last.")
        from dflash_offline.pipeline.export import export as write

        done = write(run, out, checkpoint, format_, eval_)
        if json_:
            written = {"draft": str(done.draft), "step": done.step}
            print(json.dumps({**written, "parameters": done.num_parameters, "bytes": done.num_bytes}, indent=1))
            return
        size = f"{done.num_parameters:,} parameters, {readable_bytes(done.num_bytes)}"
        print(f"{out} holds the draft of step {done.step}: {size}.")
        if format_ == FORMATS[0]:
            print(f"Next: dflash eval {out} --target MODEL --prompts FILE")


@app.command(
    name="eval",
    epilog="Examples: dflash eval draft --target Qwen/Qwen3-8B --prompts held_out.jsonl; dflash eval run --cache cache",
)
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
    limit: Annotated[int | None, typer.Option(help="Prompts, or held-out samples, from the first.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of one answer, at most.")] = EvalConfig.max_new_tokens,
    temperature: Annotated[
        float, typer.Option(help="0 is greedy; above, tokens are drawn, and drafted ones kept by rejection sampling.")
    ] = EvalConfig.temperature,
    top_p: Annotated[
        float, typer.Option(help="When drawn: the likeliest tokens that together have this much.")
    ] = EvalConfig.top_p,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = EvalConfig.seed,
    repeats: Annotated[
        int, typer.Option(help="Times each prompt is decoded each way, in turn; speeds are of the medians.")
    ] = EvalConfig.repeats,
    prompt_lookup: Annotated[
        bool, typer.Option("--prompt-lookup", help="Also decode with prompt lookup, for comparison.")
    ] = EvalConfig.prompt_lookup,
    chat_template_kwargs: TemplateKwargs = "{}",
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16 or float16; auto is float32 on the CPU, else the target's.")
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
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Decode prompts with and without the draft, or walk a cache; exit 1 if an answer changes."""
    given = locals()
    with _reported("Repeat the command."):
        for flag, path in (("--save", save), ("--plot", plot)):
            if path is not None and (path.is_dir() or not path.resolve().parent.is_dir()):
                raise DflashError(f"{flag} {path} is not a file in an existing folder. Name one.")
        config = _settings(
            EvalConfig, given, chat_template_kwargs=_object(chat_template_kwargs, "--chat-template-kwargs")
        )
        from dflash_offline.pipeline import eval_report as report
        from dflash_offline.pipeline.evaluate import evaluate_folder
        from dflash_offline.stages.target import quiet_libraries

        quiet_libraries()
        if plot is not None:
            report.require_matplotlib()
        result = evaluate_folder(config, TerminalProgress(quiet=quiet))
        text = json.dumps(result.to_json(), indent=1)
        print(text) if json_ else report.print_report(result)
        if save is not None:
            save.write_text(text + "\n")
        if plot is not None:
            report.save_plot(result, plot)
        if result.lossless is False:
            raise typer.Exit(1)


@app.command(epilog="Example: dflash demo --out demo")
def demo(
    out: Annotated[Path, typer.Option(help="Folder for cache, run and draft.")] = Path("dflash-demo"),
) -> None:
    """Run extract, inspect, train, export and eval on the target that ships with the package."""
    with _reported("Repeat the command to go on."):
        from dflash_offline.pipeline.demo import run_demo

        run_demo(out)


def main() -> None:
    """Run the command line."""
    limit_threads()
    app()


if __name__ == "__main__":
    main()
