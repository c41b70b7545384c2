"""The features of a cache compared with those of its target, which is run again on some samples.

Axes: T tokens, L captured layers, H hidden size.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from dflash_offline.schemas.errors import CacheError
from dflash_offline.schemas.identity import refuse_other_identity
from dflash_offline.schemas.manifest import FINAL, HIDDEN
from dflash_offline.schemas.settings.engine import TRANSFORMERS
from dflash_offline.schemas.settings.verify import RerunConfig
from dflash_offline.stages.capture.engines.installed import engine_identity, quantizes
from dflash_offline.stages.progress import Progress
from dflash_offline.stages.store.cache import Cache
from dflash_offline.stages.target.files import TargetFiles, open_target
from dflash_offline.stages.target.model import choose_device, layer_and_final_states, layer_states, load_model

LARGEST_ERROR, LARGEST_CHANNEL_ERROR = 0.02, 0.05
"""Errors of one layer, over all tokens together and of the median channel, that rounding to bfloat16 and another
machine's arithmetic may explain. Rounding alone gives 0.002 of either. Another attention kernel in bfloat16 gave the
median channel 0.005 after one layer and 0.008 after eight, and the error grows with the layers."""
QUANTIZED_ERROR, QUANTIZED_CHANNEL_ERROR = 0.25, 0.5
"""The same of an engine that quantized the target as it loaded it, which transformers does not: a bound against another
layer or another text, not against poor numbers."""
_UNQUANTIZED = {"quantization": None, "kv_cache_dtype": "auto"}
"""What an engine's part of an identity says where it quantizes nothing."""
Rerun = tuple[list[NDArray[np.float32]], NDArray[np.float32] | None]
"""A sample's states as the target gives them again, [T, H] for each layer, and its final states, [T, H]."""


@dataclass(frozen=True, kw_only=True)
class ChosenSamples:
    """Samples of a cache whose states the target is to give again."""

    cache: Cache
    rerun: RerunConfig
    files: TargetFiles
    """The target's."""
    device: torch.device
    layer_ids: list[int]
    """Layers whose states are compared."""
    samples: list[int]
    with_final: set[int]
    """Samples whose final states are compared too."""

    @property
    def dtype(self) -> torch.dtype:
        """The target's, as the cache was made."""
        dtype: torch.dtype = getattr(torch, self.cache.manifest.identity["target"]["dtype"])
        return dtype

    def input_ids(self, sample: int) -> list[int]:
        """Return a sample's tokens."""
        ids: list[int] = self.cache.samples.input_ids(sample).tolist()
        return ids


@dataclass(frozen=True, kw_only=True)
class LayerFit:
    """How one stored layer compares with the target run again on the samples drawn.

    The error of all tokens together is that of the largest tokens: a first token a thousand times the rest hides any
    error of the rest. So a layer is also judged by its channels, over all tokens but each sample's first, each channel
    in its own standard deviations. The median channel counts and the worst is only reported: rounding alone moves a
    channel that hardly varies around a large mean by much of its deviation.
    """

    layer_id: int
    error: float
    """Relative L2 error."""
    channel_error: float
    """Root mean square error of a channel over its standard deviation: the median channel. NaN where no channel varies
    over the tokens drawn: then the plain error alone judges."""
    worst_channel_error: float
    best_layer_id: int
    """Which of this layer and its neighbours has the channels that fit best."""
    best_channel_error: float
    is_finite: bool
    """Whether the target run again gave features that the layer can be compared with."""
    largest_error: float = LARGEST_ERROR
    """What arithmetic and the feature layout may explain of `error`."""
    largest_channel_error: float = LARGEST_CHANNEL_ERROR
    array: str = HIDDEN
    """Of the final states, `FINAL`: they are compared with the target's own alone, where they are kept."""

    @property
    def name(self) -> str:
        """What is compared, as messages name it."""
        return f"layer {self.layer_id}" if self.array == HIDDEN else "the final state"

    @property
    def fault(self) -> str:
        """What is wrong with the layer, or an empty string."""
        if not self.is_finite:
            return (
                f"{self.name} cannot be compared: the target run again gives features that are not finite. "
                f"Run it on another --device or with another --attn-implementation"
            )
        if self.best_layer_id != self.layer_id and self.best_channel_error <= self.largest_channel_error:
            return (
                f"{self.name} is off by {self.best_layer_id - self.layer_id:+d}: the target's layer "
                f"{self.best_layer_id} fits better (error of the median channel {self.best_channel_error:.2%} against "
                f"{self.channel_error:.2%})"
            )
        if not self.error <= self.largest_error or self.channel_error > self.largest_channel_error:
            channels = (
                f", its median channel by {self.channel_error:.2%} of the channel's standard deviation (at most "
                f"{self.largest_channel_error:.1%})"
            )
            return (
                f"{self.name} differs from the target's by {self.error:.2%} (expected at most "
                f"{self.largest_error:.1%}){'' if math.isnan(self.channel_error) else channels}"
            )
        return ""


