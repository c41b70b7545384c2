"""What decides a cache's content is compared field by field, and nothing else is."""

import shutil
from pathlib import Path

import pytest
from test_extract import Settings
from tiny_target import WITH_TAGS, save_tokenizer
from transformers import AutoTokenizer

from dflash_offline.schemas.config import ExtractConfig
from dflash_offline.schemas.manifest import Manifest, differences
from dflash_offline.stages.extract import Extraction
from dflash_offline.stages.progress import Silent
from dflash_offline.stages.target import open_target


@pytest.fixture
def copied(target: Path, tmp_path: Path) -> Path:
    """The target in a folder of its own, to change something in."""
    return Path(shutil.copytree(target, tmp_path / "target"))


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
