"""The seam of the variants: one file for the config, one for torch, and nowhere else a word of any."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny import tiny_draft, tiny_target_ends
from torch import nn

from dflash_offline.schemas.errors import DflashError
from dflash_offline.schemas.variants.table import BASE, NAMES, VARIANTS, own_fields
from dflash_offline.stages.trainer import DFlashTrainerModule

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = ROOT / "schemas" / "settings" / "train.py"


def test_a_variant_is_spelt_in_its_own_files_alone() -> None:
    others = [kind for kind in VARIANTS.values() if kind is not BASE]
    words = {word for kind in others for word in (kind.name, kind.architecture, kind.__name__, *own_fields(kind))}
    words |= {word for kind in others for word in (*kind.loss_settings, *kind.losses, *kind.paths)}
    words |= {BASE.architecture}
    spelt = re.compile("|".join(rf"\b{word}\b" for word in sorted(words)))
    for package in ("schemas", "stages", "pipeline"):
        for path in (ROOT / package).rglob("*.py"):
            if path != SETTINGS and path.parent.name != "variants":
                assert not spelt.search(path.read_text()), path
    code = SETTINGS.read_text()
    assert not re.search(r"if .*(variant|selector|conv_)", code)


def test_every_architecture_has_both_files_and_a_name_of_its_own() -> None:
    names = {path.stem for path in (ROOT / "schemas/variants").glob("*.py")} - {"__init__", "table", "variant"}
    assert names == {path.stem for path in (ROOT / "stages/draft/variants").glob("*.py")} - {
        *("__init__", "table", "variant")
    }
    assert names == NAMES.keys() and len(NAMES) == len(VARIANTS)


def test_another_projects_draft_of_a_variant_is_not_trained_as_a_base_draft() -> None:
    head, embed = tiny_target_ends(tiny_draft().config)
    for name in VARIANTS.keys() - {BASE.architecture}:
        draft = type(name, (nn.Linear,), {})(2, 2)
        draft.config = SimpleNamespace(layer_types=None, is_causal=False)
        with pytest.raises(DflashError, match=rf"another project's {name}.*load_draft"):
            DFlashTrainerModule(draft, head, embed, 39, block_size=4, attention_backend="sdpa")
