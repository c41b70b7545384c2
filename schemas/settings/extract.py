"""What a user may set for `dflash extract`. Each default exists here and nowhere else."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dflash_offline.schemas.manifest import FEATURE_KINDS, FeatureLayout
from dflash_offline.schemas.settings.shared import DTYPES, choice_problems, refuse, template_problems

MASKS = ("assistant", "last-turn", "all")
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
        refuse("extract", problems + template_problems(self.chat_template_kwargs))
