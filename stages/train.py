"""Stage two: train a draft from cached features. The target is not loaded.

Axes: B samples, S positions, K block size, H hidden size.
"""

import math
import platform
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from dflash_offline.schemas.config import TrainConfig, recommended_gamma
from dflash_offline.schemas.errors import DflashError
from dflash_offline.schemas.files import locked, output_folder, publish, sealed_bytes
from dflash_offline.schemas.run import RUN, RunRecord, refuse_other_run, settings_identity
from dflash_offline.stages.cache import CacheReader
from dflash_offline.stages.checkpoint import (
    TrainState,
    checkpoint_folder,
    list_checkpoints,
    prune_checkpoints,
    restore,
    save_checkpoint,
)
from dflash_offline.stages.drafter import DraftModel
from dflash_offline.stages.loader import Batch, BatchLoader, epoch_batches, split_samples
from dflash_offline.stages.metrics import MetricsLog, Window, add_sums, peak_memory
from dflash_offline.stages.optimizer import learning_rate_at, make_optimizers
from dflash_offline.stages.progress import Progress
from dflash_offline.stages.shape import borrowed_parts, draft_shape
from dflash_offline.stages.target import choose_device
from dflash_offline.stages.trainer import DFlashStepMetrics, DFlashTrainerModule
from dflash_offline.stages.walk import WalkSums, serving_walks

LOG_EVERY = 10
"""Steps between two rows of metrics."""
VAL_SEED = 0
"""Of the validation's anchors, which stay the same from one validation to the next."""


class Interrupted(KeyboardInterrupt):
    """A signal asked the run to stop; a checkpoint was saved."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What `train` left."""

    run: Path
    state: TrainState
    total_steps: int
    num_train: int
    num_held_out: int
    parameters: int
    seconds: float
    """Spent by this call."""


