"""What the features of a few samples show that no record does: norms, outlier channels, similarity of layers, bytes.

Needs numpy, not torch. Axes: T tokens, L captured layers, H hidden size.
"""

from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from dflash_offline.pipeline.inspect.plan_statistics import Spread, spread
from dflash_offline.schemas.errors import CacheError, DflashError
from dflash_offline.stages.store.cache import Cache

_MOST_BYTES = 1 << 28
"""Features in float32 that are in memory at once, several times over: 3,276 tokens at five layers of 4,096."""
_CHANNELS_SHOWN = 5
_SHARDS_MEASURED = 32


@dataclass(frozen=True)
class Channel:
    """A channel whose magnitude stands out."""

    channel: int
    magnitude: float
    """Median over tokens of the absolute value."""
    ratio: float | None
    """Magnitude over that of the layer's median channel; None where that is zero."""


@dataclass(frozen=True)
class Channels:
    """The magnitudes of a layer's channels."""

    middle: float
    """Of the median channel."""
    dead: int
    """Channels that hold one value everywhere."""
    largest: list[Channel]


@dataclass(frozen=True, kw_only=True)
class LayerFeatures:
    """What the features of one layer show."""

    layer_id: int
    not_finite: int
    norm: Spread
    """Of the tokens' norms, first tokens left out."""
    first_token_ratio: float | None
    """Median norm of first tokens over that of the others."""
    channels: Channels


@dataclass(frozen=True, kw_only=True)
class FeatureStatistics:
    """What the features of a few samples show.

    First tokens are left out of channels and similarities: many models keep activations there that are thousands of
    times the rest.
    """

    samples: list[int]
    samples_asked: int
    """How many there were to read; fewer are read where `_MOST_BYTES` do not hold so many."""
    tokens: int
    layers: list[LayerFeatures]
    similarity: list[list[float]]
    """[L][L]: mean correlation of two layers' channels."""
    difference: list[list[float]]
    """[L][L]: median over channels of two layers' difference, in standard deviations of the channel."""


@dataclass(frozen=True)
class BytesByLayer:
    """The stored bytes of each layer in some of the shards."""

    shards: int
    tokens: int
    stored: list[int]
    ratio: list[float] | None
    """Stored over raw bytes; None without a shard."""


def token_norms(values: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the root mean square over channels of features [T, L, H], as [T, L]."""
    return np.sqrt(np.square(values, dtype=np.float64).mean(axis=2))


def feature_statistics(cache: Cache, num_samples: int) -> FeatureStatistics:
    """Return what the features of samples spread over the finished shards show."""
    samples = _spread_samples(cache, num_samples)
    parts = [cache.values(sample) for sample in samples]
    not_finite = np.sum([np.count_nonzero(~np.isfinite(part), axis=(0, 2)) for part in parts], axis=0).tolist()
    for part in parts:
        np.nan_to_num(part, copy=False, nan=0.0, posinf=0.0, neginf=0.0)
    norms = [token_norms(part) for part in parts]
    rest = np.concatenate([part[1:] for part in parts])
    first, later = np.array([part[0] for part in norms]), np.concatenate([part[1:] for part in norms])
    layers = []
    for column, layer_id in enumerate(cache.layer_ids):
        middle = float(np.median(later[:, column]))
        layers.append(
            LayerFeatures(
                layer_id=layer_id,
                not_finite=not_finite[column],
                norm=spread(later[:, column]),
                first_token_ratio=float(np.median(first[:, column]) / middle) if middle else None,
                channels=_channels(rest[:, column]),
            )
        )
    similarity, difference = _similarity(rest)
    return FeatureStatistics(
        samples=samples,
        samples_asked=min(num_samples, len(cache.usable())),
        tokens=sum(map(len, parts)),
        layers=layers,
        similarity=similarity.tolist(),
        difference=difference.tolist(),
    )


def _spread_samples(cache: Cache, num_samples: int) -> list[int]:
    usable = cache.usable()
    if num_samples < 1:
        raise DflashError(f"--features is {num_samples}; expected a number of samples, at least 1.")
    if not len(usable):
        raise CacheError(f"{cache.path} has no finished shard whose features could be read. Let `dflash extract` run.")
    most = _MOST_BYTES // (2 * cache.layout.slot_bytes)
    for count in range(min(num_samples, len(usable)), 0, -1):
        chosen = usable[np.linspace(0, len(usable) - 1, count).round().astype(int)]
        if cache.samples.num_tokens[chosen].sum() <= most:
            break
    return [int(sample) for sample in chosen]


def _channels(values: NDArray[np.float32]) -> Channels:
    """Return the magnitudes of one layer's channels, of values [T, H]."""
    usual = np.median(np.abs(values), axis=0) if len(values) else np.zeros(values.shape[1])
    middle = float(np.median(usual))
    dead = int(np.count_nonzero(np.ptp(values, axis=0) == 0)) if len(values) > 1 else 0
    order = np.argsort(-usual, kind="stable")[:_CHANNELS_SHOWN].tolist()
    largest = [Channel(i, float(usual[i]), float(usual[i]) / middle if middle else None) for i in order]
    return Channels(middle, dead, largest)


def _similarity(values: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return mean correlation and relative difference of every two layers, [L, L] each, of features [T, L, H]."""
    num_layers = values.shape[1]
    center = values.mean(axis=0, dtype=np.float64)
    scale = values.std(axis=0, dtype=np.float64)  # [L, H]
    live = scale > 0
    correlation, difference = np.eye(num_layers), np.zeros((num_layers, num_layers))
    for first, other in combinations(range(num_layers), 2):
        both = live[first] & live[other]
        if not both.any():
            continue
        a, b = ((values[:, i][:, both] - center[i, both]) for i in (first, other))
        product = (a * b).mean(axis=0) / (scale[first, both] * scale[other, both])
        gap = (values[:, first] - values[:, other])[:, both].astype(np.float64)
        relative = np.sqrt(np.square(gap).mean(axis=0)) / scale[first, both]
        correlation[first, other] = correlation[other, first] = float(np.nanmean(product))
        difference[first, other] = difference[other, first] = float(np.nanmedian(relative))
    return correlation, difference


def bytes_by_layer(cache: Cache) -> BytesByLayer:
    """Return each layer's stored bytes, from the indexes of shards spread over the whole cache."""
    filled = [commit for commit in cache.commits.values() if commit.num_tokens]
    layout = cache.layout
    stored = np.zeros(layout.num_layers, np.int64)
    places = np.unique(np.linspace(0, len(filled) - 1, min(_SHARDS_MEASURED, len(filled))).round().astype(int))
    chosen = [filled[place] for place in places.tolist()]
    for commit in chosen:
        stored += cache.open_shard(commit).layer_bytes()
    tokens = sum(commit.num_tokens for commit in chosen)
    raw = tokens * layout.hidden_size * 2
    return BytesByLayer(len(chosen), tokens, stored.tolist(), (stored / raw).tolist() if raw else None)
