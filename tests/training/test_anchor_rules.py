"""Partial blocks in a cache and a run: short answers are kept and train, and what says nothing of it is as before."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dflash_offline.schemas.errors import DflashError, MismatchError
from dflash_offline.schemas.run import RunRecord
from dflash_offline.schemas.settings.extract import ExtractConfig
from dflash_offline.schemas.settings.train import TrainConfig
from dflash_offline.stages.extract import extract
from dflash_offline.stages.progress import Silent
from dflash_offline.stages.store.cache import Cache
from dflash_offline.stages.store.verify import verify_cache
from dflash_offline.stages.train import dry_run, train

TINY: dict[str, Any] = {"packing": False, "batch_size": 8, "num_anchors": 8, "draft_layers": 1, "steps": 2}


def extracted(config: dict[str, Any], out: Path, words: list[int], **settings: Any) -> Path:
    """Return a cache of blocks of 16, with an answer of each number of words."""
    rows = []
    for i, number in enumerate(words):
        answer = " ".join(f"w{i * j % 7}" for j in range(number))
        rows.append({"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": answer}]})
    data = out.with_suffix(".jsonl")
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    extract(ExtractConfig(**{**config, "data": (data,), "out": out, "block_size": 16, **settings}), Silent())
    return out


@pytest.fixture(scope="module")
def short_cache(tmp_path_factory: pytest.TempPathFactory, extract_config: dict[str, Any]) -> Path:
    """Return a cache that keeps answers shorter than a block: 30 of a word, 30 of many."""
    return extracted(extract_config, tmp_path_factory.mktemp("short") / "cache", [1, 30] * 30, anchors="partial")


def test_a_partial_plan_keeps_samples_without_room_for_a_block(
    short_cache: Path, extract_config: dict[str, Any], tmp_path: Path
) -> None:
    partial, whole = Cache.open(short_cache), Cache.open(extracted(extract_config, tmp_path / "cache", [1, 30] * 30))
    assert (len(partial.samples), len(whole.samples)) == (60, 30)
    assert partial.manifest.plan["anchor_kind"] == partial.manifest.identity["anchors"] == "partial"
    assert "anchor_kind" not in whole.manifest.plan and "anchors" not in whole.manifest.identity
    for sample in range(60):
        mask = partial.samples.loss_mask(sample)
        wanted = sum(bool(mask[i]) and bool(mask[i + 1 : i + 16].any()) for i in range(len(mask)))
        assert partial.samples.num_anchors[sample] == wanted > 0
    assert not verify_cache(short_cache, Silent())
    with pytest.raises(MismatchError, match="anchors"):
        extracted(extract_config, tmp_path / "cache", [1, 30] * 30, anchors="partial")


def test_a_run_of_whole_blocks_counts_the_samples_that_train_nothing(short_cache: Path, tmp_path: Path) -> None:
    config = TrainConfig(caches=(short_cache,), out=tmp_path / "run", val_samples=0, **TINY)
    whole, partial = dry_run(config), dry_run(replace(config, anchors="partial"))
    assert (whole.num_train, whole.num_idle, whole.anchors) == (30, 30, "whole")
    assert (partial.num_train, partial.num_idle, partial.anchors) == (60, 0, "partial")
    counts = Cache.open(short_cache).samples.num_anchors
    assert partial.blocks_per_epoch == int(np.minimum(counts, 8).sum()) > whole.blocks_per_epoch == 30 * 8
    done = train(config, Silent())
    assert (done.num_train, done.num_idle) == (30, 30)
    assert "anchors" not in RunRecord.read(tmp_path / "run").identity["settings"]


def test_a_run_of_partial_blocks_says_so_and_goes_on_with_them(short_cache: Path, tmp_path: Path) -> None:
    config = TrainConfig(caches=(short_cache,), out=tmp_path / "run", val_samples=6, anchors="partial", **TINY)
    done = train(config, Silent())
    assert done.num_train + done.num_val == 60 and done.state.best_walk >= 1
    assert RunRecord.read(tmp_path / "run").identity["settings"]["anchors"] == "partial"
    train(replace(config, anchors=None), Silent())
    with pytest.raises(MismatchError, match=r"anchors.*partial"):
        train(replace(config, anchors="whole"), Silent())


def test_a_cache_whose_every_answer_is_too_short_is_refused(extract_config: dict[str, Any], tmp_path: Path) -> None:
    cache = extracted(extract_config, tmp_path / "cache", [1] * 12, anchors="partial")
    with pytest.raises(DflashError, match="no sample to train on with a whole block after it"):
        train(TrainConfig(caches=(cache,), out=tmp_path / "run", val_samples=0, **TINY), Silent())


def test_a_variant_trains_on_partial_blocks_and_one_that_was_begun_with_whole_ones_goes_on(
    short_cache: Path, tmp_path: Path
) -> None:
    config = TrainConfig(caches=(short_cache,), out=tmp_path / "run", val_samples=0, variant="dflash2", **TINY)
    assert dry_run(config).anchors == "partial"
    train(replace(config, anchors="whole", steps=1), Silent())
    assert "anchors" not in RunRecord.read(tmp_path / "run").identity["settings"], "as runs of earlier versions"
    assert train(replace(config, steps=1), Silent()).num_idle == 30
