"""One shard's features: the buffer of codes in host memory, and what is known of each token whose code is in it.

Axes: N real tokens of a micro-batch, T token slots, L captured layers, H hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dflash_offline.schemas.commits import SkippedSample
from dflash_offline.schemas.manifest import HIDDEN, Layout
from dflash_offline.schemas.samples import SampleTable, before_supervised
from dflash_offline.stages.capture.bad_features import find_bad
from dflash_offline.stages.capture.encode import FeatureEncoder
from dflash_offline.stages.store.feature_ranges import Sums

TOKEN_STATISTICS = ("least", "largest", "storable", "total", "norm", "zeros", "max_abs")
"""What is computed of each real token and layer: least and largest of the target's features, whether all of them can
be stored, and four numbers of the stored ones, which add up to the layer's statistics."""


def stored_spans(samples: SampleTable, sample: int, array: str) -> list[tuple[int, int]]:
    """Return which positions of a sample an array of features holds, as ranges (begin, end)."""
    if array == HIDDEN:
        return [(0, int(samples.num_tokens[sample]))]
    kept = np.concatenate([[False], before_supervised(samples.loss_mask(sample)), [False]])
    edges: list[list[int]] = np.flatnonzero(kept[1:] != kept[:-1]).reshape(-1, 2).tolist()
    return [(begin, end) for begin, end in edges]


def token_statistics(states: Tensor, codes: Tensor, encoder: FeatureEncoder, layer: int, out: Tensor) -> None:
    """Fill `out` [N, 7] with `TOKEN_STATISTICS` of one layer's states [N, H] and of their codes.

    One reduction for each: on a CPU `aminmax`, `all` and `count_nonzero` take ten times as long as these.
    """
    values = encoder.values(codes, layer)
    least, largest = values.amin(dim=-1), values.amax(dim=-1)  # not finite where a feature could not be stored
    out[:, 0], out[:, 1] = states.amin(dim=-1), states.amax(dim=-1)
    out[:, 2] = least.isfinite() & largest.isfinite()
    out[:, 3] = values.sum(dim=-1)
    out[:, 4] = torch.linalg.vector_norm(values, dim=-1)
    out[:, 5] = values.shape[-1] - values.sign_().abs_().sum(dim=-1)
    out[:, 6] = torch.maximum(largest, -least)


def _layer_sums(statistics: NDArray[np.float32], hidden_size: int) -> list[Sums]:
    """Return each layer's sums of the tokens' statistics, [N, L, 7]."""
    if not len(statistics):
        return [Sums()] * statistics.shape[1]
    _, _, _, total, norm, zeros, max_abs = np.moveaxis(statistics, -1, 0).astype(np.float64)
    return [
        Sums(
            count=len(statistics) * hidden_size,
            total=float(total[:, layer].sum()),
            squares=float(np.square(norm[:, layer]).sum()),
            zeros=int(zeros[:, layer].sum()),
            max_abs=float(max_abs[:, layer].max()),
        )
        for layer in range(statistics.shape[1])
    ]


@dataclass
class ShardBuffer:
    """Room for one shard's codes; pinned where a GPU copies to it."""

    codes: Tensor
    """[T, L, H] int16 that hold uint16 bits."""
    fill: int

    @classmethod
    def empty(cls, layout: Layout, fill: int, *, pinned: bool) -> "ShardBuffer":
        """Return a buffer for the shards of a cache."""
        shape = (layout.shard_tokens, layout.num_layers, layout.hidden_size)
        return cls(torch.empty(shape, dtype=torch.int16, pin_memory=pinned), fill)

    @property
    def array(self) -> NDArray[np.uint16]:
        """The codes as uint16."""
        return self.codes.numpy().view(np.uint16)

    def fill_between(self, slots: list[tuple[int, int]]) -> None:
        """Set every slot to the fill value that is in none of these ranges, (begin, end) each."""
        end = 0
        for begin, after in [*sorted(slots), (len(self.codes), 0)]:
            self.array[end:begin] = self.fill
            end = after


@dataclass(frozen=True)
class Wanted:
    """An array of features that a shard's forwards are to give, its codes in a buffer."""

    array: str
    """`HIDDEN`, the captured layers' states, or `FINAL`, the last state after the final norm."""
    encoder: FeatureEncoder
    buffer: ShardBuffer


@dataclass(frozen=True)
class FilledShard:
    """What the forwards of a shard have left in its buffer."""

    bad: list[SkippedSample]
    """Samples with bad features, whose slots hold the fill value."""
    sums: list[Sums] | None
    """Of each layer's stored features; None where they are too large for float32."""


class Copies(Protocol):
    """What puts codes in a buffer while others work."""

    def synchronize(self) -> None:
        """Wait until all of them are there, and what is known of their tokens; raises what went wrong."""


@dataclass
class QueuedShard:
    """A shard whose forwards are queued; `wait` until its codes are in the buffer."""

    buffer: ShardBuffer
    samples: SampleTable
    layer_ids: list[int]
    batches: list[tuple[NDArray[np.int64], Tensor]]
    """For each micro-batch its samples and the `TOKEN_STATISTICS` of each position and layer that the array holds,
    float32 [N, L, 7]."""
    copied: "Copies | None"
    array: str = HIDDEN

    def wait(self, left_out: Sequence[SkippedSample] = ()) -> FilledShard:
        """Wait for the copies and set every other slot to the fill value, those of samples with bad features too.

        `left_out` are samples that are without features already, whatever they hold here.
        """
        if self.copied is not None:
            self.copied.synchronize()
        bad = list(left_out)
        known = [sample.sample for sample in bad]
        kept_slots: list[tuple[int, int]] = []
        sums = [Sums()] * len(self.layer_ids)
        for batch, tensor in self.batches:
            spans = [stored_spans(self.samples, sample, self.array) for sample in batch.tolist()]
            lengths, statistics = np.array([sum(end - begin for begin, end in of) for of in spans]), tensor.numpy()
            bad += [one for one in self._bad(batch, spans, lengths, statistics) if one.sample not in known]
            sound = ~np.isin(batch, [sample.sample for sample in bad])
            kept = statistics if sound.all() else statistics[np.repeat(sound, lengths)]
            sums = list(map(Sums.__add__, sums, _layer_sums(kept, self.buffer.codes.shape[-1])))
            starts = (self.samples.start[batch] % len(self.buffer.codes)).tolist()
            for start, of_sample, is_sound in zip(starts, spans, sound.tolist(), strict=True):
                kept_slots += [(start + begin, start + end) for begin, end in of_sample if is_sound]
        self.buffer.fill_between(kept_slots)
        finite = all(np.isfinite([layer.total, layer.squares]).all() for layer in sums)
        return FilledShard(sorted(bad, key=lambda sample: sample.sample), sums if finite else None)

    def _bad(
        self,
        batch: NDArray[np.int64],
        spans: list[list[tuple[int, int]]],
        lengths: NDArray[np.int64],
        statistics: NDArray[np.float32],
    ) -> list[SkippedSample]:
        """Return each sample of a micro-batch that has bad features, with its first fault."""
        some = lengths > 0  # a sample whose first token alone is supervised has no final state that anyone reads
        found = find_bad(batch[some], lengths[some], statistics, self.layer_ids) if some.any() else []
        own = dict(zip(batch.tolist(), spans, strict=True))
        return [replace(bad, position=_position(own[bad.sample], bad.position)) for bad in found]


def _position(spans: list[tuple[int, int]], number: int) -> int:
    """Return the position that is the `number`-th of those in the ranges, from 0."""
    return [position for begin, end in spans for position in range(begin, end)][number]
