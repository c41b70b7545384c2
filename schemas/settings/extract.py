"""What a user may set for `dflash extract`. Each text and default exists here and nowhere else."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from dflash_offline.schemas.draft.anchor_rule import ANCHORS, WHOLE, AnchorRule
from dflash_offline.schemas.manifest import FEATURE_KINDS, FeatureLayout
from dflash_offline.schemas.settings import cluster, shared
from dflash_offline.schemas.settings.engine import (
    TRANSFORMERS,
    Engine,
    EngineArgs,
    GpuMemoryUtilization,
    KvCacheDtype,
    Quantization,
    TensorParallelSize,
    engine_problems,
)
from dflash_offline.schemas.settings.option import AT_LEAST_0, AT_LEAST_1, AT_LEAST_2, Bounds, Option, problems, refuse

_ARGUMENTS = {"max_model_len": "max_length", "max_num_batched_tokens": "batch_tokens"}
"""Further arguments of vLLM's engine that are settings here."""
_INSTEAD = {
    "device_map": "vllm takes tensor_parallel_size",
    "compile": "vllm compiles by itself",
}
"""Settings of transformers alone."""


@dataclass(frozen=True, kw_only=True)
class ExtractConfig:
    """Settings of `dflash extract`."""

    # The formatter would give every word of an option a line of its own.
    # fmt: off

    data: shared.Data
    out: Annotated[Path, Option(
        "Cache folder; continued if it already holds the same cache.", "Cache", "free", "FOLDER")]
    ignore_free_space: Annotated[bool, Option(
        "Start although the disk cannot hold the cache.", "Cache", "free")] = False
    input_format: shared.InputFormat = None
    limit: shared.Limit = None
    seed: Annotated[int, Option(
        "Seed by which rows are drawn and mixed, where data has shares.", "Data", "identity", "SEED")] = 0
    drop_duplicates: Annotated[bool, Option(
        "Leave out rows that say exactly what an earlier one says, counted.", "Data", "identity")] = False
    skip_bad_rows: shared.SkipBadRows = False
    max_length: Annotated[int, Option(
        "Tokens kept of each conversation, from its start; by default as published.",
        "Data", "identity", "TOKENS", bounds=AT_LEAST_2)] = 3072
    mask: Annotated[str, Option(
        "What is supervised: every assistant turn, the last-turn alone, or all tokens.",
        "Loss mask", "resolved", "NAME", choices=("assistant", "last-turn", "all"))] = "assistant"
    no_reasoning: Annotated[bool, Option(
        "Leave the reasoning in answers unsupervised.", "Loss mask", "resolved")] = False
    keep_special_tokens: Annotated[bool, Option(
        "Keep rows whose text spells a special token, as the target would be served it, instead of rejecting them.",
        "Loss mask", "identity")] = False
    target: Annotated[str, shared.TARGET]
    revision: shared.Revision = None
    trust_remote_code: shared.TrustRemoteCode = False
    dtype: shared.TargetDtype = "auto"
    attn_implementation: shared.AttnImplementation = "sdpa"
    device: shared.Device = "auto"
    device_map: shared.DeviceMap = None
    chat_template_kwargs: shared.TemplateKwargs = field(default_factory=dict)
    compile: Annotated[bool | None, Option(
        "Compile the target's layers with torch.compile: faster, with other last bits.",
        "Target", "resolved", unset="on a GPU, where its layers are known to compile")] = None
    engine: Engine = TRANSFORMERS
    tensor_parallel_size: TensorParallelSize = 1
    gpu_memory_utilization: GpuMemoryUtilization = 0.9
    quantization: Quantization = None
    kv_cache_dtype: KvCacheDtype = "auto"
    engine_args: EngineArgs = field(default_factory=dict)
    batch_tokens: Annotated[int, Option(
        "Padded tokens of one forward, at most; fewer take less memory.",
        "Target", "identity", "TOKENS", bounds=AT_LEAST_1)] = 8192
    layers: Annotated[tuple[int, ...] | None, Option(
        "Target layers to capture, as in 1,9,17; id i is the output of layer i.",
        "What is captured", "resolved", "IDS", unset="as --num-layers spreads them")] = None
    num_layers: Annotated[int | None, Option(
        "Number of layers to capture, spread over the target.",
        "What is captured", "resolved", "LAYERS", unset="5 as published, fewer in a small target",
        instead_of="layers")] = None
    final: Annotated[bool, Option(
        "Also keep the target's last hidden state wherever the next token is supervised, from which its distribution "
        "follows; added to a cache that is there, nothing else is extracted again.",
        "What is captured", "free")] = False
    block_size: Annotated[int, Option(
        "Longest block that a draft of this cache may have, an anchor and the drafted tokens; samples without room "
        "for one are left out. By default as published.",
        "What is captured", "identity", "TOKENS", bounds=AT_LEAST_2)] = 16
    anchors: Annotated[str, Option(
        "Which samples are kept for such blocks: those with a supervised token and a whole block of text after it; or "
        "partial, all with a supervised token within a block of another, for `dflash train --anchors partial`.",
        "What is captured", "identity", "NAME", choices=ANCHORS)] = WHOLE
    mask_token_id: Annotated[int | None, Option(
        "Token that fills the slots to be drafted.",
        "What is captured", "identity", "ID", unset="a reserved one that no data holds")] = None
    on_bad_features: Annotated[str, Option(
        "What to do with a sample whose features are not finite or whose layer is dead: refuse it and stop, or skip "
        "it and record that.",
        "What is captured", "free", "NAME", choices=("refuse", "skip"))] = "refuse"
    max_skipped: Annotated[float, Option(
        "Share of the samples that may be skipped for bad features; of a small plan 8 samples may. 0 allows none.",
        "What is captured", "free", "SHARE",
        bounds=Bounds("0 to 1, a share of the samples", lambda value: 0 <= value <= 1))] = 0.01
    features: Annotated[str, Option(
        "How features are stored: lossless, rounded or scaled, with about 0.68, 0.49 and 0.33 of raw bfloat16 on "
        "disk.",
        "How it is stored", "identity", "NAME", choices=FEATURE_KINDS)] = "lossless"
    mantissa_bits: Annotated[int, Option(
        "Mantissa bits, of 7, that rounded features keep; 4 err by 1.4 %.",
        "How it is stored", "identity", "BITS", bounds=Bounds("1 to 7", lambda value: 1 <= value <= 7))] = 4
    step: Annotated[float, Option(
        "Step of scaled features, in standard deviations of the channel; 0.125 errs by 2.6 %.",
        "How it is stored", "identity", "DEVIATIONS",
        bounds=Bounds("more than 0 and at most 1 standard deviation", lambda value: 0 < value <= 1))] = 1 / 8
    shard_mib: Annotated[int, Option(
        "Raw features in one shard, which is what a kill can cost; a worker holds two, transformers on a CPU one.",
        "How it is stored", "identity", "MIB", bounds=AT_LEAST_1)] = 512
    chunk_tokens: Annotated[int, Option(
        "Tokens of one compressed chunk, the least that is read; samples are rounded up to whole chunks.",
        "How it is stored", "identity", "TOKENS",
        bounds=Bounds("1 to 65536", lambda value: 1 <= value <= 65_536))] = 128
    workers: Annotated[int, Option(
        "Processes on this machine, dealt to its GPUs in turn: take one for each GPU.",
        "Several processes", "free", "PROCESSES", bounds=AT_LEAST_1)] = 1
    rank: Annotated[int, Option(
        "Index of this command among --world-size, from 0, in an array job; 0 makes the plan.",
        "Several processes", "free", "RANK")] = 0
    world_size: Annotated[int, Option(
        "Number of commands in the array job.", "Several processes", "free", "COMMANDS", bounds=AT_LEAST_1)] = 1
    plan_timeout_s: Annotated[float, Option(
        "Time that a later rank waits for a sign of the plan, which rank 0 makes.",
        "Several processes", "free", "SECONDS", bounds=AT_LEAST_0)] = 1800.0
    ray: cluster.Ray = None
    gpus_per_worker: cluster.GpusPerWorker = None
    workers_min: cluster.WorkersMin = 1
    workers_max: cluster.WorkersMax = None

    # fmt: on

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

    @property
    def anchor_rule(self) -> AnchorRule:
        """Which positions of a sample anchor a block."""
        return AnchorRule(self.block_size, self.anchors)

    def __post_init__(self) -> None:
        found = problems(self)
        if not self.data:
            found.append("No data is given.")
        if self.anchors == WHOLE and self.max_length < self.block_size:
            found.append(f"max_length {self.max_length} is shorter than one block of {self.block_size}.")
        if self.layers is not None and self.num_layers is not None:
            found.append("Both layers and num_layers are given; name one of them.")
        if not 0 <= self.rank < self.world_size:
            found.append(f"rank is {self.rank}; expected 0 to world_size - 1 = {self.world_size - 1}.")
        if self.workers > 1 and self.device not in ("auto", "cpu", "cuda"):
            found.append(f"device is {self.device!r} and workers are dealt to all GPUs; use CUDA_VISIBLE_DEVICES.")
        if self.compile and self.device_map is not None:
            found.append("device_map spreads one target over all devices; its layers cannot be compiled.")
        if self.workers > 1 and self.device_map is not None:
            found.append("device_map spreads one target over all devices; it cannot be used with several workers.")
        if self.ray is not None and (self.workers > 1 or self.world_size > 1):
            found.append("ray starts workers of its own; workers and world_size cannot be used beside it.")
        found += cluster.cluster_problems(self)
        found += engine_problems(self, _ARGUMENTS, _INSTEAD)
        refuse("extract", found + shared.template_problems(self.chat_template_kwargs))
