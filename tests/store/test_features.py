"""Compact feature layouts against numcodecs' rounding, the rule in the attributes, and plain arithmetic."""

import numpy as np
import pytest
import torch
from numcodecs import BitRound
from numpy.typing import NDArray

from dflash_offline.schemas.manifest import FeatureLayout
from dflash_offline.stages.capture.encode import FeatureEncoder, calibrate
from dflash_offline.stages.store.codec import ABSENT, FeatureCodec

WIDTH = 4096


def states(num_tokens: int = 300, width: int = WIDTH, seed: int = 0) -> torch.Tensor:
    """Normal features; some channels are 1,000 times the rest, some lie far from zero, one never varies."""
    values = torch.randn(num_tokens, width, generator=torch.Generator().manual_seed(seed))
    values[:, ::97] *= 1000
    values[:, 5::97] += 40
    values[:, 3] = 0.25
    return values


def scaled(values: torch.Tensor, step: float = 1 / 8) -> FeatureEncoder:
    center, size = calibrate(values, step)
    return FeatureEncoder(FeatureCodec(FeatureLayout(kind="scaled", step=step), center[None], size[None]))


def decode_by_hand(code: int, center: float, step: float) -> float:
    """The rule of the array's attributes, one value at a time."""
    magnitude = code >> 1
    if magnitude < 16384:
        size = float(magnitude)
    else:
        size = float(np.array(((magnitude - 16384) << 13) + 1182793728, np.int32).view(np.float32))
    return center + (-size if code & 1 else size) * step


def as_codes(encoder: FeatureEncoder, values: torch.Tensor) -> NDArray[np.uint16]:
    return encoder.encode(values, 0).numpy().view(np.uint16)[:, None]


@pytest.mark.parametrize("bits", [1, 3, 4, 6])
def test_rounding_the_mantissa_equals_numcodecs_bitround(bits: int) -> None:
    encoder = FeatureEncoder(FeatureCodec(FeatureLayout(kind="rounded", mantissa_bits=bits)))
    bfloat16 = torch.cat([states().flatten(), torch.tensor([0.0, -0.0, 1e-38, 3e38, -1.0])]).to(torch.bfloat16)
    expected = BitRound(keepbits=bits).encode(bfloat16.float().numpy())
    found = encoder.encode(bfloat16, 0).view(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(found.view(np.uint32), np.asarray(expected).view(np.uint32))


def test_what_is_not_finite_stays_so_whatever_its_bits() -> None:
    odd = torch.tensor([0x7FC0, 0x7FFF, -1, 0x7F80, -0x80], dtype=torch.int16).view(torch.bfloat16)
    for bits in range(1, 8):
        encoder = FeatureEncoder(FeatureCodec(FeatureLayout(kind="rounded", mantissa_bits=bits)))
        codes = encoder.encode(odd, 0)
        assert not codes.view(torch.bfloat16).isfinite().any()


@pytest.mark.parametrize("step", [1 / 8, 1 / 4])
def test_a_scaled_feature_is_off_by_half_a_step_at_most(step: float) -> None:
    values = states()
    encoder = scaled(values, step)
    assert encoder.codec.step is not None
    error = np.abs(encoder.codec.values(as_codes(encoder, values), [0])[:, 0] - values.numpy())
    size = encoder.codec.step[0]
    assert (error <= 0.5001 * size + 1e-6 * np.abs(values.numpy())).all()
    spread = values.numpy().std(axis=0)
    varying = spread > 0
    relative = np.sqrt((error**2).mean(axis=0))[varying] / spread[varying]
    assert relative.max() < 1.3 * step / 12**0.5  # in every channel, the large ones and the far ones too


def test_values_thousands_of_times_the_rest_neither_clip_nor_coarsen_their_channel() -> None:
    values = states()
    values[0, 10:20] = torch.tensor([1e3, -1e4, 1e5, -1e6, 3e4, 2047.9, -2048.1, 1e7, -9e6, 5e3])
    encoder = scaled(values)
    found = encoder.codec.values(as_codes(encoder, values), [0])[:, 0]
    np.testing.assert_allclose(found[0, 10:20], values[0, 10:20].numpy(), rtol=2**-11)
    ordinary = np.abs(found[1:, 10:20] - values[1:, 10:20].numpy())
    assert ordinary.max() <= 0.5001 * 1.3 / 8


def test_numpy_torch_and_the_written_rule_decode_alike() -> None:
    values = states(num_tokens=4, width=512)
    encoder = scaled(values)
    codes = as_codes(encoder, values)
    codes[0, 0, :8] = [0, 1, 32767, 32768, 32769, 65532, 65533, 40000]
    center, step = encoder.codec.center, encoder.codec.step
    assert center is not None and step is not None
    by_hand = [
        decode_by_hand(int(code), float(center[0, h]), float(step[0, h]))
        for row in codes[:, 0]
        for h, code in enumerate(row)
    ]
    found = encoder.codec.values(codes, [0])
    np.testing.assert_allclose(found.ravel(), by_hand, rtol=1e-6, atol=1e-6)
    widened = encoder.widen(torch.from_numpy(codes.view(np.int16)), [0])
    torch.testing.assert_close(widened.float(), torch.from_numpy(found), rtol=2**-8, atol=1e-6)


def test_what_cannot_be_stored_is_marked_and_nothing_else() -> None:
    values = states(num_tokens=5, width=64)
    encoder = scaled(values)
    values[1, 7], values[2, 9], values[3, 11] = float("nan"), float("-inf"), 1e20
    codes = encoder.encode(values, 0)
    assert encoder.values(codes, 0).isfinite().all(dim=-1).tolist() == [True, False, False, False, True]
    assert (codes.numpy().view(np.uint16) == ABSENT).sum() == 3
    plain = FeatureEncoder(FeatureCodec(FeatureLayout()))
    stored = plain.values(plain.encode(values, 0), 0)
    assert stored.isfinite().all(dim=-1).tolist() == [True, False, False, True, True]


def test_every_code_is_read_back_as_itself() -> None:
    encoder = FeatureEncoder(
        FeatureCodec(FeatureLayout(kind="scaled", step=1.0), np.zeros((1, 1), np.float32), np.ones((1, 1), np.float32))
    )
    codes = np.setdiff1d(np.arange(65534, dtype=np.uint16), [1])  # 1 is a negative zero, which is written as 0
    values = torch.from_numpy(encoder.codec.values(codes[:, None, None], [0])[:, 0])
    np.testing.assert_array_equal(encoder.encode(values, 0).numpy().view(np.uint16)[:, 0], codes)


def test_calibration_hardly_moves_where_a_few_tokens_explode() -> None:
    calm = states()
    wild = calm.clone()
    wild[::150] *= 5000
    (center, step), (moved, wide) = calibrate(calm, 1.0), calibrate(wild, 1.0)
    assert (np.abs(moved - center) <= 0.1 * step)[4:].all()
    np.testing.assert_allclose(wide[4:], step[4:], rtol=0.1)
