"""One training run in memory: the draft, its optimizer and data, and the state that steps and validations change.

Axes: B rows, S positions, N anchors, K block size.
"""

import math
import time
from collections.abc import Generator, Iterable
from contextlib import nullcontext, suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dflash_offline.schemas.errors import DflashError
from dflash_offline.schemas.run import begun_settings
from dflash_offline.schemas.settings.train import TrainConfig, recommended_gamma
from dflash_offline.stages.draft.attention import choose_flex_tiles, default_backend
from dflash_offline.stages.draft.model import DraftModel
from dflash_offline.stages.trainer import DFlashStepMetrics, DFlashTrainerModule
from dflash_offline.stages.training.checkpoint import CheckpointWriter, TrainState, list_checkpoints, restore
from dflash_offline.stages.training.corpus import Corpus
from dflash_offline.stages.training.draft_setup import (
    StartDraft,
    borrowed_parts,
    choose_anchor_rule,
    needs_final,
    resolve_draft_config,
)
from dflash_offline.stages.training.loader import AHEAD, Batch, BatchLoader
from dflash_offline.stages.training.memory import HALF, StepMemory, device_memory, kept_by_block_token
from dflash_offline.stages.training.metrics import peak_memory
from dflash_offline.stages.training.optimizer import WeightAverage, learning_rate_at, make_optimizers, moment_bytes
from dflash_offline.stages.training.ranks import (
    Ranks,
    distribute,
    gathered_bytes,
    part,
    reduce_gradients,
    scaled_gradients_norm,
    share_of_step,
    whole_draft,
)
from dflash_offline.stages.training.schedule import (
    Batching,
    RowLimits,
    RowShape,
    Samples,
    Schedule,
    earlier_row_shape,
    row_shape,
)
from dflash_offline.stages.training.simulated_serving import Validation
from dflash_offline.stages.training.sums import StepResult, Window, no_sums, sums_of

VAL_EVERY = 500
"""Steps between two validations, unless told otherwise or begun otherwise."""
VAL_SEED = 0
"""Seed of the validation's anchors, which stay the same from one validation to the next."""


