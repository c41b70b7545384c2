"""Every fault of a draft folder is named, and none that is named can leave the exporter."""

import json
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from running import without_torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import tiny_draft_config
from typer.testing import CliRunner

from dflash_offline.pipeline.app import app
from dflash_offline.schemas.draft.config import DraftConfig
from dflash_offline.schemas.draft.config_rules import config_faults
from dflash_offline.schemas.draft.formats import FORMATS, config_json
from dflash_offline.schemas.draft.lint import lint_draft
from dflash_offline.schemas.draft.rules import RULES
from dflash_offline.schemas.errors import DflashError
from dflash_offline.schemas.files import sha256_file
from dflash_offline.schemas.settings.train import TrainConfig
from dflash_offline.schemas.variants.dflash2 import DFlash2
from dflash_offline.schemas.variants.dspark import DSpark
from dflash_offline.stages.export import export
from dflash_offline.stages.progress import Silent
from dflash_offline.stages.train import train

Config = dict[str, Any]


@pytest.fixture(scope="module")
def run(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "run"
    train(TrainConfig(caches=(cache,), out=out, steps=2, draft_layers=2, num_anchors=4, device="cpu"), Silent())
    return out


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {kind: tmp_path_factory.mktemp("draft") / kind for kind in FORMATS}
    for kind, folder in folders.items():
        export(run, folder, kind=kind)
    return folders


@pytest.fixture
def draft(exported: dict[str, Path], tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(exported["zlab"], tmp_path / "draft"))
    (folder / "checksums.json").unlink()  # the rules are those of any draft, another's too
    return folder


def change(folder: Path, how: Callable[[Config], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    how(config)
    (folder / "config.json").write_text(json.dumps(config))


def put(name: str, value: object, inside: str | None = None) -> Callable[[Config], object]:
    return lambda config: (config if inside is None else config[inside]).update({name: value})


def both(name: str, value: object) -> Callable[[Config], object]:
    return lambda config: [place.update({name: value}) for place in (config, config["dflash_config"])]


def rules_of(folder: Path) -> set[str]:
    return {fault.rule for fault in lint_draft(folder)}


def resave(folder: Path, how: Callable[[dict[str, torch.Tensor]], object], **metadata: str) -> None:
    path = folder / "model.safetensors"
    with safe_open(path, "pt") as file:
        metadata = {**file.metadata(), **metadata}
    weights = load_file(path)
    how(weights)
    save_file(weights, path, metadata=metadata)


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_that_is_exported_is_sound(exported: dict[str, Path], kind: str) -> None:
    assert lint_draft(exported[kind]) == []


CONFIG_FAULTS: list[tuple[str, Callable[[Config], object], str]] = [
    ("layer ids as recorded", both("target_layer_ids", [2, 3, 5]), "[1, 2, 4]"),
    ("layer ids as recorded", both("target_layer_ids", [1, 2, 3]), "[1, 2, 4]"),
    ("last layer", both("target_layer_ids", [2, 3, 5]), "usable id of 6 target layers is 4"),
    ("layer ids", both("target_layer_ids", [2, 1, 4]), "ascending"),
    ("layer ids", put("target_layer_ids", [1, 2, 3]), "dflash_config says"),
    ("layer ids", both("target_layer_ids", "1,2"), "a list"),
    ("rotary base", put("rope_theta", 1e6), "rope_parameters.rope_theta"),
    ("rotary base", put("rope_theta", 500.0, "rope_parameters"), "500"),
    ("rotary base", lambda c: [c.pop(name) for name in ("rope_theta", "rope_parameters")], "absent"),
    ("rotary base", lambda c: (put("rope_theta", float("inf"))(c), c.pop("rope_parameters")), "Infinity"),
    ("one place", lambda config: config.pop("rope_theta"), "absent"),
    ("one place", lambda config: config.pop("rope_parameters"), "absent"),
    ("one place", put("rope_parameters", {"rope_theta": 1e4, "rope_type": "yarn", "factor": 4.0}), "yarn"),
    ("rotary keys", put("partial_rotary_factor", 0.25), "no such key"),
    ("rotary keys", put("partial_rotary_factor", 0.5, "rope_parameters"), "no such key"),
    ("rotary keys", put("mrope_section", [1, 2, 3], "rope_parameters"), "no such key"),
    ("rotary scaling", put("rope_scaling", {"rope_type": "yarn", "factor": 4.0}), "yarn"),
    ("rotary scaling", put("rope_scaling", 2.0), "an object or nothing"),
    (
        "rotary scaling",
        lambda c: (
            put("rope_scaling", {"type": "yarn", "factor": 4.0})(c),
            c["rope_parameters"].update(rope_type="yarn", factor=2.0),
        ),
        '"factor": 2.0',
    ),
    ("block size", put("block_size", 16), "dflash_config says 8"),
    ("block size", put("block_size", 4, "dflash_config"), "dflash_config says 4"),
    ("block size", both("block_size", 16), "trained with 8"),
    ("one place", lambda config: config["dflash_config"].pop("block_size"), "absent"),
    ("one place", lambda config: config.pop("target_layer_ids"), "absent"),
    ("nested layer ids", lambda config: config["dflash_config"].pop("target_layer_ids"), "absent"),
    ("mask token", both("mask_token_id", 304), "0 to 303"),
    ("mask token", both("mask_token_id", -1), "0 to 303"),
    ("mask token", both("mask_token_id", 7), "trained with 3"),
    ("nested mask token", lambda config: config["dflash_config"].pop("mask_token_id"), "absent"),
    ("one place", lambda config: config.pop("num_target_layers"), "absent"),
    ("target layers", lambda c: [place.pop("num_target_layers") for place in (c, c["dflash_config"])], "absent"),
    ("target layers", both("num_target_layers", 0), "at least 1"),
    ("target layers", both("num_target_layers", "6"), "at least 1"),
    ("dtype", put("dtype", "int8"), "expected bfloat16"),
    ("quantization", put("quantization_config", {"bits": 4}), "expected none"),
    ("missing", put("num_hidden_layers", 10**7), "only 25 tensors"),
    ("architecture", put("architectures", ["Qwen3ForCausalLM"]), "DFlashDraftModel"),
    ("model type", put("model_type", "llama"), "qwen3"),
    ("activation", put("hidden_act", "gelu"), "silu"),
    ("shape", lambda config: config.pop("head_dim"), "absent"),
    ("shape", put("num_key_value_heads", 3), "multiple"),
    ("shape", put("rms_norm_eps", None), "above 0"),
    ("layer types", put("layer_types", ["full_attention"]), "expected 2 entries"),
    ("window", put("layer_types", ["sliding_attention", "full_attention"]), "expected a number"),
    ("hidden window", put("use_swa", True, "dflash_config"), "layer_types"),
    ("no layer types", lambda config: config.pop("layer_types"), "absent"),
    ("causality", put("is_causal", True), "dflash_config.causal false"),
    ("causality in SGLang", lambda c: (put("is_causal", True)(c), put("causal", True, "dflash_config")(c)), "is true"),
    ("causality", put("is_causal", "no"), "expected true, false or nothing"),
    ("logits", put("final_logit_softcapping", 30.0), "30.0"),
    ("logits", put("final_logit_softcapping", 1.0), "expected nothing"),
    ("logits", put("output_multiplier", 0.5, "dflash_config"), "expected 1"),
    ("not computed", put("attention_bias", True), "expected false"),
]


@pytest.mark.parametrize(("rule", "how", "said"), CONFIG_FAULTS)
def test_a_fault_of_the_config_is_named(draft: Path, rule: str, how: Callable[[Config], object], said: str) -> None:
    change(draft, how)
    named = [fault for fault in lint_draft(draft) if fault.rule == rule]
    assert any(said in fault.what for fault in named), lint_draft(draft)
    assert all(
        bool(fault.breaks) == (rule not in ("one place", "not computed")) and fault.why == RULES[rule].why
        for fault in named
    )


@pytest.mark.parametrize(("rule", "how", "said"), CONFIG_FAULTS)
def test_the_reader_refuses_by_the_same_rules_what_leaves_open_what_a_draft_computes(
    draft: Path, rule: str, how: Callable[[Config], object], said: str
) -> None:
    change(draft, how)
    refusal = ""
    try:
        DraftConfig.read(draft)
    except DflashError as error:
        refusal = str(error)
    for fault in config_faults(json.loads((draft / "config.json").read_text())):
        line = f"{fault.place} {fault.what}: {fault.why}."
        assert refusal.count(line) == (not RULES[fault.rule].clear), (fault, refusal)


WEIGHT_FAULTS: list[tuple[str, Callable[[dict[str, torch.Tensor]], object], str]] = [
    ("missing", lambda w: w.pop("layers.1.self_attn.k_norm.weight"), "layers.1.self_attn.k_norm.weight"),
    ("unexpected", lambda w: w.update({"embed_tokens.weight": torch.zeros(304, 32)}), "embed_tokens.weight"),
    ("tensor shape", lambda w: w.update({"fc.weight": torch.zeros(32, 64)}), "fc.weight"),
    ("finite", lambda w: w["norm.weight"].fill_(float("nan")), "norm.weight"),
    ("finite", lambda w: w["fc.weight"][3, 5:7].fill_(float("-inf")), "fc.weight"),
    ("dtype", lambda w: w.update({"fc.weight": w["fc.weight"].to(torch.int8)}), "fc.weight"),
    ("prefix", lambda w: [w.update({f"model.{name}": w.pop(name)}) for name in list(w)], "model.fc.weight"),
]


@pytest.mark.parametrize(("rule", "how", "place"), WEIGHT_FAULTS)
def test_a_fault_of_the_weights_is_named(
    draft: Path, rule: str, how: Callable[[dict[str, torch.Tensor]], object], place: str
) -> None:
    resave(draft, how)
    assert (rule, place) in {(fault.rule, fault.place) for fault in lint_draft(draft)}
    if rule == "prefix":
        assert rules_of(draft) == {"prefix"} and lint_draft(draft)[0].breaks == ("vLLM",)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_values_that_are_not_finite_are_counted_as_torch_counts_them(draft: Path, dtype: torch.dtype) -> None:
    values = torch.tensor([1.0, -0.0, 6e4, -6e4, 1e-7, float("inf"), float("-inf"), float("nan")]).to(dtype)
    mixed = values[torch.from_numpy(np.random.default_rng(0).integers(0, 8, (32, 96)))]
    resave(draft, lambda weights: weights.update({"fc.weight": mixed}))
    (fault,) = (fault for fault in lint_draft(draft) if fault.rule == "finite")
    assert fault.what == f"holds {int((~torch.isfinite(mixed)).sum())} values that are not finite"


def test_ids_shifted_by_one_are_suspected_where_nothing_was_recorded(draft: Path) -> None:
    # Another trainer's draft: the usual ids of 10 layers are 1, 4, 7.
    resave(draft, lambda weights: None)
    weights = load_file(draft / "model.safetensors")
    save_file(weights, draft / "model.safetensors", metadata={"format": "pt"})
    change(draft, both("num_target_layers", 10))
    change(draft, both("target_layer_ids", [1, 4, 7]))
    assert lint_draft(draft) == []
    change(draft, both("target_layer_ids", [2, 5, 8]))
    assert rules_of(draft) == {"layer ids shifted"}


def test_files_that_are_missing_or_damaged_are_named(draft: Path) -> None:
    path = draft / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-10])
    assert rules_of(draft) == {"weights"}
    path.unlink()
    assert rules_of(draft) == {"weights"}
    for text in ("{", "[]"):
        (draft / "config.json").write_text(text)
        assert rules_of(draft) == {"config"}
    (draft / "config.json").unlink()
    assert rules_of(draft) == {"config"}


@pytest.mark.parametrize("value", [None, "x", [], {}, -1, 1.5, True, ["x"], [None], [[1]]])
def test_no_value_of_any_field_ends_in_a_traceback(exported: dict[str, Path], tmp_path: Path, value: object) -> None:
    for kind, folder in exported.items():
        config = json.loads((folder / "config.json").read_text())
        copy = Path(shutil.copytree(folder, tmp_path / kind))
        nested = [key for key, inner in config.items() if isinstance(inner, dict)]
        for inside in [None, *nested]:
            for name in config if inside is None else config[inside]:
                broken = json.loads(json.dumps(config))
                (broken if inside is None else broken[inside])[name] = value
                (copy / "config.json").write_text(json.dumps(broken))
                lint_draft(copy)
                with suppress(DflashError):
                    DraftConfig.read(copy)


OTHER_FORMATS: list[tuple[str, str, Callable[[Config], object]]] = [
    ("speculators", "layer ids as recorded", put("aux_hidden_state_layer_ids", [1, 2, 4])),
    ("speculators", "speculative tokens", put("block_size", 9)),
    ("speculators", "window causality", put("sliding_window_non_causal", False)),
    ("speculators", "anchor", put("sample_from_anchor", True)),
    ("speculators", "vocabulary", put("draft_vocab_size", 100)),
    ("speculators", "speculators config", put("verifier", {}, "speculators_config")),
    ("speculators", "speculators config", lambda c: c["speculators_config"]["verifier"].update(architectures=[])),
    ("speculators", "rotary base", put("rope_theta", 7.0, "transformer_layer_config")),
    ("transformers", "layer ids as recorded", put("target_layer_ids", [2, 3, 5])),
    ("transformers", "block size", put("block_size", 16)),
    ("transformers", "mask token", put("mask_token_id", 304)),
    ("transformers", "default layers", lambda config: config.pop("layer_types")),
]


@pytest.mark.parametrize(("kind", "rule", "how"), OTHER_FORMATS)
def test_a_fault_of_another_format_is_named(
    exported: dict[str, Path], tmp_path: Path, kind: str, rule: str, how: Callable[[Config], object]
) -> None:
    copy = Path(shutil.copytree(exported[kind], tmp_path / kind))
    change(copy, how)
    assert rule in rules_of(copy)


def test_weights_that_no_client_would_find_are_named(draft: Path) -> None:
    weights, parts = draft / "model.safetensors", ("model-1.safetensors", "model-2.safetensors")
    weights.rename(draft / parts[0])
    assert [(fault.rule, fault.place) for fault in lint_draft(draft)] == [("weights", "model.safetensors")]
    index = draft / "model.safetensors.index.json"
    for text in ("{", "[]", '{"weight_map": [1]}', '{"weight_map": {"a": 1}}'):
        index.write_text(text)
        assert rules_of(draft) == {"weights"}
    index.write_text(json.dumps({"weight_map": dict(zip(("fc.weight", "norm.weight"), parts, strict=True))}))
    assert [(fault.rule, fault.place) for fault in lint_draft(draft)] == [("weights", parts[1])]
    index.write_text(json.dumps({"weight_map": {"fc.weight": parts[0]}}))
    assert lint_draft(draft) == []


def test_a_config_as_z_lab_publishes_it_breaks_no_client_and_is_sound(draft: Path) -> None:
    def as_published(config: Config) -> None:
        for name in ("target_layer_ids", "mask_token_id", "rope_parameters"):
            config.pop(name)
        config["dflash_config"] = {"target_layer_ids": [1, 2, 4], "mask_token_id": 3}

    change(draft, as_published)
    assert all(fault.breaks == () for fault in lint_draft(draft))
    result = CliRunner().invoke(app, ["verify", str(draft)])
    assert result.exit_code == 0 and "breaks no client of today" in result.stdout and "is sound" in result.stdout
    assert CliRunner().invoke(app, ["verify", str(draft), "--json"]).exit_code == 0


def test_a_draft_of_another_target_is_named(draft: Path) -> None:
    target = {"hidden_size": 32, "vocab_size": 304, "num_hidden_layers": 6}
    assert lint_draft(draft, target) == []
    assert lint_draft(draft, {"text_config": target, "model_type": "with_pictures"}) == []
    other = {"hidden_size": 64, "vocab_size": 304, "num_hidden_layers": 8}
    places = {fault.place for fault in lint_draft(draft, other)}
    assert places == {"hidden_size", "num_target_layers"}


MUTATIONS = [fault for fault in CONFIG_FAULTS if fault[0] != "causality in SGLang"]


@pytest.mark.parametrize(("rule", "how", "said"), MUTATIONS)
def test_the_exporter_cannot_produce_a_fault_of_the_config(
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rule: str,
    how: Callable[[Config], object],
    said: str,
) -> None:
    def faulty(*asked: Any) -> Config:
        document = config_json(*asked)
        how(document)
        return document

    monkeypatch.setattr("dflash_offline.stages.export.config_json", faulty)
    with pytest.raises(DflashError, match="would not be served as it was trained") as caught:
        export(run, tmp_path / "draft")
    assert said in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("rule", "how", "place"), WEIGHT_FAULTS)
