"""The mask token: a reserved one that no sample contains, the same from extraction to the served config."""

import json
from pathlib import Path

import pytest
from running import dflash
from tiny_plan import plan, target_files
from tiny_target import WITH_TAGS, conversations, save_conversations, save_target

from dflash_offline.schemas.errors import DflashError
from dflash_offline.schemas.samples import SampleTable
from dflash_offline.stages.conversations.plan import Plan
from dflash_offline.stages.target.files import TargetFiles
from dflash_offline.stages.target.mask_token import choose_mask_token


@pytest.fixture
def files(tmp_path: Path) -> TargetFiles:
    return target_files(tmp_path / "target", WITH_TAGS)


@pytest.fixture
def made(tmp_path: Path) -> Plan:
    return plan(tmp_path, conversations(3))


def reserve(files: TargetFiles, *names: str) -> list[int]:
    files.tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", *names]})
    return files.tokenizer.convert_tokens_to_ids(list(names))


def test_a_mask_goes_before_a_reserved_token_and_that_before_any_other(files: TargetFiles, made: Plan) -> None:
    other, reserved = reserve(files, "<|image|>", "<|reserved_7|>")
    mask, pad = files.tokenizer.convert_tokens_to_ids(["<|mask|>", "<|endoftext|>"])
    for expected in (mask, reserved, other, pad):
        assert choose_mask_token(files, made.samples, made.first_uses, None) == expected
        made.first_uses[expected] = 0  # from now on a sample contains it


def test_no_token_that_ends_an_answer_is_chosen_even_if_no_sample_contains_it(files: TargetFiles, made: Plan) -> None:
    mask, pad = files.tokenizer.convert_tokens_to_ids(["<|mask|>", "<|endoftext|>"])
    made.first_uses[mask] = 0
    assert choose_mask_token(files, made.samples, made.first_uses, None) == pad
    (files.folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, pad]}))
    with pytest.raises(DflashError, match=r"has no reserved token .* Name an unused row .* with --mask-token-id"):
        choose_mask_token(files, made.samples, made.first_uses, None)


def test_a_reserved_token_without_a_row_in_the_table_is_not_chosen(files: TargetFiles, made: Plan) -> None:
    (beyond,) = reserve(files, "<|mask_2|>")
    made.first_uses[files.tokenizer.convert_tokens_to_ids("<|mask|>")] = 0
    files.config.vocab_size = beyond
    assert choose_mask_token(files, made.samples, made.first_uses, None) != beyond


def test_the_token_is_recorded_and_served_and_one_that_the_data_has_is_refused_before_any_work(tmp_path: Path) -> None:
    target, data = save_target(tmp_path / "target"), save_conversations(tmp_path / "chats.jsonl", 30)
    extract = ["extract", data, "--target", target, "--block-size", 8, "--quiet", "--out"]
    assert dflash(*extract, tmp_path / "cache", "--mask-token-id", 303).exit_code == 0
    manifest = json.loads((tmp_path / "cache/manifest.json").read_text())
    assert manifest["plan"]["mask_token_id"] == 303
    dflash("train", tmp_path / "cache", "--out", tmp_path / "run", "--steps", 1, "--draft-layers", 1, "--quiet")
    dflash("export", tmp_path / "run", "--out", tmp_path / "draft")
    config = json.loads((tmp_path / "draft/config.json").read_text())
    assert config["mask_token_id"] == config["dflash_config"]["mask_token_id"] == 303
    samples = SampleTable.read(tmp_path / "cache/samples.parquet")
    used = int(samples.input_ids(0)[0])
    refused = dflash(*extract, tmp_path / "other", "--mask-token-id", used)
    assert refused.exit_code == 1 and "occurs in the data, first in chats.jsonl:1" in refused.stderr
    assert not (tmp_path / "other").exists()
