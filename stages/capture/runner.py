"""The target's forwards over samples: micro-batches within the token budget, to codes in a shard's buffer.

Axes: B sequences, S positions, N real tokens of a micro-batch, T token slots, L captured layers, H hidden size.
"""

import gc
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dflash_offline.schemas.errors import DflashError
from dflash_offline.schemas.identity import differences, refuse_differences
from dflash_offline.schemas.manifest import FINAL, HIDDEN, Layout, is_by_length, is_compiled
from dflash_offline.schemas.samples import SampleTable
from dflash_offline.schemas.settings.extract import ExtractConfig
from dflash_offline.stages.capture.encode import FeatureEncoder
from dflash_offline.stages.capture.inputs import ChosenTarget, target_identity
from dflash_offline.stages.capture.shard import (
    TOKEN_STATISTICS,
    QueuedShard,
    ShardBuffer,
    Wanted,
    stored_spans,
    token_statistics,
)
from dflash_offline.stages.progress import Progress
from dflash_offline.stages.target.compiled import compile_layers
from dflash_offline.stages.target.model import (
    decoder_layers,
    embedding_tensors,
    layer_and_final_states,
    layer_states,
    load_as_configured,
)

_FORWARD_TOKENS = 512
"""What a forward costs whatever it holds, in tokens."""
_CACHED_BYTES = 1 << 20
"""Float32 features that a CPU encodes and measures at once: more of them leave its cache and take fresh memory."""


