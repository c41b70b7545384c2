"""Center and step of each channel of scaled features, from samples spread over the plan, before the first shard.

Axes: L captured layers, H hidden size.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dflash_offline.schemas.commits import SkippedSample
from dflash_offline.schemas.errors import CacheError
from dflash_offline.schemas.manifest import HIDDEN, FeatureLayout
from dflash_offline.schemas.samples import SampleTable
from dflash_offline.stages.capture.bad_features import SKIP_HINT, find_bad, listed
from dflash_offline.stages.capture.encode import FeatureEncoder, calibrate
from dflash_offline.stages.capture.extractor import Extractor
from dflash_offline.stages.capture.runner import spread_out
from dflash_offline.stages.progress import Progress
from dflash_offline.stages.store.codec import FeatureCodec

CALIBRATION_TOKENS = 16_384
"""Tokens, of samples spread over the plan, whose features decide centers and steps."""
_LEAST_SOUND = 0.5
"""Share of those tokens that must be sound; below it something is wrong with the target, not with samples."""


def calibrated_scales(
    runner: Extractor, samples: SampleTable, step: float, *, skip_bad: bool, progress: Progress
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return center and step of each layer and channel, float32 [L, H]; a function of plan and target alone.

    Raises `CacheError` naming the samples with bad features, or with `skip_bad` leaves them out and raises it only
    where too few tokens remain. A step that is no finite number above zero raises it too.
    """
    members = spread_out(samples, np.arange(len(samples)), CALIBRATION_TOKENS)
    states, bad = _lossless_states(runner, samples, members, progress)
    if bad:
        num_tokens = int(samples.num_tokens[members].sum())
        fault = f"The target gives bad features for {len(bad)} of the {len(members)} samples that calibrate the steps"
        if not skip_bad:
            raise CacheError(f"{fault}; no cache was made:{listed(bad, samples)}\n{SKIP_HINT}")
        if len(states) < _LEAST_SOUND * num_tokens:
            raise CacheError(
                f"{fault}; {len(states):,} of their {num_tokens:,} tokens are left, and no cache was made:"
                f"{listed(bad, samples)}\nThat is the target's fault, not the samples': check its dtype and attention "
                f"implementation."
            )
    scales = [calibrate(states[:, layer], step) for layer in range(states.shape[1])]
    for layer_id, (center, size) in zip(runner.layer_ids, scales, strict=True):
        unusable = np.flatnonzero(~(np.isfinite(center) & np.isfinite(size) & (size > 0)))
        if len(unusable):
            channel = int(unusable[0])
            raise CacheError(
                f"Channel {channel} of layer {layer_id} has center {center[channel]} and step {size[channel]} over "
                f"{len(states):,} tokens; expected finite numbers and a step above 0. Extract with --features rounded "
                f"or lossless."
            )
    centers, sizes = zip(*scales, strict=True)
    return np.stack(centers), np.stack(sizes)


def _lossless_states(
    runner: Extractor, samples: SampleTable, members: NDArray[np.int64], progress: Progress
) -> tuple[Tensor, list[SkippedSample]]:
    """Return the features of the sound members, bfloat16 [tokens, L, H], and the members with bad features."""
    lossless = FeatureEncoder(FeatureCodec(FeatureLayout()))
    parts, bad = [], list[SkippedSample]()
    progress.start("Calibrating", int(samples.num_tokens[members].sum()), "tokens")
    for batch in runner.batches(samples, members):
        codes, statistics = runner.run_batch(samples, batch, {HIDDEN: lossless})[HIDDEN]
        lengths = samples.num_tokens[batch]
        bad_here = find_bad(batch, lengths, statistics.cpu().numpy(), runner.layer_ids)
        sound = ~np.isin(batch, [sample.sample for sample in bad_here])
        parts.append(codes if sound.all() else codes[torch.from_numpy(np.repeat(sound, lengths))])
        bad += bad_here
        progress.advance(int(lengths.sum()))
    progress.finish()
    return torch.cat(parts).view(torch.bfloat16), sorted(bad, key=lambda sample: sample.sample)