class _Difference:
    """Difference of a stored layer from one of the target's layers, added up sample by sample."""

    def __init__(self, hidden_size: int) -> None:
        self._squares = self._norm = 0.0
        self.count = self._count = 0
        """Tokens, and those but each sample's first."""
        self._by_channel, self._total, self._total_squares = np.zeros((3, hidden_size))

    def add(self, stored: NDArray[np.float32], state: NDArray[np.float32]) -> None:
        """Add a sample's features, [T, H] each; one that is not finite makes both errors NaN or infinite."""
        with np.errstate(over="ignore", invalid="ignore"):
            difference, squares = np.square(stored - state), np.square(state, dtype=np.float64)
            self._squares += float(difference.sum(dtype=np.float64))
            self._norm += float(squares.sum())
            self.count += len(state)
            self._count += max(len(state) - 1, 0)
            self._by_channel += difference[1:].sum(axis=0, dtype=np.float64)
            self._total += state[1:].sum(axis=0, dtype=np.float64)
            self._total_squares += squares[1:].sum(axis=0)

    def is_finite(self) -> bool:
        """Say whether all of the target's states were finite."""
        return math.isfinite(self._norm)

    def error(self) -> float:
        """Return the relative L2 error of all tokens together."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return float(np.sqrt(np.float64(self._squares) / self._norm))

    def channel_errors(self) -> NDArray[np.float64]:
        """Return each channel's error over its standard deviation, [H].

        Of a channel that never varies it is 0 or infinite. All are NaN where no channel varies, as over one token.
        """
        count = max(self._count, 1)
        with np.errstate(divide="ignore", invalid="ignore"):
            variance = np.maximum(self._total_squares / count - np.square(self._total / count), 0)
            errors = np.sqrt(self._by_channel / count / variance)
        if not variance.any():
            return np.full_like(errors, np.nan)
        return np.where(self._by_channel == 0, 0.0, errors)


class LayerComparison:
    """Each captured layer beside the target's, and beside the target's layers before and after it, sample by sample.

    A draft trained on layers that are off by one shows no fault in training and is served badly.
    """

    def __init__(self, layer_ids: Sequence[int], num_layers: int, hidden_size: int) -> None:
        self._made_of = (layer_ids, num_layers, hidden_size)
        self._by_layer = {
            layer: {near: _Difference(hidden_size) for near in range(max(layer - 1, 0), min(layer + 2, num_layers))}
            for layer in layer_ids
        }
        self.around = sorted({near for differences in self._by_layer.values() for near in differences})
        """Ids of the target's layers that are compared, in order."""

    def add(self, stored: NDArray[np.float32], states: Sequence[NDArray[np.float32]]) -> None:
        """Add a sample: its captured features [T, L, H], and the target's own of the layers `around`, [T, H] each."""
        for column, differences in enumerate(self._by_layer.values()):
            for near, difference in differences.items():
                difference.add(stored[:, column], states[self.around.index(near)])

    def anew(self) -> "LayerComparison":
        """Return one of the same layers without samples."""
        return LayerComparison(*self._made_of)

    def fits(self, largest_error: float, largest_channel_error: float) -> list[LayerFit]:
        """Return how each captured layer compares, with what may be explained of either error."""
        return [
            _fit(layer, differences, largest_error, largest_channel_error)
            for layer, differences in self._by_layer.items()
        ]


class FinalComparison:
    """The final states beside the target's own, sample by sample."""

    def __init__(self, last_layer: int, hidden_size: int) -> None:
        self._last_layer, self._difference = last_layer, _Difference(hidden_size)

    def add(self, stored: NDArray[np.float32], states: NDArray[np.float32]) -> None:
        """Add some positions of a sample: its final states and the target's own, [T, H] each."""
        self._difference.add(stored, states)

    def fits(self, largest_error: float, largest_channel_error: float) -> list[LayerFit]:
        """Return how they compare, with what may be explained of either error; of no position, nothing."""
        if not self._difference.count:
            return []
        differences = {self._last_layer: self._difference}
        return [replace(_fit(self._last_layer, differences, largest_error, largest_channel_error), array=FINAL)]