def test_the_exporter_cannot_produce_a_fault_of_the_weights(
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rule: str,
    how: Callable[[dict[str, torch.Tensor]], object],
    place: str,
) -> None:
    def faulty(path: Path, weights: dict[str, torch.Tensor], metadata: dict[str, str]) -> str:
        how(weights)
        save_file(weights, path, metadata=metadata)
        return sha256_file(path)

    monkeypatch.setattr("dflash_offline.stages.export.save_weights", faulty)
    with pytest.raises(DflashError, match="would not be served as it was trained") as caught:
        export(run, tmp_path / "draft")
    assert place in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_the_command_tells_a_draft_from_a_cache_and_exits_1_with_every_fault(
    draft: Path, cache: Path, tmp_path: Path
) -> None:
    def verify(*arguments: object) -> Any:
        return CliRunner().invoke(app, ["verify", *map(str, arguments)])

    sound = verify(draft)
    assert (sound.exit_code, sound.stdout) == (0, f"{draft} is sound.\nNext: dflash eval --help\n")
    change(draft, both("mask_token_id", 400))
    change(draft, put("partial_rotary_factor", 0.25))
    resave(draft, lambda weights: weights.pop("norm.weight"))
    faulty = verify(draft)
    assert faulty.exit_code == 1
    for place in ("mask_token_id", "partial_rotary_factor", "norm.weight"):
        assert f"{place} is" in faulty.stdout
    document = json.loads(verify(draft, "--json").stdout)
    assert {fault["rule"] for fault in document["faults"]} == {"mask token", "rotary keys", "missing"}
    assert verify(draft, "--json").exit_code == 1
    assert "is sound" in verify(cache, "--quiet").stdout
    nothing = verify(tmp_path)
    assert nothing.exit_code == 1 and "is not a feature cache" in nothing.output
    assert "--repair mends caches" in verify(draft, "--repair").output
    assert "`dflash verify` and `dflash eval`" in CliRunner().invoke(app, ["inspect", str(draft)]).output