class Training:
    """One run: the draft, its optimizer, the data, and where it stands."""

    def __init__(self, config: TrainConfig, reader: CacheReader, progress: Progress) -> None:
        self.config = config
        self.reader = reader
        self.progress = progress
        self.device = choose_device(config.device)
        self.shape = draft_shape(config, reader)
        torch.manual_seed(config.seed)
        self.draft = DraftModel(self.shape).to(self.device)
        self.module = self._module()
        self.optimizers = make_optimizers(
            self.draft.named_parameters(), config.optimizer, config.learning_rate, config.weight_decay
        )
        self.train_samples, self.held_out = split_samples(reader.samples, config.val_samples)
        batches = math.ceil(len(self.train_samples) / config.batch_size)
        self.total_steps = config.steps or math.ceil(config.epochs * batches / config.accumulation)
        self.state = TrainState(step=0)
        self.bfloat16 = config.dtype == "bfloat16" or (config.dtype == "auto" and self.device.type == "cuda")
        self.autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16)
        if not len(self.train_samples):
            raise DflashError(f"{reader.cache} leaves no sample to train on. Extract more conversations.")

    def _module(self) -> DFlashTrainerModule:
        config = self.config
        head, table = borrowed_parts(self.reader, self.device)
        return DFlashTrainerModule(
            self.draft,
            head,
            table,
            self.shape.mask_token_id,
            block_size=self.shape.block_size,
            attention_backend=config.attention_backend,
            num_anchors=config.num_anchors,
            loss_decay_gamma=recommended_gamma(self.shape.block_size) if config.gamma is None else config.gamma,
            loss_type=config.loss,
        )

    def identity(self) -> dict[str, Any]:
        """Return every field that decides what the run computes."""
        shape = {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self.shape).items()}
        settings = settings_identity(self.config)
        settings["dtype"] = "bfloat16" if self.bfloat16 else "float32"
        return {"settings": settings, "cache": self.reader.manifest.checksum, "draft": shape}

    def loader(self, seed: int) -> BatchLoader:
        """Return the loader of this draft's layers and blocks."""
        return BatchLoader(
            self.reader,
            columns=[self.reader.layer_ids.index(layer) for layer in self.shape.target_layer_ids],
            block_size=self.shape.block_size,
            num_anchors=self.config.num_anchors,
            seed=seed,
            pinned=self.device.type == "cuda",
        )

    def schedule(self) -> Iterator[tuple[NDArray[np.int64], int]]:
        """Yield (samples, epoch) of every micro-batch that is left, from the position in the data that follows from
        the number of finished steps."""
        config, samples = self.config, self.reader.samples
        skip, left = self.state.step * config.accumulation, (self.total_steps - self.state.step) * config.accumulation
        epoch = 0
        while left > 0:
            batches = epoch_batches(samples, self.train_samples, config.batch_size, config.seed, epoch)
            for batch in batches[skip:][:left]:
                left -= 1
                yield batch, epoch
            skip = max(0, skip - len(batches))
            epoch += 1

    def step(self, batches: list[Batch]) -> tuple[dict[str, torch.Tensor], float, float]:
        """Do one optimizer step; returns summed metrics, gradient norm and learning rate.

        The loss is the exact mean over all micro-batches: gradients of the numerators, divided once by the sum of
        the denominators.
        """
        rate = learning_rate_at(self.state.step, self.total_steps, self.config.learning_rate, self.config.warmup_ratio)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad(set_to_none=True)
        sums: dict[str, torch.Tensor] = {}
        for batch in batches:
            metrics = self.forward(batch)
            metrics.loss_sum.backward()
            add_sums(sums, metrics)
        parameters = list(self.draft.parameters())
        scale = 1.0 / (sums["loss_weight"] + 1e-6)
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(scale)
        norm = float(nn.utils.clip_grad_norm_(parameters, self.config.clip))
        if not math.isfinite(norm):
            self._refuse_non_finite([sample for batch in batches for sample in batch.samples])
        for optimizer in self.optimizers:
            optimizer.step()
        return sums, norm, rate

    def forward(self, batch: Batch) -> DFlashStepMetrics:
        """Return the metrics of one micro-batch with the anchors it brings."""
        with self.autocast:
            metrics: DFlashStepMetrics = self.module(
                batch.input_ids,
                batch.hidden_states,
                batch.loss_mask,
                document_ids=batch.document_ids,
                anchors=batch.anchors,
                keep_mask=batch.keep_mask,
            )
        return metrics

    def _refuse_non_finite(self, samples: list[int]) -> None:
        saved = list_checkpoints(self.config.out)
        raise DflashError(
            f"Loss or gradient is not finite at step {self.state.step + 1}, samples {samples}. The last good "
            f"checkpoint is {saved[-1] if saved else '(none)'}. Lower --learning-rate, or look at those samples with "
            f"`dflash inspect {self.reader.cache} --sample {samples[0]}`."
        )

    @torch.no_grad()
    def validate(self) -> dict[str, Any]:
        """Return loss, accuracy and both acceptance lengths on the held-out samples, each named for what it is."""
        self.draft.eval()
        order = self.held_out[np.argsort(self.reader.samples.num_tokens[self.held_out], kind="stable")]
        batches = [(order[i : i + self.config.batch_size], 0) for i in range(0, len(order), self.config.batch_size)]
        sums: dict[str, torch.Tensor] = {}
        walked = WalkSums()
        for loaded in self.loader(VAL_SEED).stream(batches, self.config.loader_threads):
            batch = loaded.to(self.device)
            add_sums(sums, self.forward(batch))
            with self.autocast:
                for walks in serving_walks(self.module, batch):
                    walked.add(walks)
        self.draft.train()
        by_slot = sums["correct_by_slot"] / sums["valid_by_slot"].clamp(min=1)
        return {
            "val_loss": float(sums["loss_sum"] / (sums["loss_weight"] + 1e-6)),
            "val_accuracy": float(sums["correct_tokens"] / sums["valid_tokens"].clamp(min=1)),
            "val_accuracy_by_slot": [round(float(value), 4) for value in by_slot],
            "val_accept_len_over_anchors": float(sums["accept_len_sum"] / sums["valid_blocks"].clamp(min=1)),
            "val_serving_walk": walked.pooled,
            "val_serving_walk_mean_of_samples": walked.mean_of_samples,
        }


@contextmanager
def noted_signals() -> Iterator[list[int]]:
    """Note the first SIGINT or SIGTERM in the list, so that a step is never cut in half; a second one acts at once."""
    noted: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(received: int, _frame: object) -> None:
        noted.append(received)
        restore()

    for number in before:
        signal.signal(number, note)
    try:
        yield noted
    finally:
        restore()


