"""What looks wrong in a cache, by its plan, its records and, where they were read, its features: the rules.

A warning is a hint for a person, not a refusal: what is certain to be wrong, extraction refuses to store. Axes: S
finished shards with features, L captured layers.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from dflash_offline.pipeline.inspect.feature_statistics import FeatureStatistics
from dflash_offline.pipeline.inspect.plan_statistics import MaskTokenUse
from dflash_offline.pipeline.inspect.shard_statistics import PooledLayer, ShardStatistics
from dflash_offline.schemas.draft.anchor_rule import AnchorRule
from dflash_offline.schemas.errors import dflash_line
from dflash_offline.schemas.locks import ABANDONED_S
from dflash_offline.schemas.samples import SampleTable
from dflash_offline.stages.store.leftovers import Leftovers

ZEROS = 0.01
"""Share of exact zeros. A residual stream is a sum; two summands in bfloat16, with 128 values between a number and its
double, cancel exactly about once in 500 times even if they are of one size."""
GROWTH = 1000.0
"""Standard deviation over the median one of the other layers. Outlier channels of 1,000 times the rest, one in 500, and
first tokens of 3,000 times the rest, one in 200, raise it by 45 and by 200; nothing healthy comes near both in one
layer and in none of the others."""
NEARLY_DEAD = 1e-4
"""The same downwards. bfloat16 keeps eight bits, so that of a sum over layers such a one leaves nothing."""
SHARD_CHANGE = 100.0
"""A layer's standard deviation in one shard over its median one, either way. Shards differ by how many first tokens
they hold: conversations of 20 tokens where others have 2,000 change it tenfold."""
LARGEST = 1e15
"""Values whose squares, summed over a token, leave float32, in which every RMSNorm computes: 3.4e38."""
OUTLIER = 10_000.0
"""A channel's usual magnitude over that of the layer's median channel. Outlier channels of real models reach 100 to
1,000; ten times that leaves room for one that is larger still."""
ALIKE = 2.0**-8
"""Relative difference of two layers, each channel in its own deviations: what rounding to bfloat16 alone may cause. A
decoder layer whose whole contribution is less would be none."""


@dataclass(frozen=True)
class CacheWarning:
    """One thing that looks wrong."""

    kind: str
    """Short and countable."""
    where: str
    what: str
    next: str
    """What to do about it."""
    layer_id: int | None = None
    shards: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"{self.kind}: {self.where} {self.what}. Next: {self.next}."


def with_warnings(layers: list[PooledLayer], warnings: list[CacheWarning]) -> list[PooledLayer]:
    """Return the layers, each with the kinds of its own warnings."""
    return [replace(layer, warnings=[x.kind for x in warnings if x.layer_id == layer.layer_id]) for layer in layers]


def layer_warnings(statistics: ShardStatistics, layers: list[PooledLayer], cache: str) -> Iterator[CacheWarning]:
    """Yield what looks wrong with the layers, by the records' statistics."""
    for column, layer in enumerate(layers):
        others = [other.std for other in layers if other is not layer]
        yield from _one_layer(layer, float(np.median(others)) if others else None, cache)
        yield from _odd_shards(layer.layer_id, statistics.values[:, column], statistics.shards, cache)
    for (first, layer_id), (second, other) in combinations(enumerate(statistics.layer_ids), 2):
        if np.array_equal(statistics.values[:, first], statistics.values[:, second]):
            yield CacheWarning(
                "layers too alike",
                f"layers {layer_id} and {other}",
                "have the same mean, deviation and largest value in every shard: one was stored twice",
                f"{dflash_line('verify', cache, '--target', 'MODEL')} says which is which; then extract again",
                layer_id=other,
            )


def _one_layer(layer: PooledLayer, others: float | None, cache: str) -> Iterator[CacheWarning]:
    """Yield the gravest fault of a layer; `others` is the median standard deviation of the other layers."""
    where, layer_id = f"layer {layer.layer_id}", layer.layer_id
    look = f"{dflash_line('inspect', cache, '--layers', '--features', 8)} names the channels"
    again = f"{dflash_line('verify', cache, '--target', 'MODEL')} compares it with the target; then extract again"
    std = f"standard deviation {layer.std:.3g}"
    if layer.std == 0 or (others and layer.std < others * NEARLY_DEAD):
        than = f", where the middle one of the others is {others:.3g}" if others else ""
        yield CacheWarning("dead layer", where, f"carries nothing: {std}{than}", again, layer_id)
    elif layer.max_abs > LARGEST:
        what = f"reaches {layer.max_abs:.2g}: its square leaves float32"
        yield CacheWarning("exploding norms", where, what, look, layer_id)
    elif others and layer.std > others * GROWTH:
        times = f"{layer.std / others:,.0f} times the middle one of the others; one channel is enough for that"
        yield CacheWarning("exploding norms", where, f"{std}, {times}", look, layer_id)
    elif layer.zeros > ZEROS:
        what = f"{layer.zeros:.1%} of its values are exactly zero; expected under {ZEROS:.0%}"
        yield CacheWarning("zeros", where, what, again, layer_id)


