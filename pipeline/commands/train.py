"""`dflash train`: its options, which may stand in a file, and what they start."""

from pathlib import Path
from typing import Annotated

import typer

from dflash_offline.pipeline.arguments import (
    Device,
    Json,
    LogFormatOption,
    Quiet,
    ids,
    one_of,
    settings_over_file,
    shares,
)
from dflash_offline.pipeline.command import is_first_rank, reported
from dflash_offline.pipeline.progress import LogFormat
from dflash_offline.schemas.draft.config import CAUSAL_LAYERS
from dflash_offline.schemas.settings.train import (
    ATTENTION_BACKENDS,
    AUTOCAST_DTYPES,
    LOSSES,
    OPTIMIZERS,
    REPORTERS,
    TrainConfig,
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
        Path | None,
        typer.Option(metavar="DRAFT", help="Draft folder of the same target to start from, ours or z-lab's."),
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
    with reported(go_on, quiet=quiet, log_format=log_format) as progress:
        given |= {
            "caches": tuple(caches or ()),
            "layers": ids(layers, "--layers"),
            "sliding_layers": ids(sliding_layers, "--sliding-layers"),
            "weights": shares(weights, "--weights"),
        }
        settings = settings_over_file(TrainConfig, ctx, config, given)
        from dflash_offline.pipeline import training
        from dflash_offline.stages import train as stage

        if dry_run:
            found = stage.rehearse(settings)
            if is_first_rank():
                print(training.rehearsal_json(found)) if json_ else training.print_rehearsal(found)
            return
        done = stage.train(settings, progress)
        if is_first_rank():
            print(training.trained_json(done)) if json_ else training.print_trained(done, settings.out)
