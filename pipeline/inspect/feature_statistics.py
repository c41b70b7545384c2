"""What a few samples' features show that no record does: norms, outlier channels, how alike the layers are, bytes.

Needs numpy, not torch. Axes: T tokens, L captured layers, H hidden size.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dflash_offline.pipeline.inspect.plan_statistics import spread
from dflash_offline.pipeline.inspect.warnings import Mark
from dflash_offline.schemas.errors import CacheError, DflashError, dflash_line
from dflash_offline.stages.store.cache import Cache

OUTLIER = 10_000.0
"""A channel's usual magnitude over that of the layer's middle channel. Outlier channels of real models reach 100 to
1,000; ten times that leaves room for one that is larger still."""
ALIKE = 2.0**-8
"""Relative difference of two layers, each channel in its own deviations: what rounding to bfloat16 alone may cause. A
decoder layer whose whole contribution is less would be none."""
_MOST_BYTES = 1 << 28
"""Features in float32 that are in memory at once, several times over: 3,276 tokens at five layers of 4,096."""
_CHANNELS_SHOWN = 5
_SHARDS_MEASURED = 32


def feature_figures(records: Cache, num_samples: int) -> dict[str, Any]:
    """Return what the features of samples spread over the finished shards show, layer by layer.

    `samples_asked` is how many there were to read: so few are that `_MOST_BYTES` hold them.
    `layers` holds for each layer the norms of its tokens (root mean square over channels), how often the first token's
    is larger, and the channels that stand out; `similarity` [L][L] is the mean correlation of two layers' channels, and
    `difference` [L][L] their relative difference in each channel's own deviations. First tokens are left out of
    channels and similarities: many models keep activations there that are thousands of times the rest.
    """
    samples = _spread_samples(records, num_samples)
    layer_ids = records.manifest.identity["layer_ids"]
    parts = [records.values(sample) for sample in samples]
    not_finite = np.sum([np.count_nonzero(~np.isfinite(part), axis=(0, 2)) for part in parts], axis=0).tolist()
    for part in parts:
        np.nan_to_num(part, copy=False, nan=0.0, posinf=0.0, neginf=0.0)
    rms = [np.sqrt(np.square(part, dtype=np.float64).mean(axis=2)) for part in parts]  # [T, L] each
    rest = np.concatenate([part[1:] for part in parts])
    first, later = np.array([one[0] for one in rms]), np.concatenate([one[1:] for one in rms])
    layers = []
    for column, layer_id in enumerate(layer_ids):
        middle = float(np.median(later[:, column]))
        layers.append(
            {
                "layer_id": layer_id,
                "not_finite": not_finite[column],
                "norm": spread(later[:, column]),
                "first_token_ratio": float(np.median(first[:, column]) / middle) if middle else None,
                "channels": _channels(rest[:, column]),
            }
        )
    correlation, difference = _similarity(rest)
    return {
        "samples": samples,
        "samples_asked": min(num_samples, len(records.usable())),
        "tokens": sum(map(len, parts)),
        "layers": layers,
        "similarity": correlation.tolist(),
        "difference": difference.tolist(),
    }


def _spread_samples(records: Cache, num_samples: int) -> list[int]:
    usable = records.usable()
    if num_samples < 1:
        raise DflashError(f"--features is {num_samples}; expected a number of samples, at least 1.")
    if not len(usable):
        raise CacheError(
            f"{records.path} has no finished shard whose features could be read. Let `dflash extract` run."
        )
    most = _MOST_BYTES // (2 * records.manifest.layout.slot_bytes)
    for count in range(min(num_samples, len(usable)), 0, -1):
        chosen = usable[np.linspace(0, len(usable) - 1, count).round().astype(int)]
        if records.samples.num_tokens[chosen].sum() <= most:
            break
    return [int(sample) for sample in chosen]


def _channels(values: NDArray[np.float32]) -> dict[str, Any]:
    """Return the usual magnitude of a layer's channels, [T, H] in: the middle one's, and those that stand out most."""
    usual = np.median(np.abs(values), axis=0) if len(values) else np.zeros(values.shape[1])
    middle = float(np.median(usual))
    order = np.argsort(-usual, kind="stable")[:_CHANNELS_SHOWN].tolist()
    return {
        "middle": middle,
        "dead": int(np.count_nonzero(np.ptp(values, axis=0) == 0)) if len(values) > 1 else 0,
        "largest": [
            {"channel": one, "magnitude": float(usual[one]), "ratio": float(usual[one]) / middle if middle else None}
            for one in order
        ],
    }


def _similarity(values: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return mean correlation and relative difference of every two layers, [L, L] each, of features [T, L, H]."""
    num_layers = values.shape[1]
    center = values.mean(axis=0, dtype=np.float64)
    scale = values.std(axis=0, dtype=np.float64)  # [L, H]
    live = scale > 0
    correlation, difference = np.eye(num_layers), np.zeros((num_layers, num_layers))
    for one in range(num_layers):
        for other in range(one + 1, num_layers):
            both = live[one] & live[other]
            if not both.any():
                continue
            a, b = ((values[:, i][:, both] - center[i, both]) for i in (one, other))
            product = (a * b).mean(axis=0) / (scale[one, both] * scale[other, both])
            gap = (values[:, one] - values[:, other])[:, both].astype(np.float64)
            relative = np.sqrt(np.square(gap).mean(axis=0)) / scale[one, both]
            correlation[one, other] = correlation[other, one] = float(np.nanmean(product))
            difference[one, other] = difference[other, one] = float(np.nanmedian(relative))
    return correlation, difference


