"""Samples with bad features: how they are found, and whether they are refused or left out, up to a bound.

Axes: N real tokens of a micro-batch, L captured layers.
"""

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from dflash_offline.schemas.commits import SkippedSample
from dflash_offline.schemas.errors import CacheError
from dflash_offline.schemas.locks import locked, touch_lock
from dflash_offline.schemas.manifest import FINAL
from dflash_offline.schemas.samples import SampleTable
from dflash_offline.stages.store.cache import Cache
from dflash_offline.stages.store.leftovers import SKIPPED_LOCK

NOT_FINITE, DEAD_LAYER, TOO_LARGE = "a feature is not finite", "the layer is dead", "a feature is too large"
ALWAYS_ALLOWED = 8
"""Samples that may be left out of any plan unless the share is 0: of a small plan, the share alone would allow none."""
_MOST_OF_SHARD = 0.5
"""Share of one shard's samples that may be bad; beyond it something is wrong with the target, not with samples."""
_SHOWN_SAMPLES = 10
SKIP_HINT = (
    "Check the target's dtype and attention implementation, or leave such samples out, recorded and counted, with "
    "--on-bad-features skip."
)


def find_bad(
    batch: NDArray[np.int64], lengths: NDArray[np.int64], statistics: NDArray[np.float32], layer_ids: list[int]
) -> list[SkippedSample]:
    """Return each sample of a micro-batch that has bad features, with its first fault.

    `statistics` [N, L, 7] are the `TOKEN_STATISTICS` of its tokens, of which `lengths` belong to each sample. A feature
    is bad if it is not finite, or too large for the feature layout; a layer is dead in a sample if all of its features
    over all of the sample's tokens are one number.
    """
    begins = np.cumsum(lengths) - lengths
    least, largest, storable = np.moveaxis(statistics[..., :3], -1, 0)
    finite = np.isfinite(least) & np.isfinite(largest)
    dead = np.minimum.reduceat(least, begins) == np.maximum.reduceat(largest, begins)
    suspect = dead | ~np.logical_and.reduceat(finite & (storable == 1), begins)
    bad = []
    for index in np.flatnonzero(suspect.any(axis=1)).tolist():
        tokens = slice(begins[index], begins[index] + lengths[index])
        for reason, is_bad in (
            (NOT_FINITE, ~finite[tokens]),
            (DEAD_LAYER, np.broadcast_to(dead[index], finite[tokens].shape)),
            (TOO_LARGE, storable[tokens] == 0),
        ):
            if is_bad.any():
                position, layer = (int(axis[0]) for axis in np.nonzero(is_bad))
                sample = int(batch[index])
                bad.append(SkippedSample(sample=sample, reason=reason, layer_id=layer_ids[layer], position=position))
                break
    return bad


class BadFeatures:
    """Decides whether a shard may be written without its samples with bad features.

    The verdict on a whole plan depends on neither the order of its shards nor the number of workers: a shard that is
    bad for the most part is refused whoever runs it, and so is the shard with which too much of the plan is left out.
    """

    def __init__(self, cache: Cache, what_to_do: str, max_skipped: float) -> None:
        """`what_to_do` is refuse or skip; `max_skipped` the share of the plan's samples that may be left out."""
        self._cache = cache
        is_final = cache.array == FINAL
        self._unwritten = "its final states were not written" if is_final else "nothing of it was written"
        self._skips = what_to_do == "skip"
        self._max_skipped = max_skipped
        self._counted: dict[int, list[SkippedSample]] = {}
        """Samples that the records of finished shards leave out, by shard; each record is read once."""

    def commit(self, shard: int, bad: Sequence[SkippedSample], write: Callable[[], int]) -> int:
        """Call `write`, which records the shard, if its bad samples may be left out; returns the bytes it wrote.

        Shards with bad samples are counted and recorded one at a time, under a lock, so that no two workers use up the
        same allowance. Where locks do not reach, two may: each counts again after its record, and removes the record
        if too many are left out.
        """
        if not bad:
            return write()
        lock = self._cache.path / SKIPPED_LOCK
        touch_lock(lock)
        with locked(lock, wait=True):
            self.check(shard, bad)
            size = write()
            try:
                self.check(shard, bad)
            except CacheError:
                if size:  # else the record is another worker's
                    self._cache.forget(shard)
                raise
        return size

    def check(self, shard: int, bad: Sequence[SkippedSample]) -> None:
        """Raise `CacheError` unless the shard's bad samples may be left out."""
        if not bad:
            return
        samples = self._cache.samples
        if not self._skips:
            raise CacheError(
                f"The target gives bad features for {len(bad)} samples of shard {shard}; {self._unwritten}:"
                f"{listed(bad, samples)}\n{SKIP_HINT}"
            )
        members = len(samples.samples_of_shard(shard))
        if len(bad) > max(ALWAYS_ALLOWED, max(_MOST_OF_SHARD, self._max_skipped) * members):
            raise CacheError(
                f"The target gives bad features for {len(bad)} of the {members} samples of shard {shard}; "
                f"{self._unwritten}:{_by_reason(bad)}{listed(bad, samples)}\nThat is the target's fault, not the "
                f"samples': check its dtype and attention implementation. --max-skipped 1 would allow it."
            )
        for other in range(self._cache.layout.num_shards):
            if other != shard and other not in self._counted and (commit := self._cache.finished(other)):
                self._counted[other] = commit.skipped
        refuse_too_many(
            [*(sample for skipped in self._counted.values() for sample in skipped), *bad], samples, self._max_skipped
        )


def refuse_too_many(skipped: Sequence[SkippedSample], samples: SampleTable, max_skipped: float) -> None:
    """Raise `CacheError` if more samples are left out than the share `max_skipped` of the plan's, and than a few."""
    allowed = max(ALWAYS_ALLOWED, int(max_skipped * len(samples))) if max_skipped else 0
    if len(skipped) > allowed:
        raise CacheError(
            f"The target gives bad features for {len(skipped)} of {len(samples):,} samples so far, and at most "
            f"{allowed:,} ({max_skipped:.1%}) may be left out:{_by_reason(skipped)}{listed(skipped, samples)}\n"
            f"Check the target's dtype and attention implementation; --max-skipped allows another share."
        )


def skipped_place(bad: SkippedSample, samples: SampleTable) -> str:
    """Return where a sample is and what is wrong with its features."""
    return f"{samples.place(bad.sample)}: {bad.reason} at layer {bad.layer_id}, position {bad.position}"


def listed(bad: Sequence[SkippedSample], samples: SampleTable) -> str:
    """Return a line for each of the first bad samples, and one that says how many more there are."""
    lines = "".join(f"\n  {skipped_place(sample, samples)}" for sample in bad[:_SHOWN_SAMPLES])
    more = f"\n  and {len(bad) - _SHOWN_SAMPLES} more" if len(bad) > _SHOWN_SAMPLES else ""
    return lines + more


def _by_reason(bad: Sequence[SkippedSample]) -> str:
    counts = Counter((sample.reason, sample.layer_id) for sample in bad).most_common()
    lines = [f"\n  {count:,} samples: {reason}, first at layer {layer}" for (reason, layer), count in counts]
    return "".join(lines[:_SHOWN_SAMPLES])
