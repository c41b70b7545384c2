"""What the sixteen bits of a stored feature stand for: a bfloat16, or a number of steps. Needs numpy alone.

Axes: T tokens, L captured layers, C chosen layers, H hidden size.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dflash_offline.schemas.manifest import FeatureLayout

NAN = 0x7FC0
"""bfloat16 bits of the fill value: zarr reads a missing shard as fill, so fill must not look like a feature."""
CENTER, STEP = "feature_center", "feature_step"
"""The arrays of scaled features' scales."""
ABSENT = 0xFFFF
"""The fill value of `scaled` features."""
_EXPONENT = 0x7F80
LINEAR = 1 << 14
"""Steps that a code counts one by one; larger values are kept to ten mantissa bits, so nothing is ever clipped."""
LINEAR_BITS = int(np.float32(LINEAR).view(np.int32))
FAR_SHIFT = 13

AS_BFLOAT16 = "each uint16 holds the bits of one bfloat16: float32 = (uint32(value) << 16) viewed as float32"
AS_STEPS = (
    "m = value >> 1; magnitude = float32(m) where m < 16384, else the float32 whose bits are "
    f"((m - 16384) << {FAR_SHIFT}) + {LINEAR_BITS}; sign is minus where value & 1; "
    "feature = feature_center[layer] + sign * magnitude * feature_step[layer]; 65535 is no feature"
)


class FeatureCodec:
    """What the 16-bit codes of a cache stand for; `FeatureEncoder` makes and widens them on a device.

    `center` and `step` are float32 [L, H], for `scaled` features only.
    """

    def __init__(
        self,
        layout: FeatureLayout,
        center: NDArray[np.float32] | None = None,
        step: NDArray[np.float32] | None = None,
    ) -> None:
        self.layout = layout
        self.fill = ABSENT if layout.kind == "scaled" else NAN
        self.center, self.step = center, step

    def attributes(self) -> dict[str, Any]:
        """Return what the array says of itself: how to decode it with numpy alone."""
        if self.layout.kind == "scaled":
            return {"logical_dtype": "float32", "decode": AS_STEPS}
        rounded = {"mantissa_bits": self.layout.mantissa_bits} if self.layout.kind == "rounded" else {}
        return {"logical_dtype": "bfloat16", "decode": AS_BFLOAT16, **rounded}

    def values(
        self, codes: NDArray[np.uint16], columns: Sequence[int], out: NDArray[np.float32] | None = None
    ) -> NDArray[np.float32]:
        """Return the float32 features of codes, uint16 [..., C, H], of the captured layers `columns`; in `out`, if
        given."""
        if out is None:
            out = np.empty(codes.shape, np.float32)
        if self.layout.kind != "scaled":
            bits = out.view(np.uint32)
            bits[...] = codes
            bits <<= 16
            return out
        assert self.center is not None and self.step is not None
        chosen = list(columns)
        STEPS.take(codes, out=out, mode="clip")
        out *= self.step[chosen]
        out += self.center[chosen]
        return out

    def holds_fill(self, codes: NDArray[np.uint16]) -> bool:
        """Say whether at least one code holds the fill value, or a bfloat16 like it: a positive NaN or infinity."""
        if self.layout.kind == "scaled":
            return int(codes.max()) == ABSENT
        return int(codes.view(np.int16).max()) >= _EXPONENT


def _steps() -> NDArray[np.float32]:
    code = np.arange(1 << 16, dtype=np.int32)
    magnitude = code >> 1
    far = (((magnitude - LINEAR) << FAR_SHIFT) + LINEAR_BITS).view(np.float32)
    steps = np.where(magnitude < LINEAR, magnitude.astype(np.float32), far)
    steps = np.where(code & 1, -steps, steps)
    steps[ABSENT] = np.nan
    return steps


STEPS = _steps()
"""The signed number of steps that each code of a `scaled` feature stands for, float32 [65536]."""