def feature_marks(figures: dict[str, Any], cache: str) -> list[Mark]:
    """Return what looks wrong in the features that were read."""
    marks = []
    again = f"{dflash_line('verify', cache, '--target', 'MODEL')} compares them with the target; then extract again"
    for row in figures["layers"]:
        where, layer_id = f"layer {row['layer_id']}", row["layer_id"]
        if row["not_finite"]:
            what = f"{row['not_finite']:,} values are not finite"
            marks.append(Mark(kind="not finite", where=where, what=what, next=again, layer_id=layer_id))
        far = [one for one in row["channels"]["largest"] if (one["ratio"] or 0) > OUTLIER]
        if far:
            named = ", ".join(f"{one['channel']} ({one['ratio']:,.0f} times)" for one in far)
            what = f"channels far above the middle one: {named}"
            marks.append(Mark(kind="exploding channel", where=where, what=what, next=again, layer_id=layer_id))
        if row["channels"]["dead"]:
            what = f"{row['channels']['dead']:,} channels hold one value everywhere"
            marks.append(Mark(kind="dead channels", where=where, what=what, next=again, layer_id=layer_id))
    ids = [row["layer_id"] for row in figures["layers"]]
    for one, layer_id in enumerate(ids):
        for other in range(one + 1, len(ids)):
            if figures["difference"][one][other] < ALIKE:
                marks.append(
                    Mark(
                        kind="layers too alike",
                        where=f"layers {layer_id} and {ids[other]}",
                        what=f"differ by {figures['difference'][one][other]:.2%} of a deviation, as rounding does",
                        next=again,
                        layer_id=ids[other],
                    )
                )
    return marks


def bytes_by_layer(records: Cache) -> dict[str, Any]:
    """Return each layer's stored bytes and their ratio to raw ones, from the indexes of shards over the whole cache."""
    filled = [commit for commit in records.commits.values() if commit.num_tokens]
    layout = records.manifest.layout
    stored = np.zeros(layout.num_layers, np.int64)
    places = np.unique(np.linspace(0, len(filled) - 1, min(_SHARDS_MEASURED, len(filled))).round().astype(int))
    chosen = [filled[place] for place in places.tolist()]
    for commit in chosen:
        stored += records.open_shard(commit).layer_bytes()
    tokens = sum(commit.num_tokens for commit in chosen)
    raw = tokens * layout.hidden_size * 2
    return {
        "shards": len(chosen),
        "tokens": tokens,
        "stored": stored.tolist(),
        "ratio": (stored / raw).tolist() if raw else None,
    }