def micro_batches(
    samples: SampleTable, members: NDArray[np.int64], batch_tokens: int, *, least: bool
) -> list[NDArray[np.int64]]:
    """Return samples in length-sorted groups within the token budget of a forward: `batch_tokens` padded tokens.

    A sample that is longer than the budget makes a group of its own. With `least` the groups are those of the least
    work, padding included, so that a larger budget never makes more of it; without, each is as large as it can be.
    """
    ordered = members[np.argsort(-samples.num_tokens[members], kind="stable")]
    lengths = samples.num_tokens[ordered]
    most = np.maximum(batch_tokens // lengths, 1)
    ends = _least_work(lengths, most) if least else _largest(most)
    return np.split(ordered, ends[:-1])


def _largest(most: NDArray[np.int64]) -> list[int]:
    """Return where each group ends, given how many samples a group may have that begins with each."""
    ends = [0]
    while ends[-1] < len(most):
        ends.append(min(ends[-1] + int(most[ends[-1]]), len(most)))
    return ends[1:]


def _least_work(lengths: NDArray[np.int64], most: NDArray[np.int64]) -> list[int]:
    """Return where the groups of the least work end: padded tokens, and `_FORWARD_TOKENS` for each group."""
    count = len(lengths)
    work = np.full(count + 1, np.iinfo(np.int64).max)
    begin, work[0] = np.zeros(count + 1, np.int64), 0
    for first in range(count):
        after = slice(first + 1, min(first + int(most[first]), count) + 1)
        with_this = work[first] + _FORWARD_TOKENS + lengths[first] * np.arange(1, after.stop - first)
        better = with_this < work[after]
        work[after][better] = with_this[better]
        begin[after][better] = first
    ends = [count] if count else []
    while ends and begin[ends[-1]]:
        ends.append(int(begin[ends[-1]]))
    return ends[::-1]


def pad_sequences(samples: SampleTable, batch: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the samples' tokens, [B, S], padded on the right with zeros."""
    padded = np.zeros((len(batch), int(samples.num_tokens[batch].max())), np.int64)
    for sequence, sample in zip(padded, batch.tolist(), strict=True):
        sequence[: samples.num_tokens[sample]] = samples.input_ids(sample)
    return padded


def _stored_places(samples: SampleTable, batch: NDArray[np.int64], width: int, array: str) -> NDArray[np.int64]:
    """Return which places of a batch's padded tokens, [B * width], an array holds, in order."""
    return np.concatenate(
        [
            np.arange(row * width + begin, row * width + end)
            for row, sample in enumerate(batch.tolist())
            for begin, end in stored_spans(samples, sample, array)
        ]
        or [np.empty(0, np.int64)]
    )


def spread_out(samples: SampleTable, members: NDArray[np.int64], num_tokens: int) -> NDArray[np.int64]:
    """Return members evenly spread over the plan that hold about `num_tokens` tokens, or all of them."""
    count = int(np.ceil(num_tokens / max(samples.num_tokens[members].mean(), 1)))
    return members[evenly_spaced(len(members), count)]


def evenly_spaced(num_places: int, most: int) -> NDArray[np.int64]:
    """Return up to `most` of so many places, ascending, from the first to the last."""
    return np.unique(np.linspace(0, num_places - 1, min(most, num_places)).round().astype(np.int64))


@torch.inference_mode()
def encode_states(
    states: Sequence[Tensor], real: Tensor, encoder: FeatureEncoder, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return codes, int16 [N, L, H], and `TOKEN_STATISTICS`, float32 [N, L, 7], of each layer's states, [B, S, H].

    `real` are the places of the real tokens in the states; both results lie on `device`.
    """
    shape = (len(real), len(states), states[0].shape[-1])
    codes = torch.empty(shape, dtype=torch.int16, device=device)
    statistics = torch.empty((*shape[:2], len(TOKEN_STATISTICS)), dtype=torch.float32, device=device)
    step = max(1, len(real) if device.type == "cuda" else _CACHED_BYTES // (4 * shape[-1]))
    for layer, state in enumerate(states):
        here = real.to(state.device)
        for part in (slice(begin, begin + step) for begin in range(0, len(real), step)):
            tokens = state.flatten(0, 1).index_select(0, here[part]).to(device)
            codes[part, layer] = encoder.encode(tokens, layer)
            token_statistics(tokens, codes[part, layer], encoder, layer, statistics[part, layer])
    return codes, statistics


class TargetRunner:
    """Runs the target by transformers; on a GPU the copies to the host go on a stream of their own."""

    def __init__(
        self, model: Any, device: torch.device, layer_ids: list[int], batch_tokens: int, *, by_length: bool = True
    ) -> None:
        """`by_length` is false for a cache of an older version, whose forwards were made up otherwise."""
        self.model = model
        self.device = device
        self.layer_ids = layer_ids
        self.batch_tokens = batch_tokens
        self.by_length = by_length
        # On a CPU forward and encoder share cores, so they take turns.
        self.num_buffers = 1 if device.type == "cpu" else 2
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def embeddings(self) -> dict[str, Tensor]:
        """Return the target's embedding table, and its head unless it is the same, where they lie."""
        return embedding_tensors(self.model)

    def start(self, samples: SampleTable, progress: Progress) -> None:
        """Be ready at once: the target is loaded."""

    def close(self) -> None:
        """Drop the target, and give back its memory so that other processes can have it."""
        self.model = None
        free_dropped_memory(self.device)

    def batches(self, samples: SampleTable, members: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """Return the micro-batches that the samples are run in."""
        return micro_batches(samples, members, self.batch_tokens, least=self.by_length)

    def buffer(self, layout: Layout, fill: int) -> ShardBuffer:
        """Return a new shard buffer."""
        return ShardBuffer.empty(layout, fill, pinned=self._stream is not None)

    def run_shard(
        self,
        samples: SampleTable,
        members: NDArray[np.int64],
        wanted: Sequence[Wanted],
        progress: Callable[[int], None],
    ) -> list[QueuedShard]:
        """Queue the forwards of a shard's samples; the results depend on the plan and the target alone.

        Returns a queued shard for each array that is wanted. `progress` is called with the tokens of each micro-batch.
        """
        batches: dict[str, list[tuple[NDArray[np.int64], Tensor]]] = {one.array: [] for one in wanted}
        encoders = {one.array: one.encoder for one in wanted}
        for batch in self.batches(samples, members):
            found = self.run_batch(samples, batch, encoders)
            for one in wanted:
                copied = self._copy(samples, batch, *found[one.array], one)
                batches[one.array].append((batch, copied))
            progress(int(samples.num_tokens[batch].sum()))
        event = None
        if self._stream is not None:  # who waits for it leaves its core to others meanwhile
            event = self._stream.record_event(torch.cuda.Event(blocking=True))
        return [
            QueuedShard(one.buffer, samples, self._ids(one.array), batches[one.array], event, one.array)
            for one in wanted
        ]

    def _ids(self, array: str) -> list[int]:
        """Return the ids of the layers that an array holds."""
        return self.layer_ids if array == HIDDEN else [len(decoder_layers(self.model)) - 1]

    @torch.inference_mode()
    def run_batch(
        self, samples: SampleTable, batch: NDArray[np.int64], encoders: Mapping[str, FeatureEncoder]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Return codes, int16 [N, L, H], and `TOKEN_STATISTICS`, float32 [N, L, 7], of each array that has an encoder.

        They are of one micro-batch and one forward, lie on the device, and hold the positions of its samples that the
        array keeps, in order.
        """
        padded = pad_sequences(samples, batch)
        try:
            ids = self._on_device(padded)
            places = {
                array: self._on_device(_stored_places(samples, batch, padded.shape[1], array)) for array in encoders
            }
            if FINAL in encoders:
                taps, final = layer_and_final_states(self.model, ids, self.layer_ids if HIDDEN in encoders else [])
            else:
                taps, final = layer_states(self.model, ids, self.layer_ids), ids
            return {
                array: encode_states(taps if array == HIDDEN else [final], places[array], encoder, self.device)
                for array, encoder in encoders.items()
            }
        except torch.OutOfMemoryError as error:
            raise DflashError(
                f"{self.device} has too little memory for a forward of {list(padded.shape)} tokens. Lower "
                f"--batch-tokens in a new --out, or spread the target with --device-map auto."
            ) from error

    def _on_device(self, values: NDArray[np.int64]) -> Tensor:
        """Return values where the target is; their copy to a GPU waits for nothing that runs there."""
        tensor = torch.from_numpy(values)
        return tensor if self._stream is None else tensor.pin_memory().to(self.device, non_blocking=True)

    def _copy(
        self, samples: SampleTable, batch: NDArray[np.int64], codes: Tensor, statistics: Tensor, wanted: Wanted
    ) -> Tensor:
        """Copy each sample's codes to its slots; returns the statistics in host memory."""
        buffer = wanted.buffer
        begins, lengths = list[int](), list[int]()
        for sample in batch.tolist():
            start = int(samples.start[sample]) % len(buffer.codes)
            for begin, end in stored_spans(samples, sample, wanted.array):
                begins.append(start + begin)
                lengths.append(end - begin)
        parts = codes.split(lengths)
        if self._stream is None:
            for begin, part in zip(begins, parts, strict=True):
                buffer.codes[begin : begin + len(part)] = part
            return statistics
        kept = torch.empty(statistics.shape, pin_memory=True)
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            for begin, part in zip(begins, parts, strict=True):
                buffer.codes[begin : begin + len(part)].copy_(part, non_blocking=True)
            kept.copy_(statistics, non_blocking=True)
        for tensor in (codes, statistics):  # their memory is the copying stream's until it is done
            tensor.record_stream(self._stream)
        return kept


def load_runner(
    config: ExtractConfig, target: ChosenTarget, identity: dict[str, Any], progress: Progress
) -> TargetRunner:
    """Return the target, loaded and checked to be one that a draft can be served with.

    Raises `MismatchError` if its files are no longer those of the cache's `identity`, which were hashed before.
    """
    model = load_unchanged(config, target, identity, target.device, progress)
    layer_ids, by_length = list(target.layer_ids), is_by_length(identity)
    if is_compiled(identity):
        progress.say("Compiling its layers.")
        deepest = [target.files.num_layers - 1] if config.final else layer_ids
        compile_layers(model, target.files, deepest, config.max_length)
    return TargetRunner(model, target.device, layer_ids, config.batch_tokens, by_length=by_length)


def load_unchanged(
    config: ExtractConfig, target: ChosenTarget, identity: dict[str, Any], device: torch.device, progress: Progress
) -> Any:
    """Return transformers' model of the target on `device`, checked to be one that a draft can be served with.

    Raises `MismatchError` if its files are no longer those of the cache's `identity`, which were hashed before.
    """
    model = load_as_configured(target.files, config, target.dtype, device, progress)
    refuse_changed_target(config, target, identity)
    return model


def refuse_changed_target(config: ExtractConfig, target: ChosenTarget, identity: dict[str, Any]) -> None:
    """Raise `MismatchError` if the target's files are no longer those of a cache's `identity`."""
    refuse_differences(
        f"{target.files.folder} changed while the target was loaded from it",
        differences(identity["target"], target_identity(config, target)),
        ("before", "now"),
        "Repeat the command when nobody writes there any more.",
    )


def free_dropped_memory(device: torch.device) -> None:
    """Give back the memory of a target that nothing refers to any more, so that other processes can have it."""
    gc.collect()  # hooks of a quantized target hold their modules, which hold them
    if device.type == "cuda":
        torch.cuda.empty_cache()