def test_a_draft_is_verified_without_torch(draft: Path) -> None:
    assert without_torch(["verify", str(draft)])[0] == f"{draft} is sound.\nNext: dflash eval --help\n"


def test_a_record_of_the_training_that_cannot_be_read_is_named(draft: Path) -> None:
    for record in ("{", "[]", "{}", "3"):
        resave(draft, lambda weights: None, dflash=record)
        assert rules_of(draft) == {"weights"}


DFLASH2 = DFlash2(conv_kernel_size=2, conv_group_size=8, selector_rank=6, selector_top_k=5)


def dflash2_config(**changes: object) -> Config:
    """Return a config.json of the DFlash 2 draft as z-lab publishes it, changed."""
    slides: dict[str, Any] = {"sliding_window": 2048, "sliding_layers": (0, 1)}
    return {**tiny_draft_config(variant=DFLASH2, **slides).to_json(), **changes}


def nested(name: str, value: object) -> Config:
    return {"dflash_config": {**dflash2_config()["dflash_config"], name: value}}


def test_a_dflash2_config_as_published_is_read_and_breaks_only_what_cannot_serve_its_windows() -> None:
    config = dflash2_config()
    assert config["architectures"] == ["DFlash2DraftModel"] and config["model_type"] == "qwen3"
    assert "block_size" not in config and config["is_causal"] is False and config["use_sliding_window"] is True
    assert {"conv_kernel_size": 2, "conv_group_size": 8}.items() <= config["dflash_config"].items()
    read = DraftConfig.from_json(config, "config.json")
    assert read.variant == DFLASH2 and read.sliding_window == 2048 and read.causal_layers == "none"
    assert {fault.rule for fault in config_faults(config)} == {"causality in SGLang"}
    published = {k: v for k, v in config.items() if k not in ("mask_token_id", "target_layer_ids", "rope_theta")}
    assert all(fault.breaks in ((), ("SGLang",)) for fault in config_faults(published))
    assert DraftConfig.from_json(published, "config.json") == read


