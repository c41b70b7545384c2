"""Stage two: train a draft from cached features. The target is not loaded."""

import os
import signal
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from dflash_offline.schemas.paths import output_folder
from dflash_offline.schemas.results.expected import TEMPERATURES, expected_metric
from dflash_offline.schemas.run import RUN
from dflash_offline.schemas.settings.train import LOCAL_CACHE_GIB, TrainConfig
from dflash_offline.stages.progress import Progress, Silent
from dflash_offline.stages.stop import Stopped, stops_noted
from dflash_offline.stages.training.checkpoint import TrainState, checkpoint_folder
from dflash_offline.stages.training.corpus import Corpus
from dflash_offline.stages.training.loader import Batch
from dflash_offline.stages.training.memory import HALF, step_flops
from dflash_offline.stages.training.metrics import MetricsLog, check_reporter, peak_memory
from dflash_offline.stages.training.ranks import joined_ranks, part
from dflash_offline.stages.training.record import claim_folder
from dflash_offline.stages.training.run import Training

LOG_EVERY = 10
"""Steps between two rows of metrics."""
Log = Callable[[int, dict[str, Any]], None]
"""Adds a step's row to metrics.jsonl and wherever else metrics are shown."""


class Interrupted(Stopped):
    """A signal asked the run to stop; a checkpoint was saved."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """Where a run stands after a call of `train`."""

    run: Path
    state: TrainState
    total_steps: int
    num_train: int
    """Samples to train on."""
    num_val: int
    """Validation samples, which are held out of training."""
    num_idle: int
    """Samples that anchor no block and so train nothing."""
    parameters: int
    seconds: float
    """Time that this call took."""


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """What a run would take, by two steps of it."""

    parameters: int
    weight_bytes: int
    """Bytes of float32 weights, gradients and optimizer that this rank holds."""
    num_ranks: int
    is_sharded: bool
    """Whether each rank holds a part of them, and not all."""
    peak_bytes: int
    """Most memory held in a step: by tensors on a GPU, by the process on a CPU."""
    num_train: int
    num_val: int
    num_idle: int
    """Samples that anchor no block and so train nothing."""
    anchors: str
    """The kind of `AnchorRule` by which blocks start."""
    blocks_per_epoch: int
    """Blocks that an epoch draws from the samples to train on."""
    total_steps: int
    steps_per_epoch: float
    batch_shape: tuple[int, ...]
    """[B, S, N] of the last micro-batch: rows, tokens of a row, blocks of a row; all are alike when packed."""
    block_tokens: int
    """Tokens of the blocks of the largest micro-batch, B * N * K."""
    activation_bytes: int
    """What a step keeps of those for its backward pass, counted from the draft's shape."""
    activation_budget: float
    """Share of compiled layers' activations that is kept; the rest is computed again."""
    all_activation_bytes: int
    """What would be kept with a budget of 1."""
    half_activation_bytes: int
    """What would be kept with a budget of a half: no less where layers are not compiled."""
    most_block_tokens: int
    """Block tokens of the largest micro-batch that the device would hold, counted likewise."""
    device_bytes: int
    """Memory of the GPU, or of the memory that this process may fill."""
    tokens_per_step: float
    """Tokens of a step, padding left out."""
    filled: float
    """Share of the step's positions that hold real tokens."""
    flops_per_step: float
    """Operations of this rank's matmuls in a step, counted from the draft's shape; those of attention are left out."""
    seconds_per_step: float
    """Those of the second step: the first one warms up."""

    @property
    def seconds(self) -> float:
        """Estimate for all steps, without validations."""
        return self.seconds_per_step * self.total_steps


def train(config: TrainConfig, progress: Progress) -> Trained:
    """Train the draft to the last step, or go on with the run, and return where it stands.

    Under torchrun every rank calls this with the same settings; caches and run folder are visible to all of them.
    Raises `MismatchError` if the run folder or a cache is of something else, `CacheError` for an incomplete or
    damaged cache, and `Interrupted` after a signal, with a checkpoint saved.
    """
    began = time.perf_counter()
    with ExitStack() as stack:
        training = _set_up(config, stack, progress)
        if training.ranks.is_first:
            claim_folder(training, stack)
        else:
            progress = Silent()
        if not training.start_is_compared:
            progress.say(
                f"{config.init_from} does not say which target it was trained for: only its shape was compared with "
                f"the cache's."
            )
        if len(engines := training.corpus.engines()) > 1:
            progress.say(
                f"The caches were made by {' and '.join(engines)}: their features differ by what each engine's "
                f"arithmetic makes of the same states, within what was compared when each cache was made."
            )
        if training.activation_budget == HALF and config.activation_budget is None:
            progress.say(
                f"{training.memory.block_tokens:,} block tokens a micro-batch fit {training.device} only with half of "
                f"their activations kept, so the other half is computed twice. See --activation-budget and "
                f"--batch-block-tokens."
            )
        if config.shard_draft and not training.is_sharded:
            progress.say(
                "--shard-draft: this process is alone, so it holds the whole draft. Start several with torchrun."
            )
        training.ranks.meet()
        if checkpoint := training.resume():
            progress.say(f"Going on from {checkpoint}.")
        signals = stack.enter_context(stops_noted())
        training.ranks.meet()  # from here on a signal to any rank is noted by it
        log = _open_log(training, stack, progress)
        progress.start("Training", training.total_steps, "steps", done=training.state.step)
        stack.callback(progress.finish)
        _train_steps(training, signals, progress, log)
        return Trained(
            run=training.config.out,
            state=training.state,
            total_steps=training.total_steps,
            num_train=len(training.train_samples),
            num_val=len(training.val_samples),
            num_idle=training.num_idle,
            parameters=sum(p.numel() for p in training.draft.parameters()),
            seconds=time.perf_counter() - began,
        )


