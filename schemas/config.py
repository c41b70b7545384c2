"""What a user may set for the two stages. Each default exists here and nowhere else."""

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dflash_offline.schemas.errors import DflashError
from dflash_offline.schemas.manifest import FEATURE_KINDS, FeatureLayout


def choice_problem(name: str, value: str | None, allowed: tuple[str, ...]) -> str | None:
    """Return what is wrong with a setting that takes one of a few names, with the nearest of them; None for nothing."""
    if value is None or value in allowed:
        return None
    near = difflib.get_close_matches(value, allowed, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    return f"{name} is {value!r}; expected {', '.join(allowed[:-1])} or {allowed[-1]}.{hint}"


def choice_problems(config: Any, **choices: tuple[str, ...]) -> list[str]:
    """Return what is wrong with those settings of a config that take one of a few names."""
    found = (choice_problem(name, getattr(config, name), allowed) for name, allowed in choices.items())
    return [problem for problem in found if problem]


def _refuse(what: str, problems: list[str]) -> None:
    if problems:
        raise DflashError(f"These settings of `dflash {what}` cannot be used:\n  " + "\n  ".join(problems))


RESERVED_TEMPLATE_KWARGS = {
    "conversation",
    "messages",
    "tokenize",
    "tokenizer_kwargs",
    "add_generation_prompt",
    "continue_final_message",
}


def template_problems(kwargs: dict[str, Any]) -> list[str]:
    """Return what is wrong with a user's arguments to the chat template: those that this program sets itself."""
    taken = sorted(name for name in kwargs if name in RESERVED_TEMPLATE_KWARGS or name.startswith("return_"))
    return [f"chat_template_kwargs holds {', '.join(taken)}, which this program sets itself."] if taken else []


MASKS = ("assistant", "last-turn", "all")
DTYPES = ("auto", "float32", "bfloat16", "float16")
ON_BAD_FEATURES = ("refuse", "skip")


@dataclass(frozen=True, kw_only=True)
class ExtractConfig:
    """Settings of `dflash extract`."""

    data: tuple[Path, ...]
    """Files, folders, globs, saved datasets or hub ids of conversations; `:0.3` at the end takes that share of rows."""
    target: str
    """Hugging Face model: a folder, or a hub id."""
    out: Path
    """Cache folder; continued if it already holds the same cache."""
    revision: str | None = None
    """Revision of a hub id."""
    layers: tuple[int, ...] | None = None
    """Captured layers; None for `num_layers` spread over the target."""
    num_layers: int | None = None
    """Number of captured layers; None for five, or as many as a small target has room for."""
    block_size: int = 16
    """K; a sample without one supervised position with K - 1 tokens after it is left out."""
    mask_token_id: int | None = None
    """Token that fills the slots to be drafted; None to find a reserved one."""
    max_length: int = 3072
    """Tokens kept of each conversation."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Passed to the chat template."""
    input_format: str | None = None
    """json, jsonl, parquet or arrow, and how rows are written: messages, sharegpt, prompt-response, text or tokens;
    None to find out."""
    limit: int | None = None
    """Rows read, at most."""
    seed: int = 0
    """Draws and mixes rows where data has weights."""
    drop_duplicates: bool = False
    """Leave out rows that say exactly what an earlier one says, counted."""
    mask: str = "assistant"
    """What is supervised: every assistant turn, the last-turn, or all tokens."""
    no_reasoning: bool = False
    """Leave an answer's reasoning unsupervised."""
    keep_special_tokens: bool = False
    """Keep rows whose text spells a special token, as the target would be served it, instead of rejecting them."""
    skip_bad_rows: bool = False
    """Leave unusable rows out, counted and listed in rejects.parquet, instead of stopping."""
    dtype: str = "auto"
    """float32, bfloat16 or float16; auto is float32 on the CPU and the checkpoint's own on a GPU."""
    attn_implementation: str = "sdpa"
    """As transformers names it."""
    trust_remote_code: bool = False
    """Run code that comes with the model."""
    device: str = "auto"
    """cpu, cuda or cuda:N; auto takes a GPU if there is one."""
    batch_tokens: int = 8192
    """Padded tokens of one forward."""
    shard_mib: int = 512
    """MiB of raw features in one shard: the unit of work, of resuming and of loss."""
    chunk_tokens: int = 128
    """Tokens of one compressed chunk."""
    features: str = "lossless"
    """lossless (bfloat16), rounded (bfloat16 with fewer mantissa bits) or scaled (steps of each layer and channel)."""
    mantissa_bits: int = 4
    """Mantissa bits that rounded features keep, of 7."""
    step: float = 1 / 8
    """Step of scaled features, in standard deviations of the channel."""
    on_bad_features: str = "refuse"
    """What to do with a sample whose features are not finite or whose layer is dead: refuse, or skip it, recorded."""
    max_skipped: float = 0.01
    """Share of the plan's samples that may be skipped so; of a small plan eight may, unless it is 0."""
    device_map: str | None = None
    """Spread a target over several devices as transformers does, e.g. auto; None for one device."""
    workers: int = 1
    """Processes on this machine, dealt to its GPUs in turn."""
    rank: int = 0
    """Which share of the shards is this command's, in an array job; rank 0 makes the plan."""
    world_size: int = 1
    """Commands of the array job."""
    plan_timeout_s: float = 1800.0
    """Seconds that a later rank waits for a sign of rank 0's plan."""
    ignore_free_space: bool = False
    """Start although the disk cannot hold the cache."""

    @property
    def feature_layout(self) -> FeatureLayout:
        """How features are stored."""
        return self.feature_layout_of(self.features)

    def feature_layout_of(self, kind: str) -> FeatureLayout:
        """Return how features of a kind would be stored."""
        return FeatureLayout(
            kind=kind,
            mantissa_bits=self.mantissa_bits if kind == "rounded" else None,
            step=self.step if kind == "scaled" else None,
        )

    def __post_init__(self) -> None:
        problems = []
        lows = (("block_size", 2), ("max_length", 2), ("batch_tokens", 1), ("shard_mib", 1), ("workers", 1))
        for name, low in (*lows, ("world_size", 1)):
            if getattr(self, name) < low:
                problems.append(f"{name} is {getattr(self, name)}; expected at least {low}.")
        if self.chunk_tokens < 1:
            problems.append(f"chunk_tokens is {self.chunk_tokens}; expected at least 1.")
        if self.max_length < self.block_size:
            problems.append(f"max_length {self.max_length} is shorter than one block of {self.block_size}.")
        if self.layers is not None and self.num_layers is not None:
            problems.append("Both layers and num_layers are given; name one of them.")
        problems += choice_problems(
            self, dtype=DTYPES, mask=MASKS, features=FEATURE_KINDS, on_bad_features=ON_BAD_FEATURES
        )
        if not self.data:
            problems.append("No data file is given.")
        if self.limit is not None and self.limit < 1:
            problems.append(f"limit is {self.limit}; expected at least 1.")
        if not 1 <= self.mantissa_bits <= 7:
            problems.append(f"mantissa_bits is {self.mantissa_bits}; expected 1 to 7.")
        if not 0 < self.step <= 1:
            problems.append(f"step is {self.step}; expected more than 0 and at most 1 standard deviation.")
        if not 0 <= self.max_skipped <= 1:
            problems.append(f"max_skipped is {self.max_skipped}; expected 0 to 1, a share of the samples.")
        if not self.plan_timeout_s >= 0:
            problems.append(f"plan_timeout_s is {self.plan_timeout_s}; expected at least 0.")
        if not 0 <= self.rank < self.world_size:
            problems.append(f"rank is {self.rank}; expected 0 to world_size - 1 = {self.world_size - 1}.")
        if self.workers > 1 and self.device not in ("auto", "cpu", "cuda"):
            problems.append(f"device is {self.device!r} and workers are dealt to all GPUs; use CUDA_VISIBLE_DEVICES.")
        if self.chunk_tokens > 65_536:
            problems.append(f"chunk_tokens is {self.chunk_tokens}; expected at most 65536.")
        if self.device_map is not None and self.workers > 1:
            problems.append("device_map spreads one target over all devices; it cannot be used with several workers.")
        _refuse("extract", problems + template_problems(self.chat_template_kwargs))


@dataclass(frozen=True, kw_only=True)
class RerunConfig:
    """Settings of `dflash verify --target`: how a target is run again; what is None is as the cache was made."""

    target: str
    """Hugging Face model: a folder, or a hub id."""
    samples: int = 8
    """Samples to run it on."""
    seed: int = 0
    """Draws those samples."""
    revision: str | None = None
    """Revision of a hub id."""
    trust_remote_code: bool = False
    """Run code that comes with the model."""
    attn_implementation: str | None = None
    """As transformers names it."""
    device: str = "auto"
    """cpu, cuda or cuda:N; auto takes a GPU if there is one."""
    device_map: str | None = None
    """Spread the target over several devices as transformers does."""

    def __post_init__(self) -> None:
        lows = (("samples", 1), ("seed", 0))
        _refuse(
            "verify",
            [
                f"{name} is {getattr(self, name)}; expected at least {low}."
                for name, low in lows
                if getattr(self, name) < low
            ],
        )


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
        _refuse("train", problems)


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