class Training:
    """One run: what it trains, with what, and its state; one of each rank's."""

    def __init__(self, config: TrainConfig, corpus: Corpus, ranks: Ranks) -> None:
        begun = begun_settings(config.out)
        self.is_earlier = begun is not None and begun["packing"] and "row_rule" not in begun
        """Whether it goes on with a run whose rows are those of an earlier version."""
        self.val_every: int = config.val_every or (begun["val_every"] if begun else VAL_EVERY)
        self.config, self.corpus, self.ranks, self.device = config, corpus, ranks, ranks.device
        start = StartDraft.read(config.init_from) if config.init_from else None
        self.start_sha256 = start and start.sha256
        self.start_is_compared = start is None or start.target is not None
        self.draft_config = resolve_draft_config(config, corpus, start)
        self.anchor_rule = choose_anchor_rule(config, self.draft_config, begun)
        if self.needs_final:
            corpus.require_final()
        torch.manual_seed(config.seed)
        self.draft = DraftModel(self.draft_config)
        if start:
            start.load_into(self.draft)
        on_gpu = self.device.type == "cuda"
        self.bfloat16 = config.dtype == "bfloat16" or (config.dtype == "auto" and on_gpu)
        self.is_sharded = config.shard_draft and ranks.count > 1
        distribute(self.draft, ranks, sharded=self.is_sharded, bfloat16=self.bfloat16)
        self.compiled = on_gpu if config.compile is None else config.compile
        self.backend = default_backend(self.device) if config.attention_backend == "auto" else config.attention_backend
        self.optimizers = make_optimizers(self.draft, config.optimizer, config.learning_rate, config.weight_decay)
        self.average = WeightAverage(self.draft, config.ema) if config.ema else None
        self.train_samples, self.val_samples = corpus.split(config.val_samples)
        if config.patience and not len(self.val_samples):
            raise DflashError(
                f"--patience {config.patience} stops a run by its validations, and no sample is held out for them. "
                f"Raise --val-samples, train from a larger cache, or leave --patience out."
            )
        num_anchors = corpus.num_anchors(self.anchor_rule, config.num_anchors)
        can_train = num_anchors[self.train_samples] > 0
        self.train_samples, self.num_idle = self.train_samples[can_train], int((~can_train).sum())
        self.batching, self.schedule = self._plan(num_anchors)
        head, table = borrowed_parts(corpus.caches[0], self.device, torch.bfloat16 if self.bfloat16 else None)
        self.memory, self.activation_budget = self._budget(head, table)
        self.module = self._module(head, table)
        self._loader = self._make_loader()
        self.accumulation = config.accumulation or share_of_step(config.out, begun, ranks)
        """Micro-batches of a step that are this rank's."""
        self.per_step = self.accumulation * ranks.count
        self.total_steps = config.steps or math.ceil(self.schedule.batches_of(config.epochs) / self.per_step)
        self.state, self.writer = TrainState(step=0), CheckpointWriter(config.out, config.keep, ranks)
        self._parameters = list(self.draft.parameters())
        self.autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16)

    def _budget(self, head: nn.Linear, table: nn.Embedding) -> tuple[StepMemory, float]:
        """Return what a step holds, and the share of compiled layers' activations to keep."""
        config = self.config
        asked = config.activation_budget
        memory = self._memory(head, table, 1.0 if asked is None else asked)
        if asked is None and self.compiled and self.device.type == "cuda" and not memory.fits:
            return self._memory(head, table, HALF), HALF
        return memory, 1.0 if asked is None else asked

    def _memory(self, head: nn.Linear, table: nn.Embedding, budget: float) -> StepMemory:
        config, draft = self.config, self.draft_config
        rows, tokens, anchors = self.batching.largest
        size = 2 if self.bfloat16 else 4
        ends = {tensor.data_ptr(): tensor.nbytes for tensor in (head.weight, table.weight)}  # one, where they are tied
        arrays = len(draft.target_layer_ids) + self.needs_final
        features = 2 * tokens * rows * arrays * draft.hidden_size
        ready = config.loader_threads + AHEAD + 1
        return StepMemory(
            block_tokens=rows * anchors * draft.block_size,
            by_block_token=self._kept_by_block_token(budget),
            other=moment_bytes(self.optimizers)
            + sum(part(p).numel() for p in self.draft.parameters()) * (8 + (4 if config.ema else 0))
            + gathered_bytes(self.draft, self.ranks, bfloat16=self.bfloat16)
            + sum(ends.values())
            + features * (ready + size // 2),
            device_bytes=device_memory(self.device),
        )

    def _kept_by_block_token(self, budget: float) -> int:
        kept = kept_by_block_token(
            self.draft_config,
            compiled=self.compiled,
            budget=budget,
            checkpointing=self.config.gradient_checkpointing,
        )
        teacher = 2 * self.draft_config.hidden_size if self.needs_final else 0  # in the cache's bfloat16
        return (2 if self.bfloat16 else 4) * kept + teacher

    def activations_at(self, budget: float) -> int:
        """Return the bytes that a step would keep for its backward pass with another budget."""
        return self.memory.block_tokens * self._kept_by_block_token(budget)

    def _module(self, head: nn.Linear, table: nn.Embedding) -> DFlashTrainerModule:
        config = self.config
        self.draft.gradient_checkpointing = config.gradient_checkpointing
        choose_flex_tiles(config.flex_tiles)
        return DFlashTrainerModule(
            self.draft,
            head,
            table,
            self.draft_config.mask_token_id,
            block_size=self.draft_config.block_size,
            attention_backend=self.backend,
            num_anchors=config.num_anchors,
            loss_decay_gamma=self.gamma,
            loss_type=str(config.mixture),
            teacher_temperature=self.teacher_temperature,
            compiled=self.compiled,
            activation_budget=self.activation_budget,
            loss_settings=self.loss_settings,
            anchor_kind=self.anchor_rule.kind,
        )

    @property
    def loss_settings(self) -> dict[str, float]:
        """Settings of the loss of the draft's variant, each as asked for, or its default."""
        defaults = self.draft_config.variant.loss_settings
        asked = {name: getattr(self.config, name) for name in defaults}
        return {name: default if asked[name] is None else asked[name] for name, default in defaults.items()}

    @property
    def needs_final(self) -> bool:
        """Whether the loss reads the target's states after its final norm."""
        return needs_final(self.config, self.draft_config)

    @property
    def teacher_temperature(self) -> float:
        """That of the target's distribution, as asked for, or as it is."""
        return 1.0 if self.config.teacher_temperature is None else self.config.teacher_temperature

    @property
    def gamma(self) -> float | None:
        """Decay of the weights of slots; None for dpace, which has none."""
        if self.config.mixture.weighs_by_confidence:
            return None
        return (
            recommended_gamma(1 + self.draft_config.num_draft_tokens)
            if self.config.gamma is None
            else self.config.gamma
        )

    def _plan(self, num_anchors: Samples) -> tuple[Batching, Schedule]:
        config, corpus = self.config, self.corpus
        members = corpus.by_cache(self.train_samples)
        for cache, samples in zip(corpus.caches, members, strict=True):
            if not len(samples):
                idle = f" with {self.anchor_rule.wanted}" if self.num_idle else ""
                raise DflashError(f"{cache.path} leaves no sample to train on{idle}. Extract more conversations.")
        shape = None
        if config.packing:
            skips_unseen = self.device.type == "cuda" and self.backend == "flex_attention"
            shape = self._row_shape(num_anchors, skips_unseen)
        batching = Batching(
            num_tokens=corpus.num_tokens, num_anchors=num_anchors, shape=shape, batch_size=config.batch_size
        )
        weights = list(config.weights or [1.0] * len(members))
        return batching, Schedule(batching, members, weights, config.seed)

    def _row_shape(self, num_anchors: Samples, long_rows: bool) -> RowShape:
        config, num_tokens = self.config, self.corpus.num_tokens
        if self.is_earlier:
            row_tokens = config.row_tokens or (config.batch_tokens if long_rows else None)
            return earlier_row_shape(num_tokens, num_anchors, config.batch_tokens, row_tokens)
        limits = RowLimits(
            batch_tokens=config.batch_tokens,
            batch_block_tokens=config.batch_block_tokens,
            block_size=self.draft_config.block_size,
            row_tokens=config.row_tokens,
            long_rows=long_rows,
        )
        return row_shape(num_tokens, num_anchors, limits)

    def loader(self, seed: int) -> BatchLoader:
        """Return the loader of this draft's layers and blocks; all of them share what copies to a GPU."""
        return self._loader.changed(seed, self.needs_final)

    def _make_loader(self) -> BatchLoader:
        return BatchLoader(
            self.corpus,
            layer_ids=self.draft_config.target_layer_ids,
            anchor_rule=self.anchor_rule,
            num_anchors=self.config.num_anchors,
            seed=self.config.seed,
            shape=self.batching.shape,
            device=self.device,
        )

    def stream(self) -> Generator[Batch, None, None]:
        """Yield this rank's micro-batches of all steps that are left; where they begin follows from the step alone."""
        first, last = self.state.step * self.per_step, self.total_steps * self.per_step
        mine = islice(self.schedule.between(first, last), self.ranks.rank, None, self.ranks.count)
        return self.loader(self.config.seed).stream(mine, self.config.loader_threads)

    def step(self, batches: Iterable[Batch], stop: bool = False) -> StepResult:
        """Do one optimizer step on this rank's micro-batches together with the other ranks; the state counts it.

        The loss is the exact mean over all micro-batches of all ranks: gradients of the numerators, divided once by
        the sum of the denominators. `stop` says that a signal asked this rank to stop; all of them learn of it.
        """
        began = time.perf_counter()
        rate = learning_rate_at(self.state.step, self.total_steps, self.config.learning_rate, self.config.warmup_ratio)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad(set_to_none=True)
        local = no_sums(self.draft_config.variant, self.draft_config.block_size, self.device)
        tokens, samples, wait_s = 0, 0, 0.0
        self.module.progress = self.state.step / self.total_steps
        for number, batch in enumerate(batches, start=1):
            # Whole gradients of several micro-batches would take the memory that sharding saves.
            reduce_gradients(self.draft, now=self.is_sharded or number == self.accumulation)
            local += self._backward(batch)
            tokens, samples, wait_s = tokens + batch.num_tokens, samples + len(batch.samples), wait_s + batch.wait_s
            del batch  # before the next one is made
        counts = (local.new_full((1,), count) for count in (tokens, samples, wait_s, stop))
        totals = self.ranks.add(torch.cat((local, *counts)))
        sharing = self.ranks if self.is_sharded else None
        norm = scaled_gradients_norm(self._parameters, totals[1], self.config.clip, sharing)
        # All that is read, at once: here a GPU is waited for, and never behind the update.
        *sums, tokens, samples, wait_s, stop, norm = torch.cat((totals, norm.double()[None])).tolist()
        if not (math.isfinite(norm) and math.isfinite(sums[0])):
            self._refuse_non_finite()
        self._update()
        window = Window(
            sums=tuple(sums),
            tokens=int(tokens),
            samples=int(samples),
            seconds=time.perf_counter() - began,
            wait_s=wait_s / self.ranks.count,
        )
        state = self.state
        self.state = replace(
            state, step=state.step + 1, tokens=state.tokens + window.tokens, window=state.window.plus(window)
        )
        return StepResult(window=window, grad_norm=norm, learning_rate=rate, stop=bool(stop))

    def close_window(self, last: StepResult) -> dict[str, Any]:
        """Return the log's row of the steps since the row before it, of which `last` is the last."""
        window = self.state.window
        self.state = replace(self.state, window=Window())
        return {
            **window.means(self.draft_config),
            "learning_rate": last.learning_rate,
            "grad_norm": last.grad_norm,
            "peak_memory_gib": peak_memory(self.device) / 2**30,
        }

    def _forward(self, batch: Batch) -> DFlashStepMetrics:
        """Return the metrics of one micro-batch with the anchors it brings."""
        metrics: DFlashStepMetrics = self.module(
            batch.input_ids,
            batch.hidden_states,
            batch.loss_mask,
            document_ids=batch.document_ids,
            anchors=batch.anchors,
            keep_mask=batch.keep_mask,
            final=batch.final,
        )
        return metrics

    def _backward(self, batch: Batch) -> torch.Tensor:
        """Add one micro-batch's gradients of `loss_sum` to the parameters'; returns its sums."""
        try:
            with self.autocast:
                metrics = self._forward(batch)
            metrics.loss_sum.backward()
        except torch.OutOfMemoryError as error:
            raise DflashError(
                f"{self.device} has too little memory for a micro-batch of {list(batch.input_ids.shape)} positions and "
                f"{list(batch.anchors.shape)} blocks. Lower --batch-tokens (or --batch-size) and raise --accumulation "
                f"alike, or give --gradient-checkpointing."
            ) from error
        return sums_of(metrics)

    def _update(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()
        if self.average:
            self.average.update(self.draft, self.state.step)

    def _refuse_non_finite(self) -> None:
        first = self.state.step * self.per_step
        rows = [rows for rows, _ in self.schedule.between(first, first + self.per_step)]
        samples = sorted({int(sample) for batch in rows for row in batch for sample in row})
        with suppress(Exception):  # which is told beside this
            self.writer.wait()
        saved = list_checkpoints(self.config.out)
        raise self.corpus.non_finite_error(samples, self.state.step + 1, saved[-1] if saved else None)

    @torch.no_grad()
    def validate(self) -> dict[str, Any]:
        """Return the row of metrics of the validation samples, the same on every rank; the state notes the best one.

        Validated are the averaged weights, if there are such.
        """
        batches = self.batching.batches(self.val_samples)[self.ranks.rank :: self.ranks.count]
        loader = self._loader.changed(VAL_SEED, with_final=bool(self.corpus.finals))
        found = Validation(self.module, self.device)
        self.draft.eval()
        self.module.progress = 1.0  # so that the losses of all validations compare
        average = self.average.served(self.draft) if self.average else nullcontext()
        with average, whole_draft(self.draft):  # ranks may have different numbers of batches
            for batch in loader.stream(((rows, 0) for rows in batches), self.config.loader_threads):
                with self.autocast:
                    found.add(batch)
        self.draft.train()
        row = found.row(self.ranks, self.draft_config, with_expected=bool(self.corpus.finals))
        if row["val_serving_walk"] > self.state.best_walk:
            self.state = replace(self.state, best_step=self.state.step, best_walk=row["val_serving_walk"])
        return row

    @property
    def is_stale(self) -> bool:
        """Whether so many validations passed without a better one that the run is to stop."""
        patience, state = self.config.patience, self.state
        return bool(patience and state.best_step and state.step - state.best_step >= patience * self.val_every)

    @property
    def is_at_last_step(self) -> bool:
        """Whether all steps are done."""
        return self.state.step >= self.total_steps

    def save(self) -> None:
        """Begin to save a checkpoint, after which those that need not be kept are removed; every rank calls this."""
        self.writer.save(self.state, self.draft, self.optimizers, self.average)

    def resume(self) -> Path | None:
        """Go to where the newest checkpoint stands; returns its folder, None if there is none."""
        saved = list_checkpoints(self.config.out)
        if not saved:
            return None
        self.state = restore(saved[-1], self.draft, self.optimizers, self.average)
        return saved[-1]
