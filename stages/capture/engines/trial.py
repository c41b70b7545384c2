"""What proves an engine's states before a shard is written: some samples' states, layer by layer, beside another's.

Axes: T tokens, L captured layers, H hidden size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dflash_offline.schemas.errors import DflashError
from dflash_offline.schemas.samples import SampleTable
from dflash_offline.schemas.settings.extract import ExtractConfig
from dflash_offline.stages.capture.compare import (
    LARGEST_CHANNEL_ERROR,
    LARGEST_ERROR,
    QUANTIZED_CHANNEL_ERROR,
    QUANTIZED_ERROR,
    FinalComparison,
    LayerComparison,
    LayerFit,
)
from dflash_offline.stages.capture.engines.installed import engine_identity, quantizes
from dflash_offline.stages.capture.inputs import ChosenTarget
from dflash_offline.stages.capture.runner import evenly_spaced, free_dropped_memory
from dflash_offline.stages.progress import Progress
from dflash_offline.stages.target.borrowed import FinalNorm
from dflash_offline.stages.target.checkpoint import quantization_of
from dflash_offline.stages.target.model import embedding_tensors, layer_and_final_states

_TRIAL_SAMPLES, _TRIAL_TOKENS = 12, 256
"""Samples that are compared, spread over the plan, and tokens of each, from its start."""
_NAMED_SAMPLES = 2
_FAR_SHARE = 0.05
"""Share of a sample's tokens that may be far off: a router that is undecided sends a token to another expert."""


@dataclass(frozen=True)
class Reference:
    """Samples' states as something else than the engine gives them."""

    given_by: str
    """What that is, as messages name it."""
    comparison: LayerComparison
    ids: list[list[int]]
    states: list[list[NDArray[np.float32]]]
    """For each sample those of the layers that are compared, [T, H] each."""
    final: list[NDArray[np.float32]]
    """For each sample its final states, [T, H]."""


@dataclass(frozen=True)
class _Bounds:
    """What arithmetic may explain of a difference."""

    error: float
    channel_error: float
    token_error: float


def trial_ids(samples: SampleTable) -> list[list[int]]:
    """Return the token ids of the samples that are compared."""
    chosen = evenly_spaced(len(samples), _TRIAL_SAMPLES)
    return [samples.input_ids(sample)[:_TRIAL_TOKENS].tolist() for sample in chosen.tolist()]


class TransformersReference:
    """The target as transformers runs it, each sample by itself."""

    def __init__(self, target: ChosenTarget, model: Any) -> None:
        self._target, self._model = target, model

    def embeddings(self) -> dict[str, Tensor]:
        """Return a copy of the target's embedding table, and of its head unless it is the same."""
        return {name: tensor.cpu().clone() for name, tensor in embedding_tensors(self._model).items()}

    def states(self, samples: SampleTable, progress: Progress) -> Reference:
        """Return states of some samples of the plan: of each captured layer, of those around it, and the final ones."""
        progress.say("Running some samples by transformers, to compare vLLM's states with.")
        files, ids = self._target.files, trial_ids(samples)
        comparison = LayerComparison(self._target.layer_ids, files.num_layers, int(files.text_config.hidden_size))
        states, final = [], []
        for sequence in ids:
            tokens = torch.tensor([sequence], device=self._model.device)
            found, last = layer_and_final_states(self._model, tokens, comparison.around)
            states.append([state[0].float().cpu().numpy() for state in found])
            final.append(last[0].float().cpu().numpy())
        return Reference("transformers", comparison, ids, states, final)

    def close(self) -> None:
        """Drop the target, and give back its memory."""
        self._model = None
        free_dropped_memory(self._target.device)


