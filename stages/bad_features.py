"""What becomes of samples whose features the target spoils: refused, or left out up to a bound."""

from collections import Counter
from collections.abc import Sequence

from dflash_offline.schemas.commits import SkippedSample
from dflash_offline.schemas.errors import CacheError
from dflash_offline.schemas.samples import SampleTable
from dflash_offline.stages.writer import ShardWriter

ALWAYS_ALLOWED = 8
"""Samples that may be left out of any plan: a share of a small one would be none."""
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

    def check(self, shard: int, bad: Sequence[SkippedSample]) -> None:
        """Raise `CacheError` unless the shard may be written without its bad samples."""
        if not bad:
            return
        samples = self._writer.samples
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
        for other in range(self._writer.manifest.layout.num_shards):
            if other != shard and other not in self._counted and (commit := self._writer.finished(other)):
                self._counted[other] = commit.skipped
        refuse_too_many(
            [*(one for skipped in self._counted.values() for one in skipped), *bad], samples, self._max_skipped
        )


def refuse_too_many(skipped: Sequence[SkippedSample], samples: SampleTable, max_skipped: float) -> None:
    """Raise `CacheError` if more of a plan's samples are left out than `max_skipped` of them, and than a few."""
    if len(skipped) > max(ALWAYS_ALLOWED, max_skipped * len(samples)):
        raise CacheError(
            f"The target gives bad features for {len(skipped)} of {len(samples):,} samples so far, and at most "
            f"{max_skipped:.1%} may be left out:{_by_reason(skipped)}{listed(skipped, samples)}\nCheck the target's "
            f"dtype and attention implementation; --max-skipped allows another share."
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
