"""`dflash train`: its options, what they start, and what it prints."""

import json
import shlex
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from dflash_offline.pipeline.command import is_first_rank, reported
from dflash_offline.pipeline.options import Json, LogFormatOption, Quiet, command
from dflash_offline.pipeline.progress import LogFormat
from dflash_offline.schemas.errors import dflash_line
from dflash_offline.schemas.paths import free_name
from dflash_offline.schemas.settings.option import Option
from dflash_offline.schemas.settings.train import TrainConfig
from dflash_offline.stages.progress import readable_bytes, readable_seconds

if TYPE_CHECKING:  # help is shown, and words are completed, without what takes long to import
    from dflash_offline.stages.train import DryRun, Trained


@command(
    "train",
    "Train a draft from caches, without the target.",
    ("parameters, memory, steps and time; writes nothing", "cache --out run --dry-run"),
    ("all by default; repeated, it goes on", "cache --out run"),
    (
        "the target's own distribution as teacher, of a cache made with --final",
        "cache --out run --loss kl:0.9,dflash:0.1",
    ),
    ("two caches, of one three tenths an epoch", "cache more --weights 1,0.3 --out run"),
    ("the settings of another run, one of them changed", "--config run/config.toml --out again --lr 3e-4"),
    ("behind `torchrun --nproc-per-node 2 --no-python`, each rank holds a half", "cache --out run --shard-draft"),
)
def train(
    settings: Callable[..., TrainConfig],
    dry_run: Annotated[
        bool, Option("Do two steps, say what the run would take, and write nothing.", "Run", "free")
    ] = False,
    json_: Json = False,
    log_format: LogFormatOption = LogFormat.text,
    quiet: Quiet = False,
) -> None:
    """Train a draft from caches; the target is not loaded. Under torchrun, every rank runs this command."""
    go_on = "" if dry_run else "Repeat the command to go on from the last checkpoint."
    with reported(go_on, quiet=quiet, log_format=log_format) as progress:
        config = settings()
        from dflash_offline.stages import train as stage

        if dry_run:
            found = stage.dry_run(config)
            if is_first_rank():
                print(dry_run_json(found)) if json_ else print_dry_run(found)
            return
        done = stage.train(config, progress)
        if is_first_rank():
            print(trained_json(done)) if json_ else print_trained(done, config.out)


def trained_json(done: "Trained") -> str:
    """Return a finished call of `dflash train` as JSON."""
    found: dict[str, Any] = {
        "run": str(done.run),
        "step": done.state.step,
        "total_steps": done.total_steps,
        "parameters": done.parameters,
        "train_samples": done.num_train,
        "held_out_samples": done.num_val,
        "samples_without_anchors": done.num_idle,
        "best_step": done.state.best_step,
        "best_serving_walk": done.state.best_walk,
        "seconds": done.seconds,
    }
    return json.dumps(found, indent=1)


def _idle(number: int) -> str:
    return f"; {number:,} without an anchor, which train nothing" if number else ""


def print_trained(done: "Trained", out: Path) -> None:
    """Print where the run stands and what to do next."""
    print(f"{out} is trained: {done.state.step:,} steps over {done.num_train:,} samples, {done.seconds:.0f} s.")
    if done.num_idle:
        print(f"{done.num_idle:,} samples have no anchor and trained nothing; see --anchors.")
    print(f"The draft has {done.parameters:,} parameters.")
    if done.state.best_step:
        print(f"Best acceptance length in the serving walk: {done.state.best_walk:.2f} tokens a round,")
        print(f"at step {done.state.best_step:,}, over {done.num_val:,} held-out samples.")
    print(f"Next: {dflash_line('export', out, '--out', free_name(out, 'draft'))}")
    print(f"Look: {dflash_line('inspect', out)}, or {shlex.join(['tensorboard', '--logdir', str(out)])}")


def dry_run_json(found: "DryRun") -> str:
    """Return what a dry run found as JSON."""
    document = {"num_held_out" if name == "num_val" else name: value for name, value in asdict(found).items()}
    return json.dumps({**document, "seconds": found.seconds}, indent=1)


def _kept_by_budget(found: "DryRun") -> dict[str, str]:
    """Return the line that says what keeping half of the activations saves, if layers are compiled."""
    whole, half = found.all_activation_bytes, found.half_activation_bytes
    if half == whole:
        return {}
    share = f"{found.activation_budget:g} is taken"
    return {"Budget": f"{share}; 1 keeps {readable_bytes(whole)}, 0.5 keeps {readable_bytes(half)} and takes more time"}


def _by_rank(found: "DryRun") -> str:
    if found.num_ranks == 1:
        return ""
    return f" on each of {found.num_ranks} ranks" + (", each a part of them" if found.is_sharded else "")


def print_dry_run(found: "DryRun") -> None:
    """Print what a run would take."""
    rows, tokens, blocks = found.batch_shape
    lines = {
        "Samples": f"{found.num_train:,} to train on, {found.num_val:,} held out{_idle(found.num_idle)}",
        "Anchors": f"{found.anchors}; {found.blocks_per_epoch:,} blocks an epoch",
        "Parameters": f"{found.parameters:,}",
        "Memory": f"{readable_bytes(found.weight_bytes)} weights, gradients and optimizer{_by_rank(found)}; "
        f"at its peak {readable_bytes(found.peak_bytes)}",
        "Micro-batch": f"{rows} x {tokens:,} tokens, {blocks:,} blocks a row: {found.block_tokens:,} block tokens",
        "Activations": f"{readable_bytes(found.activation_bytes)}, counted; {readable_bytes(found.device_bytes)} of "
        f"memory would hold {found.most_block_tokens:,} block tokens",
        **_kept_by_budget(found),
        "Work": f"{found.flops_per_step / 1e12:,.3g} TFLOP of matmuls a step, counted; attention's are left out",
        "Step": f"{found.tokens_per_step:,} tokens in {found.filled:.0%} of its places, {found.seconds_per_step:.2f} s",
        "Steps": f"{found.total_steps:,}; {found.steps_per_epoch:,.1f} an epoch",
        "Time": readable_seconds(found.seconds),
    }
    print("Two steps ran; nothing was written. Time is the second step's, without validations.")
    for name, text in lines.items():
        print(f"  {name:<12} {text}")