def refuse_untrue_states(
    config: ExtractConfig,
    target: ChosenTarget,
    reference: Reference,
    runs: Mapping[str, Sequence[Tensor]],
    norm: FinalNorm | None,
) -> str:
    """Raise `DflashError` unless each run's states [T, L, H] are the reference's; returns what to say of them.

    With the target's final `norm` also what it makes of the last of the layers, which is the target's last then.
    """
    bounds, last = _bounds(config, target), None if norm is None else target.files.num_layers - 1
    columns = [reference.comparison.around.index(layer) for layer in target.layer_ids]
    wanted = [np.stack([state[column] for column in columns], axis=1) for state in reference.states]
    if norm is not None:
        runs = {run: [_with_final(state, norm) for state in states] for run, states in runs.items()}
        wanted = [np.append(state, own[:, None], axis=1) for state, own in zip(wanted, reference.final, strict=True)]
    faults = []
    for run, states in runs.items():
        found = [state.numpy() for state in states]
        faults += [f"{run}: {fit.fault}" for fit in _fits(found, reference, bounds, last) if fit.fault]
        of_samples = _sample_faults(found, wanted, bounds.token_error)
        faults += [f"{run}: {fault}" for fault in of_samples[:_NAMED_SAMPLES]]
        if len(of_samples) > _NAMED_SAMPLES:
            faults.append(f"{run}: {len(of_samples) - _NAMED_SAMPLES} more of {len(found)} samples have other states")
    if faults:
        raise DflashError(
            f"vLLM's states are not those that {reference.given_by} gives, so nothing is extracted:"
            + "".join(f"\n  {fault}" for fault in faults)
            + "\nTry another release of vLLM or other --engine-args, or leave --engine out."
        )
    largest = max(error for states in runs.values() for error in map(_largest_error, states, wanted))
    return (
        f"vLLM's states are those of {reference.given_by} to {largest:.1e} of a token's norm ({len(wanted)} samples, "
        f"{len(runs)} runs)."
    )


def _with_final(states: Tensor, norm: FinalNorm) -> Tensor:
    """Return states [T, L, H] with the final ones behind them, as if they were a layer's."""
    return torch.cat([states, norm(states[:, -1:])], dim=1)


def _fits(
    found: Sequence[NDArray[np.float32]], reference: Reference, bounds: _Bounds, last: int | None
) -> list[LayerFit]:
    """Return how states [T, L, H] compare, layer by layer; with the target's `last` layer also the final ones."""
    comparison, of_final = reference.comparison.anew(), FinalComparison(last or 0, found[0].shape[-1])
    for state, near, own in zip(found, reference.states, reference.final, strict=True):
        comparison.add(state, near)
        if last is not None:
            of_final.add(state[:, -1], own)
    return [fit for of in (comparison, of_final) for fit in of.fits(bounds.error, bounds.channel_error)]


def _sample_faults(
    found: Sequence[NDArray[np.float32]], wanted: Sequence[NDArray[np.float32]], bound: float
) -> list[str]:
    """Return what is wrong with samples by themselves, which the average over all of them may hide."""
    faults = []
    for number, (state, own) in enumerate(zip(found, wanted, strict=True)):
        far = ~(_token_errors(state, own) <= bound)
        if far.mean() <= _FAR_SHARE:
            continue
        first, last = (int(places) for places in np.flatnonzero(far)[[0, -1]])
        others = [
            other
            for other, states in enumerate(wanted)
            if other != number and (_token_errors(state, states) <= bound).mean() > 1 - _FAR_SHARE
        ]
        fits = f"; they are those of sample {others[0]}" if others else ""
        faults.append(f"sample {number} has other states at {far.sum()} tokens, from {first} to {last}{fits}")
    return faults


def _token_errors(state: NDArray[np.float32], own: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return each token's difference over its norm, [T], that of its worst layer, up to the end of the shorter one."""
    shorter = min(len(state), len(own))
    with np.errstate(all="ignore"):
        norms = np.linalg.norm(own[:shorter].astype(np.float64), axis=-1)
        return (np.linalg.norm(state[:shorter] - own[:shorter].astype(np.float64), axis=-1) / norms).max(axis=-1)


def _largest_error(state: Tensor, own: NDArray[np.float32]) -> float:
    return float(_token_errors(state.numpy(), own).max())


def _bounds(config: ExtractConfig, target: ChosenTarget) -> _Bounds:
    """Return the bounds of an engine's arithmetic: its own quantization moves states most, float32 hardly."""
    if quantizes(engine_identity(config)["engine"]):
        return _Bounds(error=QUANTIZED_ERROR, channel_error=QUANTIZED_CHANNEL_ERROR, token_error=0.6)
    exact = target.dtype == torch.float32 and config.kv_cache_dtype == "auto"
    if exact and quantization_of(target.files.config) is None:
        return _Bounds(error=1e-3, channel_error=1e-3, token_error=1e-2)
    return _Bounds(error=LARGEST_ERROR, channel_error=LARGEST_CHANNEL_ERROR, token_error=0.15)
