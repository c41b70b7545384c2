"""What a user may set for `dflash train`. Each text and default exists here and nowhere else."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from dflash_offline.schemas.draft.anchor_rule import ANCHORS
from dflash_offline.schemas.draft.config import CAUSAL_LAYERS
from dflash_offline.schemas.paths import store_url
from dflash_offline.schemas.settings.losses import LOSSES, LossMixture
from dflash_offline.schemas.settings.option import (
    ARGUMENTS,
    AT_LEAST_0,
    AT_LEAST_1,
    AT_LEAST_2,
    POSITIVE,
    SEEDS,
    Bounds,
    Option,
    problems,
    refuse,
)
from dflash_offline.schemas.settings.shared import DEVICE
from dflash_offline.schemas.variants.table import NAMES

ATTENTION_BACKENDS = ("flex_attention", "sdpa", "eager")
FLEX_TILES = ("default", "narrow")
LOCAL_CACHE_GIB = 100.0
"""What a local copy of caches in object stores holds at most, unless told otherwise."""
MAX_EPOCHS = 1_000_000
"""Passes over the samples; far above any run, and few enough to count the steps of."""
_CHECKPOINTS = "Validation and checkpoints"
_TARGETS = "the target's"
_WEIGHTS = Bounds("0 or more, and finite", lambda value: 0 <= value < math.inf)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of `dflash train`."""

    # The formatter would give every word of an option a line of its own.
    # fmt: off

    caches: Annotated[tuple[Path, ...], Option(
        "Caches made by `dflash extract`, all of one target.", ARGUMENTS, "resolved", "CACHE")]
    out: Annotated[Path, Option("Run folder; continued if it already holds the same run.", "Run", "free", "FOLDER")]
    weights: Annotated[tuple[float, ...] | None, Option(
        "Share of each cache's training samples that an epoch takes, drawn anew every epoch, as in 1,0.3.",
        "Data", "identity", "SHARES", unset="all")] = None
    epochs: Annotated[float, Option(
        "Passes over the training samples; by default as published.",
        "Data", "identity", "PASSES",
        bounds=Bounds(f"more than 0, and at most {MAX_EPOCHS:,}", lambda value: 0 < value <= MAX_EPOCHS))] = 6.0
    steps: Annotated[int | None, Option(
        "Optimizer steps to train; replaces --epochs.",
        "Data", "identity", "STEPS", unset="as --epochs gives", bounds=AT_LEAST_1, instead_of="epochs")] = None
    packing: Annotated[bool, Option(
        "Pack whole documents into rows of one length, or pad a sample a row.", "Data", "identity")] = True
    batch_tokens: Annotated[int, Option(
        "Tokens of one packed micro-batch, its rows times their length; fewer take less memory.",
        "Data", "identity", "TOKENS", bounds=AT_LEAST_1)] = 8192
    batch_block_tokens: Annotated[int, Option(
        "Tokens of the blocks of one packed micro-batch, at most: most of its work and memory.",
        "Data", "identity", "TOKENS", bounds=AT_LEAST_1)] = 65_536
    row_tokens: Annotated[int | None, Option(
        "Length of a packed row.",
        "Data", "identity", "TOKENS",
        unset="with flex attention on a GPU as long as the --batch- options allow, else the longest document's",
        bounds=AT_LEAST_1)] = None
    batch_size: Annotated[int, Option(
        "Samples of one padded micro-batch, with --no-packing.", "Data", "identity", "SAMPLES", bounds=AT_LEAST_1)] = 8
    accumulation: Annotated[int | None, Option(
        "Micro-batches that each rank adds to one optimizer step; the loss is their exact mean.",
        "Data", "identity", "BATCHES", unset="1, or each rank's share of what the run was begun with",
        bounds=AT_LEAST_1)] = None
    optimizer: Annotated[str, Option(
        "Optimizer: adamw, as published; or muon, which needs fewer steps where steps are few.",
        "Optimizer", "identity", "NAME", choices=("adamw", "muon"))] = "adamw"
    learning_rate: Annotated[float, Option(
        "Peak learning rate, reached after the warm-up; a cosine to zero follows. By default as published.",
        "Optimizer", "identity", "RATE", bounds=POSITIVE, flags=("--learning-rate", "--lr"))] = 6e-4
    init_from: Annotated[Path | None, Option(
        "Draft folder of the same target, ours or z-lab's, to start from: its weights, and by default its shape.",
        "Run", "resolved", "DRAFT", unset="random weights")] = None
    ema: Annotated[float | None, Option(
        "Decay of the averaged weights that are validated and exported, as in 0.999.",
        "Optimizer", "identity", "DECAY", unset="none",
        bounds=Bounds("more than 0 and less than 1, as in 0.999", lambda value: 0 < value < 1))] = None
    warmup_ratio: Annotated[float, Option(
        "Share of the steps in which the learning rate warms up; by default as published.",
        "Optimizer", "identity", "SHARE",
        bounds=Bounds("0 or more, and less than 1", lambda value: 0 <= value < 1))] = 0.04
    weight_decay: Annotated[float, Option(
        "Weight decay of matrices; norms do not decay.",
        "Optimizer", "identity", "RATE",
        bounds=Bounds("0 or more, and finite", lambda value: 0 <= value < math.inf))] = 0.01
    clip: Annotated[float, Option(
        "Largest norm of a gradient; by default as published.", "Optimizer", "identity", "NORM", bounds=POSITIVE)] = 1.0
    num_anchors: Annotated[int, Option(
        "Blocks drawn from each sample and step, at most; by default as published.",
        "Loss", "identity", "BLOCKS", bounds=AT_LEAST_1)] = 512
    anchors: Annotated[str | None, Option(
        "Where a block may start: at a supervised token with a whole block of its text after it; or partial, wherever "
        "a supervised token follows within the block, down to the last two of an answer.",
        "Loss", "resolved", "NAME", unset="whole for the variant dflash, else partial; or as the run was begun",
        choices=ANCHORS)] = None
    block_size: Annotated[int | None, Option(
        "Length of a block: an anchor and the drafted tokens.",
        "Loss", "recorded", "TOKENS", unset="the cache's, which is the longest", bounds=AT_LEAST_2)] = None
    loss: Annotated[str, Option(
        "Loss: cross-entropy with the cached tokens, in dflash weighed less from slot to slot, in dpace by the draft's "
        "confidence; or kl, tv, lk or soft-ce, distances from the target's own distribution, weighed as dflash, for "
        "which a cache holds its final states. A mixture has coefficients, as in kl:0.9,dflash:0.1; dpace weighs all "
        "of one that it is in.",
        "Loss", "identity", "NAME", completions=LOSSES)] = "dflash"
    teacher_temperature: Annotated[float | None, Option(
        "Temperature of the target's distribution where the loss is a distance from it: above 1 it is flatter.",
        "Loss", "resolved", "TEMPERATURE", unset="1", bounds=POSITIVE)] = None
    gamma: Annotated[float | None, Option(
        "Slots over which the weight of the loss decays by e; not of one with dpace.",
        "Loss", "identity", "SLOTS", unset="7, 5, 4 for blocks of 16, 10, 8", bounds=POSITIVE)] = None
    variant: Annotated[str | None, Option(
        "Variant of the draft: dflash; dflash2, with convolutions within the block and a selector of candidates; or "
        "dspark, with a bias by the token before and a confidence, which needs a cache with `final`.",
        "Draft", "resolved", "NAME", unset="dflash, or that of --init-from", choices=tuple(NAMES))] = None
    conv_kernel_size: Annotated[int | None, Option(
        "Slots that a convolution of `--variant dflash2` reads: the own one and those before it.",
        "Draft", "resolved", "SLOTS", unset="2, as published", bounds=AT_LEAST_1)] = None
    conv_group_size: Annotated[int | None, Option(
        "Channels of such a convolution that share a kernel made from the token; a divisor of the draft's width.",
        "Draft", "resolved", "CHANNELS", unset="16, as published", bounds=AT_LEAST_1)] = None
    selector_rank: Annotated[int | None, Option(
        "Width of the codes by which the selector of `--variant dflash2` scores a token after the one before it.",
        "Draft", "resolved", "WIDTH", unset="256, as published", bounds=AT_LEAST_1)] = None
    selector_top_k: Annotated[int | None, Option(
        "Candidates of a slot among which the selector chooses.",
        "Draft", "resolved", "TOKENS", unset="16, as published", bounds=AT_LEAST_1)] = None
    selector_loss_alpha: Annotated[float | None, Option(
        "Weight of the selector's loss; with 0 it learns nothing and changes nothing.",
        "Loss", "resolved", "WEIGHT", unset="1", bounds=_WEIGHTS)] = None
    selector_warmup_ratio: Annotated[float | None, Option(
        "Share of the steps in which the weight of the selector's loss rises from zero.",
        "Loss", "resolved", "SHARE", unset="0",
        bounds=Bounds("0 to 1", lambda value: 0 <= value <= 1))] = None
    markov_rank: Annotated[int | None, Option(
        "Width of the codes by which `--variant dspark` biases a token by the one before it.",
        "Draft", "resolved", "WIDTH", unset="256, as published", bounds=AT_LEAST_1)] = None
    ce_loss_alpha: Annotated[float | None, Option(
        "Weight of the cross-entropy in the loss of `--variant dspark`.",
        "Loss", "resolved", "WEIGHT", unset="0.1, as published", bounds=_WEIGHTS)] = None
    l1_loss_alpha: Annotated[float | None, Option(
        "Weight of the distance between the draft's and the target's distribution in it.",
        "Loss", "resolved", "WEIGHT", unset="0.9, as published", bounds=_WEIGHTS)] = None
    confidence_loss_alpha: Annotated[float | None, Option(
        "Weight of its confidence head's loss; with 0 the head learns nothing.",
        "Loss", "resolved", "WEIGHT", unset="1, as published", bounds=_WEIGHTS)] = None
    draft_layers: Annotated[int | None, Option(
        "Number of draft layers.",
        "Draft", "recorded", "LAYERS", unset="as many as target layers are read", bounds=AT_LEAST_1)] = None
    draft_heads: Annotated[int | None, Option(
        "Query heads of the draft.", "Draft", "recorded", "HEADS", unset=_TARGETS, bounds=AT_LEAST_1)] = None
    draft_kv_heads: Annotated[int | None, Option(
        "Key-value heads of the draft.", "Draft", "recorded", "HEADS", unset=_TARGETS, bounds=AT_LEAST_1)] = None
    draft_head_dim: Annotated[int | None, Option(
        "Width of one head.", "Draft", "recorded", "CHANNELS", unset=_TARGETS, bounds=AT_LEAST_1)] = None
    draft_intermediate_size: Annotated[int | None, Option(
        "Width of the feed-forward layers.", "Draft", "recorded", "CHANNELS", unset=_TARGETS, bounds=AT_LEAST_1)] = None
    draft_rope_theta: Annotated[float | None, Option(
        "Base of the rotary embedding.", "Draft", "recorded", "BASE", unset=_TARGETS, bounds=POSITIVE)] = None
    draft_rms_norm_eps: Annotated[float | None, Option(
        "Epsilon added under the root of each norm.",
        "Draft", "recorded", "EPSILON", unset=_TARGETS, bounds=POSITIVE)] = None
    draft_max_position_embeddings: Annotated[int | None, Option(
        "Longest text that the draft is declared for.",
        "Draft", "recorded", "POSITIONS", unset=_TARGETS, bounds=AT_LEAST_1)] = None
    sliding_window: Annotated[int | None, Option(
        "Window of the draft's layers: they see context less than so many positions back.",
        "Draft", "recorded", "POSITIONS", unset="all context")] = None
    sliding_layers: Annotated[tuple[int, ...] | None, Option(
        "Draft layers with that window, numbered from 0, as in 0,1.",
        "Draft", "recorded", "IDS", unset="every one, if there is a window")] = None
    causal_layers: Annotated[str | None, Option(
        "Draft layers in which a token does not see later ones of its block: none, sliding or all.",
        "Draft", "resolved", "NAME", unset="none, or those of --init-from", choices=CAUSAL_LAYERS)] = None
    layers: Annotated[tuple[int, ...] | None, Option(
        "Captured target layers that the draft reads, as in 1,9,17.",
        "Draft", "recorded", "IDS", unset="all in the cache")] = None
    seed: Annotated[int, Option(
        "Seed of the initial weights, the order of samples, and the anchors.",
        "Data", "identity", "SEED", bounds=SEEDS)] = 0
    val_samples: Annotated[int, Option(
        "Samples held out of training, at most; never more than a tenth.",
        _CHECKPOINTS, "identity", "SAMPLES", bounds=AT_LEAST_0)] = 128
    val_every: Annotated[int | None, Option(
        "Steps between two validations.",
        _CHECKPOINTS, "identity", "STEPS", unset="500, or as the run was begun", bounds=AT_LEAST_1)] = None
    patience: Annotated[int | None, Option(
        "Validations without a better serving walk after which the run stops.",
        _CHECKPOINTS, "free", "VALIDATIONS", unset="never", bounds=AT_LEAST_1)] = None
    save_every: Annotated[int, Option(
        "Steps between two checkpoints.", _CHECKPOINTS, "free", "STEPS", bounds=AT_LEAST_1)] = 200
    keep: Annotated[int, Option(
        "Number of newest checkpoints to keep, beside the best.",
        _CHECKPOINTS, "free", "CHECKPOINTS", bounds=AT_LEAST_1)] = 2
    attention_backend: Annotated[str, Option(
        "Attention of the draft: flex_attention, sdpa or eager; auto is flex_attention on a GPU and sdpa on a CPU.",
        "Device", "free", "NAME", choices=("auto", *ATTENTION_BACKENDS))] = "auto"
    flex_tiles: Annotated[str, Option(
        "Tiles of flex attention's backward kernels on a GPU; `make bench-gpu` says which are faster there.",
        "Device", "free", "NAME", choices=FLEX_TILES)] = "default"
    device: Annotated[str, replace(DEVICE, group="Device", role="free")] = "auto"
    dtype: Annotated[str, Option(
        "Autocast: bfloat16 or float32; auto is bfloat16 on a GPU. Weights and optimizer are always float32.",
        "Device", "identity", "NAME", choices=("auto", "float32", "bfloat16"))] = "auto"
    gradient_checkpointing: Annotated[bool, Option(
        "Compute each draft layer again in the backward pass: less memory, more time.", "Device", "free")] = False
    shard_draft: Annotated[bool, Option(
        "Under torchrun, hold on each rank only its part of weights, gradients and optimizer; gather them by layers.",
        "Device", "free")] = False
    activation_budget: Annotated[float | None, Option(
        "Share of compiled layers' activations to keep for the backward pass, which computes the rest again.",
        "Device", "free", "SHARE", unset="1, or 0.5 where a GPU could not hold all",
        bounds=Bounds("0 to 1", lambda value: 0 <= value <= 1))] = None
    compile: Annotated[bool | None, Option(
        "Compile the draft with torch.compile.", "Device", "free", unset="on a GPU")] = None
    report_to: Annotated[str | None, Option(
        "Tracker that gets the metrics too, if it is installed: wandb or trackio.",
        _CHECKPOINTS, "free", "NAME", unset="none", choices=("wandb", "trackio"))] = None
    loader_threads: Annotated[int, Option(
        "Threads that read and decode samples ahead of the step; take more where the log shows waiting.",
        "Data", "free", "THREADS", bounds=AT_LEAST_1)] = 2
    local_cache: Annotated[Path | None, Option(
        "Folder on a local disk that keeps what is read of caches in object stores; it may be removed at any time.",
        "Data", "free", "FOLDER", unset="none")] = None
    local_cache_gib: Annotated[float | None, Option(
        "Most that the folder of --local-cache holds, of all processes together.",
        "Data", "free", "GIB", unset="100", bounds=POSITIVE)] = None

    # fmt: on

    def __post_init__(self) -> None:
        found = problems(self)
        if not self.caches:
            found.append("No cache is given.")
        found += self._loss_problems()
        if self.local_cache_gib is not None and self.local_cache is None:
            found.append("local_cache_gib bounds what --local-cache keeps, and no --local-cache is given.")
        if self.local_cache is not None and not any(map(store_url, self.caches)):
            found.append(
                f"local_cache is {self.local_cache}, and no cache is in an object store. Leave --local-cache out."
            )
        if self.weights is not None and len(self.weights) != len(self.caches):
            found.append(f"{len(self.weights)} weights are given for {len(self.caches)} caches; expected one each.")
        if any(not 0 < weight <= 1 for weight in self.weights or ()):
            found.append(
                f"weights are {list(self.weights or ())}; expected more than 0 and at most 1: the share of a cache "
                f"that an epoch takes. To see one cache more often, lower the others' and raise epochs."
            )
        if self.sliding_layers and self.sliding_window is None:
            found.append(
                f"sliding_layers is {','.join(map(str, self.sliding_layers))}, and sliding_window is not given. Name "
                f"the window of those layers with --sliding-window, or leave --sliding-layers out."
            )
        refuse("train", found)

    @property
    def mixture(self) -> LossMixture:
        """The losses that `loss` names."""
        return LossMixture.read(self.loss)

    def _loss_problems(self) -> list[str]:
        try:
            LossMixture.read(self.loss)
        except ValueError as error:
            return [str(error)]
        return []


def recommended_gamma(block_size: int) -> float:
    """Return the loss decay published for blocks of 8, 10 and 16 (4, 5 and 7), on straight lines through them."""
    return block_size / 2 if block_size <= 10 else 5 + (block_size - 10) / 3
