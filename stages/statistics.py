"""What a commit record says of each layer's features, added up chunk by chunk.

Axes: T tokens, L captured layers, H hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dflash_offline.schemas.commits import LayerStatistics


@dataclass(frozen=True)
class Sums:
    """Of some features of one layer; adds up with those of others."""

    count: int = 0
    total: float = 0.0
    squares: float = 0.0
    zeros: int = 0
    max_abs: float = 0.0
    """NaN or infinite if a feature is."""

    @classmethod
    def of(cls, values: NDArray[np.float32]) -> "Sums":
        """Return the sums of features [T, H]; of none, if T is 0."""
        if not len(values):
            return cls()
        with np.errstate(over="ignore", invalid="ignore"):  # sums by einsum: half the time of `sum`
            squares = float(np.einsum("th,th->t", values, values).sum(dtype=np.float64))
            total = float(np.einsum("th->t", values).sum(dtype=np.float64))
        if not np.isfinite([squares, total]).all():  # too large for float32
            squares = float(np.square(values, dtype=np.float64).sum())
            total = float(values.sum(dtype=np.float64))
        return cls(
            count=values.size,
            total=total,
            squares=squares,
            zeros=int(np.count_nonzero(values == 0)),
            max_abs=float(np.maximum(values.max(), -values.min())),
        )

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(
            self.count + other.count,
            self.total + other.total,
            self.squares + other.squares,
            self.zeros + other.zeros,
            float(np.maximum(self.max_abs, other.max_abs)),
        )


def layer_statistics(sums: Sequence[Sums], layer_ids: Sequence[int]) -> list[LayerStatistics]:
    """Return each layer's statistics from its sums; all zero where every sample of a shard was left out."""
    found = []
    for one, layer_id in zip(sums, layer_ids, strict=True):
        count = max(one.count, 1)
        mean = one.total / count
        found.append(
            LayerStatistics(
                layer_id=layer_id,
                mean=mean,
                std=max(one.squares / count - mean**2, 0.0) ** 0.5,
                max_abs=one.max_abs,
                zeros=one.zeros / count,
            )
        )
    return found


def agree(one: LayerStatistics, other: LayerStatistics) -> bool:
    """Say whether two layers' statistics are the same, up to the order in which they were added."""
    return bool(
        np.allclose([one.std, one.max_abs, one.zeros], [other.std, other.max_abs, other.zeros], rtol=1e-4)
        and abs(one.mean - other.mean) <= 1e-4 * (one.std + abs(one.mean))
    )
