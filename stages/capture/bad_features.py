"""What becomes of samples whose features the target spoils: refused, or left out up to a bound."""

from collections import Counter
from collections.abc import Callable, Sequence

from dflash_offline.schemas.commits import SkippedSample, commit_path
from dflash_offline.schemas.errors import CacheError
from dflash_offline.schemas.locks import locked
from dflash_offline.schemas.samples import SampleTable
from dflash_offline.stages.store.leftovers import SKIPPED_LOCK
from dflash_offline.stages.store.writer import ShardWriter

ALWAYS_ALLOWED = 8
"""Samples that any share but 0 lets be left out: of a small plan it would be none."""
_MOST_OF_SHARD = 0.5
"""Share of one shard's samples; beyond it something is wrong with the target, not with samples."""
_SHOWN_SAMPLES = 10
SKIP_HINT = (
    "Check the target's dtype and attention implementation, or leave such samples out, recorded and counted, with "
    "--on-bad-features skip."
)


class BadFeatures:
    """Decides of each shard whether it may be written without the samples that are bad in it.

    The verdict on a whole plan depends on neither the order of its shards nor the number of workers: a shard that is
    bad for the most part is refused whoever does it, and so is the one with which too much of the plan is left out.
    """

    def __init__(self, writer: ShardWriter, what_to_do: str, max_skipped: float) -> None:
        """`what_to_do` is refuse or skip; `max_skipped` the share of the plan's samples that may be left out."""
        self._writer = writer
        self._skips = what_to_do == "skip"
        self._max_skipped = max_skipped
        self._counted: dict[int, list[SkippedSample]] = {}
        """What the records of finished shards leave out, read once each."""

    def commit(self, shard: int, bad: Sequence[SkippedSample], write: Callable[[], int]) -> int:
        """Have `write` record the shard if it may be without its bad samples, and return the bytes it wrote.

        Shards with bad samples are counted and recorded one at a time, so that no two workers take the same room.
        Where locks do not reach, two may: each counts again after its record, and takes it back if that is too many.
        """
        if not bad:
            return write()
        lock = self._writer.cache.path / SKIPPED_LOCK
        lock.touch()
        with locked(lock, wait=True):
            self.check(shard, bad)
            size = write()
            try:
                self.check(shard, bad)
            except CacheError:
                if size:  # else the record is another worker's
                    commit_path(self._writer.cache.path, shard).unlink(missing_ok=True)
                raise
        return size

    def check(self, shard: int, bad: Sequence[SkippedSample]) -> None:
        """Raise `CacheError` unless the shard may be written without its bad samples."""
        if not bad:
            return
        samples = self._writer.cache.samples
        if not self._skips:
            raise CacheError(
                f"The target gives bad features for {len(bad)} samples of shard {shard}; nothing of it was written:"
                f"{listed(bad, samples)}\n{SKIP_HINT}"
            )
        members = len(samples.samples_of_shard(shard))
        if len(bad) > max(ALWAYS_ALLOWED, max(_MOST_OF_SHARD, self._max_skipped) * members):
            raise CacheError(
                f"The target gives bad features for {len(bad)} of the {members} samples of shard {shard}; nothing of "
                f"it was written:{_by_reason(bad)}{listed(bad, samples)}\nThat is the target's fault, not the "
                f"samples': check its dtype and attention implementation. --max-skipped 1 would allow it."
            )
        for other in range(self._writer.cache.layout.num_shards):
            if other != shard and other not in self._counted and (commit := self._writer.cache.finished(other)):
                self._counted[other] = commit.skipped
        refuse_too_many(
            [*(one for skipped in self._counted.values() for one in skipped), *bad], samples, self._max_skipped
        )


def refuse_too_many(skipped: Sequence[SkippedSample], samples: SampleTable, max_skipped: float) -> None:
    """Raise `CacheError` if more of a plan's samples are left out than `max_skipped` of them, or than a few."""
    allowed = max(ALWAYS_ALLOWED, int(max_skipped * len(samples))) if max_skipped else 0
    if len(skipped) > allowed:
        raise CacheError(
            f"The target gives bad features for {len(skipped)} of {len(samples):,} samples so far, and at most "
            f"{allowed:,} ({max_skipped:.1%}) may be left out:{_by_reason(skipped)}{listed(skipped, samples)}\n"
            f"Check the target's dtype and attention implementation; --max-skipped allows another share."
        )


def skipped_place(one: SkippedSample, samples: SampleTable) -> str:
    """Return where a sample is and what is wrong with its features."""
    return f"{samples.place(one.sample)}: {one.reason} at layer {one.layer_id}, position {one.position}"


def listed(bad: Sequence[SkippedSample], samples: SampleTable) -> str:
    """Return a line for each of the first bad samples, with how many more there are."""
    lines = "".join(f"\n  {skipped_place(one, samples)}" for one in bad[:_SHOWN_SAMPLES])
    more = f"\n  and {len(bad) - _SHOWN_SAMPLES} more" if len(bad) > _SHOWN_SAMPLES else ""
    return lines + more


def _by_reason(bad: Sequence[SkippedSample]) -> str:
    counts = Counter((one.reason, one.layer_id) for one in bad).most_common()
    lines = [f"\n  {count:,} samples: {reason}, first at layer {layer}" for (reason, layer), count in counts]
    return "".join(lines[:_SHOWN_SAMPLES])