def _odd_shards(
    layer_id: int, statistics: NDArray[np.float64], shards: list[int], cache: str
) -> Iterator[CacheWarning]:
    """Yield what is odd in some shards alone, of one layer's statistics [S, 4]."""
    std, zeros = statistics[:, 1], statistics[:, 3]
    middle = float(np.median(std))
    for kind, odd, what in (
        ("dead layer", std < middle / SHARD_CHANGE, f"standard deviation under a hundredth of the usual {middle:.3g}"),
        ("exploding norms", std > middle * SHARD_CHANGE, f"standard deviation over 100 times the usual {middle:.3g}"),
        ("zeros", zeros > ZEROS, f"over {ZEROS:.0%} of the values are exactly zero"),
    ):
        few = [shards[i] for i in np.flatnonzero(odd).tolist()]
        if few and len(few) <= len(shards) // 2:
            look = dflash_line("inspect", cache, "--shard", few[0])
            again = f"{look}; to redo it, remove its record in commits/ and repeat the dflash extract"
            yield CacheWarning(kind, f"layer {layer_id}, {_name_shards(few)}", what, again, layer_id, tuple(few))


def _name_shards(shards: list[int]) -> str:
    """Return the first few of the shards, and how many more there are."""
    listed = ", ".join(map(str, shards[:4])) + (f" and {len(shards) - 4:,} more" if len(shards) > 4 else "")
    return f"{'shard' if len(shards) == 1 else 'shards'} {listed}"


def half_written_warnings(half_written: Leftovers) -> Iterator[CacheWarning]:
    """Yield whether workers left half-written files; those at work touch theirs all the time."""
    if half_written.untouched_s >= ABANDONED_S:
        what = f"holds {half_written}: of workers that died"
        again = "repeat the `dflash extract` that made it, which removes those of dead workers"
        yield CacheWarning("abandoned files", "tmp/", what, again)


def shard_warnings(states: dict[int, str], faults: list[str], cache: str) -> Iterator[CacheWarning]:
    """Yield the shards that are damaged, with the first of the records' faults, or half done."""
    repair = f"{dflash_line('verify', cache, '--repair')}, then the dflash extract that made it: it redoes just these"
    again = "unless one is at it now, repeat the dflash extract that made it: it redoes what is left"
    stopped = "has files but no record, and counts for nothing: its worker was stopped, or is at it now"
    for state, what, todo in (
        ("damaged", faults[0] if faults else "its record cannot be read", repair),
        ("half-finished", stopped, again),
        ("half-written", "was being written when its worker ended, and counts for nothing", again),
    ):
        if shards := sorted(shard for shard, found in states.items() if found == state):
            yield CacheWarning(f"{state} shard", _name_shards(shards), what, todo, shards=tuple(shards))


def plan_warnings(samples: SampleTable, rule: AnchorRule, cache: str) -> Iterator[CacheWarning]:
    """Yield samples with nothing supervised or, if all have something, with nowhere to anchor a block."""
    for column, kind, what in (
        (samples.num_supervised, "all-masked samples", "have no supervised token: they train nothing"),
        (
            samples.num_anchors,
            "samples without anchors",
            f"have no supervised token with {rule.wanted}",
        ),
    ):
        empty = np.flatnonzero(column == 0)
        if len(empty):
            look = dflash_line("inspect", cache, "--sample", int(empty[0]))
            again = f"{look}; mend the chat template's generation tags or choose another --mask, and extract anew"
            where = f"{len(empty):,} of {len(samples):,} samples, first {int(empty[0])}"
            yield CacheWarning(kind, where, what, again)
            return


def mask_token_warnings(token: int, name: str | None, problem: str, use: MaskTokenUse) -> Iterator[CacheWarning]:
    """Yield what is wrong with the token that fills the slots to be drafted."""
    occurs = f"occurs in {use.samples:,} of {use.samples_checked:,} samples, first {use.first_sample}"
    if what := " and ".join([*([problem] if problem else []), *([occurs] if use.samples else [])]):
        where = f"token {token}" + (f" ({name!r})" if name is not None else "")
        again = "extract anew without --mask-token-id, or with a reserved token that no sample contains"
        yield CacheWarning("wrong mask token", where, what, again)


def feature_warnings(features: FeatureStatistics, cache: str) -> Iterator[CacheWarning]:
    """Yield what looks wrong in the features that were read."""
    again = f"{dflash_line('verify', cache, '--target', 'MODEL')} compares them with the target; then extract again"
    for layer in features.layers:
        where = f"layer {layer.layer_id}"
        far = [f"{x.channel} ({x.ratio:,.0f} times)" for x in layer.channels.largest if x.ratio and x.ratio > OUTLIER]
        for count, kind, what in (
            (layer.not_finite, "not finite", f"{layer.not_finite:,} values are not finite"),
            (len(far), "exploding channel", f"channels far above the middle one: {', '.join(far)}"),
            (layer.channels.dead, "dead channels", f"{layer.channels.dead:,} channels hold one value everywhere"),
        ):
            if count:
                yield CacheWarning(kind, where, what, again, layer.layer_id)
    for (i, layer), (j, other) in combinations(enumerate(features.layers), 2):
        if features.difference[i][j] < ALIKE:
            what = f"differ by {features.difference[i][j]:.2%} of a deviation, as rounding does"
            where = f"layers {layer.layer_id} and {other.layer_id}"
            yield CacheWarning("layers too alike", where, what, again, other.layer_id)
