"""From hidden states to stored codes and back, in torch, on the device where they are.

Axes: T tokens, C chosen layers, H hidden size.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dflash_offline.stages.store.codec import ABSENT, FAR_SHIFT, LINEAR, LINEAR_BITS, STEPS, FeatureCodec

_MANTISSA_BITS = 7
_EXPONENT = 0x7F80


class FeatureEncoder:
    """Makes the codes of a feature layout, and bfloat16 features of codes."""

    def __init__(self, codec: FeatureCodec) -> None:
        self.codec = codec
        self._on_device: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {}

    def encode(self, states: Tensor, layer: int) -> Tensor:
        """Return the codes of one layer's states [..., H] in any float dtype, as int16 that hold the uint16 bits.

        `layer` counts captured layers. A scaled feature that is not finite, or beyond 2**30 steps, becomes ABSENT.
        """
        if self.codec.layout.kind == "scaled":
            return self._to_steps(states.float(), layer)
        bits, kept = states.to(torch.bfloat16).view(torch.int16), self.codec.layout.mantissa_bits
        return bits if kept is None else _round_mantissa(bits, kept)

    def _to_steps(self, states: Tensor, layer: int) -> Tensor:
        center, step, _ = self._tables(states.device)
        steps = (states - center[layer]) / step[layer]
        near = steps.abs()
        far = ((near.view(torch.int32) - LINEAR_BITS + (1 << FAR_SHIFT >> 1)) >> FAR_SHIFT) + LINEAR
        near = near.round()
        magnitude = torch.where(near < LINEAR, near.to(torch.int32), far)
        codes = 2 * magnitude + ((steps < 0) & (magnitude > 0))
        return codes.masked_fill(~(states.isfinite() & (magnitude < ABSENT >> 1)), ABSENT).to(torch.int16)

    def values(self, codes: Tensor, layer: int) -> Tensor:
        """Return the float32 features of one layer's codes, int16 [..., H]; not finite where none could be stored."""
        if self.codec.layout.kind != "scaled":
            return codes.view(torch.bfloat16).float()
        center, step, table = self._tables(codes.device)
        return torch.addcmul(center[layer], table[codes.to(torch.int32) & 0xFFFF], step[layer])

    def widen(self, codes: Tensor, columns: Sequence[int]) -> Tensor:
        """Return the bfloat16 features of codes, int16 [..., C, H], of the captured layers `columns`."""
        if self.codec.layout.kind != "scaled":
            return codes.view(torch.bfloat16)
        features = torch.empty(codes.shape, dtype=torch.bfloat16, device=codes.device)
        for index, column in enumerate(columns):
            features[..., index, :] = self.values(codes[..., index, :], column)
        return features

    def _tables(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        if device not in self._on_device:
            center, step = self.codec.center, self.codec.step
            assert center is not None and step is not None, "scaled features have scales"
            self._on_device[device] = (
                torch.from_numpy(center).to(device),
                torch.from_numpy(step).to(device),
                torch.from_numpy(STEPS).to(device),
            )
        return self._on_device[device]


def _round_mantissa(bits: Tensor, kept: int) -> Tensor:
    """Round bfloat16 bits to `kept` mantissa bits, half to even; zeros take the place of the others."""
    dropped = _MANTISSA_BITS - kept
    if dropped == 0:
        return bits
    wide = bits.to(torch.int32)
    half = (1 << dropped - 1) - 1 + ((wide >> dropped) & 1)
    rounded = ((wide + half) & -(1 << dropped)).to(torch.int16)
    return torch.where((bits & _EXPONENT) == _EXPONENT, bits, rounded)  # a NaN's carry could make it a number


def calibrate(states: Tensor, step: float) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return each channel's center and step size, float32 [H], from one layer's states [T, H].

    The center is the median, the step `step` times half the distance between the 16th and the 84th percentile, which
    is the standard deviation of a normal channel. Both hardly move where a few tokens are thousands of times larger
    than the rest. A channel whose percentiles coincide takes its standard deviation, one that never varies its
    layer's median.
    """
    ordered = states.float().T.contiguous().sort(dim=1).values
    last = len(states) - 1
    low, center, high = (ordered[:, round(share * last)] for share in (0.1587, 0.5, 0.8413))
    spread = (high - low) / 2
    spread = torch.where(spread > 0, spread, states.float().std(dim=0, correction=0))
    varying = spread[spread > 0]
    spread = torch.where(spread > 0, spread, varying.median() if len(varying) else torch.ones_like(spread))
    return center.cpu().numpy(), (step * spread).cpu().numpy()
