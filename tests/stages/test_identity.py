"""What decides a cache's content is compared field by field, and nothing else is."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cache_files import made_otherwise, set_field
from running import Settings
from safetensors.torch import load_file, save_file
from tiny_target import WITH_TAGS, save_tokenizer
from transformers import AutoTokenizer

from dflash_offline.schemas.errors import MismatchError
from dflash_offline.schemas.identity import differences
from dflash_offline.schemas.manifest import Manifest
from dflash_offline.schemas.settings.extract import ExtractConfig
from dflash_offline.schemas.settings.option import options
from dflash_offline.stages.capture.inputs import open_inputs
from dflash_offline.stages.extract import extract
from dflash_offline.stages.progress import Silent
from dflash_offline.stages.store.cache import Cache
from dflash_offline.stages.target.files import open_target
from dflash_offline.stages.training.corpus import Corpus


@pytest.fixture
def copied(target: Path, tmp_path: Path) -> Path:
    """The target in a folder of its own, to change something in."""
    return Path(shutil.copytree(target, tmp_path / "target"))


def differing(cache: Path, config: Settings, **changes: object) -> list[str]:
    """Return the fields in which a cache differs from what a command with changed settings would make."""
    asked = open_inputs(ExtractConfig(**config | changes, out=cache), Silent()).identity
    return [name for name, _, _ in differences(Manifest.read(cache).identity, asked)]


CONTENT: dict[str, tuple[Settings, set[str]]] = {
    "layers": ({"layers": (1, 2, 3)}, {"layer_ids"}),
    "num_layers": ({"layers": None, "num_layers": 2}, {"layer_ids"}),
    "block_size": ({"block_size": 6}, {"block_size"}),
    "anchors": ({"anchors": "partial"}, {"anchors"}),
    "mask_token_id": ({"mask_token_id": 303}, {"mask_token_id"}),
    "max_length": ({"max_length": 100}, {"max_length"}),
    "chat_template_kwargs": ({"chat_template_kwargs": {"a": 1}}, {"chat_template_kwargs", "chat_template_kwargs.a"}),
    "mask": ({"mask": "last-turn"}, {"mask_rule"}),
    "no_reasoning": ({"no_reasoning": True}, {"mask_rule"}),
    "skip_bad_rows": ({"skip_bad_rows": True}, {"skip_bad_rows"}),
    "input_format": ({"input_format": "messages"}, {"input_format"}),
    "limit": ({"limit": 70}, {"limit"}),
    "drop_duplicates": ({"drop_duplicates": True}, {"drop_duplicates"}),
    "keep_special_tokens": ({"keep_special_tokens": True}, {"keep_special_tokens"}),
    "dtype": ({"dtype": "bfloat16"}, {"target.dtype"}),
    "attn_implementation": ({"attn_implementation": "eager"}, {"target.attn_implementation"}),
    "device_map": ({"device_map": "auto"}, {"target.device_map"}),
    "compile": ({"compile": True}, {"compiled"}),
    "batch_tokens": ({"batch_tokens": 4096}, {"layout.batch_tokens"}),
    "shard_mib": ({"shard_mib": 2}, {"layout.shard_mib"}),
    "chunk_tokens": ({"chunk_tokens": 64}, {"layout.chunk_tokens"}),
    "features": ({"features": "rounded"}, {"layout.features.kind", "layout.features.mantissa_bits"}),
    "step": ({"features": "scaled"}, {"layout.features.kind", "layout.features.step"}),
}
"""A change of each setting that decides what is in a cache, and the fields that must tell it."""
NOT_CONTENT: Settings = {
    "revision": "main",
    "trust_remote_code": True,
    "seed": 1,
    "mantissa_bits": 3,
    "on_bad_features": "skip",
    "max_skipped": 0.5,
    "workers": 2,
    "rank": 1,
    "world_size": 2,
    "plan_timeout_s": 1.0,
    "ignore_free_space": True,
    "final": True,
}
"""A change of each of the others; seed and mantissa bits decide nothing where there are no weights and no rounding."""


@pytest.mark.parametrize("setting", CONTENT)
def test_a_setting_that_decides_content_is_told_by_its_own_field(
    cache: Path, extract_config: Settings, setting: str
) -> None:
    changes, fields = CONTENT[setting]
    assert set(differing(cache, extract_config, **changes)) == fields


def of_group(group: str) -> set[str]:
    return {name for name, option in options(ExtractConfig).items() if option.group == group}


def test_other_settings_may_change_and_none_is_forgotten(cache: Path, extract_config: Settings) -> None:
    assert differing(cache, extract_config, **NOT_CONTENT) == []
    known = {*CONTENT, *NOT_CONTENT, "data", "target", "out", "device"}  # there is no second device here
    known |= of_group("Engine") | of_group("Ray")  # tried by test_engines.py, and by tests/cluster/test_pool.py
    assert known == options(ExtractConfig).keys()


def test_the_role_of_a_setting_is_what_the_identity_makes_of_it() -> None:
    free = {name for name, option in options(ExtractConfig).items() if option.role == "free"}
    elsewhere = {"revision", "seed", "mantissa_bits"}  # count by what they name, and where there are shares or rounding
    # With and without workers on Ray the bytes are the same: tests/cluster/test_pool.py.
    assert free == NOT_CONTENT.keys() - elsewhere | {"out", "gpu_memory_utilization"} | of_group("Ray")


def test_the_numbers_of_a_feature_layout_count_where_it_uses_them(extract_config: Settings, tmp_path: Path) -> None:
    def layout(**changes: object) -> dict[str, Any]:
        config = ExtractConfig(**extract_config | changes, out=tmp_path)
        return open_inputs(config, Silent()).identity["layout"]

    for kind, number in (("rounded", {"mantissa_bits": 3}), ("scaled", {"step": 0.25})):
        rows = differences(layout(features=kind), layout(features=kind, **number))
        assert [(name, now) for name, _, now in rows] == [(f"features.{name}", now) for name, now in number.items()]


def test_each_data_file_counts_by_content_and_by_its_share(
    cache: Path, extract_config: Settings, tmp_path: Path, data: Path
) -> None:
    moved = shutil.copy(data, tmp_path / "moved.jsonl")
    assert differing(cache, extract_config, data=(moved,)) == []
    assert set(differing(cache, extract_config, data=(Path(f"{data}:0.9"),))) == {"weights", "seed"}
    with moved.open("a") as file:
        file.write(" ")
    assert differing(cache, extract_config, data=(moved,)) == ["data.file_0_sha256"]


def edited(name: str, **fields: object) -> Callable[[Path], None]:
    """Return what sets fields of a JSON file of a folder."""

    def edit(folder: Path) -> None:
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | fields))

    return edit


def other_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


QUANTIZED = {"quant_method": "fp8", "weight_block_size": [128, 128]}
TARGET_CHANGES: dict[str, tuple[Callable[[Path], object], set[str]]] = {
    "weight": (other_weight, {"weights_sha256.model.safetensors"}),
    "config": (edited("config.json", rms_norm_eps=1e-5), {"config_sha256"}),
    "quantization": (
        edited("config.json", quantization_config=QUANTIZED),
        {"config_sha256", "quantization", *(f"quantization.{name}" for name in QUANTIZED)},
    ),
    "template": (
        lambda folder: (folder / "chat_template.jinja").write_text(WITH_TAGS + " "),
        {"chat_template_sha256"},
    ),
    "tokenizer": (edited("tokenizer.json", normalizer={"type": "Lowercase"}), {"tokenizer_sha256"}),
    "end tokens": (edited("generation_config.json", eos_token_id=[2, 5]), {"end_ids"}),
    "code": (lambda folder: (folder / "its.py").write_text("1"), {"code_sha256", "code_sha256.its.py"}),
    "nothing": (lambda folder: (folder / "README.md").write_text("1"), set()),
}
"""A change of each part of a target, and the fields that must tell it."""


@pytest.mark.parametrize("part", TARGET_CHANGES)
def test_a_part_of_the_target_is_told_by_its_own_field(
    cache: Path, extract_config: Settings, copied: Path, part: str
) -> None:
    change, fields = TARGET_CHANGES[part]
    change(copied)
    assert set(differing(cache, extract_config, target=str(copied))) == {f"target.{field}" for field in fields}


def test_a_number_of_a_quantization_is_told_by_its_own_field(copied: Path) -> None:
    identities = []
    for size in (128, 64):
        edited("config.json", quantization_config=QUANTIZED | {"weight_block_size": [size, size]})(copied)
        identities.append(open_target(str(copied)).identity())
    changed = {name for name, _, _ in differences(*identities)}
    assert changed == {"config_sha256", "quantization.weight_block_size"}


@pytest.mark.parametrize(("part", "setting"), [("template", "layers"), ("tokenizer", "dtype")])
def test_the_command_refuses_a_changed_target_and_setting_with_both_values_of_each(
    cache: Path, extract_config: Settings, copied: Path, part: str, setting: str
) -> None:
    (change, parts), (changes, fields) = TARGET_CHANGES[part], CONTENT[setting]
    change(copied)
    with pytest.raises(MismatchError, match=r"name a new --out") as error:
        extract(ExtractConfig(**extract_config | changes | {"target": str(copied)}, out=cache), Silent())
    told = re.findall(r"^  (\S+) +cache: \S.*  now: \S", str(error.value), re.MULTILINE)
    assert set(told) == fields | {f"target.{field}" for field in parts} and len(told) == 2


def test_the_template_of_rows_with_tools_is_part_of_the_target(
    cache: Path, extract_config: Settings, copied: Path
) -> None:
    def differing_with(templates: dict[str, str]) -> list[str]:
        save_tokenizer(copied)
        tokenizer = AutoTokenizer.from_pretrained(copied)
        tokenizer.chat_template = templates
        tokenizer.save_pretrained(copied)
        return differing(cache, extract_config, target=str(copied))

    assert differing_with({"default": WITH_TAGS}) == []  # one template is one, however it is saved
    only = differing_with({"default": WITH_TAGS, "tool_use": WITH_TAGS})
    assert only == ["target.other_chat_templates_sha256.tool_use"]
    hashes = open_target(str(copied)).identity()["other_chat_templates_sha256"]
    differing_with({"default": WITH_TAGS, "tool_use": WITH_TAGS + "."})
    assert open_target(str(copied)).identity()["other_chat_templates_sha256"] != hashes


def test_what_an_older_version_did_not_record_is_not_called_another_setting(
    cache: Path, extract_config: Settings, tmp_path: Path
) -> None:
    def refusal(made: Path) -> str:
        with pytest.raises(MismatchError) as error:
            extract(ExtractConfig(**extract_config | {"limit": 9}, out=made), Silent())
        return str(error.value)

    said = "What is (absent) was not set, was not there, or was not recorded by an older version."
    older = made_otherwise(cache, tmp_path / "older", lambda document: document["identity"]["target"].pop("end_ids"))
    assert re.search(r"target\.end_ids +cache: \(absent\)", refusal(older)) and said in refusal(older)
    same = made_otherwise(cache, tmp_path / "same", set_field("identity/limit", 8))
    assert "cache: 8  now: 9" in refusal(same) and said not in refusal(same)


def test_a_cache_that_was_planned_by_an_older_rule_goes_on_by_it(
    cache: Path, extract_config: Settings, tmp_path: Path
) -> None:
    older = made_otherwise(cache, tmp_path / "older", lambda document: document["identity"].pop("history"))
    asked = ExtractConfig(**extract_config, out=older)
    assert open_inputs(replace(asked, out=cache), Silent()).encoder.as_served
    assert not open_inputs(asked, Silent()).encoder.as_served
    shutil.rmtree(older / "commits")
    (older / "commits").mkdir()
    assert extract(asked, Silent()).shards_written == len(Cache(older).commits) > 0
    names = [path.relative_to(cache) for path in (cache / "features.zarr").rglob("*") if path.is_file()]
    assert all((older / name).read_bytes() == (cache / name).read_bytes() for name in names)
    other = made_otherwise(cache, tmp_path / "other", set_field("identity/history", "left out"))
    assert differing(other, extract_config) == ["history"]


ONE_TARGET = {
    "target/config_sha256": "0" * 64,
    "target/weights_sha256/model.safetensors": "0" * 64,
    "target/quantization": "int8",
    "target/tokenizer_sha256": "0",
    "target/chat_template_sha256": "0",
    "target/other_chat_templates_sha256/tool_use": "0",
    "target/end_ids": [0],
    "target/code_sha256/modeling.py": "0",
    "target/dtype": "bfloat16",
    "target/attn_implementation": "eager",
    "capture": "input of decoder layer i",
}
"""What caches of one draft have in common, each field with another value."""
OF_EACH_CACHE = {
    "target/device_map": "auto",
    "device": "cuda",
    "data/file_0_sha256": "0",
    "mask_rule": "all",
    "chat_template_kwargs/a": 1,
    "max_length": 100,
    "block_size": 6,
    "skip_bad_rows": True,
    "limit": 9,
    "layout/features/kind": "rounded",
    "layout/shard_mib": 2,
}
"""What they may differ in."""


@pytest.mark.parametrize("field", ONE_TARGET)
def test_several_caches_are_of_one_target_field_by_field(cache: Path, tmp_path: Path, field: str) -> None:
    other = made_otherwise(cache, tmp_path / "other", set_field(f"identity/{field}", ONE_TARGET[field]))
    with pytest.raises(MismatchError, match=r"does not go with") as error:
        Corpus.open((cache, other))
    named = re.findall(r"^  (\S+) +first: ", str(error.value), re.MULTILINE)
    empty = field.rpartition("/")[0].replace("/", ".")  # a group of fields that was empty is named as well
    assert set(named) - {empty} == {field.replace("/", ".")}


def test_several_caches_have_one_mask_token(cache: Path, tmp_path: Path) -> None:
    other = made_otherwise(cache, tmp_path / "other", set_field("plan/mask_token_id", 0))
    with pytest.raises(MismatchError, match=r"mask_token_id +first: 3  other: 0"):
        Corpus.open((cache, other))


def test_several_caches_may_be_of_other_data_and_layout(cache: Path, tmp_path: Path) -> None:
    def change(document: dict[str, Any]) -> None:
        for field, value in OF_EACH_CACHE.items():
            set_field(f"identity/{field}", value)(document)

    other = made_otherwise(cache, tmp_path / "other", change)
    assert len(Corpus.open((cache, other))) == 160