@pytest.mark.parametrize(
    ("changes", "rule", "said"),
    [
        (nested("conv_group_size", 7), "variant's shape", "divisor of hidden_size 32"),
        (nested("conv_kernel_size", 0), "variant's shape", "at least 1"),
        (nested("conv_kernel_size", 5), "kernel and block", "at most the block_size 4"),
        (nested("selector_rank", "6"), "variant's shape", "at least 1"),
        (nested("selector_rank", None), "variant's shape", "absent"),
        (nested("selector_top_k", 41), "variant's shape", "vocab_size 40"),
        ({"architectures": ["DominoDraftModel"]}, "architecture", '["DFlashDraftModel"] or ["DFlash2DraftModel"]'),
        ({"architectures": "DFlash2DraftModel"}, "architecture", "expected"),
        ({"block_size": 5}, "block size", "expected the same"),
    ],
)
def test_a_fault_of_a_variants_config_is_named(changes: Config, rule: str, said: str) -> None:
    config = dflash2_config(**changes)
    found = [fault for fault in config_faults(config) if fault.rule == rule]
    assert found and any(said in fault.what for fault in found)
    if not RULES[rule].clear:
        with pytest.raises(DflashError, match=re.escape(said)):
            DraftConfig.from_json(config, "config.json")


def test_fields_of_a_variant_at_the_top_alone_break_vllm_and_are_read() -> None:
    config = dflash2_config()
    for name in vars(DFLASH2):
        config[name] = config["dflash_config"].pop(name)
    found = [fault for fault in config_faults(config) if fault.rule == "nested variant's shape"]
    assert len(found) == 4 and all(fault.breaks == ("vLLM",) for fault in found)
    assert DraftConfig.from_json(config, "config.json").variant == DFLASH2


