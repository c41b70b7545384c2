"""The shape of packed rows: what it bounds, that it costs no more than the earlier rule's, and which runs keep that."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dflash_offline.schemas.errors import DflashError, MismatchError
from dflash_offline.schemas.run import RUN, RunRecord
from dflash_offline.schemas.sealed import sealed_bytes
from dflash_offline.schemas.settings.train import TrainConfig
from dflash_offline.stages.progress import Silent
from dflash_offline.stages.train import dry_run, train
from dflash_offline.stages.training.checkpoint import list_checkpoints
from dflash_offline.stages.training.schedule import (
    CONTEXT_WORK,
    RowLimits,
    RowShape,
    Samples,
    earlier_row_shape,
    pack,
    row_shape,
)

LIMITS = RowLimits(batch_tokens=8192, batch_block_tokens=65_536, block_size=16, row_tokens=None, long_rows=True)


def documents(mean: float, deviation: float, most: int, share: float, count: int = 600) -> tuple[Samples, Samples]:
    """Return log-normal lengths and the anchors of documents that are supervised to about so large a share."""
    chance = np.random.default_rng(5)
    sigma = math.sqrt(math.log(1 + (deviation / mean) ** 2))
    lengths = np.exp(chance.normal(math.log(mean) - sigma**2 / 2, sigma, count)).astype(np.int64).clip(32, most)
    supervised = chance.normal(share, 0.15, count).clip(0.05, 1.0)
    return lengths, np.minimum((lengths * supervised).astype(np.int64) - 1, 512)


def work(shape: RowShape, num_tokens: Samples, num_anchors: Samples, block_size: int) -> float:
    """Return what an epoch computes, in block tokens."""
    rows = pack(num_tokens, num_anchors, np.random.default_rng(7).permutation(len(num_tokens)), shape)
    return len(rows) * (shape.anchors * block_size + CONTEXT_WORK * shape.tokens)


@pytest.mark.parametrize("long_rows", [True, False])
@pytest.mark.parametrize(
    ("mean", "deviation", "most", "share"),
    # In the third, two of the longest documents fit a row that is full of blocks, and none that has hardly fewer.
    [(800, 900, 3072, 0.7), (800, 50, 3072, 0.8), (4000, 3000, 8192, 0.7), (200, 150, 1024, 0.6)],
    ids=["chat", "alike", "long", "short"],
)
def test_rows_cost_less_than_those_of_the_earlier_rule(
    mean: float, deviation: float, most: int, share: float, long_rows: bool
) -> None:
    tokens, anchors = documents(mean, deviation, most, share)
    shape = row_shape(tokens, anchors, replace(LIMITS, long_rows=long_rows))
    earlier = earlier_row_shape(tokens, anchors, 8192, 8192 if long_rows else None)
    assert work(shape, tokens, anchors, 16) < 1.01 * work(earlier, tokens, anchors, 16)
    if (mean, deviation, long_rows) == (800, 900, True):
        assert work(shape, tokens, anchors, 16) < 0.97 * work(earlier, tokens, anchors, 16)


@pytest.mark.parametrize(
    ("room", "block_size", "long_rows"),
    [
        (9_000, 16, True),
        (20_000, 16, True),
        (20_000, 16, False),
        (65_536, 16, True),
        (65_536, 8, False),
        (9_000, 7, True),
    ],
)
def test_a_micro_batch_has_no_more_block_tokens_than_it_may(room: int, block_size: int, long_rows: bool) -> None:
    tokens, anchors = documents(800, 900, 3072, 0.9, 200)
    limits = replace(LIMITS, long_rows=long_rows, batch_block_tokens=room, block_size=block_size)
    shape = row_shape(tokens, anchors, limits)
    assert shape.rows * shape.anchors * block_size <= room and shape.rows * shape.tokens <= 8192
    assert shape.tokens >= tokens.max() and shape.anchors >= anchors.max() and shape.tokens % 128 == 0
    if block_size in (8, 16) and room == 65_536:
        assert shape.anchors * block_size % 128 == 0
    packed = pack(tokens, anchors, np.arange(len(tokens)), shape)
    assert sorted(sample for row in packed for sample in row.tolist()) == list(range(len(tokens)))


def test_a_document_that_no_micro_batch_holds_is_refused_with_the_setting_that_would() -> None:
    tokens, anchors = np.array([398, 40]), np.array([300, 12])
    for limits, said in (
        (replace(LIMITS, batch_tokens=300), r"398 tokens, a row 300 .* Raise --batch-tokens"),
        (replace(LIMITS, row_tokens=300), "and --row-tokens, if you set it, to 398"),
        (replace(LIMITS, batch_tokens=4096, row_tokens=8192), r"a row 8,192 and a micro-batch 4,096"),
        (replace(LIMITS, batch_block_tokens=4799), r"300 blocks of 16 .* 4,799 block .*--batch-block-tokens to 4,800"),
        (replace(LIMITS, batch_block_tokens=15), "to 4,800 or more, or lower --num-anchors"),
    ):
        with pytest.raises(DflashError, match=rf"(?s){said}"):
            row_shape(tokens, anchors, limits)
    assert row_shape(tokens, anchors, replace(LIMITS, batch_block_tokens=4800)).anchors == 300
    assert row_shape(tokens, anchors, replace(LIMITS, long_rows=False)) == RowShape(rows=12, tokens=512, anchors=328)


def test_documents_without_an_anchor_have_rows_too() -> None:
    shape = row_shape(np.array([5, 9]), np.array([0, 0]), LIMITS)
    assert shape == RowShape(rows=1, tokens=8192, anchors=8)


@pytest.fixture
def earlier(cache: Path, tmp_path: Path) -> TrainConfig:
    """Settings of a run as an earlier version left it before its first checkpoint."""
    config = TrainConfig(
        caches=(cache,), out=tmp_path / "run", steps=3, draft_layers=1, num_anchors=8, batch_tokens=512, device="cpu"
    )
    train(config, Silent())
    record = RunRecord.read(config.out)
    settings = record.identity["settings"]
    del settings["row_rule"], settings["batch_block_tokens"]
    settings.update(val_every=200, row_tokens=320)  # its longest document, rounded up to a multiple of 64
    (config.out / RUN).write_bytes(sealed_bytes(record.to_json()))
    for checkpoint in list_checkpoints(config.out):
        checkpoint.rename(tmp_path / checkpoint.name)
    return config


def test_a_run_of_the_earlier_rule_goes_on_by_it(earlier: TrainConfig) -> None:
    assert dry_run(replace(earlier, out=earlier.out.with_name("other"))).batch_shape[1] == 384
    assert dry_run(earlier).batch_shape[1] == 320
    assert train(earlier, Silent()).state.step == 3
    assert train(replace(earlier, row_tokens=320, val_every=200), Silent()).state.step == 3
    with pytest.raises(MismatchError, match=r"settings\.row_tokens +run: 320 +now: 384"):
        train(replace(earlier, row_tokens=384), Silent())
    with pytest.raises(MismatchError, match=r"settings\.batch_block_tokens +run: \(absent\) +now: 4096"):
        train(replace(earlier, batch_block_tokens=4096), Silent())
    with pytest.raises(MismatchError, match=r"settings\.val_every +run: 200 +now: 500"):
        train(replace(earlier, val_every=500), Silent())
