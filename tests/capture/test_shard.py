"""The statistics of a shard's features and its bad samples, against plain sums of the codes that are stored."""

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from dflash_offline.schemas.manifest import FeatureLayout
from dflash_offline.stages.capture.bad_features import NOT_FINITE, TOO_LARGE
from dflash_offline.stages.capture.encode import FeatureEncoder, calibrate
from dflash_offline.stages.capture.shard import TOKEN_STATISTICS, QueuedShard, ShardBuffer, token_statistics
from dflash_offline.stages.store.codec import FeatureCodec
from dflash_offline.stages.store.feature_ranges import Sums, agree, layer_statistics

LENGTHS = np.array([5, 1, 7])
LAYERS, WIDTH = 3, 40
LAYOUTS = [FeatureLayout(), FeatureLayout(kind="rounded", mantissa_bits=4), FeatureLayout(kind="scaled", step=1 / 8)]


def codec_for(states: torch.Tensor, layout: FeatureLayout) -> FeatureCodec:
    if layout.step is None:
        return FeatureCodec(layout)
    scales = [calibrate(states[:, layer], layout.step) for layer in range(LAYERS)]
    return FeatureCodec(layout, *(np.stack(part) for part in zip(*scales, strict=True)))


def queued(states: torch.Tensor, codec: FeatureCodec) -> tuple[QueuedShard, np.ndarray[Any, Any]]:
    """Return a shard of three samples' states [N, L, H], side by side, and their codes."""
    encoder = FeatureEncoder(codec)
    codes = torch.stack([encoder.encode(states[:, layer], layer) for layer in range(LAYERS)], dim=1)
    statistics = torch.empty(*states.shape[:2], len(TOKEN_STATISTICS))
    for layer in range(LAYERS):
        token_statistics(states[:, layer], codes[:, layer], encoder, layer, statistics[:, layer])
    samples = cast(Any, SimpleNamespace(num_tokens=LENGTHS, start=np.cumsum(LENGTHS) - LENGTHS))
    buffer = ShardBuffer(codes.clone(), codec.fill)
    return QueuedShard(buffer, samples, [4, 5, 6], [(np.arange(3), statistics)], None), codes.numpy().view(np.uint16)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.kind)
def test_statistics_are_those_of_the_stored_features_of_sound_samples(layout: FeatureLayout) -> None:
    states = torch.randn(int(LENGTHS.sum()), LAYERS, WIDTH, generator=torch.Generator().manual_seed(0))
    states[2, 1, :9] = 0
    codec = codec_for(states, layout)
    states[5, 2, 3] = torch.nan  # the sample of one token
    shard, codes = queued(states, codec)
    filled = shard.wait()
    assert [(bad.sample, bad.reason, bad.layer_id, bad.position) for bad in filled.bad] == [(1, NOT_FINITE, 6, 0)]
    assert (shard.buffer.array[5] == codec.fill).all() and (shard.buffer.array[4] == codes[4]).all()
    kept = np.delete(codes, 5, axis=0)
    values = [codec.values(kept[:, [layer]], [layer])[:, 0] for layer in range(LAYERS)]
    expected = layer_statistics([Sums.of(layer) for layer in values], [4, 5, 6])
    assert filled.sums is not None
    assert all(map(agree, layer_statistics(filled.sums, [4, 5, 6]), expected))
    assert [layer.count for layer in filled.sums] == [kept[:, 0].size] * LAYERS


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.kind)
def test_a_feature_too_large_to_store_is_found_where_it_is(layout: FeatureLayout) -> None:
    states = torch.randn(int(LENGTHS.sum()), LAYERS, WIDTH, generator=torch.Generator().manual_seed(2))
    codec = codec_for(states, layout)
    states[8, 1, 3] = -3.4e38  # finite as float32, and no bfloat16; the third sample's position 2
    filled = queued(states, codec)[0].wait()
    assert [(bad.sample, bad.reason, bad.layer_id, bad.position) for bad in filled.bad] == [(2, TOO_LARGE, 5, 2)]


def test_features_whose_squares_float32_cannot_hold_are_left_to_the_writer_to_add_up() -> None:
    states = torch.full((int(LENGTHS.sum()), LAYERS, WIDTH), 1e25)
    states[..., ::2] = -1.0
    filled = queued(states, FeatureCodec(FeatureLayout()))[0].wait()
    assert filled.bad == [] and filled.sums is None


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.kind)
def test_one_slot_of_fill_among_features_is_seen(layout: FeatureLayout) -> None:
    states = torch.randn(int(LENGTHS.sum()), LAYERS, WIDTH, generator=torch.Generator().manual_seed(1))
    codec = codec_for(states, layout)
    codes = queued(states, codec)[1]
    assert not codec.holds_fill(codes)
    codes[3, 1, 7] = codec.fill
    assert codec.holds_fill(codes)