@pytest.mark.parametrize(
    ("quantization", "fault"),
    [
        (None, False),
        ({"quant_method": "gptq", "lm_head": True}, True),
        ({"quant_method": "gptq"}, False),
        ({"quant_method": "compressed-tensors", "ignore": ["lm_head"]}, False),
        ({"quant_method": "compressed-tensors", "ignore": []}, True),
    ],
)
def test_a_target_whose_head_is_quantized_is_named_for_drafts_that_need_a_plain_one(
    quantization: object, fault: bool
) -> None:
    target = {"hidden_size": 32, "vocab_size": 40, "num_hidden_layers": 6, "quantization_config": quantization}
    assert ("head in vLLM" in {found.rule for found in config_faults(dflash2_config(), target)}) == fault
    assert "head in vLLM" not in {found.rule for found in config_faults(tiny_draft_config().to_json(), target)}


def test_the_speculators_format_has_dflash2_under_its_own_name() -> None:
    config = tiny_draft_config(variant=DFLASH2, sliding_window=8, sliding_layers=(0, 1))
    document = config_json(config, "speculators", "target", ["Qwen3ForCausalLM"])
    assert document["architectures"] == ["DFlash2DraftModel"] and document["speculators_model_type"] == "dflash2"
    assert document["selector_rank"] == 6 and document["sliding_window_non_causal"] is True
    assert document["block_size"] == 4 and config_faults(document) == []
    assert {fault.rule for fault in config_faults({**document, "speculators_model_type": "dflash9"})} == {
        "speculators config"
    }
    assert {fault.rule for fault in config_faults({**document, "selector_rank": 0})} == {"variant's shape"}


