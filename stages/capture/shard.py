"""One shard's features, from the target's forward to a buffer of codes in host memory.

Axes: B rows, S positions, N real tokens of a micro-batch, T token slots, L captured layers, H hidden size.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dflash_offline.schemas.commits import SkippedSample
from dflash_offline.schemas.errors import DflashError
from dflash_offline.schemas.manifest import Layout
from dflash_offline.schemas.samples import SampleTable
from dflash_offline.stages.capture.encode import FeatureEncoder
from dflash_offline.stages.store.feature_ranges import Sums
from dflash_offline.stages.target.model import run_captured

MARKS = ("least", "largest", "storable", "total", "norm", "zeros", "max_abs")
"""What is noted of each real token and layer: two of the target's features, whether they can be stored, and four of
the stored ones, which add up to the layer's statistics."""
_CACHED_BYTES = 1 << 20
"""Of float32 features that a CPU takes through all these steps at once: more leave its cache, and take fresh memory."""
NOT_FINITE, CONSTANT, TOO_LARGE = "a feature is not finite", "the layer is dead", "a feature is too large"


def micro_batches(samples: SampleTable, members: NDArray[np.int64], batch_tokens: int) -> Iterator[NDArray[np.int64]]:
    """Yield a shard's samples in length-sorted groups of at most `batch_tokens` padded tokens (or one sample)."""
    ordered = members[np.argsort(-samples.num_tokens[members], kind="stable")]
    while len(ordered):
        count = max(1, batch_tokens // int(samples.num_tokens[ordered[0]]))
        yield ordered[:count]
        ordered = ordered[count:]


def pad_rows(samples: SampleTable, batch: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the samples' tokens, [B, S], padded on the right with zeros."""
    rows = np.zeros((len(batch), int(samples.num_tokens[batch].max())), np.int64)
    for row, sample in zip(rows, batch.tolist(), strict=True):
        row[: samples.num_tokens[sample]] = samples.input_ids(sample)
    return rows


def spread_out(samples: SampleTable, members: NDArray[np.int64], num_tokens: int) -> NDArray[np.int64]:
    """Return members evenly spread over the plan that hold about `num_tokens` tokens, or all of them."""
    count = int(np.ceil(num_tokens / max(samples.num_tokens[members].mean(), 1)))
    return members[np.unique(np.linspace(0, len(members) - 1, min(count, len(members))).round().astype(np.int64))]


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
        """Make every slot fill that is in none of these ranges, (begin, end) each."""
        end = 0
        for begin, after in [*sorted(slots), (len(self.codes), 0)]:
            self.array[end:begin] = self.fill
            end = after


@dataclass(frozen=True)
class Captured:
    """What is in a shard's buffer."""

    bad: list[SkippedSample]
    """Samples with bad features, whose slots are fill."""
    sums: list[Sums] | None
    """Of each layer's stored features; None where they are too large for float32."""


@dataclass
class Capture:
    """A shard whose forwards are queued; `wait` until its codes are in the buffer."""

    buffer: ShardBuffer
    samples: SampleTable
    layer_ids: list[int]
    marks: list[tuple[NDArray[np.int64], Tensor]]
    """For each micro-batch its samples and, for each real token and layer, `MARKS`: float32 [N, L, 7]."""
    copied: torch.cuda.Event | None

    def wait(self) -> Captured:
        """Wait for the copies, and make every other slot fill, those of samples with bad features too."""
        if self.copied is not None:
            self.copied.synchronize()
        bad: list[SkippedSample] = []
        kept_slots: list[tuple[int, int]] = []
        sums = [Sums()] * len(self.layer_ids)
        for batch, marks in self.marks:
            lengths = self.samples.num_tokens[batch]
            faults = list(self.faults(batch, lengths, marks.numpy(), self.layer_ids))
            sound = ~np.isin(batch, [fault.sample for fault in faults])
            kept = marks.numpy() if sound.all() else marks.numpy()[np.repeat(sound, lengths)]
            sums = list(map(Sums.__add__, sums, _sums(kept, self.buffer.codes.shape[-1])))
            bad += faults
            begins = self.samples.start[batch[sound]] % len(self.buffer.codes)
            kept_slots += zip(begins.tolist(), (begins + lengths[sound]).tolist(), strict=True)
        self.buffer.fill_between(kept_slots)
        finite = all(np.isfinite([one.total, one.squares]).all() for one in sums)
        return Captured(sorted(bad, key=lambda fault: fault.sample), sums if finite else None)

    @staticmethod
    def faults(
        batch: NDArray[np.int64], lengths: NDArray[np.int64], marks: NDArray[np.float32], layer_ids: list[int]
    ) -> Iterator[SkippedSample]:
        """Yield the first fault of every sample that has one."""
        begins = np.cumsum(lengths) - lengths
        least, largest, storable = np.moveaxis(marks[..., :3], -1, 0)
        finite = np.isfinite(least) & np.isfinite(largest)
        constant = np.minimum.reduceat(least, begins) == np.maximum.reduceat(largest, begins)
        suspect = constant | ~np.logical_and.reduceat(finite & (storable == 1), begins)
        for index in np.flatnonzero(suspect.any(axis=1)).tolist():
            tokens = slice(begins[index], begins[index] + lengths[index])
            for reason, is_bad in (
                (NOT_FINITE, ~finite[tokens]),
                (CONSTANT, np.broadcast_to(constant[index], finite[tokens].shape)),
                (TOO_LARGE, storable[tokens] == 0),
            ):
                if is_bad.any():
                    position, layer = (int(axis[0]) for axis in np.nonzero(is_bad))
                    yield SkippedSample(
                        sample=int(batch[index]), reason=reason, layer_id=layer_ids[layer], position=position
                    )
                    break


def _sums(marks: NDArray[np.float32], width: int) -> list[Sums]:
    """Return each layer's sums of the tokens' marks, [N, L, 7]."""
    if not len(marks):
        return [Sums()] * marks.shape[1]
    _, _, _, total, norm, zeros, max_abs = np.moveaxis(marks, -1, 0).astype(np.float64)
    return [
        Sums(
            count=len(marks) * width,
            total=float(total[:, layer].sum()),
            squares=float(np.square(norm[:, layer]).sum()),
            zeros=int(zeros[:, layer].sum()),
            max_abs=float(max_abs[:, layer].max()),
        )
        for layer in range(marks.shape[1])
    ]


class Capturer:
    """Runs the target over samples; on a GPU the copies to the host go on a stream of their own."""

    def __init__(self, model: Any, device: torch.device, layer_ids: list[int], batch_tokens: int) -> None:
        self.model = model
        self.device = device
        self.layer_ids = layer_ids
        self.batch_tokens = batch_tokens
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def buffer(self, layout: Layout, fill: int) -> ShardBuffer:
        """Return a new shard buffer."""
        return ShardBuffer.empty(layout, fill, pinned=self._stream is not None)

    def capture(
        self,
        samples: SampleTable,
        members: NDArray[np.int64],
        encoder: FeatureEncoder,
        buffer: ShardBuffer,
        progress: Callable[[int], None],
    ) -> Capture:
        """Queue the forwards of a shard's samples; the result depends on the plan and the target alone.

        `progress` is called with the tokens of each micro-batch.
        """
        marks = []
        for batch in micro_batches(samples, members, self.batch_tokens):
            codes, found = self.run(samples, batch, encoder)
            marks.append((batch, self._copy(samples, batch, codes, found, buffer)))
            progress(int(samples.num_tokens[batch].sum()))
        copied = None if self._stream is None else self._stream.record_event()
        return Capture(buffer, samples, self.layer_ids, marks, copied)

    @torch.inference_mode()
    def run(self, samples: SampleTable, batch: NDArray[np.int64], encoder: FeatureEncoder) -> tuple[Tensor, Tensor]:
        """Return one micro-batch's codes, int16 [N, L, H], and marks, float32 [N, L, 7]: of the real tokens of its
        samples in order, on the device."""
        rows = torch.from_numpy(pad_rows(samples, batch))
        lengths = samples.num_tokens[batch]
        index = torch.from_numpy(np.flatnonzero(np.arange(rows.shape[1]) < lengths[:, None]))
        real = index.to(self.device)  # before the forward: behind it, the copy would wait for it
        try:
            return self._encoded(run_captured(self.model, rows.to(self.device), self.layer_ids), real, encoder)
        except torch.OutOfMemoryError as error:
            raise DflashError(
                f"{self.device} has too little memory for a forward of {list(rows.shape)} tokens. Lower --batch-tokens "
                f"in a new --out, or spread the target with --device-map auto."
            ) from error

    def _encoded(self, states: list[Tensor], real: Tensor, encoder: FeatureEncoder) -> tuple[Tensor, Tensor]:
        """Return codes and marks of the real tokens, whose places in the states [B, S, H] are given."""
        shape = (len(real), len(states), states[0].shape[-1])
        codes = torch.empty(shape, dtype=torch.int16, device=self.device)
        marks = torch.empty((*shape[:2], len(MARKS)), dtype=torch.float32, device=self.device)
        step = len(real) if self._stream is not None else max(1, _CACHED_BYTES // (4 * shape[-1]))
        for layer, state in enumerate(states):
            here = real.to(state.device)
            for part in (slice(begin, begin + step) for begin in range(0, len(real), step)):
                tokens = state.flatten(0, 1).index_select(0, here[part]).to(self.device)
                codes[part, layer] = encoder.encode(tokens, layer)
                mark(tokens, codes[part, layer], encoder, layer, marks[part, layer])
        return codes, marks

    def _copy(
        self, samples: SampleTable, batch: NDArray[np.int64], codes: Tensor, marks: Tensor, buffer: ShardBuffer
    ) -> Tensor:
        """Copy each sample's codes to its slots; returns the marks in host memory."""
        begins = samples.start[batch] % len(buffer.codes)
        parts = codes.split(samples.num_tokens[batch].tolist())
        if self._stream is None:
            for begin, part in zip(begins.tolist(), parts, strict=True):
                buffer.codes[begin : begin + len(part)] = part
            return marks
        kept = torch.empty(marks.shape, pin_memory=True)
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            for begin, part in zip(begins.tolist(), parts, strict=True):
                buffer.codes[begin : begin + len(part)].copy_(part, non_blocking=True)
            kept.copy_(marks, non_blocking=True)
        for tensor in (codes, marks):  # their memory is the copying stream's until it is done
            tensor.record_stream(self._stream)
        return kept


def mark(tokens: Tensor, codes: Tensor, encoder: FeatureEncoder, layer: int, marks: Tensor) -> None:
    """Fill `marks` [N, 7] with what is to be noted of one layer's features [N, H] and of their codes.

    One reduction for each: on a CPU `aminmax`, `all` and `count_nonzero` take ten times as long as these.
    """
    values = encoder.values(codes, layer)
    least, largest = values.amin(dim=-1), values.amax(dim=-1)  # not finite where a feature could not be stored
    marks[:, 0], marks[:, 1] = tokens.amin(dim=-1), tokens.amax(dim=-1)
    marks[:, 2] = least.isfinite() & largest.isfinite()
    marks[:, 3] = values.sum(dim=-1)
    marks[:, 4] = torch.linalg.vector_norm(values, dim=-1)
    marks[:, 5] = values.shape[-1] - values.sign_().abs_().sum(dim=-1)
    marks[:, 6] = torch.maximum(largest, -least)
