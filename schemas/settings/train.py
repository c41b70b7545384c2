"""What a user may set for `dflash train`. Each default exists here and nowhere else."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dflash_offline.schemas.settings.shared import choice_problems, refuse

MAX_EPOCHS = 1_000_000
"""Passes over the samples; far above any run, and few enough to count the steps of."""
REPORTERS = ("wandb", "trackio")
OPTIMIZERS = ("adamw", "muon")
LOSSES = ("dflash", "dpace")
ATTENTION_BACKENDS = ("auto", "flex_attention", "sdpa", "eager")
AUTOCAST_DTYPES = ("auto", "float32", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of `dflash train`."""

    caches: tuple[Path, ...]
    """Feature caches made by `dflash extract`, all of the same target."""
    out: Path
    """Run folder; continued if it already holds the same run."""
    weights: tuple[float, ...] | None = None
    """Share of each cache's training samples that an epoch takes, 0 to 1, drawn anew every epoch; None for all."""
    epochs: float = 6.0
    """Passes over the training samples."""
    steps: int | None = None
    """Optimizer steps; given, it replaces `epochs`."""
    packing: bool = True
    """Pack whole documents into rows of one length; otherwise pad `batch_size` samples, a row each."""
    batch_tokens: int = 8192
    """Tokens of one packed micro-batch: its rows times their length."""
    row_tokens: int | None = None
    """Length of a packed row; None for all of `batch_tokens` with flex attention on a GPU, which skips what a block
    does not see, and for as many as the longest document needs otherwise."""
    batch_size: int = 8
    """Samples in one padded micro-batch."""
    accumulation: int = 1
    """Micro-batches that each rank adds to one optimizer step; the loss is averaged exactly over all of them."""
    optimizer: str = "adamw"
    """adamw, the published recipe; or muon, which needs fewer steps where steps are few."""
    learning_rate: float = 6e-4
    """Peak; reached after the warm-up, then a cosine to zero."""
    init_from: Path | None = None
    """Draft folder, ours or z-lab's, whose weights the run starts from; its shape is the default then."""
    ema: float | None = None
    """Decay of a running average of the weights; given, the average is what is validated and exported."""
    warmup_ratio: float = 0.04
    """Share of the steps that warm up."""
    weight_decay: float = 0.01
    """On matrices; norms do not decay."""
    clip: float = 1.0
    """Largest gradient norm."""
    num_anchors: int = 512
    """Blocks drawn from each sample and step, at most."""
    block_size: int | None = None
    """K; None for the one the cache was planned with, which is also the largest it allows."""
    loss: str = "dflash"
    """dflash (weights fall with the slot) or dpace (weights follow the draft's own confidence)."""
    gamma: float | None = None
    """Decay of the dflash loss; None for the recommended one: 7, 5, 4 at K = 16, 10, 8."""
    draft_layers: int | None = None
    """Draft layers; None for the number of captured layers."""
    draft_heads: int | None = None
    """Query heads; None for the target's."""
    draft_kv_heads: int | None = None
    """Key and value heads; None for the target's."""
    draft_head_dim: int | None = None
    """Width of one head; None for the target's."""
    draft_intermediate_size: int | None = None
    """Width of the feed-forward layers; None for the target's."""
    draft_rope_theta: float | None = None
    """Base of the rotary embedding; None for the target's."""
    draft_rms_norm_eps: float | None = None
    """Added under the root of each norm; None for the target's."""
    draft_max_position_embeddings: int | None = None
    """Longest text the draft is declared for; None for the target's."""
    sliding_window: int | None = None
    """W: draft layers see context less than W positions back; None for all of it."""
    sliding_layers: tuple[int, ...] | None = None
    """Draft layers with that window, from 0; None for every one, if there is a window."""
    causal_layers: str | None = None
    """Draft layers in which a token does not see the later ones of its block: none, sliding or all; None for none, or
    those of the draft it starts from."""
    layers: tuple[int, ...] | None = None
    """Captured layers the draft reads; None for all in the cache."""
    seed: int = 0
    """Of the initial weights, the order of samples, and the anchors."""
    val_samples: int = 128
    """Samples held out of training, at most; never more than a tenth."""
    val_every: int = 200
    """Steps between two validations."""
    patience: int | None = None
    """Validations without a better serving walk after which the run stops; None to go on to the last step."""
    save_every: int = 200
    """Steps between two checkpoints."""
    keep: int = 2
    """Newest checkpoints kept, beside the best."""
    attention_backend: str = "auto"
    """flex_attention, sdpa or eager; auto is flex_attention on a GPU and sdpa on a CPU."""
    device: str = "auto"
    """cpu, cuda or cuda:N; auto takes a GPU if there is one."""
    dtype: str = "auto"
    """Autocast: bfloat16 or float32; auto is bfloat16 on a GPU. Masters and optimizer are always float32."""
    gradient_checkpointing: bool = False
    """Compute each draft layer again in the backward pass instead of keeping what it made: less memory, more time."""
    compile: bool | None = None
    """torch.compile of the draft; None for yes on a GPU, no on a CPU."""
    report_to: str | None = None
    """wandb or trackio, if installed: metrics go there too."""
    loader_threads: int = 2
    """Threads that read and decode samples ahead of the step."""

    def __post_init__(self) -> None:
        problems = []
        for names, expected, holds in _BOUNDS:
            for name in names.split():
                value = getattr(self, name)
                if value is not None and not holds(value):
                    problems.append(f"{name} is {value}; expected {expected}.")
        if not self.caches:
            problems.append("No cache is given.")
        if self.weights is not None and len(self.weights) != len(self.caches):
            problems.append(f"{len(self.weights)} weights are given for {len(self.caches)} caches; expected one each.")
        if any(not 0 < weight <= 1 for weight in self.weights or ()):
            problems.append(
                f"weights are {list(self.weights or ())}; expected more than 0 and at most 1: the share of a cache "
                f"that an epoch takes. To see one cache more often, lower the others' and raise epochs."
            )
        if not 0 <= self.warmup_ratio < 1:
            problems.append(f"warmup_ratio is {self.warmup_ratio}; expected 0 to 1.")
        problems += choice_problems(
            self,
            **{"optimizer": OPTIMIZERS, "loss": LOSSES, "attention_backend": ATTENTION_BACKENDS},
            **{"dtype": AUTOCAST_DTYPES, "report_to": REPORTERS},
        )
        if self.ema is not None and not 0 < self.ema < 1:
            problems.append(f"ema is {self.ema}; expected more than 0 and less than 1, as in 0.999.")
        refuse("train", problems)