def train(config: TrainConfig, progress: Progress) -> Trained:
    """Train the draft to the last step, or go on with the run, and return where it stands.

    Raises `MismatchError` if the run folder or the cache is of something else, `CacheError` for an incomplete or
    damaged cache, and `Interrupted` after a signal, with a checkpoint saved.
    """
    began = time.perf_counter()
    config = replace(config, out=output_folder(config.out, marker=RUN, kind="training run", renamed=False))
    reader = CacheReader(config.cache)
    reader.require_complete()
    training = Training(config, reader, progress)
    run = config.out
    run.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        if not stack.enter_context(locked(run, wait=False)):
            raise DflashError(f"{run} is being trained by another process. Wait for it, or name another --out.")
        _start_or_resume(training)
        signals = stack.enter_context(noted_signals())
        stack.enter_context(progress_bar(training))
        log = MetricsLog(run, training.state.step)
        stack.callback(log.close)
        _run_steps(training, log, signals)
    return Trained(
        run=run,
        state=training.state,
        total_steps=training.total_steps,
        num_train=len(training.train_samples),
        num_held_out=len(training.held_out),
        parameters=sum(p.numel() for p in training.draft.parameters()),
        seconds=time.perf_counter() - began,
    )


@contextmanager
def progress_bar(training: Training) -> Iterator[None]:
    """Show the steps while the block runs."""
    training.progress.start("Training", training.total_steps, "steps", done=training.state.step)
    try:
        yield
    finally:
        training.progress.finish()


def _start_or_resume(training: Training) -> None:
    run, identity = training.config.out, training.identity()
    if (run / RUN).exists():
        refuse_other_run(run, RunRecord.read(run).identity, identity)
        saved = list_checkpoints(run)
        if saved:
            training.state = restore(saved[-1], training.draft, training.optimizers)
            training.progress.say(f"Going on from {saved[-1]}.")
        return
    origin = {
        "cache": str(training.config.cache),
        "target": training.reader.manifest.origin["target"],
        "target_identity": training.reader.manifest.identity["target"],
        "software": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("dflash-offline", "torch", "transformers")},
        },
    }
    record = RunRecord(identity=identity, origin=origin)
    publish([sealed_bytes(record.to_json())], temporary=run / f".{RUN}", path=run / RUN)


def _run_steps(training: Training, log: MetricsLog, signals: list[int]) -> None:
    config = training.config
    stream = training.loader(config.seed).stream(training.schedule(), config.loader_threads)
    window = Window()
    while training.state.step < training.total_steps:
        batches = [next(stream) for _ in range(config.accumulation)]
        sums, norm, rate = training.step([batch.to(training.device) for batch in batches])
        window.add(sums, batches)
        tokens = sum(batch.num_tokens for batch in batches)
        training.state = replace(training.state, step=training.state.step + 1, tokens=training.state.tokens + tokens)
        step, last = training.state.step, training.state.step == training.total_steps
        validates = len(training.held_out) > 0 and (step % config.val_every == 0 or last)
        if step % LOG_EVERY == 0 or last or validates:
            row = window.row() | {"learning_rate": rate, "grad_norm": norm, **peak_memory(training.device)}
            log.write(step, row)
            window = Window()
            training.progress.advance(0, loss=f"{row['loss']:.3f}", accept=f"{row['accept_len_over_anchors']:.2f}")
        training.progress.advance(1)
        improved = False
        if validates:
            improved = _validate(training, log)
            window = Window()
        if step % config.save_every == 0 or last or improved or signals:
            save_checkpoint(config.out, training.state, training.draft, training.optimizers)
            prune_checkpoints(config.out, config.keep, training.state.best_step)
        if signals and not last:
            raise Interrupted(f"Stopped at step {step}; {checkpoint_folder(config.out, step)} is saved.")


def _validate(training: Training, log: MetricsLog) -> bool:
    """Validate, log it, and say whether this is the best serving walk so far."""
    row, step = training.validate(), training.state.step
    log.write(step, row)
    training.progress.say(
        f"step {step}: held-out loss {row['val_loss']:.3f}, accuracy {row['val_accuracy']:.3f}, acceptance length "
        f"{row['val_serving_walk']:.2f} in the serving walk, {row['val_accept_len_over_anchors']:.2f} over all anchors"
    )
    if row["val_serving_walk"] <= training.state.best_walk:
        return False
    training.state = replace(training.state, best_step=step, best_walk=row["val_serving_walk"])
    return True