def _set_up(config: TrainConfig, stack: ExitStack, progress: Progress) -> Training:
    config = replace(config, out=output_folder(config.out, marker=RUN, kind="training run", renamed=False))
    check_reporter(config.report_to)
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        # Micro-batches differ in how many slots are supervised: blocks of a fixed size would seldom fit the next one's.
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    corpus = Corpus.open(config.caches)
    if config.local_cache is not None:
        corpus.copy_locally(config.local_cache, int((config.local_cache_gib or LOCAL_CACHE_GIB) * 2**30), progress.say)
    return Training(config, corpus, stack.enter_context(joined_ranks(config.device)))


def _open_log(training: Training, stack: ExitStack, progress: Progress) -> Log:
    """Return what adds a row to the run's log; on ranks other than the first, what does nothing."""
    if not training.ranks.is_first:
        return lambda step, row: None
    return stack.enter_context(closing(MetricsLog(training.config, training.state.step, progress.say))).write


def _train_steps(training: Training, signals: list[int], progress: Progress, log: Log) -> None:
    """Step, log, validate and save until the last step, a signal, or too many validations without a better one."""
    config = training.config
    with training.writer as writer, closing(training.stream()) as stream:
        while not (training.is_at_last_step or training.is_stale):
            writer.check()
            result = training.step(islice(stream, training.accumulation), stop=bool(signals))
            step, last = training.state.step, training.is_at_last_step
            validates = len(training.val_samples) > 0 and (step % training.val_every == 0 or last)
            if step % LOG_EVERY == 0 or validates or last:
                row = training.close_window(result)
                log(step, row)
                progress.advance(0, loss=row["loss"], accept=row["accept_len_over_anchors"])
            progress.advance(1)
            if validates:
                _validate(training, progress, log)
            improved = training.state.best_step == step
            if step % config.save_every == 0 or last or improved or result.stop or training.is_stale:
                training.save()
            if result.stop and not last:
                writer.wait()
                training.ranks.meet()  # torchrun ends all ranks once one has ended: none before the checkpoint is there
                number = signals[0] if signals else signal.SIGTERM  # another rank's
                raise Interrupted(number, f"Stopped at step {step}; {checkpoint_folder(config.out, step)} is saved.")
    if not training.is_at_last_step:
        progress.say(f"Stopped early: no better serving walk since step {training.state.best_step}.")


def _validate(training: Training, progress: Progress, log: Log) -> None:
    row, step = training.validate(), training.state.step
    log(step, row)
    paths = training.draft_config.variant.paths
    others = "".join(f"; {name.replace('_', ' ')} {row[f'val_serving_walk_{name}']:.2f}" for name in paths)
    drawn = {f"{one:g}": row.get(f"val_{expected_metric(one)}") for one in TEMPERATURES}
    expected = "".join(f"; {value:.2f} expected at temperature {one}" for one, value in drawn.items() if value)
    progress.say(
        f"step {step}: held-out loss {row['val_loss']:.3f}, accuracy {row['val_accuracy']:.3f}, acceptance length "
        f"{row['val_serving_walk']:.2f} in the serving walk, {row['val_accept_len_over_anchors']:.2f} over all "
        f"anchors{others}{expected}"
    )


def dry_run(config: TrainConfig) -> DryRun:
    """Build everything, do two steps and return what the run would take; writes nothing."""
    shapes: list[tuple[int, ...]] = []

    def noted(batch: Batch) -> Batch:
        shapes.append((*batch.input_ids.shape, batch.anchors.shape[1]))
        return batch

    with ExitStack() as stack:
        training = _set_up(config, stack, Silent())
        stream = stack.enter_context(closing(training.stream()))
        for _ in range(min(2, training.total_steps)):
            began = time.perf_counter()
            shapes.clear()
            result = training.step(map(noted, islice(stream, training.accumulation)))
            seconds = time.perf_counter() - began
        optimizer_state = [t for o in training.optimizers for s in o.state.values() for t in s.values()]
        weights = [part(t) for t in (*training.draft.parameters(), *training.draft.parameters(), *optimizer_state)]
        slots = statistics.mean(rows * tokens for rows, tokens, _ in shapes) * training.per_step
        return DryRun(
            parameters=sum(p.numel() for p in training.draft.parameters()),
            weight_bytes=sum(t.nbytes for t in weights),
            num_ranks=training.ranks.count,
            is_sharded=training.is_sharded,
            peak_bytes=peak_memory(training.device),
            num_train=len(training.train_samples),
            num_val=len(training.val_samples),
            num_idle=training.num_idle,
            anchors=training.anchor_rule.kind,
            blocks_per_epoch=int(training.batching.num_anchors[training.train_samples].sum()),
            total_steps=training.total_steps,
            steps_per_epoch=training.schedule.count(0) / training.per_step,
            batch_shape=shapes[-1],
            block_tokens=training.memory.block_tokens,
            activation_bytes=training.memory.activations,
            activation_budget=training.activation_budget,
            all_activation_bytes=training.activations_at(1.0),
            half_activation_bytes=training.activations_at(HALF),
            most_block_tokens=training.memory.most_block_tokens,
            device_bytes=training.memory.device_bytes,
            tokens_per_step=result.window.tokens,
            filled=result.window.tokens / slots,
            flops_per_step=sum(
                step_flops(
                    training.draft_config,
                    rows * tokens,
                    rows * anchors * training.draft_config.block_size,
                    teacher=training.needs_final,
                )
                for rows, tokens, anchors in shapes
            ),
            seconds_per_step=seconds,
        )
