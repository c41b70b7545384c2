"""What decides a cache's content is compared field by field, and nothing else is."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_extract import Settings
from tiny_target import WITH_TAGS, save_tokenizer
from transformers import AutoTokenizer

from dflash_offline.schemas.config import ExtractConfig
from dflash_offline.schemas.errors import MismatchError
from dflash_offline.schemas.files import read_sealed, sealed_bytes
from dflash_offline.schemas.manifest import MANIFEST, Manifest, differences
from dflash_offline.stages.corpus import Corpus
from dflash_offline.stages.extract import Extraction
from dflash_offline.stages.progress import Silent
from dflash_offline.stages.target import open_target


@pytest.fixture
def copied(target: Path, tmp_path: Path) -> Path:
    """The target in a folder of its own, to change something in."""
    return Path(shutil.copytree(target, tmp_path / "target"))


def made_otherwise(cache: Path, out: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """Return a copy of a cache whose manifest, sealed anew, says otherwise what it was made from."""
    shutil.copytree(cache, out)
    document = read_sealed(out / MANIFEST)
    del document["checksum"]
    change(document)
    (out / MANIFEST).write_bytes(sealed_bytes(document))
    for path in (out / "commits").iterdir():
        record = read_sealed(path) | {"manifest": read_sealed(out / MANIFEST)["checksum"]}
        del record["checksum"]
        path.write_bytes(sealed_bytes(record))
    return out


def set_field(name: str, value: object) -> Callable[[dict[str, Any]], None]:
    """Return what sets one field of a document, named with a slash between its parts."""

    def change(document: dict[str, Any]) -> None:
        *parents, last = name.split("/")
        for parent in parents:
            document = document.setdefault(parent, {})
        document[last] = value

    return change


def differing(cache: Path, config: Settings, **changes: object) -> list[str]:
    """Return the fields in which a cache differs from what a command with changed settings would make."""
    asked = Extraction(ExtractConfig(**config | changes, out=cache), Silent()).identity()
    return [name for name, _, _ in differences(Manifest.read(cache).identity, asked)]


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


ONE_TARGET = {
    "target/config_sha256": "0",
    "target/weights_sha256/model.safetensors": "0",
    "target/quantization": "int8",
    "target/tokenizer_sha256": "0",
    "target/chat_template_sha256": "0",
    "target/other_chat_templates_sha256/tool_use": "0",
    "target/end_ids": [0],
    "target/code_sha256/modeling.py": "0",
    "target/dtype": "bfloat16",
    "target/attn_implementation": "eager",
    "target/device_map": "auto",
    "capture": "input of decoder layer i",
}
"""What caches of one draft have in common, each field with another value."""
OF_EACH_CACHE = {
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
