"""Targets whose rotary tables are scaled: no sample depends on those beside it, and drafts declare what is served."""

import json
from pathlib import Path
from typing import Any

import pytest
from running import dflash
from tiny_target import save_conversations, save_target

from dflash_offline.stages.target.files import open_target

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [1.0, 4.0, 16.0, 64.0],
    "original_max_position_embeddings": 128,
    "factor": 4.0,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 512}


def rows(path: Path, *words: int) -> Path:
    """Write a conversation for each number of words in its answer."""
    answers = [{"role": "assistant", "content": "red cat " * count} for count in words]
    user = {"role": "user", "content": "a dog"}
    path.write_text("".join(json.dumps({"messages": [user, answer]}) + "\n" for answer in answers))
    return path


def test_a_long_sample_does_not_change_the_features_of_a_short_one_beside_it(tmp_path: Path) -> None:
    target = save_target(tmp_path / "target", rope_parameters=LONGROPE)
    data, cache = rows(tmp_path / "rows.jsonl", 10, 100), tmp_path / "cache"
    made = dflash("extract", data, "--target", target, "--out", cache, "--block-size", 4, "--device", "cpu")
    assert made.exit_code == 0, made.output
    assert "Beyond 128 positions the target turns all sequences of a batch by another rotary table" in made.stderr
    found = dflash("verify", cache, "--target", target, "--samples", 2, "--quiet")
    assert found.exit_code == 0 and "is sound" in found.stdout, found.output


def test_a_row_that_could_grow_beyond_its_rotary_table_is_counted_and_not_answered(tmp_path: Path) -> None:
    target, data = save_target(tmp_path / "target", rope_parameters=LONGROPE), rows(tmp_path / "rows.jsonl", 1)
    flags = ["--target", target, "--device", "cpu", "--quiet", "--out"]
    refused = dflash("regenerate", data, *flags, tmp_path / "one.jsonl", "--max-new-tokens", 128)
    assert refused.exit_code == 1 and "expected less than 128" in refused.stderr, refused.output
    counted = dflash("regenerate", data, *flags, tmp_path / "two.jsonl", "--max-new-tokens", 124)
    assert "prompt too long" in counted.output, counted.output


@pytest.mark.parametrize(
    ("scaling", "served"),
    [
        (YARN, 2048),
        (YARN | {"rope_type": "linear"}, 2048),
        (YARN | {"rope_type": "dynamic"}, 2048),
        (YARN | {"original_max_position_embeddings": 128}, 512),
        (LONGROPE, 512),
        ({"rope_type": "default", "rope_theta": 1e6}, 512),
    ],
)
def test_as_many_positions_are_served_as_the_scaling_gives(
    scaling: dict[str, Any], served: int, tmp_path: Path
) -> None:
    files = open_target(str(save_target(tmp_path / "target", rope_parameters=scaling)))
    assert files.decoder()["max_position_embeddings"] == served
    assert files.num_positions == (128 if scaling is LONGROPE else 512)


def test_a_draft_declares_the_positions_of_a_scaled_target_and_no_scaling_of_its_own(tmp_path: Path) -> None:
    target, data = save_target(tmp_path / "target", rope_parameters=YARN), save_conversations(tmp_path / "c.jsonl", 8)
    cache, run, draft = (tmp_path / name for name in ("cache", "run", "draft"))
    flags = ["--device", "cpu", "--quiet", "--out"]
    assert dflash("extract", data, "--target", target, "--block-size", 4, *flags, cache).exit_code == 0
    trained = dflash("train", cache, "--steps", 1, "--draft-layers", 1, "--num-anchors", 4, *flags, run)
    assert trained.exit_code == 0, trained.output
    assert dflash("export", run, "--out", draft).exit_code == 0
    config = json.loads((draft / "config.json").read_text())
    assert config["max_position_embeddings"] == 2048 and config["rope_scaling"] is None
