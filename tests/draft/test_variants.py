"""The seam of the variants: one file for the config, one for torch, and nowhere else a word of any."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_draft, tiny_draft_config, tiny_target_ends
from torch import nn

from dflash_offline.schemas.draft.config import DraftConfig
from dflash_offline.schemas.errors import DflashError
from dflash_offline.schemas.variants.table import BASE, NAMES, VARIANTS, own_fields
from dflash_offline.stages.draft.model import DraftModel
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


def test_a_base_drafts_record_and_config_say_nothing_of_variants() -> None:
    config = tiny_draft_config()
    sizes = "hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim intermediate_size"
    target = "vocab_size target_layer_ids num_target_layers block_size mask_token_id max_position_embeddings"
    others = "rms_norm_eps rope_theta sliding_window sliding_layers causal_layers"
    assert config.to_record().keys() == {*f"{sizes} {target} {others}".split()}
    assert config.to_json() == config.shared_json() and config.to_json()["architectures"] == [BASE.architecture]
    assert DraftConfig.from_record(config.to_record(), Path("run.json")) == config


def test_every_variant_begins_with_the_weights_that_a_base_draft_of_its_seed_has() -> None:
    torch.manual_seed(4)
    base = DraftModel(tiny_draft_config()).state_dict()
    for kind in VARIANTS.values():
        torch.manual_seed(4)
        config = tiny_draft_config(hidden_size=32, variant=kind())
        weights = DraftModel(config).state_dict()
        assert weights.keys() - base.keys() == kind().shapes(vars(config)).keys()
        assert all(torch.equal(weights[name], weight) for name, weight in base.items())
        assert DraftConfig.from_record(config.to_record(), Path("run.json")) == config