def compare_with_target(path: Path, rerun: RerunConfig, progress: Progress) -> list[LayerFit]:
    """Run the target again on samples drawn by seed and return how each stored layer compares.

    Raises `MismatchError` if the target is not the cache's.
    """
    cache = Cache.open(path)
    finished = cache.usable()
    if not len(finished):
        raise CacheError(f"{path} has no finished shard to compare with the target. Let `dflash extract` finish one.")
    device, files = choose_device(rerun.device), _open_recorded(cache, rerun)
    comparison = LayerComparison(cache.layer_ids, files.num_layers, cache.layout.hidden_size)
    final, of_final = cache.final, FinalComparison(files.num_layers - 1, cache.layout.hidden_size)
    drawn = np.sort(
        np.random.default_rng(rerun.seed).choice(finished, min(rerun.samples, len(finished)), replace=False)
    )
    with_final = set[int]() if final is None else {*final.usable().tolist()} & {*drawn.tolist()}
    made = cache.manifest.identity.get("engine", {})
    is_quantized = quantizes(made)
    run = _by_transformers
    if rerun.engine != TRANSFORMERS:
        from dflash_offline.stages.capture.engines.rerun import as_made, rerun_states

        rerun = as_made(rerun, cache)
        own = engine_identity(rerun)["engine"]
        # Where both quantize alike they differ by arithmetic alone.
        is_alike = all(own.get(name, unset) == made.get(name, unset) for name, unset in _UNQUANTIZED.items())
        is_quantized = not is_alike and (quantizes(made) or quantizes(own))
        run = rerun_states
    chosen = ChosenSamples(
        cache=cache,
        rerun=rerun,
        files=files,
        device=device,
        layer_ids=comparison.around,
        samples=drawn.tolist(),
        with_final=with_final,
    )
    with run(chosen, progress) as reruns:
        progress.start("Running the target", len(drawn), "samples")
        for sample, (states, final_state) in zip(chosen.samples, reruns, strict=True):
            if final is not None and final_state is not None:
                kept = final.stored(sample)
                of_final.add(final.values(sample)[kept, 0], final_state[kept])
            comparison.add(cache.values(sample), states)
            progress.advance(1)
        progress.finish()
    expected_error = cache.layout.features.expected_error
    error, channel_error = LARGEST_ERROR, LARGEST_CHANNEL_ERROR
    if is_quantized:
        error, channel_error = QUANTIZED_ERROR, QUANTIZED_CHANNEL_ERROR
    fits = comparison.fits(error + expected_error, channel_error + expected_error)
    own_error = 0.0 if final is None else final.layout.features.expected_error
    return fits + of_final.fits(error + own_error, channel_error + own_error)


@contextmanager
def _by_transformers(chosen: ChosenSamples, progress: Progress) -> Iterator[Iterator[Rerun]]:
    """Give what yields each sample's states."""
    rerun, recorded = chosen.rerun, chosen.cache.manifest.identity["target"]
    model = load_model(
        chosen.files,
        dtype=chosen.dtype,
        device=chosen.device,
        attn_implementation=rerun.attn_implementation or recorded["attn_implementation"],
        device_map=rerun.device_map or recorded["device_map"],
        trust_remote_code=rerun.trust_remote_code,
        progress=progress,
    )

    def states() -> Iterator[Rerun]:
        for sample in chosen.samples:
            ids = torch.tensor([chosen.input_ids(sample)], device=chosen.device)
            if sample in chosen.with_final:
                found, after_norm = layer_and_final_states(model, ids, chosen.layer_ids)
                final = after_norm[0].float().cpu().numpy()
            else:
                found, final = layer_states(model, ids, chosen.layer_ids), None
            yield [state[0].float().cpu().numpy() for state in found], final

    yield states()


def _open_recorded(cache: Cache, rerun: RerunConfig) -> TargetFiles:
    """Return the target's files; `MismatchError` if it is not the cache's."""
    recorded, origin = cache.manifest.identity["target"], cache.manifest.origin
    revision = rerun.revision or (origin.get("revision") if rerun.target == origin["target"] else None)
    files = open_target(
        rerun.target,
        revision=revision,
        trust_remote_code=rerun.trust_remote_code,
        by_transformers=rerun.engine == TRANSFORMERS,
    )
    own = {name: recorded[name] for name in ("dtype", "attn_implementation", "device_map")}
    refuse_other_identity(
        cache.path,
        {"target": recorded},
        {"target": {**files.identity(), **own}},
        what_to_do="Name the target that it was made from, or extract again from this one into a new folder.",
    )
    return files


def _fit(
    layer_id: int, differences: dict[int, _Difference], largest_error: float, largest_channel_error: float
) -> LayerFit:
    """Return how a stored layer compares, from its differences to the target's layers around it."""
    channels = {near: difference.channel_errors() for near, difference in differences.items()}
    medians = {near: float(np.median(errors)) for near, errors in channels.items()}
    best = min(
        (near for near in medians if math.isfinite(medians[near])),
        key=lambda near: (medians[near], near != layer_id),  # a block that adds nothing gives its neighbour's states
        default=layer_id,
    )
    return LayerFit(
        layer_id=layer_id,
        error=differences[layer_id].error(),
        channel_error=medians[layer_id],
        worst_channel_error=float(channels[layer_id].max()),
        best_layer_id=best,
        best_channel_error=medians[best],
        is_finite=differences[layer_id].is_finite(),
        largest_error=largest_error,
        largest_channel_error=largest_channel_error,
    )