_BOUNDS: tuple[tuple[str, str, Callable[[Any], bool]], ...] = (
    (
        "batch_tokens row_tokens batch_size accumulation num_anchors val_every patience save_every keep loader_threads "
        "steps draft_layers draft_heads draft_kv_heads draft_head_dim draft_intermediate_size "
        "draft_max_position_embeddings",
        "at least 1",
        lambda value: value >= 1,
    ),
    (
        "learning_rate clip gamma draft_rope_theta draft_rms_norm_eps",
        "more than 0, and finite",
        lambda value: 0 < value < math.inf,
    ),
    ("epochs", f"more than 0, and at most {MAX_EPOCHS:,}", lambda value: 0 < value <= MAX_EPOCHS),
    ("weight_decay", "0 or more, and finite", lambda value: 0 <= value < math.inf),
    ("seed", "0 or more, below 2**63", lambda value: 0 <= value < 2**63),
    ("val_samples", "0 or more", lambda value: value >= 0),
    ("block_size", "at least 2", lambda value: value >= 2),
)


def recommended_gamma(block_size: int) -> float:
    """Return the loss decay published for blocks of 8, 10 and 16 (4, 5 and 7), on straight lines through them."""
    return block_size / 2 if block_size <= 10 else 5 + (block_size - 10) / 3
