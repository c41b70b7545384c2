"""What is in a cache, by its manifest, the plan's numbers and the commit records.

No feature is read, and neither torch nor zarr is loaded. `dflash inspect CACHE --json` prints exactly this.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dflash_offline.pipeline.inspect.plan_statistics import (
    MaskTokenUse,
    RejectedRow,
    Spread,
    describe_token,
    mask_token_use,
    reject_examples,
    spread,
)
from dflash_offline.pipeline.inspect.shard_statistics import (
    ArrayBytes,
    PooledLayer,
    ShardRun,
    ShardStatistics,
    WorkerStatistics,
    bytes_by_array,
    shard_states,
    state_runs,
    worker_statistics,
)
from dflash_offline.pipeline.inspect.warnings import (
    CacheWarning,
    half_written_warnings,
    layer_warnings,
    mask_token_warnings,
    plan_warnings,
    shard_warnings,
    with_warnings,
)
from dflash_offline.pipeline.terminal import FLATTENED, named
from dflash_offline.schemas.commits import Commit, SkippedSample
from dflash_offline.schemas.errors import CacheError, dflash_line
from dflash_offline.schemas.manifest import Manifest
from dflash_offline.stages.store.cache import Cache
from dflash_offline.stages.store.leftovers import Leftovers, summarize

_TOKENS_SEARCHED = 1 << 22
"""Tokens of the plan that are looked through for the mask token; a quarter of a second."""
_SKIPPED_SHOWN = 1000


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """What made a cache, from its manifest."""

    manifest: str
    """Its checksum."""
    target: str
    origin: dict[str, Any]
    identity: dict[str, Any]
    layer_ids: list[int]
    hidden_size: int
    features: str
    shard_tokens: int
    chunk_tokens: int
    mask_rule: str
    mask_token_id: int
    block_size: int
    anchor_kind: str


@dataclass(frozen=True, kw_only=True)
class PlanStatistics:
    """What became of the input rows."""

    samples: int
    tokens: int
    supervised: int
    supervised_share: float
    anchors: int
    truncated: int
    """Samples cut at the maximum length."""
    truncated_supervised: int
    """Supervised tokens that were cut off."""
    formats: dict[str, int]
    """Input rows of each format; empty for caches made before other formats were read."""
    not_drawn: int
    """Input rows that sampling by weight left out."""
    rejects: dict[str, int]
    """Input rows left out for each reason."""
    reject_examples: dict[str, list[RejectedRow]]
    answers_left_out: dict[str, int]
    """Answers that are in none of the samples of their conversation, for each reason."""
    split: dict[str, int]
    """Conversations that became several samples, these samples, and the tokens that this cost; empty if none did."""
    dropped: dict[str, int]
    """Samples some part of which the chat template left out of the text, by its kind."""
    notes: dict[str, int]
    """Samples of which something else was said when they were planned, by its kind."""
    length: Spread
    supervised_per_sample: Spread
    """Of the share of a sample's tokens."""
    anchors_per_sample: Spread


@dataclass(frozen=True, kw_only=True)
class SkippedOfShard:
    """A sample without features, and its shard."""

    sample: SkippedSample = field(metadata=FLATTENED)
    shard: int


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far the shards are."""

    shards: int
    shards_done: int
    shards_left: int
    shard_states: dict[str, int]
    """Shards in each state."""
    progress: list[ShardRun]
    samples_done: int
    tokens_done: int
    skipped: int
    """Samples of finished shards without features."""
    skipped_samples: list[SkippedOfShard]
    """The first of them."""


@dataclass(frozen=True, kw_only=True)
class FinalStates:
    """How far a cache's final states are, and what they take."""

    shards_done: int
    features: str
    positions: int
    """Of the finished shards' tokens, those that hold one; the others hold fill."""
    kept_share: float | None
    """Of these tokens; None without a finished shard."""
    stored: int
    """Bytes."""
    ratio: float | None
    """Stored over raw bytes of the positions that are kept."""
    skipped: int
    """Samples of finished shards without final states."""
    statistics: PooledLayer | None
    damaged_records: list[str]

    @classmethod
    def of(cls, final: Cache) -> "FinalStates":
        """Return what the records of a cache's final states say together."""
        commits = final.commits
        skipped = {sample.sample for commit in commits.values() for sample in commit.skipped}
        of_done = [sample for shard in commits for sample in final.samples.samples_of_shard(shard).tolist()]
        tokens = int(final.samples.num_tokens[[sample for sample in of_done if sample not in skipped]].sum())
        positions = sum(commit.num_tokens for commit in commits.values())
        stored = sum(record.size for commit in commits.values() for record in commit.files.values())
        pooled = ShardStatistics.of(commits).pooled()
        return cls(
            shards_done=len(commits),
            features=str(final.layout.features),
            positions=positions,
            kept_share=positions / tokens if tokens else None,
            stored=stored,
            ratio=stored / (positions * final.layout.slot_bytes) if positions else None,
            skipped=len(skipped),
            statistics=pooled[0] if pooled else None,
            damaged_records=final.faults,
        )