def dspark_config(**changes: object) -> Config:
    """Return a config.json as DeepSpec's published drafts have it: all at the top, nothing nested."""
    config = tiny_draft_config(variant=DSpark(markov_rank=6)).to_json()
    del config["is_causal"]
    return {**config, "num_anchors": 512, **changes}


def test_a_dspark_config_as_published_is_read_and_breaks_nothing() -> None:
    config = dspark_config()
    assert config["architectures"] == ["Qwen3DSparkModel"] and "dflash_config" not in config
    assert (config["block_size"], config["markov_rank"], config["markov_head_type"]) == (4, 6, "vanilla")
    assert config["enable_confidence_head"] is config["confidence_head_with_markov"] is True
    assert config_faults(config) == []
    read = DraftConfig.from_json(config, "config.json")
    assert read.variant == DSpark(markov_rank=6) and read.num_draft_tokens == read.block_size == 4
    assert read.to_json() == {**tiny_draft_config(variant=DSpark(markov_rank=6)).to_json()}
    assert config_faults(dspark_config(block_size=1)) == [], "one slot predicts too"


@pytest.mark.parametrize(
    ("changes", "rule", "said"),
    [
        ({"markov_rank": 0}, "variant's shape", "at least 1"),
        ({"markov_rank": None}, "variant's shape", "at least 1"),
        ({"markov_head_type": "gated"}, "variant's heads", 'expected "vanilla"'),
        ({"enable_confidence_head": False}, "variant's heads", "expected true"),
        ({"confidence_head_with_markov": None}, "variant's heads", "expected true"),
        ({"block_size": 0}, "block size", "at least 1"),
        ({"dflash_config": {"block_size": 5}}, "block size", "expected the same"),
        ({"target_layer_ids": None}, "layer ids", "absent"),
    ],
)
def test_a_fault_of_a_dspark_config_is_named(changes: Config, rule: str, said: str) -> None:
    found = [fault for fault in config_faults(dspark_config(**changes)) if fault.rule == rule]
    assert found and any(said in fault.what for fault in found)
    with pytest.raises(DflashError, match=re.escape(said)):
        DraftConfig.from_json(dspark_config(**changes), "config.json")


def test_the_speculators_format_has_dspark_as_vllm_reads_it() -> None:
    """Every slot is sampled from, so as many tokens are drafted as the block is long; the ids are one more."""
    config = tiny_draft_config(variant=DSpark(markov_rank=6))
    document = config_json(config, "speculators", "target", ["Qwen3ForCausalLM"])
    assert (document["speculators_model_type"], document["sample_from_anchor"]) == ("dspark", True)
    assert document["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == 4
    assert (document["markov_rank"], document["aux_hidden_state_layer_ids"]) == (6, [2, 4])
    assert config_faults(document) == []
    wrong = {**document, "sample_from_anchor": False}
    assert [fault.rule for fault in config_faults(wrong)] == ["anchor"]
