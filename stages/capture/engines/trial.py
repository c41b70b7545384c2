"""What proves an engine's states before a shard is written: some samples' states, layer by layer, beside transformers'.

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
    LayerComparison,
)
from dflash_offline.stages.capture.engines.installed import engine_identity, quantizes
from dflash_offline.stages.capture.inputs import ChosenTarget
from dflash_offline.stages.capture.runner import evenly_spaced
from dflash_offline.stages.target.checkpoint import quantization_of
from dflash_offline.stages.target.model import layer_states

_TRIAL_SAMPLES, _TRIAL_TOKENS = 12, 256
"""Samples that are compared, spread over the plan, and tokens of each, from its start."""
_NAMED_SAMPLES = 2
_FAR_SHARE = 0.05
"""Share of a sample's tokens that may be far off: a router that is undecided sends a token to another expert."""


@dataclass(frozen=True)
class Reference:
    """Samples' states as transformers gives them."""

    comparison: LayerComparison
    ids: list[list[int]]
    states: list[list[NDArray[np.float32]]]
    """For each sample those of the layers that are compared, [T, H] each."""


@dataclass(frozen=True)
class _Bounds:
    """What arithmetic may explain of a difference."""

    error: float
    channel_error: float
    token_error: float


def reference_states(model: Any, num_layers: int, layer_ids: Sequence[int], samples: SampleTable) -> Reference:
    """Return states of some samples of the plan, each run by itself: of each captured layer and of those around it."""
    chosen = evenly_spaced(len(samples), _TRIAL_SAMPLES)
    ids = [samples.input_ids(sample)[:_TRIAL_TOKENS].tolist() for sample in chosen.tolist()]
    comparison = LayerComparison(layer_ids, num_layers, int(model.config.get_text_config().hidden_size))
    states = []
    for sequence in ids:
        found = layer_states(model, torch.tensor([sequence], device=model.device), comparison.around)
        states.append([state[0].float().cpu().numpy() for state in found])
    return Reference(comparison, ids, states)


def refuse_untrue_states(
    config: ExtractConfig, target: ChosenTarget, reference: Reference, runs: Mapping[str, Sequence[Tensor]]
) -> str:
    """Raise `DflashError` unless each run's states [T, L, H] are the reference's; returns what to say of them."""
    bounds = _bounds(config, target)
    columns = [reference.comparison.around.index(layer) for layer in target.layer_ids]
    wanted = [np.stack([state[column] for column in columns], axis=1) for state in reference.states]
    faults = []
    for run, states in runs.items():
        found = [state.numpy() for state in states]
        comparison = reference.comparison.anew()
        for state, near in zip(found, reference.states, strict=True):
            comparison.add(state, near)
        faults += [f"{run}: {fit.fault}" for fit in comparison.fits(bounds.error, bounds.channel_error) if fit.fault]
        of_samples = _sample_faults(found, wanted, bounds.token_error)
        faults += [f"{run}: {fault}" for fault in of_samples[:_NAMED_SAMPLES]]
        if len(of_samples) > _NAMED_SAMPLES:
            faults.append(f"{run}: {len(of_samples) - _NAMED_SAMPLES} more of {len(found)} samples have other states")
    if faults:
        raise DflashError(
            "vLLM's states are not those that transformers gives, so nothing is extracted:"
            + "".join(f"\n  {fault}" for fault in faults)
            + "\nTry another release of vLLM or other --engine-args, or leave --engine out."
        )
    largest = max(error for states in runs.values() for error in map(_largest_error, states, wanted))
    return (
        f"vLLM's states are transformers' to {largest:.1e} of a token's norm ({len(wanted)} samples, {len(runs)} runs)."
    )


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