@dataclass(frozen=True, kw_only=True)
class Overview:
    """What a cache holds, how far it is and what looks wrong."""

    cache: str
    provenance: Provenance = field(metadata=FLATTENED)
    mask_token: str | None
    mask_token_use: MaskTokenUse
    plan: PlanStatistics = field(metadata=FLATTENED)
    progress: Progress = field(metadata=FLATTENED)
    damaged_records: list[str]
    half_written: Leftovers
    arrays: dict[str, ArrayBytes]
    bytes: dict[str, int]
    """Stored bytes of each array."""
    raw_feature_bytes: int
    compression: float | None
    """Stored over raw bytes of the features."""
    final: FinalStates | None
    """The target's last hidden states, where the cache has them."""
    layers: list[PooledLayer]
    workers: list[WorkerStatistics]
    warnings: list[CacheWarning] = field(metadata=named("marks"))
    next: list[str]
    """Commands that are of use now."""


def overview(cache: Cache) -> Overview:
    """Return the overview of a cache."""
    path, manifest, commits = cache.path, cache.manifest, cache.commits
    states = shard_states(path, cache.layout, commits)
    statistics = ShardStatistics.of(commits)
    layers = statistics.pooled()
    mask_token = int(manifest.plan["mask_token_id"])
    name, problem = describe_token(path, manifest, mask_token)
    use = mask_token_use(path, mask_token, _TOKENS_SEARCHED)
    half_written = summarize(path)
    warnings = [
        *shard_warnings(states, cache.faults, cache.name),
        *layer_warnings(statistics, layers, cache.name),
        *plan_warnings(cache.samples, manifest.anchor_rule, cache.name),
        *mask_token_warnings(mask_token, name, problem, use),
        *half_written_warnings(half_written),
    ]
    arrays = bytes_by_array(commits, cache.layout)
    final, damaged = None, [*cache.faults]
    try:
        final = None if cache.final is None else FinalStates.of(cache.final)
    except CacheError as error:  # the hidden states can be looked at all the same
        damaged.append(str(error))
    hidden = arrays.get("hidden_states")
    return Overview(
        cache=cache.name,
        provenance=_provenance(manifest),
        mask_token=name,
        mask_token_use=use,
        plan=_plan_statistics(cache),
        progress=_progress(cache.layout.num_shards, commits, states),
        damaged_records=damaged,
        half_written=half_written,
        arrays=arrays,
        bytes={array: size.stored for array, size in arrays.items()},
        raw_feature_bytes=hidden.raw if hidden else 0,
        compression=hidden.ratio if hidden else None,
        final=final,
        layers=with_warnings(layers, warnings),
        workers=worker_statistics(commits),
        warnings=warnings,
        next=_next(cache),
    )


def _next(cache: Cache) -> list[str]:
    path, target = cache.name, cache.manifest.origin["target"]
    if len(cache.commits) < cache.layout.num_shards:
        return ["the `dflash extract` that made it, to go on", dflash_line("inspect", path, "--sample", 0)]
    return [
        dflash_line("train", path, "--out", "RUN"),
        f"{dflash_line('verify', path, '--target', target)}  # is each layer the one it is called?",
        dflash_line("inspect", path, "--sample", 0),
        dflash_line("inspect", path, "--layers", "--features", 8),
    ]


def _provenance(manifest: Manifest) -> Provenance:
    layout, identity = manifest.layout, manifest.identity
    return Provenance(
        manifest=manifest.checksum,
        target=manifest.origin["target"],
        origin=manifest.origin,
        identity=identity,
        layer_ids=identity["layer_ids"],
        hidden_size=layout.hidden_size,
        features=str(layout.features),
        shard_tokens=layout.shard_tokens,
        chunk_tokens=layout.chunk_tokens,
        mask_rule=identity["mask_rule"],
        mask_token_id=manifest.plan["mask_token_id"],
        block_size=manifest.plan["block_size"],
        anchor_kind=manifest.anchor_rule.kind,
    )


def _plan_statistics(cache: Cache) -> PlanStatistics:
    samples, plan = cache.samples, cache.manifest.plan
    tokens, supervised = samples.num_tokens, samples.num_supervised
    return PlanStatistics(
        samples=len(samples),
        tokens=int(tokens.sum()),
        supervised=int(supervised.sum()),
        supervised_share=float(supervised.sum() / max(tokens.sum(), 1)),
        anchors=int(samples.num_anchors.sum()),
        truncated=plan["truncated"],
        truncated_supervised=plan.get("truncated_supervised", 0),
        formats=plan.get("formats", {}),
        not_drawn=plan.get("not_drawn", 0),
        rejects=plan["rejects"],
        reject_examples=reject_examples(cache.path, plan["rejects"]),
        answers_left_out=plan.get("answers_left_out", {}),
        split=plan.get("split", {}),
        dropped=plan.get("dropped", {}),
        notes=plan.get("notes", {}),
        length=spread(tokens),
        supervised_per_sample=spread(supervised / np.maximum(tokens, 1)),
        anchors_per_sample=spread(samples.num_anchors),
    )


def _progress(num_shards: int, commits: dict[int, Commit], states: dict[int, str]) -> Progress:
    skipped = [SkippedOfShard(sample=x, shard=commit.shard) for commit in commits.values() for x in commit.skipped]
    return Progress(
        shards=num_shards,
        shards_done=len(commits),
        shards_left=num_shards - len(commits),
        shard_states=dict(Counter(states.get(shard, "left") for shard in range(num_shards))),
        progress=state_runs(states, num_shards),
        samples_done=sum(commit.num_samples for commit in commits.values()),
        tokens_done=sum(commit.num_tokens for commit in commits.values()),
        skipped=len(skipped),
        skipped_samples=skipped[:_SKIPPED_SHOWN],
    )
